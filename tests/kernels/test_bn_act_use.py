"""bn_act as it is used: a module, over processes, compiled, exported, and what it refuses."""

import pytest
import torch
from float64_bn_act import FLOAT32, assert_close, away_from_the_kink, inputs, run, torch_modules
from torch import nn

from fastgan_kernels import BatchNormAct2d, _launch, bn_act, bn_act_kernels


@pytest.mark.parametrize(("frozen", "left"), [("weight", "x"), ("x", "weight")])
def test_what_is_frozen_gets_no_gradient(frozen, left, device):
    x, (weight, bias, mean, var), grad = inputs((4, 6, 3, 3), torch.float32, device)
    leaves = {"x": x, "weight": weight}
    leaves[left].requires_grad_()
    y = bn_act(x, weight, bias, mean.clone(), var.clone(), training=True, impl="triton")
    y.backward(grad)
    theirs = run(x.detach(), (weight.detach(), bias, mean, var), grad, impl="ref")
    assert leaves[frozen].grad is None
    assert_close({"g": leaves[left].grad}, {"g": theirs["dx" if left == "x" else "dw"]}, FLOAT32)


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
def test_the_module_is_batchnorm2d_and_its_activation(impl, device):
    dtype, tolerance = (torch.float32, 1e-5) if impl == "triton" else (torch.float64, 1e-10)
    ours = BatchNormAct2d(12, act="leaky_relu", impl=impl).to(device, dtype)
    theirs = nn.BatchNorm2d(12).to(device, dtype)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 12, 3, 3, dtype=dtype, device=device)
    expected = torch.cat([nn.functional.leaky_relu(theirs(p), 0.2) for p in x.chunk(2)])
    torch.testing.assert_close(ours(x, 2), expected, rtol=tolerance, atol=tolerance)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    assert int(ours.num_batches_tracked) == 2
    theirs.load_state_dict(ours.state_dict())  # and back
    ours.eval(), theirs.eval()
    expected = nn.functional.leaky_relu(theirs(x), 0.2)
    torch.testing.assert_close(ours(x, 2), expected, rtol=tolerance, atol=tolerance)
    scale, shift = (t[:, None, None] for t in ours.folded())
    folded = nn.functional.leaky_relu(x * scale + shift, 0.2)
    torch.testing.assert_close(folded, expected, rtol=tolerance, atol=tolerance)


# What a process adds to the sums of the others, which it gets by itself here: a first walk notes
# the sums of each part, a second hands out their totals.
class Together:
    def __init__(self):
        self.noted, self.totals = [], []

    def __call__(self, sums):
        if self.totals:
            sums.copy_(self.totals.pop(0))
        else:
            self.noted.append(sums.clone())


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 4), (6, 2)], ids=str)
def test_two_processes_normalise_as_one(impl, groups, sizes, device):
    """A batch in two parts, each with a reduction over both, against the whole batch in one."""
    dtype, tolerance = (torch.float32, FLOAT32) if impl == "triton" else (torch.float64, 1e-10)
    wholes = [inputs((8, 10, 4, 3), dtype, device) for _ in range(groups)]
    parameters = wholes[0][1]
    x, grad = (torch.cat([w[i] for w in wholes]) for i in (0, 2))
    grad = away_from_the_kink(x, parameters, grad, groups)
    expected = torch_modules(x, parameters, grad, "leaky_relu", groups)

    def part(t, which):  # of each group the first images, or the rest
        return torch.cat([g.split(list(sizes))[which] for g in t.chunk(groups)])

    parts = [
        (part(x, i).contiguous(memory_format=torch.channels_last), part(grad, i)) for i in (0, 1)
    ]
    options = {"impl": impl, "act": "leaky_relu", "groups": groups}
    totals = []
    for _ in range(2):  # forward's reduction, then backward's
        together = [Together(), Together()]
        for one, (x_part, grad_part) in zip(together, parts, strict=True):
            one.totals = [t.clone() for t in totals]
            run(x_part, parameters, grad_part, reduce=one, **options)
        totals.append(together[0].noted[0] + together[1].noted[0])
    got = []
    for x_part, grad_part in parts:
        one = Together()
        one.totals = [t.clone() for t in totals]
        got.append(run(x_part, parameters, grad_part, reduce=one, **options))
        assert not one.totals  # once forward, once backward
    for i in (0, 1):
        theirs = {name: part(expected[name], i) for name in ("y", "dx")}
        theirs |= {name: expected[name] for name in ("mean", "var", "count")}
        assert_close(got[i], theirs, tolerance)
    for name in ("dw", "db"):  # each its own share, for the gradients' own reduction
        assert_close({name: got[0][name] + got[1][name]}, {name: expected[name]}, tolerance)


def test_a_reduction_may_return_its_result(device):
    x, parameters, grad = inputs((4, 6, 3, 3), torch.float32, device)
    twice = {"impl": "triton", "act": "relu"}
    in_place = run(x, parameters, grad, reduce=lambda t: t.mul_(2), **twice)
    returned = run(x, parameters, grad, reduce=lambda t: t * 2, **twice)
    assert all(torch.equal(in_place[name], returned[name]) for name in in_place)


def test_evaluation_reduces_nothing(device):
    x, parameters, grad = inputs((4, 6, 3, 3), torch.float32, device)
    one = Together()
    run(x, parameters, grad, impl="triton", training=False, reduce=one)
    run(x, parameters, grad, impl="torch", training=False, reduce=one)
    assert not one.noted


OPS = ["bn_act_stats", "bn_act_apply", "bn_act_grad_sums", "bn_act_grad_apply"]


@pytest.mark.parametrize("name", OPS)
def test_the_operators_are_registered_rightly(name, device):
    x, (weight, bias, mean, var), grad = inputs((4, 6, 3, 3), torch.float32, device)
    statistics = (torch.randn(2, 6, device=device), torch.rand(2, 6, device=device) + 0.5)
    given, options = (*statistics, weight, bias), (1e-5, "leaky_relu", 0.2)
    count = torch.zeros((), dtype=torch.int64, device=device)
    grad = grad.contiguous(memory_format=torch.channels_last)
    arguments = {
        "bn_act_stats": (x, mean, var, count, 2, 0.1, True),
        "bn_act_apply": (x, *given, *options),
        "bn_act_grad_sums": (x, grad, *given, *options),
        "bn_act_grad_apply": (x, grad, *given, torch.randn(2, 2, 6, device=device), 18, *options),
    }
    torch.library.opcheck(getattr(bn_act_kernels, name), arguments[name])


def compiled_and_plain(device, backend, impl="triton", reduce=None):
    """Two layers, whole and compiled without a break, two steps: outputs, gradients, buffers."""
    torch._dynamo.reset()
    results = []
    for compile in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            BatchNormAct2d(8, impl=impl),
            nn.Conv2d(8, 6, 3, bias=False),
            BatchNormAct2d(6, act="leaky_relu", impl=impl),
        ).to(device, memory_format=torch.channels_last)
        net[1].reduce = net[3].reduce = reduce
        call = torch.compile(net, fullgraph=True, backend=backend) if compile else net
        x = torch.randn(4, 3, 12, 12).to(device, memory_format=torch.channels_last)
        for _ in range(2):
            y = call(x)
            y.backward(torch.linspace(-1, 1, y.numel(), device=device).view_as(y))
        results.append([y, *(p.grad for p in net.parameters()), *net.buffers()])
    return results


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_graph_break_and_the_same_numbers_under_compile(backend, device):
    for plain, compiled in zip(*compiled_and_plain(device, backend), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


SUMMED = []  # the shapes that were, as the operator ran


@torch.library.custom_op("test_bn_act_use::all_sum", mutates_args=())
def all_sum(sums: torch.Tensor, processes: int) -> torch.Tensor:
    """A world of processes which all have the same batch."""
    SUMMED.append(tuple(sums.shape))
    return sums * processes


@all_sum.register_fake
def _(sums, processes):
    return torch.empty_like(sums)


BACKENDS = [
    ("torch", "aot_eager"),
    ("triton", "aot_eager"),
    pytest.param("torch", "inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("impl", "backend"), BACKENDS)
def test_a_reduction_that_is_an_operator_is_compiled_as_it_stands(impl, backend, device):
    """Forward and backward, without a graph break: the sums and numbers of the plain calls."""
    SUMMED.clear()
    plain, compiled = compiled_and_plain(device, backend, impl, lambda t: all_sum(t, 2))
    # two layers, [groups, 2 C + 1] forward and [groups, 2, C] backward, two steps
    assert SUMMED[:8] == [(1, 17), (1, 13), (1, 2, 6), (1, 2, 8)] * 2 == SUMMED[8:]
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_compilation_for_all_batch_sizes(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    norm = BatchNormAct2d(6, impl="triton").to(device)
    call = torch.compile(norm, fullgraph=True, dynamic=True, backend=count)
    for batch in range(2, 14):
        x = torch.randn(batch, 6, 3, 3, device=device, requires_grad=True)
        call(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
    assert len(graphs) <= 2


BAD = [
    ({"groups": 3}, "groups must divide the batch of 8 evenly, got 3"),
    ({"groups": 0}, "groups must divide"),
    ({"act": "gelu"}, "act must be one of relu, leaky_relu, none, got 'gelu'"),
    ({"impl": "cuda"}, "impl must be one of auto, triton, torch, ref, got 'cuda'"),
    ({"negative_slope": -0.1}, "negative_slope must be 0 or more, got -0.1"),
    ({"negative_slope": float("nan")}, "negative_slope must be 0 or more, got nan"),
    ({"momentum": 1.5}, "momentum must be a number from 0 to 1, got 1.5"),
    ({"eps": 0.0}, "eps must be above 0, got 0.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_options_are_named(change, message):
    x, parameters, _ = inputs((8, 4, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=message):
        bn_act(x, *parameters, training=True, **change)


def test_wrong_shapes_are_named():
    x, (weight, bias, mean, var), _ = inputs((8, 4, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        bn_act(x, weight[:3], bias, mean, var, training=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        bn_act(x[0], weight, bias, mean, var, training=True)
    with pytest.raises(ValueError, match="at least 2 values a channel in each group"):
        bn_act(x[:2, :, :1, :1], weight, bias, mean, var, training=True, groups=2)
    with pytest.raises(ValueError, match="momentum must be a number"):
        BatchNormAct2d(4, momentum=None)


def test_what_the_kernels_do_not_take_is_named(monkeypatch, device):
    x, (weight, bias, mean, var), _ = inputs((8, 4, 2, 2), torch.float32, device)
    call = {"training": True, "impl": "triton"}
    with pytest.raises(
        ValueError, match="x must be float32, bfloat16 or float16, got torch.float64"
    ):
        bn_act(x.double(), weight, bias, mean, var, **call)
    with pytest.raises(ValueError, match="running_mean must be float32 on .*, got torch.bfloat16"):
        bn_act(x, weight, bias, mean.bfloat16(), var, **call)
    with pytest.raises(ValueError, match="bias must be contiguous"):
        bn_act(x, weight, bias.repeat(2)[::2], mean, var, **call)
    with pytest.raises(ValueError, match="at least 2 values a channel"):
        bn_act(x[:1, :, :1, :1], weight, bias, mean, var, **call)
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU, got cpu"):
        bn_act(x.cpu(), weight, bias, mean, var, **call)
    monkeypatch.setattr(_launch, "triton", None)
    with pytest.raises(ValueError, match="needs the package triton"):
        bn_act(x, weight, bias, mean, var, **call)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_module_without_its_momentum_says_so(impl, device):
    """torch.optim.swa_utils.update_bn takes it away, for a cumulative average."""
    norm = BatchNormAct2d(4, impl=impl).to(device)
    norm.momentum = None
    with pytest.raises(ValueError, match="momentum must be a number from 0 to 1, got None"):
        norm(torch.randn(2, 4, 3, 3, device=device))
    for options in ({"act": "gelu"}, {"impl": "cuda"}, {"eps": 0.0}, {"negative_slope": -1.0}):
        with pytest.raises(ValueError, match=f"BatchNormAct2d: {next(iter(options))} must be"):
            BatchNormAct2d(4, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_network_is_exported_with_a_free_batch(impl, device):
    norm = BatchNormAct2d(4, impl=impl).to(device).eval()
    x = torch.randn(3, 4, 5, 5, device=device)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}, "groups": None}
    exported = torch.export.export(norm, (x, 1), dynamic_shapes=batch).module()
    more = torch.randn(7, 4, 5, 5, device=device)
    torch.testing.assert_close(exported(more, 1), norm(more))


def test_auto_is_pytorchs_own_on_a_cpu(monkeypatch):
    monkeypatch.setattr(bn_act_kernels, "launch", None)  # would raise if it were called
    x, parameters, grad = inputs((4, 6, 3, 3), torch.float32)
    ours = run(x, parameters, grad, impl="auto")
    assert torch.equal(ours["y"], run(x, parameters, grad, impl="torch")["y"])


def test_the_kernels_cannot_be_differentiated_twice(device):
    x, (weight, bias, mean, var), _ = inputs((4, 6, 3, 3), torch.float32, device)
    x.requires_grad_()
    for impl in ("torch", "triton"):
        y = bn_act(x, weight, bias, mean, var, training=True, impl=impl)
        if impl == "torch":
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            dx.square().sum().backward()
            assert x.grad.abs().sum() > 0
        else:  # at once: the penalty's own gradient need not come by here again
            with pytest.raises(RuntimeError, match="bn_act: .* cannot be differentiated twice"):
                torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_an_empty_batch_is_empty_in_evaluation(device):
    x, parameters, _ = inputs((4, 6, 3, 3), torch.float32, device)
    y = bn_act(x[:0], *parameters, training=False, impl="triton")
    assert y.shape == (0, 6, 3, 3)

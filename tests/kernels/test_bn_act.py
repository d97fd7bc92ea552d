"""bn_act: the definition against nn.BatchNorm2d in float64, every implementation against that."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgan_kernels import BatchNormAct2d, _launch, bn_act, bn_act_kernels

ACTS = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "none": nn.Identity()}
SHAPES = [(8, 16, 4, 4), (4, 3, 7, 9), (4, 1, 1, 1), (6, 100, 1, 1), (12, 5, 3, 2)]
STORED = [torch.float32, torch.bfloat16, torch.float16]

# Sums in float32 of n terms by lanes and then by halves lose about 2^-24 * log2(n) relative to the
# largest term, three times (mean, variance, backward sums); outputs and gradients of N(0, 1) data
# reach about 5.
FLOAT32 = 5 * 3 * 10 * 2**-24
# What is stored in 16 bits is rounded once, by half a unit in the last place at most; Triton's
# interpreter cuts bfloat16 off instead, by a whole one.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2**-11}
ROUNDING[torch.bfloat16] = 2**-7 if _launch.INTERPRETED else 2**-8


def inputs(shape, dtype, device="cpu", *, channels_last=True, offset=0.5, spread=2.0):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(shape) * spread + offset).to(device, dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    c = shape[1]
    parameters = [torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5]
    grad = torch.randn(shape).to(device, dtype)
    return x, [p.to(device, wide) for p in parameters], grad


def run(x, parameters, grad, *, impl, training=True, **options):
    """y, gradients of x, weight and bias, running statistics; everything on fresh copies."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias, mean, var = (p.clone() for p in parameters)
    weight.requires_grad_(), bias.requires_grad_()
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    y = bn_act(
        x, weight, bias, mean, var,
        training=training, num_batches_tracked=count, impl=impl, **options,
    )  # fmt: skip
    y.backward(grad.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "db": bias.grad}
    return result | {"mean": mean, "var": var, "count": count}


def torch_modules(x, parameters, grad, act, groups, training=True):
    """The same by nn.BatchNorm2d and nn activations in float64, one call a group."""
    norm = nn.BatchNorm2d(x.shape[1]).double().train(training).to(x.device)
    with torch.no_grad():
        for target, value in zip(
            (norm.weight, norm.bias, norm.running_mean, norm.running_var), parameters, strict=True
        ):
            target.copy_(value)
    wide = x.detach().double().requires_grad_()
    y = torch.cat([ACTS[act](norm(part)) for part in wide.chunk(groups)])
    y.backward(grad.double())
    result = {"y": y.detach(), "dx": wide.grad, "dw": norm.weight.grad, "db": norm.bias.grad}
    statistics = {"mean": norm.running_mean, "var": norm.running_var}
    return result | statistics | {"count": norm.num_batches_tracked}


def away_from_the_kink(x, parameters, grad, groups, training=True):
    """`grad` without the places where a rounding of z decides the activation's side."""
    z = torch_modules(x, parameters, grad, "none", groups, training)["y"]
    return grad.masked_fill(z.abs() < 1e-4, 0)


def assert_close(ours, theirs, tolerance, rounding=0.0):
    """Relative L2 errors within `tolerance`; of what is stored as x is, with its `rounding`."""
    for name, expected in theirs.items():
        limit = tolerance + (rounding if name in ("y", "dx") else 0.0)
        expected = expected.detach().double()
        error = (ours[name].detach().double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= limit, f"{name}: relative L2 error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_float64_equals_one_batchnorm_call_a_group(impl, act, shape, groups):
    x, parameters, grad = inputs(shape, torch.float64)
    ours = run(x, parameters, grad, impl=impl, act=act, groups=groups)
    # of two values a channel the gradient of x is what is left after everything cancels: up to
    # 1e-16 times the inverse of eps = 1e-5, squared
    assert_close(ours, torch_modules(x, parameters, grad, act, groups), 1e-7)


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_storage_types_stay_within_their_rounding(impl, dtype, groups, channels_last, device):
    x, parameters, grad = inputs((16, 24, 8, 8), dtype, device, channels_last=channels_last)
    grad = away_from_the_kink(x, parameters, grad, groups)
    ours = run(x, parameters, grad, impl=impl, act="leaky_relu", groups=groups)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert ours["mean"].dtype == ours["dw"].dtype == torch.float32
    theirs = torch_modules(x, parameters, grad, "leaky_relu", groups)
    # PyTorch's own rounds between batch norm and activation, too, forwards and backwards
    between = ROUNDING[dtype] if impl == "torch" else 0.0
    assert_close(ours, theirs, FLOAT32 + between, ROUNDING[dtype])


# Channels and edge of the DCGAN's batch norms at 64 px, in the order of its layers.
LAYERS = {
    "G1": (512, 4, "relu"),
    "G2": (256, 8, "relu"),
    "G3": (128, 16, "relu"),
    "G4": (64, 32, "relu"),
    "D2": (128, 16, "leaky_relu"),
    "D3": (256, 8, "leaky_relu"),
    "D4": (512, 4, "leaky_relu"),
}


def held_to_float64(shape, dtype, device, act, groups=1, training=True, **of):
    x, parameters, grad = inputs(shape, dtype, device, **of)
    grad = away_from_the_kink(x, parameters, grad, groups, training)
    ours = run(x, parameters, grad, impl="triton", act=act, groups=groups, training=training)
    theirs = torch_modules(x, parameters, grad, act, groups, training)
    # a mean many deviations away takes its own rounding into x - mean
    sigmas = max(1.0, abs(of.get("offset", 0.5)) / of.get("spread", 2.0))
    assert_close(ours, theirs, FLOAT32 * sigmas, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_kernels_on_the_layers_of_a_dcgan(layer, dtype, device):
    channels, size, act = LAYERS[layer]
    held_to_float64((2, channels, size, size), dtype, device, act, groups=2 if layer > "E" else 1)


# rows of 1 and 3 values, of less than a tile, of no multiple of one; 2, 63 and 1025 rows
AWKWARD = [(2, 1, 1, 1), (2, 3, 1, 1), (7, 48, 3, 3), (7, 100, 3, 3), (1, 64, 63, 1)]
AWKWARD += [(1, 3, 41, 25), (25, 48, 41, 1), (1, 100, 25, 41), (1, 192, 2, 1)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_the_kernels_on_awkward_shapes(shape, dtype, device):
    x, parameters, grad = inputs(shape, dtype, device)
    grad = away_from_the_kink(x, parameters, grad, 1)
    ours = run(x, parameters, grad, impl="triton", act="leaky_relu")
    theirs = torch_modules(x, parameters, grad, "leaky_relu", 1)
    if shape[0] * shape[2] * shape[3] == 2:
        # of two values the gradient of x is what is left where everything cancels: eps / var of
        # it; only its size says something
        assert (ours.pop("dx") - theirs.pop("dx")).abs().max() <= FLOAT32 * 5 + ROUNDING[dtype] * 5
    assert_close(ours, theirs, FLOAT32, ROUNDING[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [(c, s) for c, s, _ in LAYERS.values()][:4] + [(1, 5), (3, 7), (48, 3), (100, 9)]
)
def test_the_kernels_on_everything(shape, dtype, act, groups, training, device):
    channels, size = shape
    held_to_float64((12, channels, size, size), dtype, device, act, groups, training)


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_keep_the_variance_of_a_mean_30_sigma_away(dtype, device):
    held_to_float64((4, 70, 9, 9), dtype, device, "leaky_relu", 2, offset=60.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_outlier_at_the_corner_does_not_cost_the_variance(groups, device):
    """The first value of an image is not its others' kind: padding makes it so."""
    x, parameters, grad = inputs((16, 24, 16, 16), torch.float32, device, offset=60.0)
    x[:, :, 0, 0] *= 4 / 9
    grad = away_from_the_kink(x, parameters, grad, groups)
    ours = run(x, parameters, grad, impl="triton", act="relu", groups=groups)
    theirs = torch_modules(x, parameters, grad, "relu", groups)
    assert_close({"var": ours["var"]}, {"var": theirs["var"]}, FLOAT32)
    assert_close(ours, theirs, 30 * FLOAT32)


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_on_a_constant_channel(dtype, device):
    x, parameters, grad = inputs((4, 5, 6, 6), dtype, device)
    x[:, 2] = 3.0
    grad = away_from_the_kink(x, parameters, grad, 1)
    ours = run(x, parameters, grad, impl="triton", act="relu")
    theirs = torch_modules(x, parameters, grad, "relu", 1)
    assert torch.equal(ours["y"][:, 2], theirs["y"][:, 2].to(dtype))
    assert_close(ours, theirs, FLOAT32, ROUNDING[dtype])


@settings(deadline=None, max_examples=15)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 4),
    st.sampled_from(STORED),
    st.sampled_from(sorted(ACTS)),
)
def test_the_kernels_on_drawn_shapes(part, groups, dtype, act):
    n, channels, height, width = part
    if n * height * width < 2:
        height = 3
    torch.manual_seed(n * 7 + channels)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    shape = (n * groups, channels, height, width)
    x, parameters, grad = inputs(shape, dtype, device)
    ours = run(x, parameters, grad, impl="triton", act=act, groups=groups)
    parts = [
        run(x_part, parameters, grad_part, impl="triton", act=act)
        for x_part, grad_part in zip(x.chunk(groups), grad.chunk(groups), strict=True)
    ]
    for name in ("y", "dx"):  # the same function as one call a group, split in the same way or not
        apart = torch.cat([p[name] for p in parts]).double()
        limit = 1e-4 * apart.abs().max() + 2 * ROUNDING[dtype] * apart.abs()
        different = (ours[name].double() - apart).abs() > limit
        # where z is within a rounding of 0 the activation may be on either side
        assert different.double().mean() <= (0 if act == "none" or name == "y" else 1e-2)
    assert int(ours["count"]) == groups


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
def test_groups_move_the_running_statistics_in_order(impl, device):
    x, parameters, grad = inputs((8, 6, 3, 3), torch.float32, device)
    weight, bias, mean, var = (p.clone() for p in parameters)
    for part in x.chunk(4):
        bn_act(part, weight, bias, mean, var, training=True, impl="ref")
    ours = run(x, parameters, grad, impl=impl, groups=4)
    assert_close(ours, {"mean": mean, "var": var}, FLOAT32)
    backwards = run(x.flip(0), parameters, grad, impl=impl, groups=4)
    assert (backwards["mean"] - mean).norm() > 100 * FLOAT32 * mean.norm()


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_give_the_same_bits_twice(dtype, device):
    x, parameters, grad = inputs((6, 72, 9, 9), dtype, device)
    first, second = (run(x, parameters, grad, impl="triton", groups=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_whichever_program_ends_last_gives_the_same_bits(device, backwards):
    """A GPU runs programs in any order: here from the first to the last, and the other way."""
    x, parameters, grad = inputs((16, 150, 9, 9), torch.float32, device)
    first = run(x, parameters, grad, impl="triton", groups=2)
    with backwards() as ran:
        second = run(x, parameters, grad, impl="triton", groups=2)
    assert len(ran) > 30 and all(torch.equal(first[name], second[name]) for name in first)


def test_the_kernels_take_any_memory_layout(device):
    x, parameters, grad = inputs((6, 20, 10, 8), torch.float32, device)
    expected = run(x, parameters, grad, impl="triton")
    padded = torch.randn(6, 20, 12, 8, device=device)
    padded[:, :, 1:11] = x
    for other in (
        x.contiguous(),
        padded[:, :, 1:11],
        x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        got = run(
            other,
            parameters,
            grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            impl="triton",
        )
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_kernels_pass_nan_on(device):
    x, parameters, grad = inputs((4, 5, 3, 3), torch.float32, device)
    x[1, 2, 0, 0] = float("nan")
    got = run(x, parameters, grad, impl="triton", act="relu")
    bad = torch.tensor([False, False, True, False, False], device=device)
    for name in ("y", "dx"):
        assert torch.equal(got[name].isnan().all((2, 3)).all(0), bad), name
        assert torch.equal(got[name].isnan().any((2, 3)).any(0), bad), name
    for name in ("dw", "db", "mean", "var"):
        # the mask of a NaN is closed, so dbias is the one that stays a number
        assert name == "db" or torch.equal(got[name].isnan(), bad), name


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


def test_the_counters_are_zero_again(device):
    x, parameters, grad = inputs((4, 130, 3, 3), torch.float32, device)
    run(x, parameters, grad, impl="triton", groups=2)
    assert not _launch._COUNTERS[device]._all.any()


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("act", ACTS)
def test_evaluation_uses_and_keeps_the_running_statistics(impl, act, device):
    dtype, tolerance = (torch.float32, FLOAT32) if impl == "triton" else (torch.float64, 1e-12)
    x, parameters, grad = inputs((6, 10, 5, 5), dtype, device)
    grad = away_from_the_kink(x, parameters, grad, 2, training=False)
    ours = run(x, parameters, grad, impl=impl, act=act, training=False, groups=2)
    assert_close(ours, torch_modules(x, parameters, grad, act, 2, training=False), tolerance)
    assert torch.equal(ours["mean"], parameters[2]) and torch.equal(ours["var"], parameters[3])


def test_evaluation_is_one_launch(device, monkeypatch):
    launched = []
    real = bn_act_kernels.launch
    monkeypatch.setattr(
        bn_act_kernels, "launch", lambda *a, **k: (launched.append(a[0]), real(*a, **k))
    )
    x, (weight, bias, mean, var), grad = inputs((4, 6, 3, 3), torch.float32, device)
    with torch.no_grad():
        bn_act(x, weight, bias, mean, var, training=False, impl="triton")
    assert len(launched) == 1
    run(x, (weight, bias, mean, var), grad, impl="triton")
    assert len(launched) == 1 + 4  # training: two forward, two backward


def test_the_definition_has_right_gradients():
    x, (weight, bias, mean, var), _ = inputs((4, 3, 2, 2), torch.float64)

    def f(x, weight, bias):
        return bn_act(
            x,
            weight,
            bias,
            mean.clone(),
            var.clone(),
            training=True,
            act="leaky_relu",
            groups=2,
            impl="ref",
        )

    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(f, arguments)


def test_a_large_mean_does_not_cancel_the_variance():
    x, parameters, grad = inputs((32, 8, 8, 8), torch.float32)
    ours = run(x + 60, parameters, grad, impl="torch", act="none")  # 30 sigma
    theirs = torch_modules(x + 60, parameters, grad, "none", 1)
    assert_close(ours, theirs, 30 * FLOAT32)  # the mean's own rounding, 30 sigma large


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


def compiled_and_plain(device, backend):
    """Two layers, whole and compiled without a break, two steps: outputs, gradients, buffers."""
    torch._dynamo.reset()
    results = []
    for compile in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            BatchNormAct2d(8, impl="triton"),
            nn.Conv2d(8, 6, 3, bias=False),
            BatchNormAct2d(6, act="leaky_relu", impl="triton"),
        ).to(device, memory_format=torch.channels_last)
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
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        if impl == "torch":
            dx.square().sum().backward()
            assert x.grad.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dx.square().sum().backward()


def test_an_empty_batch_is_empty_in_evaluation(device):
    x, parameters, _ = inputs((4, 6, 3, 3), torch.float32, device)
    y = bn_act(x[:0], *parameters, training=False, impl="triton")
    assert y.shape == (0, 6, 3, 3)

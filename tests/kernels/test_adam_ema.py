"""adam_ema and the optimizer around it against torch.optim.Adam and written-out averages."""

import contextlib
import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastgan_kernels import Adam, Average, _launch, adam_ema
from fastgan_kernels.adam_ema import _adam_ema_fused

IMPLS = ["ref", "torch", "triton"]
BETAS = (0.5, 0.999)
# Weights near 1 are rounded to 2^-24 once a step, beside a move of up to lr = 2e-4 a step; and each
# update is a handful of float32 roundings.
PER_STEP = 2**-24 / 2e-4 + 10 * 2**-24
# bfloat16 is rounded to nearest, and cut off in Triton's interpreter
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if _launch.INTERPRETED else 2**-8}


def network(device, dtype=torch.float32):
    """Convolutions, whose weights are channels-last, and a batch norm with its buffers."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4), nn.BatchNorm2d(16), nn.Conv2d(16, 70, 4), nn.Conv2d(70, 1, 4)
    )
    return net.to(device, dtype).to(memory_format=torch.channels_last)


def averaged(net, half_life=5.0, ramp=0.3):
    """An Average that begins as `net` is."""
    start = copy.deepcopy(net)
    buffers = [
        (a, b) for a, b in zip(net.buffers(), start.buffers(), strict=True) if a.is_floating_point()
    ]
    step = torch.zeros((), dtype=torch.float64, device=buffers[0][0].device)
    return Average(list(start.parameters()), buffers, step, half_life, ramp)


def gradients(net):
    """Of every order of magnitude, tensor by tensor."""
    return [torch.randn_like(p) * 10.0 ** torch.randint(-6, 2, ()).item() for p in net.parameters()]


def distance(ours, theirs, start):
    """The largest L2(difference) / L2(move) of any tensor."""
    pairs = zip(ours, theirs, start, strict=True)
    errors = [(a.double() - b).norm() / (b.double() - s).norm() for a, b, s in pairs]
    return max(error.item() for error in errors)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_50_steps_of_torchs_adam(impl, scale, device):
    """As torch.optim.Adam's in float64, with gradients scaled and one step of them not finite."""
    ours = network(device)
    theirs = copy.deepcopy(ours).double()
    start = [p.detach().double() for p in ours.parameters()]
    adam = Adam(ours.parameters(), 2e-4, BETAS, impl=impl)
    plain = torch.optim.Adam(theirs.parameters(), 2e-4, BETAS)
    for step in range(50):
        grads = gradients(ours)
        bad = scale is not None and step == 7
        for p, q, g in zip(ours.parameters(), theirs.parameters(), grads, strict=True):
            p.grad = g * (scale or 1.0)
            q.grad = g.double()
        if scale is not None:
            adam.grad_scale = torch.tensor(scale, device=device)
            adam.found_inf = torch.tensor(float(bad), device=device)
        if bad:
            next(ours.parameters()).grad[0] = float("inf")
        adam.step()
        if not bad:
            plain.step()
    assert distance(ours.parameters(), theirs.parameters(), start) <= 50 * PER_STEP
    state = adam.state[next(ours.parameters())]
    assert float(state["step"]) == 50 - (scale is not None)
    # CUDA's fused Adam rounds beta2 to float32 before it takes it from 1: 1.3e-5 of 0.001
    for name, limit in (("exp_avg", 1e-5), ("exp_avg_sq", 2e-5)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            expected = plain.state[q][name]
            assert (adam.state[p][name] - expected).norm() <= limit * expected.norm()


def test_the_first_steps_are_not_lost_to_rounding(device):
    """1 - beta2^t is 0.001 at first: in float32 beta2^t would leave three digits of it."""
    for impl in IMPLS:
        net = nn.Linear(1, 1, bias=False).to(device)
        weight = net.weight.detach().double().clone()
        adam = Adam(net.parameters(), 1e-3, (0.9, 0.9999999), impl=impl)
        net.weight.grad = torch.full_like(net.weight, 3.0)
        adam.step()
        assert abs((net.weight.double() - weight + 1e-3).item()) < 2e-7, impl  # lr * sign(g)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_life", [0.0, 4.0, 1e9])
def test_copies_and_average_follow_the_weights(impl, low, half_life, device):
    net = network(device)
    average = averaged(net, half_life)
    copies = [torch.empty_like(p, dtype=low) for p in net.parameters()]
    adam = Adam(net.parameters(), 1e-2, BETAS, low=copies, average=average, impl=impl)
    sources = [*net.parameters(), *(source for source, _ in average.buffers)]
    means = [*average.params, *(mean for _, mean in average.buffers)]
    expected = [mean.detach().double() for mean in means]
    for step in range(1, 9):
        for p, g in zip(net.parameters(), gradients(net), strict=True):
            p.grad = g
        for source, _ in average.buffers:
            source.add_(torch.randn_like(source))
        if step == 5:  # a step that is skipped moves the average all the same
            adam.found_inf = torch.ones((), device=device)
        adam.step()
        adam.found_inf = None
        share = min(half_life, 0.3 * step)
        keep = 0.5 ** (1 / share) if share else 0.0
        expected = [
            keep * e + (1 - keep) * s.detach().double()
            for e, s in zip(expected, sources, strict=True)
        ]
        for copied, p in zip(copies, net.parameters(), strict=True):
            assert copied.stride() == p.stride()
            assert ((copied.double() - p).abs() <= UNIT[low] * p.abs() + 2**-25).all()
    assert float(average.step) == 8
    for mean, e in zip(means, expected, strict=True):
        torch.testing.assert_close(mean.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half_life", [1e4, 1e7])
def test_a_long_average_moves_by_the_right_share(half_life, device):
    """1 - 2^(-1/h) of h = 10^7 steps is 7e-8: of a float32 power nothing would be left."""
    for impl in IMPLS:
        net = nn.Linear(1, 1, bias=False).to(device)
        net.weight.data.fill_(1000.0)
        average = averaged(nn.Sequential(net, nn.BatchNorm2d(1).to(device)), half_life, 1.0)
        average = Average([torch.zeros_like(net.weight)], [], average.step, half_life, 1.0)
        average.step.fill_(1e8)
        adam = Adam(net.parameters(), 0.0, average=average, impl=impl)
        net.weight.grad = torch.ones_like(net.weight)
        adam.step()
        share = float(average.params[0].double()) / 1000
        assert abs(share / (0.6931471805599453 / half_life) - 1) < 1e-3, impl


@pytest.mark.parametrize("grad_type", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits(grad_type, device):
    params = [torch.randn(33, 7, device=device)]
    grads = [torch.randn(33, 7, device=device).to(grad_type)]
    results = []
    for impl in IMPLS:
        p, m, v = ([t.clone() for t in params], *([torch.zeros_like(params[0])] for _ in range(2)))
        step, lr = torch.zeros((), device=device), torch.tensor(1e-2, device=device)
        adam_ema(p, grads, m, v, step, lr, impl=impl)
        results.append((p[0], m[0], v[0]))
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 2500), min_size=1, max_size=6), st.integers(0, 3))
def test_the_kernel_on_drawn_sizes(sizes, buffers):
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(sum(sizes))

    def draw(count=None):
        return [torch.rand(n, device=device) for n in sizes[:count]]

    start = [draw() for _ in range(5)]
    sources, means = draw(buffers), draw(buffers)
    results = []
    for impl in ("ref", "triton"):
        p, g, m, v, ema = copy.deepcopy(start)
        moved = copy.deepcopy(means)
        step, lr = torch.full((), 3.0, device=device), torch.full((), 1e-2, device=device)
        count = torch.full((), 9.0, dtype=torch.float64, device=device)
        average = Average(ema, list(zip(sources, moved, strict=True)), count, 4.0, 0.2)
        adam_ema(p, g, m, v, step, lr, average=average, impl=impl)
        results.append([*p, *m, *v, *ema, *moved, step, count])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_more_tensors_than_one_launch_takes(device, monkeypatch):
    import sys

    module = sys.modules["fastgan_kernels.adam_ema"]
    launches = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launches.append(a[1]), real(*a, **k)))
    results = []
    for impl in ("ref", "triton"):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(n % 5 + 1, device=device)) for n in range(150)]
        count = torch.zeros((), dtype=torch.float64, device=device)
        buffers = [(torch.randn(3, device=device), torch.zeros(3, device=device))]
        average = Average([p.detach().clone() for p in params], buffers, count, 4.0, 1.0)
        adam = Adam(params, 1e-2, average=average, impl=impl)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            adam.step()
        results.append(
            [*params, *average.params, buffers[0][1], adam.state[params[0]]["step"], count]
        )
    assert len(launches) == 2 * 3  # 64 a launch
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_same_bits_twice(device):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        net = network(device)
        adam = Adam(net.parameters(), impl="triton")
        for p, g in zip(net.parameters(), gradients(net), strict=True):
            p.grad = g
        adam.step()
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not _launch._COUNTERS[device]._all.any()


def test_whichever_program_ends_last_counts_the_step(device, backwards):
    results = []
    for order in (contextlib.nullcontext, backwards):
        torch.manual_seed(3)
        net = network(device)
        average = averaged(net)
        adam = Adam(net.parameters(), average=average, impl="triton")
        with order():
            for _ in range(2):
                for p, g in zip(net.parameters(), gradients(net), strict=True):
                    p.grad = g
                adam.step()
        results.append([*net.parameters(), *average.params, average.step])
        assert float(average.step) == float(adam.state[next(net.parameters())]["step"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_in_another_layout_is_taken_as_it_is_meant(device):
    net = network(device)
    other = copy.deepcopy(net)
    for p, q, g in zip(net.parameters(), other.parameters(), gradients(net), strict=True):
        p.grad, q.grad = g, g.contiguous()
    for n in (net, other):
        Adam(n.parameters(), impl="triton").step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert net[2].weight.grad.stride() != other[2].weight.grad.stride()


def test_the_state_goes_into_torchs_adam_and_back(device):
    nets = [network(device) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    adams = [
        Adam(nets[0].parameters(), 1e-3, BETAS, impl="triton"),
        torch.optim.Adam(nets[1].parameters(), 1e-3, BETAS),
        Adam(nets[2].parameters(), 5.0, impl="triton"),  # taken from torch's below
    ]

    def step(which):
        torch.manual_seed(len(which))
        grads = gradients(nets[0])
        for i in which:
            for p, g in zip(nets[i].parameters(), grads, strict=True):
                p.grad = g.clone()
            adams[i].step()

    step([0, 1])
    adams[2].load_state_dict(copy.deepcopy(adams[1].state_dict()))
    nets[2].load_state_dict(nets[1].state_dict())
    adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
    step([0, 1, 2])
    for p, q, r in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
        torch.testing.assert_close(r, p, rtol=0, atol=1e-6)
    first = next(nets[2].parameters())
    assert float(adams[2].state[first]["step"]) == 2
    assert len({id(s["step"]) for s in adams[2].state.values()}) == 1  # one count again


def test_gradscaler_skips_and_backs_off(device):
    net = network(device)
    adam = Adam(net.parameters(), impl="triton")
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    before = [p.detach().clone() for p in net.parameters()]
    for finite in (False, True):
        scaler.scale(torch.zeros((), device=device))  # made on first use
        for p in net.parameters():
            p.grad = torch.ones_like(p) * 2.0**10
        if not finite:
            next(net.parameters()).grad[0] = float("nan")
        scaler.step(adam)
        scaler.update()
        same = [torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)]
        assert all(same) if not finite else not any(same)
    assert scaler.get_scale() == 2.0**9
    assert not hasattr(adam, "found_inf") and float(adam.state[next(net.parameters())]["step"]) == 1


def test_a_closure_and_groups(device):
    nets = [network(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    results = []
    for net, make in zip(nets, (Adam, torch.optim.Adam), strict=True):
        groups = [
            {"params": list(net[0].parameters())},
            {"params": list(net[2].parameters()), "lr": 0.1},
        ]
        adam = make(groups, lr=1e-3)
        torch.manual_seed(0)
        x = torch.randn(2, 3, 12, 12, device=device)

        def closure(net=net, adam=adam, x=x):
            adam.zero_grad()
            loss = net[2](net[0](x)).square().mean()
            loss.backward()
            return loss

        results.append(adam.step(closure))
    assert torch.equal(*results)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operator_is_registered_rightly(scaled, device):
    def draw(dtype=torch.float32):
        return [torch.rand(n, device=device).to(dtype) for n in (5, 8)]

    scalar = torch.ones((), device=device)
    rest = (scalar.clone(), torch.zeros((), device=device)) if scaled else (None, None)
    arguments = (draw(), draw(), draw(), draw(), scalar, scalar.clone(), *BETAS, 1e-8)
    arguments += (draw(torch.bfloat16), draw(), draw(), draw(), scalar.double(), 4.0, 0.1, *rest)
    torch.library.opcheck(_adam_ema_fused, arguments)


def test_no_graph_break_under_compile(device):
    torch._dynamo.reset()

    def step(params, grads, exp_avgs, exp_avg_sqs, count, lr):
        adam_ema(params, grads, exp_avgs, exp_avg_sqs, count, lr, impl="triton")
        return params[0] * 2

    def arguments():
        torch.manual_seed(2)
        lists = [[torch.rand(n, device=device) for n in (5, 8)] for _ in range(4)]
        return [*lists, torch.ones((), device=device), torch.full((), 0.1, device=device)]

    plain, compiled = arguments(), arguments()
    expected = step(*plain)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, expected) and float(compiled[4]) == 2
    for ours, theirs in zip(compiled[:4], plain[:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_does_not_fit_is_named(device):
    def make(*shapes, dtype=torch.float32):
        return [torch.zeros(s, device=device, dtype=dtype) for s in shapes]

    p, scalar = make((4, 3), (5,)), torch.zeros((), device=device)
    good = [p, make((4, 3), (5,)), make((4, 3), (5,)), make((4, 3), (5,)), scalar, scalar]

    def refuse(message, place=None, value=None, **options):
        arguments = list(good)
        if place is not None:
            arguments[place] = value
        with pytest.raises(ValueError, match=message):
            adam_ema(*arguments, impl="triton", **options)

    refuse("params must hold at least one", 0, [])
    refuse("grads must be as many as params, 2, got 1", 1, make((4, 3)))
    refuse(r"exp_avgs\[1\] must have shape \(5,\), got \(6,\)", 2, make((4, 3), (6,)))
    refuse(
        r"exp_avg_sqs\[0\] must have the strides of params\[0\]",
        3,
        [make((3, 4))[0].T, *make((5,))],
    )
    refuse("exp_avgs must be float32", 2, make((4, 3), (5,), dtype=torch.bfloat16))
    refuse("lr must be float32", 5, scalar.double())
    refuse("lr must be a 0-d tensor on the device, got 0.1", 5, 0.1)
    refuse("step must be a 0-d tensor", 4, torch.zeros(3, device=device))
    refuse("grads must be float32 or bfloat16 or float16", 1, make((4, 3), (5,), dtype=torch.int32))
    refuse(r"betas must be two numbers from 0 to below 1, got \(1.0, 0.9\)", betas=(1.0, 0.9))
    refuse("low must be as many as params", low=make((4, 3)))
    gap = torch.zeros(4, 6, device=device)[:, :3]
    with pytest.raises(ValueError, match="fill its memory densely"):
        adam_ema([gap], [gap], [gap], [gap], scalar, scalar, impl="triton")
    with pytest.raises(ValueError, match="adam_ema: impl must be one of"):
        adam_ema(*good, impl="cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_buffers_that_do_not_fit_their_average_are_named(impl, device):
    def refuse(message, *pair):
        p = [torch.zeros(3, device=device)]
        scalar, count = torch.zeros((), device=device), torch.zeros((), device=device).double()
        average = Average([p[0].clone()], [pair], count, 4.0, 1.0)
        with pytest.raises(ValueError, match=message):
            adam_ema(p, p, p, p, scalar, scalar, average=average, impl=impl)

    zeros = functools.partial(torch.zeros, device=device)
    refuse(r"buffers\[0\]\[1\] must have shape \(7,\), got \(6,\)", zeros(7), zeros(6))
    refuse(r"buffers\[0\]\[1\] must have the strides", zeros(3, 2).t(), zeros(2, 3))
    if impl == "triton":
        refuse(r"average.buffers\[0\] must fill its memory", zeros(12)[::2], zeros(12)[::2])
        refuse("average.buffers must be float32", zeros(3), zeros(3).double())
    with pytest.raises(ValueError, match="Average: half_life must be 0 or more, got -1"):
        Average([], [], zeros(()), -1.0, 1.0)


def test_what_pytorch_does_to_an_optimizer(device):
    """Copied, pickled, extended, scheduled, and saved before its first step: as torch's."""
    results = []
    for make in (functools.partial(Adam, impl="triton"), torch.optim.Adam):
        torch.manual_seed(4)
        net = network(device)
        adam = make(net[:2].parameters(), lr=1e-2)
        adam.load_state_dict(make(net[:2].parameters(), lr=1e-2).state_dict())
        adam.add_param_group({"params": list(net[2:].parameters()), "lr": 1e-3})
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, [0.1, 0.2], total_steps=9)
        for step in range(4):
            if step == 2:
                net, adam_of_copy = copy.deepcopy((net, adam))
                schedule.optimizer = adam = adam_of_copy
            for p, g in zip(net.parameters(), gradients(net), strict=True):
                p.grad = g
            adam.step()
            schedule.step()
        results.append([*net.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_state_is_loaded_into_the_tensors_in_use(device):
    """Which a captured graph goes on reading."""
    net = network(device)
    adam, other = (Adam(net.parameters(), lr, impl="triton") for lr in (0.1, 0.2))
    first = next(net.parameters())
    held = [adam.param_groups[0]["lr"], *adam.state[first].values()]
    for p, g in zip(net.parameters(), gradients(net), strict=True):
        p.grad = g
    other.step()
    adam.load_state_dict(other.state_dict())
    now = [adam.param_groups[0]["lr"], *adam.state[first].values()]
    theirs = [other.param_groups[0]["lr"], *other.state[first].values()]
    for ours, was, expected in zip(now, held, theirs, strict=True):
        assert ours is was and torch.equal(ours, expected) and ours is not expected


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_tensors_are_nothing_to_do(impl, device):
    params = [nn.Parameter(torch.ones(n, device=device)) for n in (0, *[2] * 64, 0)]
    adam = Adam(params, 1e-2, impl=impl)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        adam.step()
    assert float(adam.state[params[0]]["step"]) == 3
    torch.testing.assert_close(params[1].detach(), torch.full((2,), 0.97, device=device))


def test_auto_says_what_the_kernel_cannot_take(monkeypatch):
    """On a GPU, which is played here: PyTorch's own takes it, not in silence."""
    x = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    assert _launch.choose("adam_ema", "auto", x, "") == "triton"
    with pytest.warns(UserWarning, match="adam_ema: PyTorch's own operator, since lr must be"):
        assert _launch.choose("adam_ema", "auto", x, "lr must be float32") == "torch"
    with pytest.raises(ValueError, match='adam_ema: for impl="triton" lr must be float32'):
        _launch.choose("adam_ema", "triton", x, "lr must be float32")


def test_a_skipped_step_writes_the_copies_all_the_same(device):
    for impl in IMPLS:
        p, low = torch.full((5,), 1.5, device=device), torch.zeros(5, device=device).half()
        scalars = [torch.zeros((), device=device) for _ in range(2)]
        moments = [[torch.zeros(5, device=device)] for _ in range(2)]
        inf = torch.ones((), device=device)
        adam_ema([p], [p.clone()], *moments, *scalars, low=[low], found_inf=inf, impl=impl)
        assert torch.equal(low, p.half()) and p.unique().tolist() == [1.5], impl


def test_wrong_options_of_the_optimizer_are_named(device):
    net = network(device)
    params = list(net.parameters())
    for options, message in (
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"betas": (0.5, 1.0)}, "betas must be two numbers from 0 to below 1"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=f"Adam: {message}"):
            Adam(params, **options)
    with pytest.raises(ValueError, match="go with one group"):
        Adam([{"params": params[:1]}, {"params": params[1:]}], low=params)
    for absent in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}):
        with pytest.raises(ValueError, match=f"there is no {next(iter(absent))} here"):
            Adam([{"params": params, **absent}])
    with pytest.raises(ValueError, match="at least one parameter, got none"):
        Adam([{"params": []}])
    adam = Adam(params)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(16, 3, 4, 4\) has no gradient"):
        adam.step()
    with pytest.raises(ValueError, match="a group must hold lr, betas and eps"):
        adam.load_state_dict(torch.optim.SGD(params, 0.1).state_dict())
    decayed = torch.optim.Adam(params, weight_decay=0.1)
    with pytest.raises(ValueError, match="there is no weight_decay here, got 0.1"):
        adam.load_state_dict(decayed.state_dict())

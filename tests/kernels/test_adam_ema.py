"""adam_ema: copies, averages, counts and arguments, every implementation against the definition."""

import contextlib
import copy
import functools

import pytest
import torch
from adam_network import BETAS, averaged, gradients, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgan_kernels import Adam, Average, _launch, adam_ema
from fastgan_kernels.adam_ema import _adam_ema_fused

IMPLS = ["ref", "torch", "triton"]
# bfloat16 is rounded to nearest, and cut off in Triton's interpreter
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if _launch.INTERPRETED else 2**-8}


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
    # of weights alone, as in mixed precision
    copies = [torch.empty_like(p, dtype=low) if p.dim() > 1 else None for p in net.parameters()]
    assert None in copies
    adam = Adam(net.parameters(), 1e-2, BETAS, low=copies, average=average, impl=impl)
    sources = [*net.parameters(), *(source for source, _ in average.buffers)]
    means = [*average.params, *(mean for _, mean in average.buffers)]
    expected = [mean.detach().double() for mean in means]
    for step in range(1, 9):
        for p, g in zip(net.parameters(), gradients(net), strict=True):
            p.grad = g
        for source, _ in average.buffers:
            source.add_(torch.randn_like(source))
        adam.found_inf = torch.zeros((), device=device) if step % 2 else None
        adam.step()
        share = min(half_life, 0.3 * step)
        keep = 0.5 ** (1 / share) if share else 0.0
        expected = [
            keep * e + (1 - keep) * s.detach().double()
            for e, s in zip(expected, sources, strict=True)
        ]
        for copied, p in zip(copies, net.parameters(), strict=True):
            if copied is None:
                continue
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


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operator_is_registered_rightly(scaled, device):
    def draw(dtype=torch.float32):
        return [torch.rand(n, device=device).to(dtype) for n in (5, 8)]

    scalar = torch.ones((), device=device)
    rest = (scalar.clone(), torch.zeros((), device=device)) if scaled else (None, None)
    arguments = (draw(), draw(), draw(), draw(), scalar, scalar.clone(), *BETAS, 1e-8)
    low = [draw(torch.bfloat16)[1]], [1]  # of the second tensor alone
    arguments += (*low, draw(), draw(), draw(), scalar.double(), 4.0, 0.1, *rest)
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


def test_auto_says_what_the_kernel_cannot_take(monkeypatch):
    """On a GPU, which is played here: PyTorch's own takes it, not in silence."""
    x = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    assert _launch.choose("adam_ema", "auto", x, "") == "triton"
    with pytest.warns(UserWarning, match="adam_ema: PyTorch's own operator, since lr must be"):
        assert _launch.choose("adam_ema", "auto", x, "lr must be float32") == "torch"
    with pytest.raises(ValueError, match='adam_ema: for impl="triton" lr must be float32'):
        _launch.choose("adam_ema", "triton", x, "lr must be float32")


# found_inf may be a count over processes, or what became of one.
@pytest.mark.parametrize("found", [1.0, 2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_step_does_nothing_at_all(impl, found, device):
    """Beside a twin that is not asked: with NaN and Inf in all that a step reads, which the twin
    never sees; the steps before and after are theirs both.
    """
    torch.manual_seed(5)
    nets, adams, states, counts = [], [], [], []
    for _ in range(2):
        net = network(device) if not nets else copy.deepcopy(nets[0])
        low = [p.detach().bfloat16() if p.dim() > 1 else None for p in net.parameters()]
        average = averaged(net)
        adam = Adam(net.parameters(), 1e-2, BETAS, low=low, average=average, impl=impl)
        count = adam.state[net[0].weight]["step"]
        moments = [s[name] for s in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        means = [*average.params, *(mean for _, mean in average.buffers)]
        copies = [t for t in low if t is not None]
        nets.append(net), adams.append(adam), counts.append((count, average))
        states.append([*net.parameters(), *moments, *copies, *means, count, average.step])
    with torch.no_grad():  # a sign that a sum with 0 would lose, and a count that ends counting
        for net, (count, average) in zip(nets, counts, strict=True):
            net[1].bias.fill_(-0.0), average.params[3].fill_(-0.0), count.fill_(2.0**24)

    def step(which, found_inf, spoilt=None):
        grads = gradients(nets[0])
        for i in which:
            for p, g in zip(nets[i].parameters(), grads, strict=True):
                p.grad = g.clone() if spoilt is None else torch.full_like(g, spoilt)
            if found_inf is not None:
                adams[i].found_inf = torch.tensor(found_inf, device=device)
            adams[i].step()

    step([0, 1], 0.0)
    sources = [t for t, _ in counts[0][1].buffers]
    held = [t.clone() for t in sources]
    for spoilt in (float("nan"), float("inf")):
        for t in sources:
            t.fill_(spoilt)
        before = [bits(t) for t in states[0]]
        step([0], found, spoilt)
        for t, was in zip(states[0], before, strict=True):
            assert torch.equal(bits(t), was)
    for t, was in zip(sources, held, strict=True):
        t.copy_(was)
    step([0, 1], 0.0)
    moved = zip(*states, before, strict=True)
    for i, (ours, theirs, was) in enumerate(moved):
        assert torch.equal(bits(ours), bits(theirs))
        assert i >= 8 or not torch.equal(bits(ours), was)  # weights, at least
    assert not _launch._COUNTERS or not _launch._COUNTERS[device]._all.any()


def bits(t):
    """Of a copy: NaN is itself there, and 0 is not -0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone().view(whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_flag_of_zero_changes_no_bit(impl, device):
    results = []
    for found_inf in (None, torch.zeros((), device=device)):
        torch.manual_seed(6)
        net = network(device)
        average = averaged(net)
        low = [torch.zeros_like(p, dtype=torch.float16) for p in net.parameters()]
        adam = Adam(net.parameters(), 1e-2, BETAS, low=low, average=average, impl=impl)
        adam.found_inf = found_inf
        for _ in range(3):
            for p, g in zip(net.parameters(), gradients(net), strict=True):
                p.grad = g
            for source, _ in average.buffers:
                source.add_(torch.randn_like(source))
            adam.step()
        means = [*average.params, *(mean for _, mean in average.buffers), average.step]
        moments = [t for s in adam.state.values() for t in s.values()]
        results.append([bits(t) for t in (*net.parameters(), *moments, *low, *means)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_host_never_reads_the_flag():
    """PyTorch's own form on tensors without values, of which to read one is an error."""
    with FakeTensorMode():
        p, g, m, v, mean, source = ([torch.zeros(3)] for _ in range(6))
        low, count = [torch.zeros(3, dtype=torch.float16)], torch.zeros((), dtype=torch.float64)
        average = Average(mean, [(source[0], torch.zeros(3))], count, 4.0, 1.0)
        scalars, flags = [torch.zeros(()), torch.zeros(())], [torch.ones(()), torch.zeros(())]
        options = {"low": low, "average": average, "grad_scale": flags[0], "found_inf": flags[1]}
        adam_ema(p, g, m, v, *scalars, impl="torch", **options)
        with pytest.raises(DataDependentOutputException):  # as the definition does
            adam_ema(p, g, m, v, *scalars, impl="ref", **options)

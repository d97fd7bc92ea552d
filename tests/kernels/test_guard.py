"""guard: what is not finite is seen wherever it lies, and what follows is the rule, written out."""

import contextlib
import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgan_kernels import _launch, guard
from fastgan_kernels.guard import _guard_fused

MODULE = sys.modules["fastgan_kernels.guard"]
IMPLS = ["ref", "torch", "triton"]
NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state(count, device, bad=0.0, frozen=0, bad_type=torch.float32):
    """What a guard writes, with marks of what was there before."""
    return {
        "flags": torch.full((count,), 7, dtype=torch.int32, device=device),
        "bad": torch.tensor(bad, dtype=bad_type, device=device),
        "frozen": torch.tensor(frozen, device=device),
        "lost": torch.full((), -3.0, device=device),
        "found": torch.full((), -5.0, device=device),
    }


def seen(grads, impl, loss=1.0, **options):
    """The flags of gradients that a step is not to be applied for, or None."""
    device = grads[0].device
    held = state(len(grads), device)
    guard(grads, torch.tensor(loss, device=device), **held, impl=impl, **options)
    assert float(held["found"]) == float(held["bad"])
    return held["flags"].tolist() if held["bad"] else None


def numbers(held):
    """As they are compared: NaN is itself."""
    return {k: repr(t.tolist()) for k, t in held.items()}


@pytest.mark.parametrize("bad_type", [torch.float32, torch.bool])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_rule(impl, bad_type, device):
    """Every case of it."""
    floor, losses, flags = 2.0**-16, (1.5, NAN), ([0, 0], [0, 1])
    cases = itertools.product((0, 1), (0, 2), losses, flags, (None, 4.0, floor), (False, True))
    for bad, frozen, loss, now, scale, last in cases:
        over = any(now)
        fatal = not math.isfinite(loss) or (over and (scale is None or scale <= floor))
        stop = bool(bad) or fatal
        expected = state(2, "cpu", float(stop), frozen + (stop and last), bad_type)
        expected["found"].fill_(float(stop or over))
        if stop and frozen == 0:
            expected["flags"], expected["lost"] = torch.tensor(now), torch.tensor(loss)
        grads = [torch.ones(6, device=device), torch.ones(3, 2, device=device)]
        for g, wrong in zip(grads, now, strict=True):
            g.view(-1)[4] = INF if wrong else 1.0
        held = state(2, device, float(bad), frozen, bad_type)
        scales = None if scale is None else torch.tensor(scale, device=device)
        guard(
            grads, torch.tensor(loss, device=device), **held,
            scale=scales, least=floor, last=last, impl=impl,
        )  # fmt: skip
        assert numbers(held) == numbers(expected), (bad, frozen, loss, now, scale, last)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_that_was_not_finite_is_kept(impl, device):
    """Step by step, of two networks that share it."""
    d, g = state(2, device), state(1, device)
    g["bad"], g["frozen"] = d["bad"], d["frozen"]
    fine = torch.ones(5, device=device)
    broken = torch.tensor([1.0, NAN], device=device)
    met = [([fine, fine], 0.5, [fine], 0.25), ([fine, broken], 2.0, [fine], 3.0)]
    met += [([broken, broken], -INF, [broken], NAN), ([fine, fine], 1.0, [fine], 1.0)]
    for step, (of_d, d_loss, of_g, g_loss) in enumerate(met):
        guard(of_d, torch.tensor(d_loss, device=device), **d, impl=impl)
        guard(of_g, torch.tensor(g_loss, device=device), **g, last=True, impl=impl)
        assert float(d["found"]) == float(g["found"]) == float(d["bad"]) == float(step > 0)
        assert int(d["frozen"]) == step
    assert d["flags"].tolist() == [0, 1] and float(d["lost"]) == 2
    assert g["flags"].tolist() == [0] and float(g["lost"]) == 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
def test_all_that_is_finite_is_finite(impl, dtype, device):
    """The largest numbers, whose squares and sums are not, and the smallest."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("not the kernel's")
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    grads = [
        torch.full((3000,), value, dtype=dtype, device=device)
        for value in (top, -top, tiny / 2, -0.0)
    ]
    assert seen(grads, impl) is None
    for value in (NAN, INF, -INF):
        grads[1][2999] = value
        assert seen(grads, impl) == [0, 1, 0, 0]


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_a_loss_of_64_bits_is_finite_where_it_is_infinite_in_32(impl, device):
    held = state(1, device)
    loss = torch.tensor(1e300, dtype=torch.float64, device=device)
    guard([torch.ones(2, device=device)], loss, **held, impl=impl)
    assert float(held["bad"]) == 0 and float(held["lost"]) == -3


@pytest.mark.parametrize("impl", IMPLS)
def test_every_place_of_every_layout(impl, device, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 64)  # several programs a tensor, the last one masked
    whole = torch.ones(400, device=device)
    tensors = {
        "a vector": torch.ones(130, device=device),
        "a scalar": torch.ones((), device=device),
        "an unaligned view": whole[3:200],
        "channels-last": torch.ones(4, 3, 5, 2, device=device).to(
            memory_format=torch.channels_last
        ),
        "transposed": torch.ones(13, 7, device=device).t(),
        "of 16 bits": torch.ones(129, dtype=torch.bfloat16, device=device),
    }
    for i, (name, t) in enumerate(tensors.items()):
        places = {0, t.numel() - 1, min(63, t.numel() - 1), t.numel() // 2}
        for place in places:
            at = tuple(int(x) for x in torch.unravel_index(torch.tensor(place), t.shape))
            t[at] = NAN
            flags = [int(j == i) for j in range(len(tensors))]
            assert seen(list(tensors.values()), impl) == flags, (name, place)
            t[at] = 1.0
    assert seen(list(tensors.values()), impl) is None
    whole[:3], whole[200:] = NAN, NAN  # beside a view is not in it
    assert seen([tensors["an unaligned view"]], impl) is None


@pytest.mark.parametrize("impl", IMPLS)
def test_what_lies_in_the_gaps_of_a_gradient_is_not_read(impl, device):
    held = torch.full((6, 8), NAN, device=device)
    held[:, ::2] = 1.0
    gaps, wide = held[:, ::2], torch.ones((), device=device).expand(5, 4)
    assert seen([gaps, wide], impl) is None
    gaps[5, 3] = INF
    assert seen([gaps, wide], impl) == [1, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_that_is_not_finite(impl, device):
    for loss in (NAN, INF, -INF):
        for scale in (None, torch.ones((), device=device)):
            assert seen([torch.ones(3, device=device)], impl, loss, scale=scale) == [0]
    assert seen([torch.ones(3, device=device)], impl, -3e38) is None


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_without_elements(impl, device):
    def nothing():
        return torch.zeros(0, 3, device=device)

    some = torch.tensor([INF], device=device)
    assert seen([nothing(), some, nothing(), some], impl) == [0, 1, 0, 1]
    assert seen([nothing(), nothing()], impl) is None
    assert seen([nothing(), nothing()], impl, loss=NAN) == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [3, 4, 7, 8])
def test_more_tensors_than_a_launch_takes(impl, count, device, monkeypatch):
    monkeypatch.setattr(MODULE, "MOST", 3)
    grads = [torch.ones(i % 2 * 5, device=device) for i in range(2 * count)]  # half without any
    assert seen(grads, impl) is None
    for i in range(1, 2 * count, 2):
        grads[i][2] = NAN
        assert seen(grads, impl) == [int(j == i) for j in range(2 * count)]
        grads[i][2] = 1.0
    grads[1][0] = grads[-1][4] = INF
    held = state(len(grads), device)
    for step in (1, 2):
        guard(grads, grads[1][1], **held, last=True, impl=impl)
        assert int(held["frozen"]) == step
    assert held["flags"].nonzero().flatten().tolist() == [1, len(grads) - 1]
    assert not _launch._COUNTERS or not _launch._COUNTERS[device]._all.any()


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 9000), st.sampled_from(DTYPES)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_kernel_on_drawn_sizes(tensors, random):
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    grads = [torch.ones(n, dtype=dtype, device=device) for n, dtype in tensors]
    flags = [int(g.numel() > 0 and random.random() < 0.5) for g in grads]
    for g, wrong in zip(grads, flags, strict=True):
        if wrong:
            g[random.randrange(g.numel())] = random.choice([NAN, INF, -INF])
    assert seen(grads, "triton") == (flags if any(flags) else None)


def test_whichever_program_ends_last_decides(device, backwards, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    grads = [torch.ones(100, device=device), torch.ones(40, device=device)]
    grads[0][50] = NAN
    for order in (contextlib.nullcontext, backwards):
        with order():
            for _ in range(2):
                assert seen(grads, "triton") == [1, 0]
                assert seen(grads[1:], "triton") is None
        assert not _launch._COUNTERS[torch.device(device)]._all.any()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operator_is_registered_rightly(scaled, device):
    grads = [torch.ones(5, device=device), torch.full((8,), NAN, device=device)]
    scalar = torch.ones((), device=device)
    held = state(2, device).values()
    scale = scalar.clone() if scaled else None
    torch.library.opcheck(_guard_fused, (grads, scalar, *held, scale, 0.5, True))


def test_no_graph_break_under_compile(device):
    torch._dynamo.reset()

    def step(grads, loss, held):
        guard(grads, loss, **held, last=True, impl="triton")
        return held["found"] * 2

    grads, loss = [torch.ones(3, device=device), torch.tensor([INF], device=device)], 2.0
    plain, compiled = state(2, device), state(2, device)
    loss = torch.tensor(loss, device=device)
    step(grads, loss, plain)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, loss, compiled)
    assert float(got) == 2 and numbers(compiled) == numbers(plain)
    assert plain["flags"].tolist() == [0, 1]


def test_the_host_reads_nothing():
    """PyTorch's own form on tensors without values, of which to read one is an error."""
    with FakeTensorMode():
        grads, held = [torch.ones(3), torch.ones(2, dtype=torch.float16)], state(2, "cpu")
        scale = torch.ones(())
        guard(grads, torch.ones(()), **held, scale=scale, last=True, impl="torch")
        with pytest.raises(DataDependentOutputException):  # as the definition does
            guard(grads, torch.ones(()), **held, scale=scale, impl="ref")


def test_what_does_not_fit_is_named(device):
    def refuse(message, grads=None, loss=None, impl="triton", **changes):
        grads = [torch.ones(3, device=device)] if grads is None else grads
        loss = torch.ones((), device=device) if loss is None else loss
        with pytest.raises(ValueError, match=message):
            guard(grads, loss, **{**state(1, device), **changes}, impl=impl)

    zeros = torch.zeros((), device=device)
    refuse("guard: grads must hold at least one", [])
    refuse(r"grads\[0\] must be floating, strided, on \w+(:0)?, got torch.int64", [zeros.long()])
    refuse(r"grads\[0\] must be floating, strided", [torch.ones(2, device=device).to_sparse()])
    refuse(r"grads\[0\] must be floating, strided", [torch.ones(2, device="meta")])
    flags = torch.zeros(4, dtype=torch.int32, device=device)
    refuse(r"flags must be contiguous int32 \[1\], got torch.int32 \(4,\)", flags=flags)
    refuse(r"flags must be contiguous int32 \[1\]", flags=flags[:1].long())
    refuse(
        r"flags must be contiguous int32 \[2\]",
        [torch.ones(1, device=device)] * 2,
        flags=flags[::2],
    )
    refuse(r"loss must be a 0-d float32 or .* on .*, got torch.float32 \(1,\)", loss=zeros[None])
    refuse("bad must be a 0-d bool or float32", bad=zeros.double())
    refuse("frozen must be a 0-d int64", frozen=zeros.int())
    refuse("lost must be a 0-d float32", lost=zeros.double())
    refuse("found must be a 0-d float32", found=zeros.bool())
    refuse("scale must be a 0-d float32", scale=zeros.double())
    refuse("impl must be one of", impl="cuda")
    wide = [torch.ones(2, dtype=torch.float64, device=device)]
    refuse(r'for impl="triton" grads\[0\] must be float32, bfloat16 or float16', wide)
    refuse('for impl="triton" loss must be float32, bfloat16 or float16', loss=zeros.double())

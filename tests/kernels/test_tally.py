"""tally: sums and the ring of the last steps against Python's own lists."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgan_kernels import tally
from fastgan_kernels.tally import MOST, _tally_fused

IMPLS = ["ref", "torch", "triton"]


def empty(width, rows, device):
    """Sums, ring and count."""
    sums = torch.zeros(width + 1, dtype=torch.float64, device=device)
    return sums, torch.zeros_like(sums).repeat(rows, 1), torch.zeros_like(sums[0]).long()


def scalars(values, device, dtype=torch.float32):
    return [torch.tensor(v, dtype=dtype, device=device) for v in values]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("impl", IMPLS)
def test_sums_and_ring_through_a_freeze(impl, width, rows, device):
    sums, recent, count = empty(width, rows, device)
    total, kept = [0.0] * (width + 1), [[0.0] * (width + 1)] * rows
    frozen_of = [0, 0, 0, 0, 0, 1, 2, 3, 0]
    went_in = 0
    for step, frozen in enumerate(frozen_of):
        # what is not applied may be anything, and is exact in float32 otherwise
        row = [math.nan if frozen else step + i / 8 for i in range(width)] + [1.0]
        tally(
            scalars(row[:-1], device), torch.tensor(frozen, device=device),
            sums, recent, count, impl=impl,
        )  # fmt: skip
        if frozen == 0:
            total = [a + b for a, b in zip(total, row, strict=True)]
        if frozen <= 1:
            kept = [row if i == went_in % rows else old for i, old in enumerate(kept)]
            went_in += 1
        assert sums.tolist() == total and int(count) == went_in
        assert repr(recent.tolist()) == repr(kept)
    assert went_in == 7 and total[-1] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_sums_have_64_bits(impl, dtype, device):
    sums, recent, count = empty(2, 4, device)
    values = [*scalars([0.1], device, dtype), *scalars([1.0], device)]  # of two types
    sums[1] = 2.0**40  # whose last place is 2^-12
    for _ in range(8):
        tally(values, count * 0, sums, recent, count, impl=impl)
    assert sums[1] == 2.0**40 + 8 and sums[2] == 8
    assert float(recent[3, 0]) == float(values[0].double())
    torch.testing.assert_close(float(sums[0]), 8 * float(values[0].double()), rtol=1e-15, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("start", [-1, -4, 7, 2**62, -(2**62)])
def test_no_count_leads_out_of_the_ring(impl, start, device):
    around = torch.zeros(7, 3, dtype=torch.float64, device=device)
    sums, _, count = empty(2, 3, device)
    count.fill_(start)
    tally(scalars([5.0, 6.0], device), torch.zeros_like(count), sums, around[2:5], count, impl=impl)
    assert int(count) == start + 1
    assert around[2 + start % 3].tolist() == [5.0, 6.0, 1.0]
    assert int(around.ne(0).any(1).sum()) == 1


def test_the_operator_is_registered_rightly(device):
    sums, recent, count = empty(4, 5, device)
    values = scalars([1.0, 2.0, 3.0, 4.0], device)
    torch.library.opcheck(_tally_fused, (values, count.clone(), sums, recent, count))


def test_no_graph_break_under_compile(device):
    torch._dynamo.reset()
    frozen = torch.zeros((), dtype=torch.int64, device=device)

    def step(values, sums, recent, count):
        tally(values, frozen, sums, recent, count, impl="triton")
        return sums * 2

    held, values = empty(2, 3, device), scalars([3.0, 4.0], device)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(values, *held)
    assert got.tolist() == [6.0, 8.0, 2.0] and int(held[2]) == 1


def test_the_host_reads_nothing():
    """PyTorch's own form on tensors without values, of which to read one is an error."""
    with FakeTensorMode():
        sums, recent, count = empty(2, 3, "cpu")
        values = [torch.ones(()), torch.ones((), dtype=torch.float16)]
        tally(values, count.clone(), sums, recent, count, impl="torch")
        with pytest.raises(DataDependentOutputException):  # as the definition does
            tally(values, count.clone(), sums, recent, count, impl="ref")


def test_what_does_not_fit_is_named(device):
    sums, recent, count = empty(2, 3, device)
    good = [scalars([1.0, 2.0], device), count.clone(), sums, recent, count]

    def refuse(message, place, value, impl="triton"):
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(ValueError, match=message):
            tally(*arguments, impl=impl)

    refuse(f"tally: values must be 1 to {MOST} tensors, got 0", 0, [])
    refuse(f"values must be 1 to {MOST} tensors, got 65", 0, scalars([1.0] * 65, device))
    refuse(r"values\[1\] must be contiguous .*float64 \(\)", 0, [good[0][0], sums])
    refuse(r"values\[0\] must be contiguous float32 or", 0, [count, good[0][0]])
    refuse(r"sums must be contiguous float64 \(2,\)", 0, good[0][:1])
    refuse("frozen must be contiguous int64", 1, sums[0])
    refuse("sums must be contiguous float64", 2, sums.float())
    refuse(r"recent must have shape \[R, K \+ 1\], got \(0, 3\)", 3, recent[:0])
    refuse(r"recent must have shape \[R, K \+ 1\], got \(3,\)", 3, sums)
    refuse(r"recent must be contiguous float64 \(3, 3\)", 3, recent.t())
    refuse(
        r"recent must be contiguous float64 \(3, 3\) .*got torch.float64 \(3, 2\)", 3, recent[:, 1:]
    )
    refuse("count must be contiguous int64", 4, count.int())
    refuse(r"count must be contiguous int64 \(\) on", 4, torch.zeros((), device="meta").long())
    refuse("impl must be one of", 0, good[0], "cuda")

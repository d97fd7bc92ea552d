"""gather_u8 against plain indexing in float64, the kernel against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan_kernels import _launch, gather_u8

IMAGES = torch.randint(0, 256, (20, 6, 6, 3), dtype=torch.uint8)
INDEX = torch.tensor([3, 3, 19, 0, 7])


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # one rounding of a value up to 1, after three float32 ones
    [
        (torch.float64, 1e-15),
        (torch.float32, 4 * 2**-24),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-11),
    ],
)
@pytest.mark.parametrize("flips", [None, [True, False, False, True, True]])
def test_values_layout_and_flip(value_range, dtype, tolerance, flips):
    flip = None if flips is None else torch.tensor(flips)
    got = gather_u8(IMAGES, INDEX, flip, dtype=dtype, value_range=value_range)
    expected = IMAGES[INDEX].double() / 255 * (value_range[1] - value_range[0]) + value_range[0]
    for i, flipped in enumerate(flips or []):
        if flipped:
            expected[i] = expected[i].flip(1)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert (got.permute(0, 2, 3, 1).double() - expected).abs().max() <= tolerance


def test_the_ends_of_the_range_are_exact():
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    got = gather_u8(ends.contiguous(), torch.arange(2), dtype=torch.float32)
    assert got[0].unique().tolist() == [-1.0] and got[1].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGES.float(), INDEX), "images must be uint8"),
        ((IMAGES[..., :2], INDEX), r"\[N, H, W, 3\]"),
        ((IMAGES, INDEX.short()), "index must be int64 or int32"),
        ((IMAGES, INDEX[None]), "index must be int64 or int32"),
        ((IMAGES, INDEX, torch.ones(5)), r"flip must be bool \[5\]"),
        ((IMAGES, INDEX, torch.ones(4, dtype=torch.bool)), r"flip must be bool \[5\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gather_u8(*arguments)


def equal_to_the_definition(images, index, flip, dtype, value_range):
    got = gather_u8(images, index, flip, dtype=dtype, value_range=value_range, impl="triton")
    expected = gather_u8(images, index, flip, dtype=dtype, value_range=value_range, impl="ref")
    assert got.dtype == dtype and got.stride() == expected.stride()
    if dtype == torch.bfloat16 and _launch.INTERPRETED:  # which cuts bfloat16 off: one unit
        assert ((got - expected).abs() <= 2**-7 * expected.abs()).all()
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_the_kernel_gives_the_bits_of_the_definition(dtype, value_range, flips, index_type, device):
    images = torch.randint(0, 256, (9, 31, 29, 3), dtype=torch.uint8, device=device)  # two programs
    index = torch.tensor([3, 3, 8, 0, 7], device=device, dtype=index_type)
    flip = torch.tensor([True, False, False, True, True], device=device) if flips else None
    equal_to_the_definition(images, index, flip, dtype, value_range)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_the_kernel_on_drawn_shapes(height, width, batch, flips):
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(height * 41 + width)
    images = torch.randint(0, 256, (7, height, width, 3), dtype=torch.uint8, device=device)
    index = torch.randint(0, 7, (batch,), device=device)
    flip = torch.rand(batch, device=device) < 0.5 if flips else None
    equal_to_the_definition(images, index, flip, torch.float32, (-1.0, 1.0))


def test_an_index_outside_of_the_set_does_not_pass_for_an_image(device):
    images = IMAGES.to(device)
    got = gather_u8(images, torch.tensor([20, 4, -1], device=device), impl="triton")
    assert got.isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert torch.equal(got[1:2], gather_u8(images, torch.tensor([4], device=device), impl="ref"))
    with pytest.raises(IndexError):
        gather_u8(IMAGES, torch.tensor([20]))


def test_an_empty_batch_is_empty(device):
    got = gather_u8(
        IMAGES.to(device), torch.empty(0, dtype=torch.int64, device=device), impl="triton"
    )
    assert got.shape == (0, 3, 6, 6)


def test_what_the_kernel_does_not_take_is_named(device):
    images = IMAGES.to(device)
    index = INDEX.to(device)
    with pytest.raises(ValueError, match="images must be contiguous"):
        gather_u8(images[:, :, ::2], index, impl="triton")
    with pytest.raises(ValueError, match="index must be contiguous"):
        gather_u8(images, index.repeat(2)[::2], impl="triton")
    with pytest.raises(
        ValueError, match="dtype must be float32, bfloat16 or float16, got torch.float64"
    ):
        gather_u8(images, index, dtype=torch.float64, impl="triton")
    with pytest.raises(ValueError, match="gather_u8: impl must be one of"):
        gather_u8(images, index, impl="cuda")


@pytest.mark.parametrize("flips", [False, True])
def test_the_operator_is_registered_rightly(flips, device):
    index = INDEX.to(device)
    flip = torch.ones(5, dtype=torch.bool, device=device) if flips else None
    arguments = (IMAGES.to(device), index, flip, torch.float32, -1.0, 1.0)
    torch.library.opcheck(torch.ops.fastgan_kernels.gather_u8.default, arguments)


def test_no_graph_break_under_compile(device):
    torch._dynamo.reset()
    images, index = IMAGES.to(device), INDEX.to(device)
    call = torch.compile(
        lambda images, index: gather_u8(images, index, impl="triton") * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(call(images, index), gather_u8(images, index, impl="triton") * 2)

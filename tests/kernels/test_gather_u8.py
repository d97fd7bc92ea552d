"""gather_u8 against plain indexing in float64."""

import pytest
import torch

from fastgan_kernels import gather_u8

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
        ((IMAGES, INDEX.int()), "index must be int64"),
        ((IMAGES, INDEX[None]), "index must be int64"),
        ((IMAGES, INDEX, torch.ones(5)), r"flip must be bool \[5\]"),
        ((IMAGES, INDEX, torch.ones(4, dtype=torch.bool)), r"flip must be bool \[5\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gather_u8(*arguments)

"""MS-SSIM is what a form written from the papers says, from 32 px on; and a set's diversity is the
mean of it over pairs that a seed draws.
"""

import math

import numpy as np
import pytest
import torch

from fastgan.metrics import ms_ssim as module
from fastgan.metrics.ms_ssim import diversity, ms_ssim


def pictures(count=8, size=64, seed=0):
    """uint8 [count, size, size, 3]: a colour in each quarter of a quarter, and some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(40, 216, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (coarse + random.integers(-20, 21, coarse.shape)).astype(np.uint8)


def slow_ms_ssim(a, b):
    """Of uint8 [H, W, 3]: Wang et al. 2003 and 2004 with a 2-d window laid on every place."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    value = 1.0
    for scale, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        if scale:
            a, b = ((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (a, b))
        size = min(11, *a.shape[:2])
        at = np.arange(size) - (size - 1) / 2
        line = np.exp(-(at**2) / (2 * (1.5 * size / 11) ** 2))
        window = np.outer(line, line)[:, :, None] / line.sum() ** 2
        ssim, structure = [], []
        for y in range(a.shape[0] - size + 1):
            for x in range(a.shape[1] - size + 1):
                p, q = a[y : y + size, x : x + size], b[y : y + size, x : x + size]
                m, n = (window * p).sum((0, 1)), (window * q).sum((0, 1))
                v, w = (window * (p - m) ** 2).sum((0, 1)), (window * (q - n) ** 2).sum((0, 1))
                both = (window * (p - m) * (q - n)).sum((0, 1))
                cs = (2 * both + 58.5225) / (v + w + 58.5225)
                structure.append(cs)
                ssim.append(cs * (2 * m * n + 6.5025) / (m**2 + n**2 + 6.5025))
        value *= max(np.mean(ssim if scale == 4 else structure), 0) ** weight
    return value


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (48, 80), (176, 160)])
def test_it_is_what_the_papers_say(height, width):
    a = pictures(1, 176)[:, :height, :width]
    noise = np.random.default_rng(1).integers(-30, 31, a.shape)
    b = np.clip(a[:, ::-1] * 0.2 + a * 0.8 + noise, 0, 255).astype(np.uint8)
    (found,) = ms_ssim(a, b)
    assert 0.1 < found < 0.95
    assert found == pytest.approx(slow_ms_ssim(a[0], b[0]), abs=1e-9)


def test_windows_are_those_of_the_published_code():
    # mmagic and ProGAN at 64 px: 11, 11, 11, 8, 4 pixels, and a deviation in proportion
    line = module._window(64, 11)[0, :11]
    assert line[5] / line[4] == pytest.approx(math.exp(1 / (2 * 1.5**2)))
    small = module._window(4, 4)
    assert small.shape == (1, 4) and float(small.sum()) == pytest.approx(1)
    assert float(small[0, 1] / small[0, 0]) == pytest.approx(math.exp(2 / (2 * (6 / 11) ** 2)))


@pytest.mark.parametrize("size", [32, 40, 56, 64, 112, 256])
def test_the_same_images_are_1_at_every_size(size):
    same = pictures(3, size)
    assert ms_ssim(same, same) == pytest.approx(1, abs=1e-12)
    assert diversity(same[:1].repeat(6, 0)) == pytest.approx(1, abs=1e-12)


def test_it_is_symmetric_and_of_each_pair_alone():
    a, b = pictures(9, seed=1), pictures(9, seed=2)
    found = ms_ssim(a, b)
    assert np.array_equal(found, ms_ssim(b, a)) and len(set(found)) > 1
    assert np.array_equal(found[3:4], ms_ssim(a[3:4], b[3:4]))


def test_what_is_opposite_counts_as_0():
    a = pictures(1)
    assert ms_ssim(a, 255 - a) == 0


def test_noise_is_below_images_and_few_images_over_and_over_are_above():
    real = pictures(64) // 2 + pictures(1, seed=1) // 2  # with something in common, as faces have
    noise = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
    softer = (128 + (real.astype(np.float64) - 128) * 0.1).astype(np.uint8)
    assert diversity(noise) < 0.1 < diversity(real)
    assert diversity(real[:4].repeat(16, 0)) > diversity(real) + 0.1
    assert diversity(softer) > diversity(real) + 0.1


def test_it_is_the_mean_over_pairs_each_image_in_one():
    real = pictures(7)
    order = np.random.default_rng(3).permutation(7)
    pairs = ms_ssim(real[order[[0, 2, 4]]], real[order[[1, 3, 5]]])
    assert diversity(real, seed=3) == pairs.mean()


def test_neighbours_are_no_pairs():
    twins = pictures(32).repeat(2, 0)
    assert diversity(twins) < 0.5


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    real = pictures(16)
    assert diversity(real, seed=1) == diversity(real, seed=1) != diversity(real, seed=2)


def test_the_memory_layout_and_the_kind_of_array_do_not_matter():
    real = pictures(8)
    planes = torch.from_numpy(real).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for same in (planes, np.asfortranarray(real), real.repeat(2, 0)[::2]):
        assert diversity(same) == diversity(real)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (pictures(1), "diversity: images must be 2 images or more, got 1"),
        (pictures()[0], r"diversity: images must be uint8 \[N, H, W, 3\], got uint8 \[64"),
        (pictures() / 255, r"diversity: images must be uint8 \[N, H, W, 3\], got float64"),
        (pictures(size=16), "diversity: images must be of 32 px or more a side"),
    ],
)
def test_other_arrays_are_refused(images, says):
    with pytest.raises(ValueError, match=says):
        diversity(images)


def test_pairs_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"ms_ssim: b must be \[8, 64, 64, 3\] as a is, got \[7"):
        ms_ssim(pictures(), pictures(7))
    with pytest.raises(ValueError, match="ms_ssim: b must be uint8"):
        ms_ssim(pictures(), pictures().astype(np.int64))


def test_each_scale_is_torchmetrics_where_it_is_installed():
    """At 256 px, on windows that are inside: torchmetrics' last scale takes reflected borders in,
    too, which the published code (TensorFlow's) does not.
    """
    ssim = pytest.importorskip("torchmetrics.functional.image.ssim")
    random = np.random.default_rng(4)
    a, b = random.integers(0, 256, (2, 3, 256, 256, 3), np.uint8)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    ours = [module._planes(x) for x in (a, b)]
    theirs = [torch.from_numpy(x) for x in ours]
    options = {"sigma": 1.5, "kernel_size": 11, "data_range": 255.0}
    for scale in range(5):
        if scale:
            ours = [module._half(x) for x in ours]
            theirs = [torch.nn.functional.avg_pool2d(x, 2) for x in theirs]
        _, contrast = ssim._ssim_update(*theirs, return_contrast_sensitivity=True, **options)
        _, full = ssim._ssim_update(*theirs, return_full_image=True, **options)
        similar, structure = module._ssim(*ours)
        np.testing.assert_allclose(structure, contrast, atol=1e-12)
        np.testing.assert_allclose(similar, full[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-12)

"""The sliced Wasserstein distance is what a slow form written from its definition says, sees
structure and neither contrast nor casts, and gives the same bits for a seed.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgan.metrics import swd as module
from fastgan.metrics.swd import MMAGIC, PROGAN, RealSet, swd


def pictures(count=48, size=32, seed=0):
    """uint8 [count, size, size, 3]: four by four patches of colour, and some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(60, 196, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (coarse + random.integers(-12, 13, coarse.shape)).astype(np.uint8)


REAL, OTHER = pictures(seed=1), pictures(seed=2)
# cells of 1/4096 standard deviation, which the rounding of many values averages out
TOLERANCE = 3e-4


KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def filtered(plane):
    """[H, W] through the 5x5 binomial filter, mirrored, pixel by pixel."""
    height, width = plane.shape

    def mirror(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    out = np.zeros((height, width))
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            rows = [mirror(y + dy, height) for y in range(height)]
            columns = [mirror(x + dx, width) for x in range(width)]
            out += KERNEL[dy + 2, dx + 2] * plane[np.ix_(rows, columns)]
    return out


def slow_pyramid(plane, levels):
    """Laplacian levels of float [H, W], the finest first."""
    bands = []
    for _ in range(levels - 1):
        half = filtered(plane)[::2, ::2]
        zeros = np.zeros_like(plane)
        zeros[::2, ::2] = half
        bands.append(plane - 4 * filtered(zeros))
        plane = half
    return [*bands, plane]


def zero_filtered(plane, step):
    """The same with zeros around, at every `step`th pixel."""
    height, width = plane.shape
    padded = np.zeros((height + 4, width + 4))
    padded[2:-2, 2:-2] = plane
    return np.array(
        [
            [(KERNEL * padded[y : y + 5, x : x + 5]).sum() for x in range(0, width, step)]
            for y in range(0, height, step)
        ]
    )


def slow_mmagic_pyramid(plane, levels):
    """mmagic's: of pixels from -1 to 1, down by a convolution of stride 2, up by repeated pixels
    and a convolution; four levels at most.
    """
    bands, plane = [], (plane - 127.5) / 127.5
    for _ in range(levels - 1):
        half = zero_filtered(plane, 2)
        bands.append(plane - zero_filtered(half.repeat(2, 0).repeat(2, 1), 1))
        plane = half
    return [*bands, plane]


def slow_swd(real, fake, levels, seed, pyramid=slow_pyramid, less=0):
    """Sorted projections of standardised patches, in float64; positions and directions from the
    streams that the module documents by its code.
    """
    found = {}
    for level in range(levels):
        rows = []
        for role, images in enumerate((real, fake)):
            random = np.random.default_rng([seed, level, role])
            side = images.shape[1] >> level
            top = random.integers(0, side - 6, (len(images), 128), np.int16)
            left = random.integers(0, side - 6, (len(images), 128), np.int16)
            patches = []
            for n, image in enumerate(images.astype(np.float64)):
                bands = [pyramid(image[..., c], levels)[level] for c in range(3)]
                for y, x in zip(top[n], left[n], strict=True):
                    patches.append([band[y : y + 7, x : x + 7] for band in bands])
            array = np.array(patches)
            for c in range(3):
                array[:, c] = (array[:, c] - array[:, c].mean()) / array[:, c].std(ddof=less)
            rows.append(array.reshape(len(array), -1))
        random = np.random.default_rng([seed, level, 2])
        directions = random.standard_normal((512, 147))
        directions /= np.sqrt((directions**2).sum(1, keepdims=True))
        a, b = (np.sort(set_ @ directions.T, axis=0) for set_ in rows)
        found[real.shape[1] >> level] = 1e3 * np.abs(a - b).mean()
    return found


@pytest.mark.parametrize(("size", "levels"), [(32, 2), (64, 3), (20, 1), (40, 2)])
def test_it_is_what_the_definition_says(size, levels):
    real, fake = pictures(12, size, 1), pictures(12, size, 2) // 2 * 2
    found, wanted = swd(real, fake, seed=5), slow_swd(real, fake, levels, 5)
    assert list(found.levels) == [size >> level for level in range(levels)]
    for side, value in wanted.items():
        assert found.levels[side] == pytest.approx(value, rel=TOLERANCE)
    assert found.mean == pytest.approx(sum(wanted.values()) / levels, rel=TOLERANCE)


def test_mmagics_form_is_what_its_definition_says():
    real, fake, levels = pictures(6, 64, 1) // 2, pictures(6, 64, 2) // 4 * 2, 3
    found = swd(real, fake, seed=5, form=MMAGIC)
    wanted = slow_swd(real, fake, levels, 5, slow_mmagic_pyramid, less=1)
    assert list(found.levels) == list(wanted)
    for side, value in wanted.items():
        assert found.levels[side] == pytest.approx(value, rel=TOLERANCE)
    # and not what the other form says, nor the same with mirrored borders
    for form in (PROGAN, replace(MMAGIC, border="reflect")):
        other = swd(real, fake, seed=5, form=form).levels
        assert max(abs(other[side] / wanted[side] - 1) for side in wanted) > 30 * TOLERANCE
    assert RealSet(real, seed=5, form=MMAGIC).swd(fake) == found


def test_mmagics_pyramid_pixel_by_pixel():
    image = pictures(1, 64)
    # values below 256 in float32: two passes of 5 products and sums on the way down, twice, and up
    limit = 60 * 256 * 2.0**-24
    for level in range(3):
        wanted = [slow_mmagic_pyramid(image[0, ..., c].astype(float), 3)[level] for c in range(3)]
        wanted = 127.5 * np.stack(wanted, -1)
        assert np.abs(module._band(image, level, 3, MMAGIC)[0] - wanted).max() < limit
        # borders mirrored, black beyond them, and zeros between pixels on the way up, if there is
        mistakes = [{"border": "reflect"}, {"zero": 0.0}, {"repeats": False}]
        for change in mistakes[: 2 if level == 2 else 3]:
            other = module._band(image, level, 3, replace(MMAGIC, **change))[0]
            assert np.abs(other - wanted).max() > 1000 * limit, change


def test_mmagics_form_has_four_levels_at_most_and_an_unbiased_deviation():
    assert module._levels(128, 128, MMAGIC.most) == module._levels(128, 128, None) == 4
    assert module._levels(256, 256, MMAGIC.most) == 4 and module._levels(256, 256, None) == 5
    random = np.random.default_rng(0)
    with module._threads() as threads:
        patches = module._patches(REAL[:1], 0, 2, random, threads, MMAGIC, list)
    colours = patches.reshape(128, 3, -1).transpose(1, 0, 2).reshape(3, -1).astype(np.float64)
    # of 6,272 values each the other deviation is 8e-5 less; float32 has 6e-8
    assert np.abs(colours.std(1, ddof=1) - 1).max() < 1e-6


def test_progress_is_told_of_both_sets():
    told = []
    RealSet(REAL, progress=told.append).swd(OTHER, progress=told.append)
    blocks = [48 * part // 16 for part in range(16)]  # eight of directions in each of two levels
    patches = [0, 0], [24, 24]  # cut and standardised, of CHUNK images
    assert told == 2 * [*patches[0], *blocks[:8], *patches[1], *blocks[8:]]


def test_the_area_between_counts_is_the_distance_of_a_shift():
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * module.GRID
    for shift in (0.25, 3.0, 1000.5):
        a, b = module._count(values.copy()), module._count(values + np.float32(shift))
        assert module._apart(a, b) / len(values) == pytest.approx(shift, rel=0.02)
        assert module._apart(b, a) == module._apart(a, b)
    assert module._apart(a, a) == 0


def test_values_too_far_out_count_at_the_border():
    far = module.FARTHEST * module.GRID
    first, counts = module._count(np.float32([-1e9, 0, 1e9]))
    assert first == -far and len(counts) == 2 * far + 1
    assert counts.sum() == 3 and counts[0] == counts[far] == counts[-1] == 1


def test_levels_add_up_to_the_image():
    images = pictures(2, 64)
    total = module._band(images, 2, 3)
    for level in (1, 0):
        total = module._band(images, level, 3) + module._up(total)
    assert np.abs(total - images).max() < 1e-3


def test_one_set_with_itself_is_at_the_floor_and_others_are_above():
    itself, alike = swd(REAL, REAL), swd(REAL, OTHER)
    assert 0 < itself.mean < alike.mean
    coarse = swd(REAL, OTHER // 64 * 64)
    noise = swd(REAL, np.random.default_rng(3).integers(0, 256, REAL.shape, np.uint8))
    assert alike.mean < coarse.mean < noise.mean


def test_the_floor_falls_with_the_count():
    few, many = (swd(pictures(n, 32, 1), pictures(n, 32, 2)).mean for n in (16, 256))
    assert few / many == pytest.approx(4, rel=0.3)  # the root of 256 / 16


def test_it_is_symmetric_up_to_the_places_of_patches():
    fake = OTHER // 32 * 32
    there, back = swd(REAL, fake), swd(fake, REAL)
    assert there.mean == pytest.approx(back.mean, rel=0.05)


def test_a_shift_or_scale_of_one_set_is_not_seen_as_each_is_standardised():
    same = swd(REAL, OTHER)
    for changed in (OTHER + np.uint8(30), OTHER + np.uint8([0, 20, 40]), OTHER // 2):
        assert swd(REAL, changed).mean == pytest.approx(same.mean, rel=0.02)


def test_a_seed_gives_the_same_bits_and_another_seed_others():
    assert swd(REAL, OTHER, seed=3) == swd(REAL, OTHER, seed=3) != swd(REAL, OTHER, seed=4)


def test_a_real_set_is_compared_with_many(monkeypatch):
    kept = RealSet(REAL, seed=3)
    assert kept.swd(OTHER) == swd(REAL, OTHER, seed=3)
    assert kept.swd(REAL) == swd(REAL, REAL, seed=3)
    assert kept.swd(OTHER) == swd(REAL, OTHER, seed=3)  # once more: nothing was used up
    monkeypatch.setattr(module, "CHUNK", 7)
    assert kept.swd(OTHER).mean == pytest.approx(swd(REAL, OTHER, seed=3).mean, rel=1e-6)


def test_the_memory_layout_and_the_kind_of_array_do_not_matter(tmp_path):
    wanted = swd(REAL, OTHER)
    np.save(tmp_path / "images.npy", OTHER)
    planes = torch.from_numpy(OTHER).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for same in (planes, np.asfortranarray(OTHER), mapped, OTHER.repeat(2, 0)[::2]):
        assert swd(REAL, same) == wanted


def test_images_that_are_all_one_colour_have_a_distance():
    flat = np.full_like(REAL, 90)
    value = swd(REAL, flat)
    assert all(np.isfinite(v) and v > 300 for v in value.levels.values())
    assert swd(flat, flat).mean == 0


@pytest.mark.parametrize(
    ("real", "fake", "says"),
    [
        (REAL[0], OTHER, r"swd: real must be uint8 \[N, H, W, 3\], got uint8 \[32, 32, 3\]"),
        (REAL, OTHER.astype(np.float32), r"swd: fake must be uint8 .* got float32 \["),
        (REAL, OTHER[..., :1], r"swd: fake must be uint8 \[N, H, W, 3\], got uint8 \[48"),
        (REAL, OTHER[:9], "swd: fake must be as many images as real, 48, got 9"),
        (REAL, OTHER[:, :16], r"swd: fake must be \[32, 32, 3\] .* got \[16, 32, 3\]"),
        (REAL[:0], OTHER, "swd: real must be 1 images or more, got 0"),
        (REAL[:, :12], OTHER[:, :12], "swd: real must be of 16 px or more a side"),
    ],
)
def test_other_arrays_are_refused(real, fake, says):
    with pytest.raises(ValueError, match=says):
        swd(real, fake)


def test_a_size_that_cannot_be_halved_is_refused():
    odd = pictures(4, 64)[:, :50, :50]
    with pytest.raises(ValueError, match=r"multiples of 2 for 2 levels, got 33 x 50"):
        swd(odd[:, :33], odd[:, :33])
    assert list(swd(odd, odd).levels) == [50, 25]


def test_a_real_set_refuses_others_by_its_own_name():
    kept = RealSet(REAL[:8])
    with pytest.raises(ValueError, match=r"RealSet\.swd: fake must be as many .* 8, got 9"):
        kept.swd(OTHER[:9])
    with pytest.raises(ValueError, match=r"RealSet\.swd: fake must be \[32, 32, 3\]"):
        kept.swd(pictures(8, 64))
    with pytest.raises(ValueError, match="RealSet: real must be uint8"):
        RealSet(REAL / 255)

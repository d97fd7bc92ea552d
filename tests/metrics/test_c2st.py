"""The classifier two-sample test: by chance for two halves of a set, never wrong about noise, blind
to how pixels are laid out and rounded.
"""

import math

import numpy as np
import pytest
import torch

from fastgan.metrics import c2st as module
from fastgan.metrics.c2st import c2st, wilson


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)
    monkeypatch.setattr(module, "BATCH", 64)


def pictures(count=400, size=16, seed=0):
    """uint8 [count, size, size, 3]: colours in four by four fields, and some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(40, 216, (count, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    return (coarse + random.integers(-20, 21, coarse.shape)).astype(np.uint8)


REAL, OTHER = pictures(seed=1), pictures(seed=2)
NOISE = np.random.default_rng(3).integers(0, 256, REAL.shape, np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_two_sets_of_the_same_kind_are_told_apart_by_chance_alone(seed):
    found = c2st(REAL, OTHER, seed=seed)
    assert found.count == 400  # half of 2 x 400
    # 4 standard deviations of a fair coin
    assert found.accuracy == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(400))


def test_noise_is_always_told():
    found = c2st(REAL, NOISE)
    assert found.accuracy == 1.0 == found.high and found.low == pytest.approx(0.99, abs=0.001)


def test_a_finer_difference_is_told_less_often():
    blurred = OTHER.copy()
    blurred[:, 1:] = (blurred[:, 1:].astype(int) + blurred[:, :-1]) // 2
    some = np.where(np.arange(400)[:, None, None, None] % 2, OTHER, blurred)
    assert c2st(REAL, blurred).accuracy > 0.95
    assert 0.6 < c2st(REAL, some).accuracy < 0.85


@pytest.mark.parametrize("how", ["down", "even"])
def test_rounding_is_not_seen(how):
    random = np.random.default_rng(4)
    fake = OTHER - random.integers(0, 2, OTHER.shape, np.uint8) if how == "down" else OTHER // 2 * 2
    assert c2st(REAL, fake).accuracy == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(400))


def test_the_memory_layout_and_the_kind_of_array_do_not_matter(tmp_path):
    wanted = c2st(REAL, OTHER)
    np.save(tmp_path / "images.npy", OTHER)
    planes = torch.from_numpy(OTHER).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for same in (planes, np.asfortranarray(OTHER), mapped):
        assert c2st(REAL, same) == wanted
    assert c2st(np.asfortranarray(REAL), OTHER) == wanted


def weights(real, fake, seed):
    """The trained network's, and the result."""
    kept = []
    right = module._right

    def spy(network, view, rows):
        kept.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        return right(network, view, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_right", spy)
        found = c2st(real, fake, seed=seed)
    return kept[0], found


def test_a_seed_gives_the_same_bits_whatever_was_drawn_before():
    (first, one), _ = weights(REAL, OTHER, 1), torch.rand(7)
    before = torch.get_rng_state()
    second, two = weights(REAL, OTHER, 1)
    assert torch.equal(torch.get_rng_state(), before)  # and nothing of the caller's is used up
    assert torch.equal(first, second) and one == two
    assert not torch.equal(first, weights(REAL, OTHER, 2)[0])


def test_no_held_out_image_is_trained_on(monkeypatch):
    seen = {"train": set(), "test": set()}
    for name, kind in (("_train", "train"), ("_right", "test")):
        original = getattr(module, name)

        def spy(network, view, rows, *rest, original=original, kind=kind):
            for label in (0, 1):
                assert len(set(rows[label])) == len(rows[label]) == 40
                seen[kind] |= {(label, row) for row in rows[label]}
            return original(network, view, rows, *rest)

        monkeypatch.setattr(module, name, spy)
    c2st(REAL[:80], OTHER[:80])
    assert not seen["train"] & seen["test"] and len(seen["train"] | seen["test"]) == 160


def test_of_the_larger_set_as_many_are_drawn_as_the_other_has():
    assert c2st(REAL, OTHER[:65]).count == 2 * 33  # 32 train
    assert c2st(REAL[:64], NOISE).count == 64


@pytest.mark.parametrize("size", [20, 28, 40, 56])
def test_it_works_at_every_size(size, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 32)
    real = pictures(64, size)
    noise = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
    assert c2st(real, noise).accuracy > 0.9


@pytest.mark.gpu
def test_it_works_on_a_gpu():
    assert c2st(REAL, NOISE, device="cuda").accuracy == 1.0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # R's prop.test(correct = FALSE), which is Wilson's
    [(50, 100, 0.4038, 0.5962), (81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611)],
)
def test_the_interval_is_wilsons(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("real", "fake", "says"),
    [
        (REAL[:63], OTHER, "c2st: real must be 64 images or more, got 63"),
        (
            REAL,
            OTHER[..., 0],
            r"c2st: fake must be uint8 \[N, H, W, 3\], got uint8 \[400, 16, 16\]",
        ),
        (REAL, OTHER / 255, r"c2st: fake must be uint8 \[N, H, W, 3\], got float64"),
        (REAL, pictures(64, 32), r"c2st: fake must be \[16, 16, 3\] .* got \[32, 32, 3\]"),
        (REAL[:, :8], OTHER[:, :8], "c2st: real must be of 16 px or more a side"),
    ],
)
def test_other_arrays_are_refused(real, fake, says):
    with pytest.raises(ValueError, match=says):
        c2st(real, fake)

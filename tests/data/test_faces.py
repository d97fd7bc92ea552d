"""The drawn faces: reproducible, steered by their factors, alike at every size, and varied."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastgan.data import face_paint, faces
from fastgan.data.faces import FACTOR_NAMES, FACTORS, draw_faces, factors, render


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def face(**values: float) -> np.ndarray:
    """A face of mid-range factors, upright and centred, without extras: float32 [1, factors]."""
    plain = {"hair_style": 1.5, "light_strength": 0.3, "blush": 0.0, "hair_grey": 0.0}
    row = {name: (low + high) / 2 for name, (low, high, _) in FACTORS.items()}
    return np.array([list((row | plain | values).values())], np.float32)


def patch(image: np.ndarray, x: float, y: float, radius: int = 2) -> np.ndarray:
    """Mean colour [3] about a point given in shares of the picture."""
    row, col = int(y * len(image)), int(x * len(image))
    here = image[row - radius : row + radius + 1, col - radius : col + radius + 1]
    return here.reshape(-1, 3).mean(0)


# In shares of the picture, for `face()`: worked out from the layout, not from the painters.
EYES = ((0.385, 0.5), (0.615, 0.5))
CHEEK, FOREHEAD, BRIDGE, CORNER = (0.35, 0.63), (0.5, 0.38), (0.5, 0.486), (0.03, 0.03)


def test_a_row_depends_on_its_seed_and_index_only() -> None:
    rows = factors(1000, seed=7)
    assert np.array_equal(factors(100, seed=7), rows[:100])
    assert np.array_equal(draw_faces(3, 16, 7, start=900), render(rows[900:903], 16))
    assert not (factors(100, seed=8) == rows[:100]).any(axis=1).any()


def test_factors_fill_their_ranges() -> None:
    rows = factors(4000)
    low, high = np.array([bounds[:2] for bounds in FACTORS.values()], np.float32).T
    assert rows.dtype == np.float32 and rows.shape == (4000, len(FACTOR_NAMES))
    assert (rows >= low).all() and (rows <= high).all()
    assert (rows.min(0) < low + 0.01 * (high - low)).all()
    assert (rows.max(0) > low + 0.95 * (high - low)).all()
    tenths = np.histogram(rows[:, FACTOR_NAMES.index("skin_tone")], 10, (0, 1))[0]
    assert tenths.min() > 320  # 400 expected; 4 standard deviations are 76


@pytest.mark.parametrize("size", [33, 64, 200])
def test_same_bits_for_any_tiles_threads_and_start(
    size: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    whole = draw_faces(9, size, seed=3)
    assert torch.get_num_threads() == 2, "the caller's setting is left alone"
    assert whole.dtype == np.uint8 and whole.shape == (9, size, size, 3)
    torch.set_num_threads(1)
    assert np.array_equal(draw_faces(9, size, seed=3), whole)
    assert np.array_equal(draw_faces(4, size, seed=3, start=5), whole[5:])
    monkeypatch.setattr(faces, "_TILE_IMAGES", 2)
    monkeypatch.setattr(faces, "_TILE_PIXELS", 5000)
    monkeypatch.setattr(faces, "_BLOCK_IMAGES", 5)
    assert np.array_equal(draw_faces(9, size, seed=3), whole)


NEEDS: dict[str, dict[str, float]] = {
    "hair_length": {"hair_style": 3.5},
    "hair_part": {"hair_style": 2.5},
    "glasses_shape": {"glasses": 1},
    "glasses_tone": {"glasses": 1},
}


@pytest.mark.parametrize("name", FACTOR_NAMES)
def test_every_factor_changes_the_picture(name: str) -> None:
    low, high, _ = FACTORS[name]
    needs = NEEDS.get(name, {})
    a, b = render(np.concatenate([face(**needs | {name: low}), face(**needs | {name: high})]), 64)
    change = np.abs(a.astype(int) - b).max(-1)
    assert (change > 8).sum() >= 12, "a change that nobody would see"


def test_factors_stay_in_their_place() -> None:
    plain = render(face(), 128)[0]
    for name, value, rows in (
        ("cloth_hue", 0.1, slice(0, 96)),
        ("mouth_open", 1.0, slice(0, 70)),
        ("eye_tone", 1.0, slice(78, 128)),
        ("hair_tone", 1.0, slice(76, 128)),
    ):
        other = render(face(**{name: value}), 128)[0]
        assert np.array_equal(plain[rows], other[rows]), name
        assert not np.array_equal(plain, other), name


def test_eyes_are_where_they_should_be() -> None:
    image = render(face(gaze_x=0, gaze_y=0, eye_lid=0, eye_tone=0.8), 256)[0]
    for x, y in EYES:
        assert patch(image, x, y, 1).max() < 40, "pupil"
        iris = patch(image, x + 0.036, y, 0)
        assert iris[2] > iris[0] + 30, "a blue ring about it"
        assert patch(image, x - 0.055, y, 0).min() > 190, "the white beside it"
    skew = np.abs(image.astype(int) - image[:, ::-1]).max(-1)[148:]
    assert np.mean(skew > 3) < 0.002, "below the hair an upright face is symmetrical"


def test_skin_gets_lighter_with_skin_tone() -> None:
    tones = np.linspace(0, 1, 12)
    images = render(np.concatenate([face(skin_tone=t) for t in tones]), 96)
    for x, y in (CHEEK, FOREHEAD):
        light = np.array([patch(image, x, y).mean() for image in images])
        assert (np.diff(light) > 3).all()
        assert light[0] < 90 and light[-1] > 200


def test_skin_stands_out_from_hair_and_background() -> None:
    image = render(face(skin_tone=0.8, hair_tone=0.1, background_hue=0.15), 128)[0]
    skin = patch(image, *FOREHEAD)
    assert skin.mean() - patch(image, 0.5, 0.2).mean() > 80
    corner = patch(image, *CORNER)
    assert skin[0] > skin[2] + 30 and corner[2] > corner[0] + 30


def test_glasses_come_on_with_their_frame_across_the_nose() -> None:
    off, on = render(np.concatenate([face(glasses=0.6), face(glasses=0.8, glasses_tone=0)]), 256)
    assert patch(off, *BRIDGE, 0).mean() > 110
    assert patch(on, *BRIDGE, 0).mean() < 45
    changed = np.argwhere((off != on).any(-1))
    rows, cols = changed[:, 0], changed[:, 1]
    assert abs(rows.mean() - 128) < 6 and abs(cols.mean() - 127.5) < 1
    assert rows.min() > 96 and rows.max() < 160


def test_a_face_looks_the_same_at_every_size() -> None:
    large = draw_faces(24, 512).astype(np.float32)
    for size in (64, 128):
        k = 512 // size
        small = large.reshape(24, size, k, size, k, 3).mean((2, 4))
        error = np.abs(small - draw_faces(24, size)).mean((1, 2, 3))
        # measured 1.1 and 0.5 on average, 1.7 and 0.7 at worst; with hard edges 4.4 and 2.2
        assert error.max() < 160 / size
        assert error.mean() < 90 / size


def test_no_two_faces_are_alike() -> None:
    flat = draw_faces(256, 32).reshape(256, -1).astype(np.float64)
    square = (flat * flat).sum(1)
    apart = np.sqrt(np.maximum(square[:, None] + square - 2 * flat @ flat.T, 0) / flat.shape[1])
    np.fill_diagonal(apart, np.inf)
    assert apart.min() > 12


def test_there_is_something_to_learn() -> None:
    images = draw_faces(512, 64).astype(np.float32)
    spread = images.std(0)
    assert spread.mean() > 38
    assert spread.min() > 15, "a part of the picture hardly changes"
    # aligned: the mean face still has eyes darker than the cheeks and a mouth darker than the chin
    mean = images.mean((0, 3))
    assert mean[31:34, 22:26].mean() < mean[38:42, 20:24].mean()
    assert mean[44:47, 28:36].mean() + 15 < mean[48:50, 28:36].mean()


# by FACES_VERSION: [face, quarter and channel]
PRINTS = {
    1: [
        [173.0, 134.0, 158.8, 176.7, 137.5, 159.1, 179.1, 131.4, 148.6, 189.0, 139.9, 153.6],
        [135.7, 137.2, 116.9, 137.6, 140.2, 119.2, 135.6, 119.5, 104.4, 143.4, 133.5, 116.5],
        [175.4, 181.2, 148.4, 176.9, 183.7, 147.6, 160.9, 165.9, 139.8, 162.7, 172.9, 144.6],
    ],
}


def test_the_version_goes_with_the_picture() -> None:
    """Mean colours of three faces in quarters: if they change, raise FACES_VERSION."""
    quarters = draw_faces(3, 64).reshape(3, 2, 32, 2, 32, 3).mean((2, 4)).reshape(3, -1)
    assert faces.FACES_VERSION in PRINTS, "add the new print"
    np.testing.assert_allclose(quarters, PRINTS[faces.FACES_VERSION], atol=0.06)


def test_a_part_is_painted_in_full_inside_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors at the ends of their ranges, alone in small windows against over the whole tile."""
    ends = np.array([bounds[:2] for bounds in FACTORS.values()], np.float32)
    pick = np.random.default_rng(1).integers(0, 2, (150, len(ends)))
    rows = ends[np.arange(len(ends)), pick]
    monkeypatch.setattr(faces, "_TILE_IMAGES", 1)
    small = [render(rows, size) for size in (16, 24)]
    monkeypatch.setattr(faces, "_TILE_IMAGES", 64)
    monkeypatch.setattr(
        face_paint.Tile,
        "_window",
        lambda tile, *_: (slice(0, tile.last - tile.first), slice(0, tile.size)),
    )
    assert np.array_equal(small[0], render(rows, 16))
    assert np.array_equal(small[1], render(rows, 24))


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="render: size must be at least 16, got 4"):
        render(factors(1), 4)
    with pytest.raises(
        ValueError, match=r"render: factors must have shape \(n, 4\d\), got \(2, 3\)"
    ):
        render(np.zeros((2, 3), np.float32), 64)
    with pytest.raises(ValueError, match="render: factors must be finite"):
        render(face(tilt=float("nan")), 64)
    with pytest.raises(ValueError, match="factors: count must be at least 0, got -1"):
        factors(-1)
    with pytest.raises(
        ValueError, match="draw_faces: count and start must be at least 0, got 1, -2"
    ):
        draw_faces(1, 64, start=-2)
    assert render(factors(0), 16).shape == (0, 16, 16, 3)

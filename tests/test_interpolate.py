"""Walks: great circles at one speed through what `fastgan sample` draws, frame by frame."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastgan import interpolate as module
from fastgan.cli import main
from fastgan.config import NetworkOptions
from fastgan.interpolate import slerp, walk
from fastgan.latents import CHUNK, latents
from fastgan.models import init_weights, make_generator

# Angles and norms of rows of 50 float64 numbers: some tens of roundings of 1e-16.
CLOSE = 1e-13
OPTIONS = NetworkOptions(size=32, latent=8, width=4)


def rows(count, length=50, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, dtype=torch.float64, generator=random)


def parts(count):
    return torch.linspace(0, 1, count, dtype=torch.float64).view(-1, 1, 1)


def angle(a, b):
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (a, b))
    return 2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1))


def test_slerp_is_shoemakes_for_unit_vectors():
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (rows(9), rows(9, seed=1)))
    part = parts(7)
    omega = torch.acos((a * b).sum(-1, keepdim=True))
    wanted = ((1 - part) * omega).sin() / omega.sin() * a + (part * omega).sin() / omega.sin() * b
    assert torch.allclose(slerp(a, b, part), wanted, rtol=0, atol=CLOSE)


def test_slerp_keeps_one_speed_and_moves_the_norm_in_a_straight_line():
    a, b, part = rows(9), 3 * rows(9, seed=1), parts(7)
    way = slerp(a, b, part)
    assert torch.equal(way[0], a) and torch.equal(way[-1], b)
    norms = torch.lerp(a.norm(dim=-1), b.norm(dim=-1), part[:, 0])
    assert torch.allclose(way.norm(dim=-1), norms, rtol=CLOSE, atol=0)
    gone = torch.stack([angle(a, step) for step in way])
    assert torch.allclose(gone, part[:, 0] * angle(a, b), rtol=0, atol=CLOSE)
    straight = torch.lerp(a, b / 3, part[3])  # what great circles are for
    assert (straight.norm(dim=-1) < 0.85 * a.norm(dim=-1)).all()


@pytest.mark.parametrize("nearly", [0.0, 1e-15, 1e-13, 1e-9, 1e-5])
def test_slerp_of_directions_that_are_the_same_or_opposite(nearly):
    a, part = rows(5), parts(9)
    for sign in (1, -1):
        b = sign * 2 * a + nearly * rows(5, seed=1)
        way = slerp(a, b, part)
        assert torch.equal(way[0], a) and torch.equal(way[-1], b) and way.isfinite().all()
        norms = torch.lerp(a.norm(dim=-1), b.norm(dim=-1), part[:, 0])
        assert torch.allclose(way.norm(dim=-1), norms, rtol=1e-12, atol=0)
        # steps of one angle: a direction of its own, however near to none that of the data is
        whole = angle(a, b)
        steps = torch.stack([angle(x, y) for x, y in zip(way, way[1:], strict=False)])
        assert torch.allclose(steps, (whole / 8).expand(8, -1), rtol=1e-6, atol=1e-7)
        assert (whole > 3).all() if sign < 0 else (whole < 1e-4).all()


def test_slerp_from_nothing_and_of_one_number_is_straight():
    a, part = rows(3), parts(5)
    for x, y in ((a, 0 * a), (0 * a, a), (0 * a, 0 * a), (a[:, :1], -a[:, :1])):
        assert torch.allclose(slerp(x, y, part), (1 - part) * x + part * y, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dist", ["normal", "uniform"])
@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize(("walks", "frames"), [(1, 3), (3, 100), (1, CHUNK + 5), (CHUNK + 1, 2)])
def test_stops_are_met_exactly_and_in_time(dist, loop, walks, frames):
    stops = [torch.cat(list(latents(seed, walks, 6, dist))) for seed in range(3)]
    pieces = list(walk(stops, frames, loop, dist))
    assert all(len(piece) % walks == 0 and len(piece) <= max(CHUNK, walks) for piece in pieces)
    way = torch.cat(pieces).unflatten(0, (-1, walks))
    assert way.dtype == torch.float32
    assert len(way) == (3 * frames if loop else 2 * frames + 1)
    for number, stop in enumerate(stops):
        assert torch.equal(way[number * frames], stop)
    # no leg is skipped or walked backwards: from frame to frame it is a small step
    ends = torch.cat([way, way[:1]]) if loop else way
    most = max(
        (a - b).norm(dim=-1).max() for a, b in zip(stops, stops[1:] + stops[:1], strict=True)
    )
    assert (ends[1:] - ends[:-1]).norm(dim=-1).max() <= 1.6 * most / frames  # pi / 2 of the chord


def test_uniform_latents_stay_in_their_cube():
    stops = list(torch.cat(list(latents(1, 40, 20, "uniform"))).split(1))
    assert max(piece.abs().max() for piece in walk(stops, 8, True, "uniform")) <= 1
    assert max(piece.abs().max() for piece in walk(stops, 8, True, "normal")) > 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A generator whose images differ: its statistics are those of its own maps."""
    g = make_generator(OPTIONS)
    init_weights(g, torch.Generator().manual_seed(0))
    with torch.no_grad():
        g.last.weight.mul_(20)  # colours, not shades of grey
        for piece in torch.randn(100, 32, OPTIONS.latent):  # 0.9^100 of what they begin with
            g(piece)
    path = tmp_path_factory.mktemp("weights") / "generator.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in g.state_dict().items()}, path)
    return path


def filmed(monkeypatch, *args):
    """The frames that a command line hands on to be encoded, and what else it says of them."""
    got = {}

    def write_film(frames, path, count, fps):
        got.update(frames=[np.asarray(frame, int) for frame in frames], count=count, fps=fps)
        path.write_bytes(b"")

    monkeypatch.setattr(module, "write_film", write_film)
    assert main(["interpolate", *map(str, args), "--device=cpu"]) == 0
    assert got["count"] == len(got["frames"])
    return got["frames"]


def sampled(weights, tmp_path, seed, count, *flags):
    out = tmp_path / f"sample-{seed}-{count}.png"
    args = [f"--seed={seed}", f"--count={count}", f"--out={out}", "--device=cpu", *flags]
    assert main(["sample", str(weights), *args]) == 0
    return np.asarray(Image.open(out), int)


def same(frame, picture):
    """One level apart at the most: batches of other sizes may be summed in another order."""
    assert frame.shape == picture.shape
    return np.abs(frame - picture).max() <= 1


@pytest.mark.parametrize("flags", [(), ("--truncation=0.5",)])
def test_a_stop_is_what_sample_draws_of_its_seed(weights, tmp_path, monkeypatch, flags):
    out = f"--out={tmp_path / 'walk.webp'}"
    frames = filmed(
        monkeypatch, weights, "--seeds", 3, 5, 4, "--frames=4", out, "--scale=1", *flags
    )
    assert len(frames) == 12
    for number, seed in enumerate((3, 5, 4)):
        picture = sampled(weights, tmp_path, seed, 1, *flags)
        assert same(frames[4 * number], picture)
        others = [np.abs(frame - picture).mean() for frame in frames]
        assert np.argmin(others) == 4 * number and np.partition(others, 1)[1] > 1


def test_several_walks_in_a_grid_stop_at_grids(weights, tmp_path, monkeypatch):
    out = f"--out={tmp_path / 'walk.gif'}"
    args = [weights, "--grid=2x2", "--no-loop", "--frames=3", out]
    frames = filmed(monkeypatch, *args, "--seeds", 7, 8)
    assert len(frames) == 4 and frames[0].shape == (280, 280, 3)  # 70, four times
    for frame, seed in ((frames[0], 7), (frames[3], 8)):
        assert same(frame, sampled(weights, tmp_path, seed, 4).repeat(4, 0).repeat(4, 1))


def test_stops_of_one_seed_are_its_images_one_after_another(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    every = sampled(weights, tmp_path, 9, 9)  # three rows of three
    frames = filmed(monkeypatch, weights, "--count=3", "--seed=9", "--frames=2", "--grid=1x3")
    assert len(frames) == 6 and (tmp_path / "walk-seed9.webp").is_file()
    for row in range(3):
        picture = every[34 * row : 34 * row + 36].repeat(8, 0).repeat(8, 1)
        assert same(frames[2 * row], picture)


def test_a_walk_as_a_film(weights, tmp_path, capsys):
    out = tmp_path / "new" / "walk.webp"
    args = ["interpolate", str(weights), f"--out={out}", "--frames=5", "--fps=20", "--device=cpu"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert f"{out}: 20 frames of 256x256 px, 1.0 s" in said
    assert f"through 4 images from {weights}" in said
    picture = sampled(weights, tmp_path, 0, 4)
    stops = [picture[y : y + 32, x : x + 32] for y in (2, 36) for x in (2, 36)]
    with Image.open(out) as film:
        assert film.n_frames == 20 and film.size == (256, 256)
        for i, stop in enumerate(stops):
            film.seek(5 * i)
            frame = np.asarray(film.convert("RGB").reduce(8), int)  # WebP halves colours' detail
            own, other = sorted(np.abs(frame - one).mean() for one in stops)[:2]
            assert own == np.abs(frame - stop).mean() < other / 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seeds", "1", "2", "--count", "3"], "--seeds and --count are two ways"),
        (["--seeds", "1", "2", "--seed", "0"], "--seeds and --seed are two ways"),
        (["--seeds", "1"], "--seeds must be two or more"),
        (["--seeds", "1", "-2"], "--seeds must be greater than or equal to 0, got -2"),
        (["--count", "1"], "--count must be greater than or equal to 2, got 1"),
        (["--grid", "2"], "--grid must be 1 or RxC, rows and columns, got '2'"),
        (["--grid", "1x17"], "--grid must have 1 to 16 rows and columns, got '1x17'"),
        (["--grid", "0x1"], "--grid must have 1 to 16 rows and columns, got '0x1'"),
        (["--truncation", "0"], "--truncation must be greater than 0, got"),
        (["--scale", "0"], "--scale must be greater than or equal to 1"),
        (["--scale", "60", "--grid", "4x4"], "--scale 60: frames would be 8,280x8,280 px"),
        (["--out", "a.png"], "--out must end in .webp, .gif, .mp4, got a.png"),
        (["--out", "a.gif", "--fps", "60"], "--fps must be at most 50 for a .gif, got 60"),
        (["--out", "a.gif", "--fps", "0.001"], "--fps must be greater than or equal to 0.1"),
    ],
)
def test_wrong_walks(weights, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(["interpolate", str(weights), *flags, "--device=cpu"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_walk_of_nothing(tmp_path, capsys):
    assert main(["interpolate", str(tmp_path / "none"), "--device=cpu"]) == 2
    assert "RUN must be a run, a checkpoint" in capsys.readouterr().err


def test_the_angle_between_normal_latents_is_wide():
    """Why a straight line will not do: nearly a right angle, so sqrt(1/2) of the norm at half."""
    a, b = torch.cat(list(latents(0, 2, 12_288))).double()
    assert abs(angle(a, b) - math.pi / 2) < 0.05
    assert abs((a + b).norm() / 2 / a.norm() - 0.5**0.5) < 0.02
    (middle,) = slerp(a, b, torch.tensor([[0.5]], dtype=torch.float64))
    assert abs(middle.norm() / a.norm() - 1) < 0.02

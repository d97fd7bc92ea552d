"""`fastgan interpolate`: a walk through latents, from image to image, as a film."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor

from . import console
from .commands import InterpolateCommand, split_grid
from .config import LatentDist
from .errors import UsageError
from .films import film_file, magnification, magnified, write_film
from .generators import open_generator
from .latents import CHUNK, latents
from .models import AnyGenerator
from .modes import pick_device
from .samples import GAP, among_samples, generate, grid, weights_of

STOPS, SEED = 4, 0  # unless flags say otherwise
# Of directions whose sine is less the difference is but rounding: they are the same, or opposite.
NO_ANGLE = 1e-12


def interpolate(command: InterpolateCommand) -> None:
    """`fastgan interpolate`: a film of a walk, or of several in a grid."""
    for key in ("count", "seed"):
        if command.seeds and getattr(command, key) is not None:
            raise UsageError(f"--seeds and --{key} are two ways to say it: give one of them")
    if len(command.seeds) == 1:
        raise UsageError("--seeds must be two or more, to walk from one to the next; got 1")
    rows, columns = split_grid(command.grid)
    device = pick_device(command.device)
    found = open_generator(command.what, "RUN", command.ema, device)
    generator = found.generator
    step = generator.size + GAP
    single = rows * columns == 1
    sides = (step - GAP,) * 2 if single else (columns * step + GAP, rows * step + GAP)
    times = magnification(sides, command.scale)
    target = film_file(command.out or among_samples(found, _name(command)), "--out", command.fps)

    stops = _stops(command, generator, rows * columns)
    legs = len(stops) if command.loop else len(stops) - 1
    count = legs * command.frames + (not command.loop)
    pieces = walk(stops, command.frames, command.loop, generator.latent_dist)
    pictures = _pictures(generate(generator, pieces), rows * columns, columns)
    write_film((magnified(one, times) for one in pictures), target, count, command.fps)
    console.say(
        f"{target}: {count:,} frames of {sides[0] * times}x{sides[1] * times} px, "
        f"{count / command.fps:.1f} s, {target.stat().st_size / 1e6:.2f} MB, through {len(stops)} "
        f"images from {weights_of(found, command.ema)}"
    )


def _name(command: InterpolateCommand) -> str:
    if not command.seeds:
        return f"walk-seed{command.seed or SEED}.webp"
    return f"walk-seeds{'-'.join(map(str, command.seeds))[:100]}.webp"


def _stops(command: InterpolateCommand, generator: AnyGenerator, walks: int) -> list[Tensor]:
    """The latents [walks, latent] of each stop: what `fastgan sample --count walks --seed` draws of
    each of --seeds, or piece by piece what it draws of --seed.
    """

    def drawn(seed: int, count: int) -> Tensor:
        latent, dist = generator.latent, generator.latent_dist
        return torch.cat(list(latents(seed, count, latent, dist, command.truncation)))

    if command.seeds:
        return [drawn(seed, walks) for seed in command.seeds]
    return list(drawn(command.seed or SEED, (command.count or STOPS) * walks).split(walks))


def _pictures(pieces: Iterable[Tensor], walks: int, columns: int) -> Iterator[Image.Image]:
    for piece in pieces:
        for images in piece.split(walks):
            yield grid(images, columns)


def walk(stops: Sequence[Tensor], frames: int, loop: bool, dist: LatentDist) -> Iterator[Tensor]:
    """float32 [n * B, latent] pieces of the way through `stops`, [B, latent] each: the B latents of
    one frame after those of another, `frames` a leg. Stop i is frame i * `frames`, exactly.

    N(0, 1) is walked along great circles (`slerp`): nearly all of it has the norm sqrt(latent), and
    the middle of a straight line has 0.7 of that, which no generator was trained on (White 2016,
    arXiv:1609.04468). U(-1, 1) is walked in straight lines, as a cube holds all between two of its
    points, but not the great circle.
    """
    between = slerp if dist == "normal" else torch.lerp
    at_once = max(1, CHUNK // len(stops[0]))
    ends = [*stops, stops[0]] if loop else stops
    for a, b in pairwise(ends):
        for start in range(0, frames, at_once):
            parts = torch.arange(start, min(start + at_once, frames), dtype=torch.float64) / frames
            way = between(a.double(), b.double(), parts.view(-1, 1, 1))
            yield way.flatten(0, 1).float()
    if not loop:
        yield stops[-1]


def slerp(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """From `a` (`part` 0) to `b` (1), float64 [..., D]: directions along the great circle at one
    speed (Shoemake 1985), norms in a straight line between the two.

    Shoemake's sines are for unit vectors; of vectors that are not, they bend the norm between two
    that are alike. Opposite directions have no great circle of their own: they are walked through
    the axis that is most across. Where `a` or `b` is 0, or D is 1, the line is straight.
    """
    if a.shape[-1] == 1:
        return torch.lerp(a, b, part)
    norm_a, norm_b = (v.norm(dim=-1, keepdim=True) for v in (a, b))
    to_a, to_b = a / norm_a, b / norm_b
    # Kahan's, right to the last digits where an arccosine has lost half of them
    angle = 2 * torch.atan2(
        (to_a - to_b).norm(dim=-1, keepdim=True), (to_a + to_b).norm(dim=-1, keepdim=True)
    )
    across = to_b - (to_a * to_b).sum(-1, keepdim=True) * to_a
    sine = across.norm(dim=-1, keepdim=True)
    axis = torch.zeros_like(to_a).scatter_(-1, to_a.abs().argmin(-1, keepdim=True), 1.0)
    other = axis - (to_a * axis).sum(-1, keepdim=True) * to_a
    across = torch.where(sine < NO_ANGLE, other / other.norm(dim=-1, keepdim=True), across / sine)
    across -= (to_a * across).sum(-1, keepdim=True) * to_a  # what rounding left, of a small sine
    direction = (part * angle).cos() * to_a + (part * angle).sin() * across
    curved = torch.lerp(norm_a, norm_b, part) * direction
    straight = torch.lerp(a, b, part)
    way = torch.where((norm_a == 0) | (norm_b == 0), straight, curved)
    return torch.where(part == 0, a, torch.where(part == 1, b, way))

"""Pictures: from the generator's numbers to pixels, grids and files; and `fastgan sample`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from . import console
from .commands import SampleCommand
from .config import PixelRange
from .durable import beside
from .errors import RunError, UsageError
from .generators import Found, open_generator
from .latents import latents
from .models import AnyGenerator
from .modes import pick_device
from .paths import empty_folder, picture_file
from .png_files import write_pngs

GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_GRID = 4096
GAP = 2  # pixels between the images of a grid


def to_uint8(images: Tensor, pixel_range: PixelRange) -> Tensor:
    """[B, 3, H, W] in `pixel_range` to uint8 [B, H, W, 3], rounded to the nearest level."""
    low, high = pixel_range
    levels = (images.float() - low) * (255 / (high - low))
    return levels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def generate(generator: AnyGenerator, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """uint8 [B, H, W, 3] on the CPU for each piece of latents, batch norm by its running
    statistics.
    """
    weight = next(generator.parameters())
    was_training = generator.training
    generator.eval()
    try:
        for piece in pieces:
            images = generator(piece.to(weight.device, weight.dtype))
            yield to_uint8(images, generator.pixel_range).cpu()
    finally:
        generator.train(was_training)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 [N, H, W, 3] as one picture, near to square unless the columns are given; between and
    around the images `GAP` white pixels, around a single one none.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    tiled = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=GAP, pad_value=255)
    return Image.fromarray(tiled.permute(1, 2, 0).numpy())


def save_picture(picture: Image.Image, path: Path, shared: bool = False) -> None:
    """Write beside and rename, so that a viewer never meets half a picture. `shared`: other
    processes may write it, too.
    """
    with beside(path, shared) as scratch:
        picture.save(scratch, quality=92)  # of JPEG and WebP; PNG takes none


def sample(command: SampleCommand) -> None:
    """`fastgan sample`: a grid, or single files."""
    if command.each is not None and command.out is not None:
        raise UsageError("--out writes a grid and --each writes single files: give one of them")
    if command.each is None and command.count > MAX_GRID:
        raise UsageError(
            f"--count must be at most {MAX_GRID:,} for a grid, got {command.count:,}; "
            "--each writes single files"
        )
    found = open_generator(command.what, "RUN", command.ema, pick_device(command.device))
    generator = found.generator
    drawn = latents(
        command.seed, command.count, generator.latent, generator.latent_dist, command.truncation
    )
    pieces = generate(generator, drawn)
    if command.each is not None:
        target = empty_folder(command.each, "--each")
        write_pngs((image for piece in pieces for image in piece.numpy()), target, command.count)
    else:
        named = command.out or among_samples(found, _name(command))
        target = picture_file(named, GRID_SUFFIXES, "--out")
        try:
            save_picture(grid(torch.cat(list(pieces))), target, shared=True)
        except (OSError, ValueError) as error:
            raise RunError(f"--out {target} cannot be written: {error}") from None
    console.say(f"{command.count:,} images from {weights_of(found, command.ema)}: {target}")


def weights_of(found: Found, ema: bool) -> str:
    """Which weights images are from, in words; a file of weights alone has but one kind."""
    if found.checkpoint is None:
        return str(found.path)
    return f"the {'averaged' if ema else 'trained'} weights of {found.path}"


def among_samples(found: Found, name: str) -> Path:
    """Where a picture goes by default: among the run's samples; into the current folder for what is
    of no run.
    """
    samples = found.run / "samples" if found.run is not None else None
    return (samples if samples is not None and samples.is_dir() else Path()) / name


def _name(command: SampleCommand) -> str:
    truncated = f"-truncation{command.truncation:g}" if command.truncation is not None else ""
    return f"sample-seed{command.seed}{truncated}.png"

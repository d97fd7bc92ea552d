"""Pictures: from the generator's numbers to pixels, grids and files; and `fastgan sample`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from . import console
from .checkpoint import Checkpoint, find, under
from .commands import SampleCommand
from .config import PixelRange, recorded_config
from .durable import beside
from .errors import RunError, UsageError
from .models import Generator
from .modes import pick_device, pick_kernels
from .optim import copy_into
from .paths import empty_folder, picture_file
from .png_files import write_pngs

CHUNK = 256  # images a pass of the generator
GRID_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_GRID = 4096


def to_uint8(images: Tensor, pixel_range: PixelRange) -> Tensor:
    """[B, 3, H, W] in `pixel_range` to uint8 [B, H, W, 3], rounded to the nearest level."""
    low, high = pixel_range
    levels = (images.float() - low) * (255 / (high - low))
    return levels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def latents(seed: int, count: int, latent: int) -> Iterator[Tensor]:
    """float32 [<= CHUNK, latent] pieces of N(0, 1), `count` rows in all; row i depends on (seed,
    i) alone.
    """
    random = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        shape = (min(CHUNK, count - start), latent)
        yield torch.from_numpy(random.standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def generate(generator: Generator, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
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


def grid(images: Tensor) -> Image.Image:
    """uint8 [N, H, W, 3] as one picture, near to square."""
    columns = math.ceil(math.sqrt(len(images)))
    tiled = make_grid(images.permute(0, 3, 1, 2), nrow=columns, padding=2, pad_value=255)
    return Image.fromarray(tiled.permute(1, 2, 0).numpy())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write beside and rename, so that a viewer never meets half a picture."""
    with beside(path) as scratch:
        picture.save(scratch, quality=92)  # of JPEG and WebP; PNG takes none


def load_generator(checkpoint: Checkpoint, ema: bool, device: torch.device) -> Generator:
    """The generator of a checkpoint: averaged (`ema`) or as trained, in evaluation mode.

    The averaged generator has batch-norm statistics of its own, averaged with its weights
    (`optim.Ema`).
    """
    meta = checkpoint.meta
    where = f"checkpoint {checkpoint.path}: "
    config = recorded_config(meta["config"], where, meta.get("fastgan"))
    impl, _ = pick_kernels("auto", device)
    generator = Generator(config.size, config.latent, config.width, config.pixel_range, impl)
    saved = under(checkpoint.tensors("model"), "ema." if ema else "g.")
    try:
        copy_into(generator.state_dict(), saved, str(checkpoint.path))
    except ValueError as error:
        raise RunError(f"the weights do not fit the configuration: {error}") from None
    return generator.to(device).to(memory_format=torch.channels_last).eval()


def sample(command: SampleCommand) -> None:
    """`fastgan sample`: a grid, or single files."""
    if command.each is not None and command.out is not None:
        raise UsageError("--out writes a grid and --each writes single files: give one of them")
    checkpoint, device = find(command.run), pick_device(command.device)
    if command.each is not None:
        target = empty_folder(command.each, "--each")
    else:
        if command.count > MAX_GRID:
            raise UsageError(
                f"--count must be at most {MAX_GRID:,} for a grid, got {command.count:,}; "
                "--each writes single files"
            )
        named = command.out or _default_out(checkpoint, command.seed)
        target = picture_file(named, GRID_SUFFIXES, "--out")
    generator = load_generator(checkpoint, command.ema, device)
    pieces = generate(generator, latents(command.seed, command.count, generator.latent))
    if command.each is not None:
        write_pngs((image for piece in pieces for image in piece.numpy()), target, command.count)
    else:
        try:
            save_picture(grid(torch.cat(list(pieces))), target)
        except (OSError, ValueError) as error:
            raise UsageError(f"--out {target} cannot be written: {error}") from None
    weights = "averaged" if command.ema else "trained"
    console.say(
        f"{command.count:,} images from the {weights} weights of {checkpoint.path}: {target}"
    )


def _default_out(checkpoint: Checkpoint, seed: int) -> Path:
    """Among the run's samples; in the current folder for a checkpoint outside of a run."""
    samples = checkpoint.path.parent.parent / "samples"
    return (samples if samples.is_dir() else Path()) / f"sample-seed{seed}.png"

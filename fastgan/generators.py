"""A trained generator from wherever it is: a run, a checkpoint, an exported folder, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import NAME, PARTS, Checkpoint, find, under
from .config import NetworkOptions, TrainConfig, recorded_config
from .errors import RunError, UsageError, first_line
from .layouts import digest_of, read_generator
from .models import AnyGenerator, make_generator
from .modes import pick_kernels
from .optim import copy_into
from .paths import absolute
from .resume import run_of

WEIGHTS = (".safetensors", ".pth", ".pt")
GENERATOR = "generator.safetensors"  # in an exported folder
KINDS = "a run, a checkpoint, an exported folder or weights (.safetensors, .pth)"


@dataclass(frozen=True)
class Found:
    """A trained generator, in evaluation mode.

    Attributes:
        name: for a table.
        path: the checkpoint, the exported folder or the file.
        digest: SHA-256 of its weights and statistics in float32, whatever file they were in.
        checkpoint, config: of a run's.
    """

    name: str
    path: Path
    generator: AnyGenerator
    digest: str
    checkpoint: Checkpoint | None = None
    config: TrainConfig | None = None

    @property
    def options(self) -> NetworkOptions:
        """All that its weights need to be used again; of weights alone, whether D has spectral norm
        is not known.
        """
        return network_options(self.config) if self.config else options_of(self.generator)

    @property
    def run(self) -> Path | None:
        """The run folder, where it comes from one."""
        if self.checkpoint is None:
            return None
        if self.path.parent.name == "checkpoints":  # also of a run that lost its config.json
            return self.path.parent.parent
        found = run_of(self.path)
        return found if found != self.path else None


def load_generator(
    path: str | Path, *, ema: bool = True, device: str | torch.device = "cpu"
) -> AnyGenerator:
    """A trained generator, ready to draw images: in evaluation mode and float32, its weights fixed.

        generator = fastgan.load_generator("runs/00000-faces-64px-b128-s999")
        images = generator(torch.randn(16, generator.latent))  # [16, 3, 64, 64]
        pixels = fastgan.samples.to_uint8(images, generator.pixel_range)  # uint8 [16, 64, 64, 3]

    Images are in `generator.pixel_range`, (-1, 1) or (0, 1), which those of a ReLU may pass;
    latents are to be drawn from N(0, 1), or from U(-1, 1) where `generator.latent_dist` is
    "uniform".

    Args:
        path: a run (its newest checkpoint), one checkpoint, a folder that `fastgan export` wrote,
            or weights: .safetensors, .pth or .pt, also of pytorch/examples.
        ema: of a run or a checkpoint the averaged generator; else the weights as trained.
        device: where it computes.

    Raises:
        UsageError: there is no such thing, a run without a checkpoint, or no such device.
        RunError: it is damaged, or something else than a generator.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise UsageError(f"load_generator: path must be a path, got {path!r}")
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("it must be cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's, built without CUDA, asserts
        raise UsageError(f"load_generator: device {device}: {first_line(error)}") from None
    return open_generator(str(path), "load_generator: path", ema, torch.device(device)).generator


def open_generator(given: str, flag: str, ema: bool, device: torch.device) -> Found:
    """What `given` names; `flag` is what the user gave it as, in messages.

    Raises:
        UsageError: there is no such thing, or a run without a checkpoint.
        RunError: it is damaged, or something else than a generator.
    """
    path = Path(absolute(given, flag))
    if path.is_dir() and (path / GENERATOR).is_file():
        return _of_weights(path / GENERATOR, path, ema, device)
    if path.is_dir() and is_run(path):
        return _of_run(path, ema, device)
    if path.suffix.lower() in WEIGHTS and path.is_file():
        return _of_weights(path, path, ema, device)
    what = "no such path"
    if NAME.fullmatch(path.name) and not path.exists():
        find(path)  # which names the checkpoints that there are
    if path.exists():
        what = "it is another folder" if path.is_dir() else "it is another file"
    raise UsageError(f"{flag} must be {KINDS}; {what}: {path}")


def is_generator(path: Path) -> bool:
    """Whether `open_generator` takes it for one, whole or not."""
    if path.is_dir():
        return (path / GENERATOR).is_file() or is_run(path)
    return path.suffix.lower() in WEIGHTS and path.is_file()


def is_run(path: Path) -> bool:
    """Whether it is a run folder, one that has no checkpoint yet, too, or a checkpoint."""
    whole = (path / "config.json").exists() and (path / "run.json").exists()
    inside = ("checkpoints", f"{PARTS[0]}.safetensors")
    return (
        whole or bool(NAME.fullmatch(path.name)) or any((path / name).exists() for name in inside)
    )


def options_of(generator: AnyGenerator) -> NetworkOptions:
    """The options that a generator was made by; those of its discriminator are the defaults."""
    keys = ("arch", "size", "latent", "latent_dist", "width", "pixel_range")
    return NetworkOptions(**{key: getattr(generator, key) for key in keys})


def network_options(config: NetworkOptions) -> NetworkOptions:
    """Of all a run's options those that its networks are made by."""
    return NetworkOptions(**{key: getattr(config, key) for key in NetworkOptions.model_fields})


def _of_run(path: Path, ema: bool, device: torch.device) -> Found:
    found = find(path)
    meta, where = found.meta, f"checkpoint {found.path}: "
    config = recorded_config(meta["config"], where, meta.get("fastgan"))
    # the averaged generator has batch-norm statistics of its own (`optim.Ema`)
    saved = under(found.tensors("model"), "ema." if ema else "g.")
    try:
        generator = _made(config, saved, str(found.path), device)
    except ValueError as error:
        raise RunError(f"the weights do not fit the configuration: {error}") from None
    run = run_of(found.path)
    name = found.path.name if run == found.path else f"{run.name} {found.path.name}"
    if not ema:
        name += " (as trained)"
    return Found(name, found.path, generator, _digest(generator), found, config)


def _of_weights(file: Path, path: Path, ema: bool, device: torch.device) -> Found:
    saved, options = read_generator(file, ema)
    generator = _made(options, saved, str(file), device)
    name = path.stem if path == file else path.name
    return Found(name, path, generator, _digest(generator))


def _made(
    options: NetworkOptions, saved: Mapping[str, Tensor], what: str, device: torch.device
) -> AnyGenerator:
    """The generator of these weights; `ValueError` where they do not fit."""
    impl, _ = pick_kernels("auto", device)
    generator = make_generator(options, impl)
    copy_into(generator.state_dict(), saved, what)
    generator.to(device).to(memory_format=torch.channels_last)
    return generator.eval().requires_grad_(False)


def _digest(generator: nn.Module) -> str:
    return digest_of(generator.state_dict())

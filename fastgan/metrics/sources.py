"""Where images to be judged come from: a run, a checkpoint, a generator's weights, or pictures."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import NAME, PARTS, Checkpoint, find
from ..config import SIZES, DataOptions, TrainConfig, recorded_config, split_size
from ..console import say
from ..data.cache import Cache, is_cache, open_cache
from ..data.images import find_images
from ..data.pillow_decoder import FORMATS
from ..data.prepare import prepare
from ..errors import RunError, UsageError
from ..models import Generator
from ..models.dcgan import channels
from ..modes import pick_kernels
from ..optim import copy_into
from ..paths import absolute
from ..resume import run_of
from ..samples import generate, latents, load_generator
from ..weights import read_weights

WEIGHTS = (".safetensors", ".pth", ".pt")
KINDS = "a run, a checkpoint, weights (.safetensors, .pth), a folder of images, a .zip, a cache"

Progress = Callable[[int], object]  # is told how many images are done


@dataclass(frozen=True)
class Trained:
    """A generator.

    Attributes:
        digest: SHA-256 of its weights and statistics in float32, whatever file they were in.
        checkpoint, config: of a run's.
    """

    name: str
    path: Path
    generator: Generator
    digest: str
    checkpoint: Checkpoint | None = None
    config: TrainConfig | None = None

    @property
    def run(self) -> Path | None:
        """The run folder, where it comes from one."""
        if self.checkpoint is None:
            return None
        if self.path.parent.name == "checkpoints":  # also of a run that lost its config.json
            return self.path.parent.parent
        found = run_of(self.path)
        return found if found != self.path else None

    def images(self, count: int, seed: int, progress: Progress) -> np.ndarray:
        """uint8 [count, size, size, 3], of the latents that `fastgan sample --seed` takes."""
        parts: list[np.ndarray] = []
        for piece in generate(self.generator, latents(seed, count, self.generator.latent)):
            parts.append(piece.numpy())
            progress(sum(map(len, parts)))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Pictures:
    """Images of a folder, a zip or a cache, or drawn faces; `flag` is what the user gave it as."""

    name: str
    source: str
    flag: str

    def prepare(self, data: DataOptions, root: Path | None) -> Cache:
        """Decoded as the data is. What has the data's size already is taken as it is: pictures that
        a generator made are not to be cropped a second time.
        """
        size = data.size
        if self.source.startswith("faces:") or is_cache(Path(self.source)):
            return prepare(self.source, DataOptions(size=size), root=root, flag=self.flag)
        crop, sides = data.crop, _sides(Path(self.source), self.flag)
        if sides == (size, size):
            crop = "none"
        elif sides is not None:
            say(
                f"{self.name}: images of {sides[0]}x{sides[1]} px, brought to {size} px as the "
                f"data is (--crop {crop}, --filter {data.filter})"
            )
        options = DataOptions(size=size, crop=crop, filter=data.filter)
        return prepare(self.source, options, root=root, flag=self.flag)


Source = Trained | Pictures


def open_source(given: str, flag: str, ema: bool, device: torch.device) -> Source:
    """What `given` names.

    Raises:
        UsageError: there is no such thing, or a run without a checkpoint.
        RunError: it is damaged, or weights of something else than a generator.
    """
    if given.startswith("faces:"):
        return Pictures(given, given, flag)
    path = Path(absolute(given, flag))
    if path.suffix.lower() in WEIGHTS and path.is_file():
        return _of_weights(path, ema, device)
    if path.is_dir() and not is_cache(path) and is_run(path):
        return _of_run(path, ema, device)
    if not path.exists() or (path.is_file() and path.suffix.lower() != ".zip"):
        what = "it is another file" if path.exists() else "no such path"
        raise UsageError(f"{flag} must be {KINDS} or faces:N; {what}: {path}")
    return Pictures(path.name, str(path), flag)


def is_run(path: Path) -> bool:
    """Whether it is a run folder, one that has no checkpoint yet, too, or a checkpoint."""
    whole = (path / "config.json").exists() and (path / "run.json").exists()
    inside = ("checkpoints", f"{PARTS[0]}.safetensors")
    return (
        whole or bool(NAME.fullmatch(path.name)) or any((path / name).exists() for name in inside)
    )


def _of_run(path: Path, ema: bool, device: torch.device) -> Trained:
    found = find(path)
    meta = found.meta
    config = recorded_config(meta["config"], f"checkpoint {found.path}: ", meta.get("fastgan"))
    generator = load_generator(found, ema, device)
    run = run_of(found.path)
    name = found.path.name if run == found.path else f"{run.name} {found.path.name}"
    if not ema:
        name += " (as trained)"
    return Trained(name, found.path, generator, digest_of(generator), found, config)


def _of_weights(path: Path, ema: bool, device: torch.device) -> Trained:
    impl, _ = pick_kernels("auto", device)
    saved = _plain(read_weights(path), ema)
    try:
        if not all(t.is_floating_point() for t in saved.values() if t.dim() == 4):
            raise ValueError("its convolutions are not floating-point numbers")
        size, latent, width = shape_of(saved)
        generator = Generator(size, latent, width, impl=impl)
        copy_into(generator.state_dict(), saved, "a generator of that shape")
    except ValueError as error:
        raise RunError(f"weights {path} are of no generator that fastgan knows: {error}") from None
    if not all(bool(t.isfinite().all()) for t in saved.values()):
        raise RunError(f"weights {path}: not all of them are finite numbers")
    generator.to(device).to(memory_format=torch.channels_last).eval()
    return Trained(path.stem, path, generator, digest_of(generator))


def _plain(saved: Mapping[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """A generator's tensors by the names that ours has, float32: also from the model.safetensors of
    a checkpoint, or from the Sequential of pytorch/examples (`main.0.weight`).
    """
    prefix = "ema." if ema else "g."
    if any(name.startswith(prefix) for name in saved):
        saved = {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)}
    saved = {k.removeprefix("main."): t for k, t in saved.items()}
    saved = {k: t.float() if t.is_floating_point() else t for k, t in saved.items()}
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        place, _, leaf = name.partition(".")
        if not place.isdecimal():
            return saved
        places.setdefault(int(place), {})[leaf] = tensor
    renamed: dict[str, Tensor] = {}
    layers = [places[place] for place in sorted(places)]
    convolutions = [layer for layer in layers if "running_mean" not in layer]
    norms = [layer for layer in layers if "running_mean" in layer]
    for number, layer in enumerate(convolutions):
        name = "last" if number == len(convolutions) - 1 else f"blocks.{number}.conv"
        renamed |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.items()}
    for number, layer in enumerate(norms):
        renamed |= {f"blocks.{number}.norm.{leaf}": tensor for leaf, tensor in layer.items()}
    return renamed


def shape_of(saved: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Size, latent and width of the generator that has these tensors; `ValueError` where it is
    none.
    """
    shapes = {name: tuple(t.shape) for name, t in saved.items() if t.dim() == 4}
    first, last = shapes.get("blocks.0.conv.weight"), shapes.get("last.weight")
    if first is None or last is None:
        raise ValueError("no blocks.0.conv.weight and last.weight, or 0.weight, 3.weight, ...")
    latent, width, size = first[0], last[0], first[2] << len(shapes) - 1
    if last[1] != 3 or size not in SIZES or split_size(size)[0] != first[2]:
        raise ValueError(f"its first convolution is {list(first)}, its last {list(last)}")
    inner = channels(size, width)
    if first[1] != inner[0]:
        raise ValueError(f"{first[1]} channels at first where {inner[0]} belong at width {width}")
    return size, latent, width


def digest_of(generator: Generator) -> str:
    """SHA-256 of all its tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _sides(source: Path, flag: str) -> tuple[int, int] | None:
    """Width and height of a source's first image; None where it cannot be read: `prepare` says
    why.
    """
    blob = find_images(source, flag)[0].read()
    if isinstance(blob, str):
        return None
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
            return image.size
    except Exception:  # the plugins let anything through
        return None


def resolved(
    what: Source, data: str | None, changed: Mapping[str, object]
) -> tuple[str, DataOptions, Path | None]:
    """The real images to compare with, how they are framed, and the folder of decoded sets.

    A cache keeps its own framing; else it is that of the run, unless a flag says otherwise.

    Args:
        data: `--data`, which only a run does without.
        changed: options that flags give.
    """
    config = what.config if isinstance(what, Trained) else None
    if data is None and config is None:
        raise UsageError(f"--data must name the real images: {what.name} is no run, which knows")
    options = DataOptions()
    if config is not None:
        options = DataOptions(**{key: getattr(config, key) for key in DataOptions.model_fields})
    elif isinstance(what, Trained):
        options = DataOptions(size=what.generator.size)
    source = data or (config.data if config else "")
    if data is not None and not data.startswith("faces:"):
        source = absolute(data, "--data")
        if is_run(Path(source)):
            raise UsageError(
                f"--data must be images, and {source} is a run: leave --data out to take what the "
                "evaluated run learned from, or name the images"
            )
        options = _of_cache(Path(source), options, changed)
    elif data is not None and config is not None and not config.data.startswith("faces:"):
        options = DataOptions(size=options.size)  # no other option applies to drawn faces
    options = DataOptions(**{**options.model_dump(), **changed})
    if isinstance(what, Trained) and options.size != what.generator.size:
        named = "--size" if "size" in changed else f"--data {source}"
        raise UsageError(
            f"{named}: images of {options.size} px are asked for, and {what.name} makes images of "
            f"{what.generator.size} px"
        )
    return source, options, config.cache if config else None


def _of_cache(path: Path, options: DataOptions, changed: Mapping[str, object]) -> DataOptions:
    """The framing of the cache at `path`; `options` where there is none."""
    if not is_cache(path):
        return options
    held = open_cache(path).meta.options
    for key, value in changed.items():
        if held.get(key) != value:
            raise UsageError(
                f"--{key} {value} is not what the cache {path} was made with ({held.get(key)}): "
                "name its images instead"
            )
    return DataOptions(**held)

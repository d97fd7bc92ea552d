"""Where images to be judged come from: a run, a checkpoint, a generator's weights, or pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config import DataOptions
from ..console import say
from ..data.cache import Cache, is_cache, open_cache
from ..data.images import find_images
from ..data.pillow_decoder import FORMATS
from ..data.prepare import prepare
from ..errors import UsageError
from ..generators import Found, is_generator, is_run, open_generator
from ..latents import latents
from ..paths import absolute
from ..samples import generate

KINDS = "a run, a checkpoint, weights (.safetensors, .pth), a folder of images, a .zip, a cache"

Progress = Callable[[int], object]  # is told how many images are done


class Trained(Found):
    """A generator."""

    def images(self, count: int, seed: int, progress: Progress) -> np.ndarray:
        """uint8 [count, size, size, 3], of the latents that `fastgan sample --seed` takes."""
        generator, parts = self.generator, list[np.ndarray]()
        drawn = latents(seed, count, generator.latent, generator.latent_dist)
        for piece in generate(generator, drawn):
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
    if is_generator(path) and not (path.is_dir() and is_cache(path)):
        found = open_generator(given, flag, ema, device)
        return Trained(**{field.name: getattr(found, field.name) for field in fields(found)})
    if not path.exists() or (path.is_file() and path.suffix.lower() != ".zip"):
        what = "it is another file" if path.exists() else "no such path"
        raise UsageError(f"{flag} must be {KINDS} or faces:N; {what}: {path}")
    return Pictures(path.name, str(path), flag)


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

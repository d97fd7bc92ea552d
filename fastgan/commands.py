"""Every command as the command line spells it: its flags, typed, with their defaults and rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import AfterValidator, Field, ValidationError, model_validator

from .config import (
    FRAMING,
    Crops,
    DataOptions,
    Device,
    Limit,
    Metric,
    OptionalPath,
    Options,
    Size,
    TrainConfig,
    explain,
    flag_of,
)
from .errors import UsageError
from .framing import Filter

MAX_ROWS = 16  # of a grid that is filmed, and columns

Truncation = Annotated[
    float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=""), Field(gt=0)
]
Scale = Annotated[Limit, Field(ge=1, le=64)]
Fps = Annotated[float, Field(ge=0.1, le=120)]
SeedNumber = Annotated[int, Field(ge=0, lt=2**63)]


class Flags(Options):
    """Options that come from the command line: what does not fit raises `UsageError` naming the
    flag.
    """

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(explain(error, "--", dash=True)) from None


class TrainCommand(Flags, TrainConfig):
    """Train a generator and a discriminator on a folder of images.

    With no --data, --recipe and --resume this is the recipe `quickstart`: drawn faces, about two
    minutes on two cores.
    """

    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE", help_behavior_hint="")] = None
    """Start from a recipe: a name (see `fastgan info`) or a TOML file as --dry-run prints it."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="auto|RUN", help_behavior_hint="")] = None
    """Continue a run from its newest checkpoint; auto takes the newest run in --out with this
    configuration.
    """
    allow_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With --resume, let this option differ from the run's though it changes what the run is; may
    be given several times.
    """
    elastic: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --resume, go on in another number of processes: the same images in the same order, but
    not the same bits.
    """
    exit_zero: tyro.conf.FlagCreatePairsOff[bool] = False
    """Exit with 0 instead of 143 or 138 when SIGTERM or SIGUSR1 stopped the run and it was saved:
    for schedulers that take all else for a failure.
    """
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the resolved configuration as TOML and stop."""

    @model_validator(mode="after")
    def _only_with_resume(self) -> Self:
        if self.resume is None:
            for key in ("allow_change", "elastic"):
                if getattr(self, key):
                    raise ValueError(
                        f"{flag_of(key)} needs --resume: a new run has nothing to keep"
                    )
        return self


class PrepareCommand(Flags, DataOptions):
    """Decode images once into a cache that `train --data` takes."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A folder of images (searched in depth), a .zip, or faces:N."""
    size: Size = FRAMING.size
    """Image size in pixels: 4, 5, 6 or 7 times a power of two, 32 to 256."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Verify that the cache SOURCE is whole, by its checksums, and stop."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use a cache again only if the contents of all files are what it was made from: not only their
    names, sizes and times.
    """
    out: OptionalPath = None
    """The cache folder to write (default: a name of its own in --cache)."""
    cache: OptionalPath = None
    """Folder of the decoded sets (default: $FASTGAN_CACHE, else the user's cache folder)."""


class SampleCommand(Flags):
    """Draw images from a trained generator."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """A run folder (its newest checkpoint), one checkpoint, an exported folder, or weights
    (.safetensors or .pth, also of pytorch/examples).
    """
    count: int = Field(64, ge=1, le=10_000_000)
    """How many images."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the latents; image i of a seed is the same for every --count."""
    truncation: Truncation = None
    """Draw anew what is further from 0 than this in a latent: images are more alike, and more often
    good (default: latents as in training).
    """
    out: OptionalPath = None
    """The grid to write, .png, .jpg or .webp (default: RUN/samples/sample-seed0.png)."""
    each: OptionalPath = None
    """Write single PNG files into this folder instead of a grid."""
    ema: bool = True
    """Of a run, use the averaged generator; --no-ema takes the weights as trained."""
    device: Device = "auto"
    """Where to run."""


def split_grid(value: str) -> tuple[int, int]:
    """Rows and columns of `RxC`, or of `1`."""
    found = re.fullmatch(r"(\d{1,2})x(\d{1,2})", value) or re.fullmatch(r"(1)()", value)
    if not found:
        raise ValueError(f"must be 1 or RxC, rows and columns, got {value!r}")
    rows, columns = int(found[1]), int(found[2] or 1)
    if not (1 <= rows <= MAX_ROWS and 1 <= columns <= MAX_ROWS):
        raise ValueError(f"must have 1 to {MAX_ROWS} rows and columns, got {value!r}")
    return rows, columns


def _grid(value: str) -> str:
    split_grid(value)
    return value


class InterpolateCommand(Flags):
    """Film a walk through the latents of a trained generator, from one of its images to another."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """A run folder (its newest checkpoint), one checkpoint, an exported folder, or weights
    (.safetensors or .pth, also of pytorch/examples).
    """
    seeds: Annotated[tuple[SeedNumber, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Walk through the first image of each of these seeds, as `fastgan sample --seed` draws it;
    instead of --count and --seed.
    """
    count: Annotated[Limit, Field(ge=2, le=1000)] = None
    """Walk through so many images of --seed (default: 4)."""
    seed: Annotated[Limit, Field(ge=0, lt=2**63)] = None
    """Seed of the images to walk through (default: 0)."""
    frames: int = Field(60, ge=1, le=10_000)
    """Frames from one of them to the next."""
    fps: Fps = 30.0
    """Frames a second; at most 50 in a .gif."""
    loop: bool = True
    """Walk back to the first image at the end, so that the film has no cut; --no-loop ends with the
    last one.
    """
    grid: Annotated[str, AfterValidator(_grid), tyro.conf.arg(metavar="1|RxC")] = "1"
    """Several walks at once, in rows and columns: each stop is the next RxC images of --seed, or
    the first RxC of each of --seeds.
    """
    scale: Scale = None
    """Magnify so many times, each pixel a square (default: to 256 pixels or a little more)."""
    truncation: Truncation = None
    """As in `fastgan sample`."""
    out: OptionalPath = None
    """The film to write, .webp, .gif or .mp4 (default: RUN/samples/walk-seed0.webp)."""
    ema: bool = True
    """Of a run, use the averaged generator; --no-ema takes the weights as trained."""
    device: Device = "auto"
    """Where to run."""


class AnimateCommand(Flags):
    """Film how the samples of a run became what they are: its grids, in the order of training."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    out: OptionalPath = None
    """The film to write, .webp, .gif or .mp4 (default: RUN/training.webp)."""
    fps: Fps = 8.0
    """Grids a second; at most 50 in a .gif."""
    hold: float = Field(2.0, ge=0, le=60)
    """Seconds for which the last one is shown."""
    scale: Scale = None
    """Magnify so many times, each pixel a square (default: to 256 pixels or a little more)."""


def _named(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


Named = Annotated[str, AfterValidator(_named)]


class EvaluateCommand(Flags):
    """Measure how good generated images are: beside real ones, an untrained generator and noise."""

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|WEIGHTS|IMAGES")]
    """A run folder (its newest checkpoint), one checkpoint, an exported folder, weights of a
    generator (.safetensors or .pth, also of pytorch/examples), or images of any generator: a
    folder, a .zip, a cache.
    """
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC", help_behavior_hint="")] = None
    """The real images: a folder, a .zip, a cache or faces:N (default: what the run learned from).
    """
    against: Annotated[tuple[Named, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Others to compare with, each as the first argument."""
    count: int = Field(10_000, ge=2, le=1_000_000)
    """Images of each set at most; half of the real ones, where that is less, as the other half is
    what real ones score.
    """
    metrics: Annotated[tuple[Metric, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """What to measure; inception is fid, kid, is, precision, recall, density and coverage (default:
    all that can be).
    """
    inception: OptionalPath = None
    """Inception's weights (default: torch hub's, where they are). Nothing is downloaded."""
    size: Annotated[Size | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Image size in pixels (default: the run's, the weights' or the cache's, else 64)."""
    crop: Annotated[
        Crops | None,
        tyro.conf.arg(metavar="center|none|WxH|WxH+X+Y", help_behavior_hint=""),
    ] = None
    """How the real images are cropped (default: as the run's or the cache's, else center)."""
    filter: Annotated[
        Filter | None, tyro.conf.arg(metavar="triangular|lanczos|cubic", help_behavior_hint="")
    ] = None
    """How they are resized (default: as the run's or the cache's, else triangular)."""
    holdout: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=""), Field(ge=0, lt=1)
    ] = None
    """The share of them that training never saw (default: as the run's or the cache's, else 0)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of latents, noise, and all that is drawn by the metrics (by Inception's it is 2020)."""
    ema: bool = True
    """Of a run, evaluate the averaged generator; --no-ema takes the weights as trained."""
    device: Device = "auto"
    """Where to run."""
    out: OptionalPath = None
    """The file that gets a line of JSON (default: metrics.jsonl in the run, else here)."""


ExportFormat = Literal["safetensors", "onnx", "torch-examples"]


class ExportCommand(Flags):
    """Write a trained generator into a folder to be used elsewhere, with a model card and samples.

    No data, no path of this machine, and no code is in it.
    """

    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """A run folder (its newest checkpoint), one checkpoint, an exported folder, or weights
    (.safetensors or .pth, also of pytorch/examples).
    """
    out: Path
    """Folder to write; new, or empty."""
    format: Annotated[tuple[ExportFormat, ...], Field(min_length=1)] = ("safetensors",)
    """safetensors: weights that fastgan loads again, D's too; onnx: the generator for onnxruntime
    and others; torch-examples: netG.pth and netD.pth of pytorch/examples' dcgan. One or more.
    """
    ema: bool = True
    """Of a run, write the averaged generator; --no-ema takes the weights as trained."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the latents of samples.png."""


class ReportCommand(Flags):
    """Make one HTML page of a run: samples over time, curves, metrics, how to train it again."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    out: OptionalPath = None
    """The page to write, .html (default: RUN/report.html)."""


class FacesCommand(Flags):
    """Write drawn faces as PNG files, with the factors that made them in factors.csv."""

    out: Path
    """Folder to write into; new, or empty."""
    count: int = Field(64, ge=1, le=10_000_000)
    """How many faces."""
    size: int = Field(256, ge=16, le=4096)
    """Edge in pixels."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed; face i of a seed is the same for every --count and --size."""


class InfoCommand(Flags):
    """Show the machine, the versions, and which fast paths are on or what they lack."""


def plain_config(command: TrainCommand) -> TrainConfig:
    """The configuration that a `fastgan train` command line came to."""
    return TrainConfig(**{key: getattr(command, key) for key in TrainConfig.model_fields})

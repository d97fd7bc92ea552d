"""Every option of a training run, typed, with its default and its rule; and the recipes, which are
the same as TOML. A flag beats the recipe, the recipe beats the default.

Nothing heavy is imported here, nor in `commands.py`: `fastgan --help` and a mistyped flag are
answered from these two files alone.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from . import __version__
from .errors import RunError, UsageError
from .framing import MAX_SIDE, Crop, Filter, Framing

MIN_SIZE, MAX_SIZE = 32, 256
BASES = (4, 5, 6, 7)  # the smallest map's edge; doubling it reaches every supported size
SIZES = tuple(sorted(b << k for b in BASES for k in range(8) if MIN_SIZE <= b << k <= MAX_SIZE))
PIXEL_RANGES = ((-1.0, 1.0), (0.0, 1.0))
FRAMING = Framing()  # the defaults
DEFAULT_KIMG = 1000.0
DEFAULT_RECIPE = "quickstart"  # what `fastgan train` does when no data, recipe or run is named

PixelRange = tuple[float, float]


def split_size(size: int) -> tuple[int, int]:
    """`size` as (base, doublings): 64 is (4, 4), 112 is (7, 4)."""
    doublings = 0
    while size > BASES[-1]:
        size //= 2
        doublings += 1
    return size, doublings


def _size(value: int) -> int:
    if value not in SIZES:
        near = sorted(sorted(SIZES, key=lambda s: (abs(s - value), s))[:2])
        raise ValueError(
            f"must be 4, 5, 6 or 7 times a power of two, {MIN_SIZE} to {MAX_SIZE} "
            f"(nearest: {near[0]}, {near[1]}), got {value}"
        )
    return value


def _crop(value: str) -> str:
    return Crop(value).text


def _pixel_range(value: PixelRange) -> PixelRange:
    if value not in PIXEL_RANGES:
        raise ValueError(f"must be -1 1 or 0 1, got {value[0]:g} {value[1]:g}")
    return value


Size = Annotated[int, AfterValidator(_size)]
Crops = Annotated[str, AfterValidator(_crop)]
CropText = Annotated[Crops, tyro.conf.arg(metavar="center|none|WxH|WxH+X+Y")]
Device = Literal["auto", "cpu", "cuda"]
Kernels = Literal["auto", "triton", "torch"]
OnBad = Literal["skip", "stop"]
DecoderName = Literal["auto", "dali-gpu", "dali-cpu", "pillow"]
Loader = Literal["auto", "resident", "stream", "dali"]
AmpDtype = Literal["auto", "bf16", "fp16"]
Metric = Literal["swd", "swd_mmagic", "ms_ssim", "c2st", "d_accuracy", "nearest", "inception"]
Arch = Literal["dcgan", "two-rate", "two-rate-autoencoder"]
LatentDist = Literal["normal", "uniform"]
Loss = Literal["non-saturating", "minimax", "hinge", "least-squares"]
Augmentation = Literal["color", "translation", "cutout"]
# The latents of what has no size of its own: 5 maps of 5x5 numbers; 3 of 64x64, an image of noise.
FIXED: dict[str, tuple[int, int]] = {  # size and latent
    "two-rate": (64, 5 * 5 * 5),
    "two-rate-autoencoder": (64, 3 * 64 * 64),
}
# Options that may be unset: the help text says what happens then, so tyro's "(default: None)" is
# left away.
Kimg = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Limit = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


class Options(BaseModel):
    """A set of options, checked when made (pydantic's ValidationError says what does not fit)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """Text and paths that can be written down; `~` is the home directory in every path."""
        if not isinstance(value, str | Path):
            return value
        try:
            text = str(value).encode()
        except UnicodeEncodeError:
            raise ValueError(f"must be valid UTF-8, got {str(value)!r}") from None
        if not text:
            raise ValueError("must not be empty")
        if b"\0" in text:
            raise ValueError(f"must not hold a NUL, got {str(value)!r}")
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError(f"begins with a home directory that is not known: {value}") from None


class Source(Options):
    """Where the images are."""

    data: str = "faces:10000"
    """Images to learn from: a folder (searched in depth), a .zip, a cache made by `prepare`, or
    faces:N (N drawn faces).
    """


class DataOptions(Options):
    """Which images of a source are taken, and how they are framed."""

    size: Annotated[int, Field(ge=1)] = FRAMING.size
    """Image size in pixels: 4, 5, 6 or 7 times a power of two, 32 to 256."""
    crop: CropText = FRAMING.crop
    """The part of each image that is kept: center (the largest centred square), none (all of it,
    squeezed), WxH from the centre, or WxH+X+Y. CelebA's 178x218 are usually cut to 178x178, 140x140
    or 108x108, or to 128x128+25+57.
    """
    filter: Filter = FRAMING.filter
    """How images are resized, antialiased: triangular (Pillow's bilinear), lanczos or cubic."""
    min_size: int = Field(FRAMING.min_size, ge=1, le=MAX_SIDE)
    """Refuse images whose shorter side has fewer pixels."""
    max_pixels: int = Field(FRAMING.max_pixels, ge=1, le=2**31 - 1)
    """Refuse images of more pixels, before they are decoded."""
    limit: Annotated[Limit, Field(ge=1)] = None
    """Take at most so many images, spread over the set by a hash of their names (default: all)."""
    keep: float = Field(1.0, gt=0, le=1)
    """Take each image with this probability, by a hash of its name: adding files changes no other
    choice.
    """
    holdout: float = Field(0.0, ge=0, lt=1)
    """Set each image aside with this probability, by another hash of its name: training never sees
    those, metrics can.
    """
    on_bad: OnBad = "skip"
    """What to do with a file that cannot be decoded or is refused: skip it (and list it in
    skipped.jsonl), or stop.
    """
    decoder: DecoderName = "auto"
    """What decodes: DALI on the GPU or the CPU, or Pillow with kornia-rs for PNGs; auto takes the
    GPU for large sets of JPEGs, else Pillow.
    """


class NetworkOptions(Options):
    """What the two networks are: all that weights need to be used again."""

    arch: Arch = "dcgan"
    """The networks: dcgan (any size and width), or those of the recipes two-rate64 and
    two-rate64-autoencoder.
    """
    size: Size = FRAMING.size
    """Image size in pixels: 4, 5, 6 or 7 times a power of two, 32 to 256."""
    latent: int = Field(100, ge=1, le=65536)
    """Length of the latent vector z."""
    latent_dist: LatentDist = "normal"
    """What latents are drawn from: normal, N(0, 1), or uniform, U(-1, 1)."""
    width: int = Field(64, ge=1, le=4096)
    """Channels of the layers beside the image (the tutorial's ngf and ndf)."""
    pixel_range: Annotated[PixelRange, AfterValidator(_pixel_range)] = (-1.0, 1.0)
    """What 0 and 255 become for the networks: -1 1 (tanh generator) or 0 1 (sigmoid)."""
    spectral_norm: bool = False
    """Divide D's weights by their spectral norms, in place of its batch norms."""

    @model_validator(mode="after")
    def _of_one_shape(self) -> Self:
        if self.arch not in FIXED:
            return self
        size, latent = FIXED[self.arch]
        fixed = {"size": size, "latent": latent, "width": 64, "pixel_range": (0.0, 1.0)}
        for key, value in (fixed | {"spectral_norm": False}).items():
            if (got := getattr(self, key)) != value:
                recipe = self.arch.replace("rate", "rate64", 1)
                raise ValueError(
                    f"arch {self.arch} has {key} {_spelled(value)} and no other, got "
                    f"{_spelled(got)}; the recipe {recipe} has all of it"
                )
        return self


def _spelled(value: object) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


class TrainConfig(NetworkOptions, DataOptions, Source):
    """What one training run is. A recipe is this as TOML; a run folder keeps it as config.json."""

    flip: bool = False
    """Mirror each image left to right with probability 1/2, anew in each epoch."""
    loader: Loader = "auto"
    """Where batches come from: the set resident on the device, streamed from the cache (stream), or
    decoded on the fly without a cache (dali); auto is resident where it fits, else stream.
    """
    batch: int = Field(128, ge=2, le=65536)
    """Images a step, of all processes together."""
    kimg: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Length of the run in thousands of images (default: 1000)."""
    epochs: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Length of the run in passes over the set, instead of --kimg."""
    amp: bool = False
    """Mixed precision: the networks compute in 16 bits; weights, statistics and Adam stay float32.
    """
    amp_dtype: AmpDtype = "auto"
    """With --amp, the 16-bit type: bf16, fp16 (with a scaled loss), or auto: bf16, and fp16 on
    cards before sm_80.
    """
    compile: bool = False
    """Compile the networks with their losses by torch.compile, where it has a compiler."""
    graph: bool = True
    """On an NVIDIA GPU, run each step as one CUDA graph."""
    sync_bn: bool = False
    """In several processes (torchrun), normalise by the statistics of the whole batch; without it
    each process normalises its share by its own, and rank 0's running statistics are kept.
    """
    kernels: Kernels = "auto"
    """Operators for batch norm + activation, image gather and Adam: fastgan's own (triton) or
    PyTorch's (torch); auto takes fastgan's on an NVIDIA GPU.
    """
    device: Device = "auto"
    """Where to train; auto takes the GPU where there is one."""
    seed: int = Field(999, ge=0, lt=2**63)
    """Seed of weights, latents and the order of images."""
    init_g: OptionalPath = None
    """Begin with a generator's weights: .safetensors or .pth, as `export` or pytorch/examples
    write them (default: drawn anew).
    """
    init_d: OptionalPath = None
    """Begin with a discriminator's weights, likewise."""
    loss: Loss = "non-saturating"
    """What the networks minimise: cross-entropy, with G's non-saturating or minimax form; hinge; or
    least-squares.
    """
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """D's target for real images is 1 minus this; not for hinge."""
    instance_noise: float = Field(0.0, ge=0, le=10)
    """Standard deviation of the noise that is added to all images that D sees, where pixels go from
    -1 to 1 or 0 to 1.
    """
    noise_kimg: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Let that noise fall to 0, evenly, over so many thousands of images (default: it stays)."""
    diffaug: Annotated[tuple[Augmentation, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Augment all images that D sees, differentiably: any of color, translation, cutout."""
    r1: float = Field(0.0, ge=0, le=1e6)
    """Weight gamma of the penalty on D's gradient at real images as D sees them (0: none), in
    float32 (convolutions in TF32, PyTorch's default on a GPU) and by PyTorch's own operators. With
    fp16 the loss scale falls for it; bf16 has none.
    """
    r1_every: int = Field(16, ge=1, le=1000)
    """Steps from one penalty to the next, which counts for all of them."""
    lr_g: float = Field(2e-4, gt=0, le=10)
    """Adam's learning rate of the generator."""
    lr_d: float = Field(2e-4, gt=0, le=10)
    """Adam's learning rate of the discriminator."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Adam's beta1."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Adam's beta2."""
    ema_kimg: float = Field(10.0, ge=0, le=1e9)
    """Half-life of the averaged generator in thousands of images (at most 5% of what was seen;
    0: the generator as it is).
    """
    out: Path = Path("runs")
    """Folder of the run folders."""
    cache: OptionalPath = None
    """Folder of the decoded sets (default: $FASTGAN_CACHE, else the user's cache folder)."""
    tick_kimg: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Between two lines of statistics (default: a hundredth of the run)."""
    tick_epochs: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """The same in passes over the set, instead of --tick-kimg: 1 is a line after each."""
    sample_kimg: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Between two sample grids (default: a twentieth of the run)."""
    save_kimg: Annotated[Kimg, Field(gt=0, le=1e9)] = None
    """Between two checkpoints (default: a quarter of the run)."""
    eval_kimg: Annotated[
        float | None,
        tyro.conf.arg(metavar="FLOAT", help_behavior_hint="", aliases=["--eval-every"]),
        Field(gt=0, le=1e9),
    ] = None
    """Between two evaluations, each of a checkpoint of its own (default: none)."""
    eval_count: int = Field(10_000, ge=2, le=1_000_000)
    """Images of each set at most in these (`fastgan evaluate --count`)."""
    eval_metrics: Annotated[tuple[Metric, ...], tyro.conf.arg(help_behavior_hint="")] = (
        "swd",
        "ms_ssim",
    )
    """What these measure (`fastgan evaluate --metrics`)."""
    keep_checkpoints: int = Field(3, ge=2)
    """How many checkpoints stay; older ones are deleted."""
    grid: int = Field(64, ge=1, le=4096)
    """Images in a sample grid."""
    logger: Literal["none", "tensorboard"] = "none"
    """Write scalars and grids for TensorBoard, too, into the run's folder."""

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.kimg is not None and self.epochs is not None:
            raise ValueError(
                "kimg and epochs are two ways to give the length, and only one may be given: "
                f"got kimg {self.kimg:g} and epochs {self.epochs:g}"
            )
        if self.tick_kimg is not None and self.tick_epochs is not None:
            raise ValueError("tick_kimg and tick_epochs are two ways to say it: give one of them")
        if self.loss == "hinge" and self.label_smoothing:
            raise ValueError("label_smoothing does not go with loss hinge, which has no targets")
        if self.noise_kimg is not None and not self.instance_noise:
            raise ValueError("noise_kimg needs instance_noise: there is no noise to let fall")
        if self.r1 and self.sync_bn and self.arch == "dcgan" and not self.spectral_norm:
            raise ValueError(
                "r1 does not go with sync_bn, whose statistics cannot be differentiated twice: "
                "with spectral_norm D has none"
            )
        if self.kimg is None and self.epochs is None:
            object.__setattr__(self, "kimg", DEFAULT_KIMG)  # past `frozen`: still being made
        return self


def recipe_names() -> list[str]:
    """The recipes that ship with fastgan."""
    folder = resources.files("fastgan") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str) -> TrainConfig:
    """The configuration that a recipe's name or TOML file stands for; `UsageError` if it is not a
    right one.
    """
    if name in recipe_names():
        text = (resources.files("fastgan") / "recipes" / f"{name}.toml").read_text("utf-8")
    elif os.path.exists(name) and not os.path.isdir(name):
        try:
            text = Path(name).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--recipe {name}: cannot be read as UTF-8 text: {error}") from None
    else:
        near = difflib.get_close_matches(name, recipe_names(), n=2)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(
            f"--recipe must be a TOML file or one of {', '.join(recipe_names())}, "
            f"got {name!r}{guess}"
        )
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number or a nesting without end, too
        raise UsageError(f"--recipe {name}: not valid TOML: {error}") from None
    return config_from(values, f"--recipe {name}: ")


def config_from(values: dict[str, Any], where: str) -> TrainConfig:
    """A checked configuration from plain values; types are taken strictly, and errors begin with
    `where`.
    """
    try:
        return TrainConfig.model_validate_json(json.dumps(values, default=_date), strict=True)
    except ValidationError as error:
        raise UsageError(explain(error, where, dash=False)) from None


def recorded_config(values: dict[str, Any], where: str, version: object) -> TrainConfig:
    """The configuration that a run or a checkpoint keeps, written by fastgan `version`.

    Raises:
        UsageError: something in it is wrong.
        RunError: a newer fastgan wrote it, and this one does not understand it.
    """
    try:
        return config_from(values, where)
    except UsageError as error:
        if not isinstance(version, str) or _release(version) <= _release(__version__):
            raise
        unknown = sorted(set(values) - set(TrainConfig.model_fields))
        what = f"has options that it does not know ({', '.join(unknown)})" if unknown else ""
        raise RunError(
            f"{where}written by fastgan {version}; this is {__version__}, for which it "
            f"{what or f'is not right ({error})'}: go on with {version} or newer"
        ) from None


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 1.2.0 of 1.2.0rc1+local."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _date(value: Any) -> dict[str, str]:
    """A TOML date or time, as something that no option takes."""
    return {type(value).__name__: str(value)}


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values, without what is not set; `config_from` reads it back."""
    return config.model_dump(mode="json", include=set(TrainConfig.model_fields), exclude_none=True)


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML that `--recipe` reads back to the same."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in to_plain(config).items())


def _toml(value: Any) -> str:
    # A JSON string, number, list or boolean is TOML too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# arguments that have no flag, as the help spells them
POSITIONAL = {"what": "RUN", "run": "RUN", "source": "SOURCE"}


def explain(error: ValidationError, where: str, dash: bool) -> str:
    """Pydantic's findings in one line each: the name, the rule, the value."""
    lines = []
    for found in error.errors():
        key = str(found["loc"][0]) if found["loc"] else ""
        rule = found["msg"].removeprefix("Value error, ")
        rule = re.sub(r"^(Input|Tuple) should", "must", rule)
        if found["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, list(TrainConfig.model_fields), n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{where}unknown key {key!r}{guess}")
        elif not key:  # a rule about several options
            names = "|".join(key for key in TrainConfig.model_fields if "_" in key)
            spelled = re.sub(rf"\b({names})\b", lambda m: flag_of(m[0]), rule)
            lines.append(spelled if dash else f"{where}{rule}")
        else:
            name = key.replace("_", "-") if dash else key
            if dash and key in POSITIONAL:
                where, name = "", POSITIONAL[key]
            got = "" if found["type"] == "value_error" else f", got {found['input']!r}"
            lines.append(f"{where}{name} {rule}{got}")
    return "\n".join(lines)


def lengths_replaced(base: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`base` without the lengths that `given` gives in their other unit: a run's in kimg or epochs,
    and what is between two ticks.
    """
    unset: dict[str, None] = {}
    for part in ("", "tick_"):
        for name, other in (("kimg", "epochs"), ("epochs", "kimg")):
            if given.get(part + name) is not None and given.get(part + other) is None:
                unset[part + other] = None
    return base.model_copy(update=unset)


def flag_of(key: str) -> str:
    """An option as the command line spells it."""
    return f"--{key.replace('_', '-')}"


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What changed: {key: (old value, new value)}, None where it is not set."""
    was, now = to_plain(old), to_plain(new)
    return {
        k: (was.get(k), now.get(k)) for k in TrainConfig.model_fields if was.get(k) != now.get(k)
    }

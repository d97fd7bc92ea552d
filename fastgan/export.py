"""`fastgan export`: a trained generator as a folder to be used elsewhere.

README.md                  a model card: what it is, how to load it, how it was trained
samples.png                64 images of one seed
config.json                what the networks are
generator.safetensors      --format safetensors, with D's where it is known:
discriminator.safetensors  `fastgan.load_generator(FOLDER)`, --init-g and --init-d take them
generator.onnx             --format onnx
netG.pth  netD.pth         --format torch-examples: pytorch/examples' dcgan/main.py takes them
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, console
from .card import card
from .checkpoint import under
from .commands import ExportCommand
from .config import NetworkOptions
from .durable import flush_folder, write_flushed
from .errors import RunError, UsageError
from .generators import GENERATOR, Found, open_generator
from .latents import latents
from .layouts import CONFIG, Which, digest_of, in_float32, read_discriminator, to_examples
from .onnx_file import OPSET, require_onnx, write_onnx
from .paths import check_folder, empty_folder, make_folder
from .samples import generate, grid, weights_of
from .tensor_file import write_tensors

CPU = torch.device("cpu")
DISCRIMINATOR = "discriminator.safetensors"
SAMPLES, GRID = "samples.png", 64
EXAMPLES_PX = 64  # of pytorch/examples' classes

State = Mapping[str, Tensor]


def export(command: ExportCommand) -> Path:
    """Write the folder and return where it is: it is complete, or absent.

    Raises:
        UsageError: there is no such run, --out holds files, or a format cannot hold this generator.
        RunError: something is damaged, or the disk is full.
    """
    formats = set(command.format)
    if "onnx" in formats:
        require_onnx()
    target = _target(command.out)
    found = open_generator(command.what, "RUN", command.ema, CPU)
    critic = _discriminator(found)
    options = found.options
    if critic is not None:  # a generator alone does not know of it
        options = options.model_copy(update={"spectral_norm": critic[1].spectral_norm})
    if "torch-examples" in formats:
        _check_examples(found, critic)
    said: list[str] = []
    with _complete_or_absent(target, command.out) as folder:
        _write_options(folder, options)
        if "safetensors" in formats:
            _write_safetensors(folder, found, options, critic)
        if "onnx" in formats:
            state = found.generator.state_dict()
            about = _about("generator", options, found.digest)
            compared = write_onnx(folder / "generator.onnx", options, state, about)
            said.append(f"onnx       opset {OPSET}, {compared}")
        if "torch-examples" in formats:
            _write_examples(folder / "netG.pth", found.generator.state_dict(), "generator")
            if critic is not None:
                _write_examples(folder / "netD.pth", critic[0], "discriminator")
        _write_samples(folder / SAMPLES, found, command.seed)
        files = sorted(path.name for path in folder.iterdir())
        text = card(found, target.name, files, command.ema, command.seed)
        write_flushed(folder / "README.md", text.encode())
    said.append(f"{weights_of(found, command.ema)}: {target} (README.md, {', '.join(files)})")
    for line in said:
        console.say(line)
    return target


def _target(out: Path) -> Path:
    """--out, without links, once it is known to be a place for the folder."""
    check_folder(out, "--out")
    target = Path(os.path.realpath(out))
    if target.exists():
        empty_folder(target, "--out")
    return target


@contextmanager
def _complete_or_absent(target: Path, out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends well and is gone when not.

    One that is there already, which may be a mount or somebody's current folder, is kept: the whole
    files are moved into it, one after another; README.md is the last.
    """
    kept = target.exists()
    scratch = (target / ".tmp") if kept else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    make_folder(target.parent, "--out")
    try:
        scratch.mkdir()
        yield scratch
        flush_folder(scratch)
        if kept:
            for path in sorted(scratch.iterdir(), reverse=True):
                path.rename(target / path.name)
        else:
            scratch.rename(target)
        flush_folder(target if kept else target.parent)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch)


def _discriminator(found: Found) -> tuple[dict[str, Tensor], NetworkOptions] | None:
    """The tensors and the options of the D that it was trained with, where these are known."""
    if found.checkpoint is not None:
        saved = under(found.checkpoint.tensors("model"), "d.")
        return in_float32(saved), found.options
    path = found.path / DISCRIMINATOR
    if not (found.path.is_dir() and path.is_file()):
        return None
    state, options = read_discriminator(path)
    if (options.size, options.width) != (found.options.size, found.options.width):
        raise RunError(
            f"{path} is of {options.size} px and width {options.width}, and the generator beside "
            f"it of {found.options.size} px and width {found.options.width}: take one of them away"
        )
    return state, options


def _check_examples(found: Found, critic: tuple[State, NetworkOptions] | None) -> None:
    """`UsageError` unless pytorch/examples' layers are those of these networks."""
    options = found.options
    why = ""
    if options.arch != "dcgan":
        why = f"these are --arch {options.arch}"
    elif options.pixel_range != (-1.0, 1.0):
        why = "the generator ends in a sigmoid (--pixel-range 0 1), theirs in a tanh"
    elif critic is not None and critic[1].spectral_norm:
        why = "D has spectral norm, theirs has batch norm"
    if why:
        raise UsageError(
            f"--format torch-examples is for the DCGAN of pytorch/examples, and {why}: give "
            "--format safetensors or onnx"
        )
    if options.size != EXAMPLES_PX:
        console.warn(
            f"--format torch-examples: pytorch/examples' classes are of {EXAMPLES_PX} px, and this "
            f"is of {options.size} px: its names go on as theirs do"
        )


def _about(which: Which, options: NetworkOptions, digest: str) -> dict[str, str]:
    """What a file of weights says of itself, which `layouts` reads."""
    return {
        "format": "pt",
        "fastgan": __version__,
        "network": which,
        "options": options.model_dump_json(),
        "sha256": digest,
    }


def _write_safetensors(
    folder: Path,
    found: Found,
    options: NetworkOptions,
    critic: tuple[State, NetworkOptions] | None,
) -> None:
    about = _about("generator", options, found.digest)
    write_tensors(folder / GENERATOR, found.generator.state_dict(), about)
    if critic is not None:
        about = _about("discriminator", options, digest_of(critic[0]))
        write_tensors(folder / DISCRIMINATOR, critic[0], about)


def _write_options(folder: Path, options: NetworkOptions) -> None:
    """What weights beside it are of, also those whose file cannot say it."""
    values = {"fastgan": __version__, **options.model_dump(mode="json")}
    write_flushed(folder / CONFIG, (json.dumps(values, indent=1) + "\n").encode())


def _write_examples(path: Path, state: State, which: Which) -> None:
    content = io.BytesIO()
    torch.save(to_examples(state, which), content)
    write_flushed(path, content.getvalue())


def _write_samples(path: Path, found: Found, seed: int) -> None:
    generator = found.generator
    drawn = latents(seed, GRID, generator.latent, generator.latent_dist)
    pictures = torch.cat(list(generate(generator, drawn)))
    content = io.BytesIO()
    grid(pictures).save(content, "png")
    write_flushed(path, content.getvalue())

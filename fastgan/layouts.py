"""Weights by anybody's names, as the tensors of fastgan's networks and the options that these have.

    ours              blocks.0.conv.weight, blocks.0.norm.weight, ..., last.weight; D: first.weight
    a checkpoint's    the same behind ema., g. and d., all in its model.safetensors
    pytorch/examples  main.0.weight, main.1.running_mean, ..., with `main.` or without: the places
                      of the layers in dcgan/main.py's nn.Sequential, which counts activations, too

Which network it is, its size, latent and width are told by the shapes. What these do not tell,
range of the pixels and distribution of the latents, fastgan records beside them: in a safetensors'
metadata, in an export's config.json, in a checkpoint's meta.json; without any they are the
defaults.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .config import FIXED, SIZES, NetworkOptions, explain, split_size
from .console import warn
from .data.image_file import open_regular
from .errors import RunError
from .models import make_discriminator, make_generator
from .models.dcgan import channels
from .weights import MAX_HEADER_BYTES, read_weights

Which = Literal["generator", "discriminator"]
Shapes = dict[str, tuple[int, ...]]

CONFIG, META = "config.json", "meta.json"
MAX_JSON_BYTES = 1 << 20
NETWORKS = ("g.", "d.", "ema.")  # of a checkpoint's model.safetensors
COUNT = "num_batches_tracked"  # which PyTorch before 0.4.1 did not have
LEAVES = ("weight", "bias", "running_mean", "running_var", COUNT)  # as a state_dict orders them


def read_generator(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], NetworkOptions]:
    """The tensors of a generator by our names, float32 on the CPU, and its options.

    Args:
        path: .safetensors, .pth or .pt, in any of the layouts above.
        ema: of a checkpoint's model.safetensors take the averaged generator.

    Raises:
        UsageError: there is no such file, or it is not of these kinds.
        RunError: it is damaged, or no generator's; the message says what it is instead.
    """
    return _read(path, "generator", "ema." if ema else "g.")


def read_discriminator(path: Path) -> tuple[dict[str, Tensor], NetworkOptions]:
    """The same of a discriminator, whose shapes do not tell the length of latents."""
    return _read(path, "discriminator", "d.")


def to_examples(state: Mapping[str, Tensor], which: Which) -> OrderedDict[str, Tensor]:
    """A DCGAN's tensors, row-major on the CPU, by the names and in the order of pytorch/examples
    (`main.0.weight`, ...): what `read_generator` and `read_discriminator` take back bit for bit.
    """
    first = 0 if which == "generator" else 2  # D's first convolution has no batch norm behind it
    places: dict[tuple[int, int], Tensor] = {}
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for name, tensor in state.items():
        layer, leaf = name.rsplit(".", 1)
        if layer == "first":
            place = 0
        elif layer == "last":
            place = first + 3 * blocks
        else:
            _, number, kind = layer.split(".")
            place = first + 3 * int(number) + (kind == "norm")
        places[place, LEAVES.index(leaf)] = tensor.detach().cpu().contiguous()
    return OrderedDict(
        (f"main.{at}.{LEAVES[leaf]}", places[at, leaf]) for at, leaf in sorted(places)
    )


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and statistics in float32, counts as they are."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors by name, in the order of the names and row-major."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, which: Which, prefix: str) -> tuple[dict[str, Tensor], NetworkOptions]:
    saved = in_float32(_part(read_weights(path), prefix, path))
    state = _by_our_names(saved, which)
    try:
        options = _options_of(state, which)
    except ValueError as error:
        raise RunError(f"weights {path} are of no {which}{_instead(saved, which, error)}") from None
    if not all(bool(t.isfinite().all()) for t in state.values()):
        raise RunError(f"weights {path}: not all of them are finite numbers")
    if any(bool((t < 0).any()) for name, t in state.items() if name.endswith("running_var")):
        raise RunError(f"weights {path} are damaged: a variance in them is below 0")
    return state, _recorded(path, state, options, which)


def _part(saved: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    """The tensors of one network, where the file holds a checkpoint's."""
    held = {start for name in saved if (start := f"{name.partition('.')[0]}.") in NETWORKS}
    if prefix in held:
        return {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix)}
    if held:
        raise RunError(
            f"weights {path} are those of {', '.join(sorted(held))[:-1]}, without {prefix[:-1]} "
            "(g: the generator as trained, ema: averaged, d: the discriminator)"
        )
    return saved


def _by_our_names(saved: Mapping[str, Tensor], which: Which) -> dict[str, Tensor]:
    """Tensors of a Sequential renamed; others as they are."""
    saved = {name.removeprefix("main."): t for name, t in saved.items()}
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        place, _, leaf = name.partition(".")
        if not (place.isascii() and place.isdecimal() and len(place) < 4):
            layers.clear()
            break
        layers.setdefault(int(place), {})[leaf] = tensor
    renamed: dict[str, Tensor] = {} if layers else dict(saved)
    ordered = [layers[place] for place in sorted(layers)]
    norms = [layer for layer in ordered if "running_mean" in layer]
    convolutions = [layer for layer in ordered if "running_mean" not in layer]
    names = [f"blocks.{number}.conv" for number in range(len(convolutions))]
    if convolutions:
        names[-1] = "last"
    if which == "discriminator":
        names = ["first", *names[:-2], *names[-1:]][: len(convolutions)]
    for name, layer in zip(names, convolutions, strict=True):
        renamed |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.items()}
    for number, layer in enumerate(norms):
        renamed |= {f"blocks.{number}.norm.{leaf}": tensor for leaf, tensor in layer.items()}
    for name in [name for name in renamed if name.endswith(".running_mean")]:
        renamed.setdefault(name.replace("running_mean", COUNT), torch.zeros((), dtype=torch.int64))
    return renamed


def _options_of(state: Mapping[str, Tensor], which: Which) -> NetworkOptions:
    """The options of the network that has these tensors; `ValueError` where it is none."""
    shapes: Shapes = {name: tuple(t.shape) for name, t in state.items()}
    if not all(t.is_floating_point() for t in state.values() if t.dim() > 1):
        raise ValueError("its weights are not floating-point numbers")
    for arch, (size, latent) in FIXED.items():
        fixed = _valid(arch=arch, size=size, latent=latent, pixel_range=(0.0, 1.0))
        expected = _shapes(fixed, which)
        if shapes == expected:
            return fixed
        if set(shapes) == set(expected):
            _check_shapes(shapes, fixed, which)
    options = _of_dcgan_g(shapes) if which == "generator" else _of_dcgan_d(shapes)
    _check_shapes(shapes, options, which)
    return options


def _of_dcgan_g(shapes: Shapes) -> NetworkOptions:
    first, last = shapes.get("blocks.0.conv.weight", ()), shapes.get("last.weight", ())
    if len(first) != 4 or len(last) != 4:
        raise ValueError("no blocks.0.conv.weight and last.weight, or 0.weight, 3.weight, ...")
    latent, width, size = first[0], last[0], _size(shapes, first[2])
    if last[1] != 3 or size is None:
        raise ValueError(f"its first convolution is {list(first)}, its last {list(last)}")
    _check_inner(first[1], size, width, "at first")
    return _valid(size=size, latent=latent, width=width)


def _of_dcgan_d(shapes: Shapes) -> NetworkOptions:
    last = shapes.get("last.weight", ())
    spectral = "first.weight" not in shapes
    first = shapes.get("blocks.0.conv.weight" if spectral else "first.weight", ())
    if len(first) != 4 or len(last) != 4:
        raise ValueError("no first.weight and last.weight, or 0.weight, 2.weight, ...")
    width, size = first[0], _size(shapes, last[2])
    if last[0] != 1 or first[1] != 3 or size is None:
        raise ValueError(f"its first convolution is {list(first)}, its last {list(last)}")
    _check_inner(last[1], size, width, "at last")
    return _valid(size=size, width=width, spectral_norm=spectral)


def _size(shapes: Shapes, base: int) -> int | None:
    """The image size: all convolutions but one double the smallest map, or halve the image."""
    doublings = sum(len(shape) == 4 for shape in shapes.values()) - 1
    size = base << min(doublings, 16)
    return size if size in SIZES and split_size(size) == (base, doublings) else None


def _check_inner(got: int, size: int, width: int, where: str) -> None:
    belong = channels(size, width)[0]
    if got != belong:
        raise ValueError(f"{got} channels {where} where {belong} belong at width {width}")


def _valid(**found: Any) -> NetworkOptions:
    """The options, with `ValueError` where they are none."""
    try:
        return NetworkOptions(**found)
    except ValidationError as error:
        raise ValueError(explain(error, "", dash=False)) from None


def _shapes(options: NetworkOptions, which: Which) -> Shapes:
    """Of all tensors that a network has, which takes no memory for it."""
    make = make_generator if which == "generator" else make_discriminator
    with torch.device("meta"):
        network: nn.Module = make(options, "torch")
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


def _check_shapes(shapes: Shapes, options: NetworkOptions, which: Which) -> None:
    expected = _shapes(options, which)
    wrong = sorted(set(expected) ^ set(shapes))
    if wrong:
        raise ValueError(f"for {_words(options, which)} tensors that do not fit: {_few(wrong)}")
    told = [
        f"{name} is {list(shapes[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if told:
        raise ValueError(f"for {_words(options, which)} {_few(told)}")


def _few(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _words(options: NetworkOptions, which: Which) -> str:
    sizes = f"{options.size} px, width {options.width}"
    latent = f", latent {options.latent}" if which == "generator" else ""
    norm = ", spectral norm" if options.spectral_norm else ""
    return f"a {options.arch} {which} ({sizes}{latent}{norm})"


def _instead(saved: Mapping[str, Tensor], which: Which, error: ValueError) -> str:
    """What is wrong with weights that are none of `which`."""
    other: Which = "discriminator" if which == "generator" else "generator"
    try:
        found = _options_of(_by_our_names(saved, other), other)
    except ValueError:
        return f" that fastgan knows: {error}"
    return f": they are {_words(found, other)}"


def _recorded(
    path: Path, state: Mapping[str, Tensor], told: NetworkOptions, which: Which
) -> NetworkOptions:
    """What the shapes told, and what they do not tell from the record that belongs to the file."""
    told_by = {
        "generator": ("arch", "size", "width", "latent"),
        # the autoencoder's is the other generator's, too
        "discriminator": (
            "size",
            "width",
            "spectral_norm",
            *(["arch"] if told.arch == "dcgan" else []),
        ),
    }[which]
    metadata = _metadata(path)
    digest = metadata.get("sha256")
    if "options" in metadata and digest is not None and digest != digest_of(state):
        raise RunError(f"weights {path} are damaged: they do not have their recorded SHA-256")
    if "options" in metadata and _parsed(metadata["options"]) is None:
        warn(f"weights {path}: the options in its metadata cannot be read: they do not count")
    for where, values in (
        (f"weights {path}", _parsed(metadata.get("options", ""))),
        (str(path.with_name(CONFIG)), _beside(path, CONFIG)),
        (str(path.with_name(META)), _beside(path, META)),
    ):
        if values is None:
            continue
        known = {key: values[key] for key in NetworkOptions.model_fields if key in values}
        try:
            found = NetworkOptions.model_validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            raise RunError(explain(error, f"{where}: ", dash=False)) from None
        fixed = {found.arch in FIXED, told.arch in FIXED}
        if len(fixed) == 1 and all(getattr(found, key) == getattr(told, key) for key in told_by):
            return found
        warn(f"{where} is of {_words(found, which)}, and not of {path.name}: it does not count")
    return told


def _metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; its header was read before, and is right."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with open_regular(path) as file:
        count = int.from_bytes(file.read(8), "little")
        header = _parsed(file.read(min(count, MAX_HEADER_BYTES)))
    metadata = (header or {}).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _beside(path: Path, name: str) -> dict[str, Any] | None:
    """The options in a JSON file beside the weights, if it is one of fastgan's."""
    try:
        with open_regular(path.with_name(name)) as file:
            values = _parsed(file.read(MAX_JSON_BYTES))
    except OSError:
        return None
    if values is None or "fastgan" not in values:
        return None
    if name == META:  # a checkpoint's, which has one file of weights by one name
        values = values.get("config") if path.name == "model.safetensors" else None
    return values if isinstance(values, dict) else None


def _parsed(text: str | bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None

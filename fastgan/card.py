"""The model card of an exported generator: Markdown with the front matter of Hugging Face's hub.

Nothing in it says where on a machine anything was, and what came from files, names above all, is
escaped: it is text, and no markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from . import __version__
from .config import FIXED, NetworkOptions, TrainConfig, to_plain, to_toml
from .data.image_file import open_regular
from .generators import GENERATOR, Found
from .metrics.records import RECORDS, read
from .report_metrics import evaluation

# Paths of a machine, and what says nothing about the model
UNSAID = {"out", "cache", "device", "logger", "grid", "keep_checkpoints", "decoder", "loader"}
UNSAID |= {"tick_kimg", "tick_epochs", "sample_kimg", "save_kimg", "eval_kimg", "eval_count"}
UNSAID |= {"eval_metrics", "on_bad"}
ALWAYS = ("data", "size", "kimg", "epochs")  # though they may be the defaults
MARKUP = re.compile(r"([\\`*_{}\[\]<>|~&$#])")
MAX_TEXT = 200  # characters of a name
MAX_JSON_BYTES = 1 << 16
FILES = {
    GENERATOR: "the generator's tensors; `fastgan.load_generator`, `fastgan train --init-g`",
    "discriminator.safetensors": "the discriminator's; `fastgan train --init-d`",
    "config.json": "what the networks are",
    "generator.onnx": "the generator for ONNX: `latents` to `images`, any batch",
    "netG.pth": "the generator by the names of pytorch/examples' dcgan",
    "netD.pth": "the discriminator by the names of pytorch/examples' dcgan",
}


def card(found: Found, title: str, files: Sequence[str], ema: bool, seed: int) -> str:
    """The README.md of a folder with these files.

    Args:
        title: the folder's name.
        ema, seed: which weights of a run it holds, and what its samples were drawn from.
    """
    options = found.options
    recipe = _recipe(found.config) if found.config is not None else ""
    record = _record(found)
    low, high = (f"{end:g}" for end in options.pixel_range)
    values = {
        "title": title,
        "tags": ["fastgan", "gan", *(["dcgan"] if options.arch == "dcgan" else [])],
        "options": options,
        "network": _network(options),
        "uniform": options.latent_dist == "uniform",
        "low": low,
        "high": high,
        "over": options.arch in FIXED,
        "seed": seed,
        "lines": _lines(options, files, low, high),
        "files": [(name, FILES[name]) for name in files if name in FILES],
        "facts": _facts(found, ema),
        "trained": _trained(found),
        "recipe": recipe,
        # longer than any in the recipe, whose texts may hold some
        "fence": "`" * max(3, *(len(run) + 1 for run in re.findall("`+", recipe)), 3),
        "about": _about(record) if record else "",
        "tables": evaluation(record, found.run.name if found.run else "")["tables"]
        if record
        else [],
        "version": __version__,
        "torch": torch.__version__,
        "digest": found.digest,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastgan", "templates"),
        autoescape=False,  # of HTML: this is Markdown, by the filter `md`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escaped
    return environment.get_template("card.md").render(values)


def escaped(value: object) -> str:
    """A value as Markdown text that is no markup: one line of `MAX_TEXT` characters at most."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    text = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."
    return MARKUP.sub(r"\\\1", text)


def _network(options: NetworkOptions) -> str:
    if options.arch != "dcgan":
        return f"the generator of fastgan's architecture {options.arch}"
    return f"a DCGAN, width {options.width}"


def _lines(options: NetworkOptions, files: Sequence[str], low: str, high: str) -> list[str]:
    """How it is loaded, by the first of the files that there is."""
    size, latent = options.size, options.latent
    result = f"  # [16, 3, {size}, {size}], from {low} to {high}"
    if GENERATOR in files or "netG.pth" in files:
        where = "." if GENERATOR in files else "netG.pth"
        drawn = "torch.randn(16, generator.latent)"
        if options.latent_dist == "uniform":
            drawn = "2 * torch.rand(16, generator.latent) - 1"
        return [
            "import fastgan, torch",
            f'generator = fastgan.load_generator("{where}")  # this folder',
            f"images = generator({drawn}){result}",
        ]
    drawn = f"standard_normal((16, {latent})"
    if options.latent_dist == "uniform":
        drawn = f"uniform(-1, 1, (16, {latent})"
    return [
        "import numpy, onnxruntime",
        'session = onnxruntime.InferenceSession("generator.onnx")',
        f'latents = numpy.random.default_rng(0).{drawn}).astype("float32")',
        f'(images,) = session.run(["images"], {{"latents": latents}}){result}',
    ]


def _trained(found: Found) -> str:
    """How much was learned from what, in words."""
    if found.checkpoint is None or found.config is None:
        return ""
    shown = found.checkpoint.meta["images"]
    return f"{shown / 1000:,.3f} thousand images shown, of {escaped(_data(found))}"


def _data(found: Found) -> str:
    assert found.checkpoint is not None and found.config is not None
    name, count = data_label(found.config.data), found.checkpoint.meta["data"].get("count")
    return f"{name} ({count:,} images)" if isinstance(count, int) else name


def _facts(found: Found, ema: bool) -> list[tuple[str, str]]:
    """What is known of the training, as rows of a table."""
    if found.checkpoint is None or found.config is None:
        return []
    meta, config = found.checkpoint.meta, found.config
    return [
        ("Data", _data(found)),
        ("Framing", f"crop {config.crop}, filter {config.filter}, {config.size} px"),
        ("Shown to D", f"{meta['images'] / 1000:,.3f} kimg, {meta['step']:,} steps"),
        ("Weights", "averaged over training (EMA)" if ema else "as trained, not averaged"),
        ("Checkpoint", found.checkpoint.path.name),
        ("Trained by", _software(found)),
    ]


def _software(found: Found) -> str:
    """fastgan, torch and commit, as the checkpoint and the run's env.json have them."""
    assert found.checkpoint is not None
    environment: dict[str, Any] = {}
    if found.run is not None:
        try:
            with open_regular(found.run / "env.json") as file:
                values = json.loads(file.read(MAX_JSON_BYTES))
            environment = values if isinstance(values, dict) else {}
        except (OSError, ValueError, RecursionError):
            pass  # a run without it: what it ran on is not known
    parts = [f"fastgan {found.checkpoint.meta.get('fastgan') or '(version not known)'}"]
    sha = environment.get("commit")
    if isinstance(sha, str):
        clean = "" if environment.get("clean") is True else ", changed"
        parts.append(f"commit {sha[:12]}{clean}")
    parts += [
        f"{key} {v}" for key in ("torch", "gpu") if isinstance(v := environment.get(key), str)
    ]
    return ", ".join(parts)


def data_label(source: str) -> str:
    """The name of a folder or an archive, without where it is."""
    return source if source.startswith("faces:") else Path(source).name or "a folder"


def _recipe(config: TrainConfig) -> str:
    """The options that differ from the defaults as TOML, paths as names."""
    named: dict[str, Any] = {"data": data_label(config.data)}
    named |= {key: Path(p.name) for key in ("init_g", "init_d") if (p := getattr(config, key))}
    default, mine = to_plain(TrainConfig()), to_plain(config)
    # at these alone: JSON leaves others, U+2028 among them, as they are
    lines = [f"{line}\n" for line in to_toml(config.model_copy(update=named)).split("\n")]
    keys = [
        key
        for key, value in mine.items()
        if key in ALWAYS or (key not in UNSAID and value != default.get(key))
    ]
    return "".join(line for line in lines if line.partition(" = ")[0] in keys)


def _record(found: Found) -> dict[str, Any] | None:
    """The newest evaluation of these very weights in the run's metrics.jsonl."""
    if found.run is None:
        return None
    of_these = [
        record
        for record in read(found.run / RECORDS)
        if record.get("weights_sha256") == found.digest and isinstance(record.get("rows"), list)
    ]
    if not of_these:
        return None
    record = of_these[-1]
    return {**record, "rows": [row for row in record["rows"] if isinstance(row, dict)]}


def _about(record: dict[str, Any]) -> str:
    parts = ["fastgan evaluate"]
    if isinstance(count := record.get("count"), int):
        parts.append(f"{count:,} images of each set")
    if isinstance(seed := record.get("seed"), int):
        parts.append(f"seed {seed}")
    if isinstance(date := record.get("date"), str):
        parts.append(date)
    return ", ".join(parts)

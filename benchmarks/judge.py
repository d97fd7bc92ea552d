"""How good the pictures of trained generators are, beside the real ones, on a CPU.

    python benchmarks/judge.py DATA OUT.json NAME=WEIGHTS.safetensors[,RUN] ...
                               [--machine RECORD.json] [--picture OUT.jpg] [--size 64] [--seed 0]
                               [--threads 2]

WEIGHTS are a generator's state_dict, of `fastgan.models.Generator` or of the reference
(`train_reference.py`), told apart by its names. RUN is the folder of the run that they are of,
where it had the card to itself: its seconds and its rate between grids go into the row. RECORD is
one of the machine that trained them, which OUT becomes a record of.

The real images are cut in two by the seed: every row compares one half with as many images, so that
"real, the other half" is the floor that belongs beside the others; an untrained generator and noise
stand at the other end. The generators were trained on both halves: one that gave its training
images back would reach the floor.

SWD is `fastgan.metrics.swd` (x 1e3, lower is nearer; more than at the 16,384 images of published
figures), MS-SSIM the likeness of pairs within a set (higher is less diverse; to be near the real
one), C2ST the accuracy of a small network that tells real from generated with its 95% interval (50%
is what cannot be told apart).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fastgan.config import config_from  # noqa: E402
from fastgan.data.prepare import prepare  # noqa: E402
from fastgan.durable import beside  # noqa: E402
from fastgan.env import environment  # noqa: E402
from fastgan.metrics.c2st import c2st  # noqa: E402
from fastgan.metrics.ms_ssim import diversity  # noqa: E402
from fastgan.metrics.swd import RealSet  # noqa: E402
from fastgan.models import Generator, init_weights  # noqa: E402
from fastgan.samples import generate, latents, save_picture  # noqa: E402

ROW = 12  # pictures of each generator that are shown


def generator_of(path: Path, size: int) -> Generator:
    return as_ours(load_file(path), size).to(memory_format=torch.channels_last).eval()


def as_ours(saved: dict[str, torch.Tensor], size: int) -> Generator:
    """The generator that these weights are of, whichever of the two wrote them."""
    saved = {k: t.float() if t.is_floating_point() else t for k, t in saved.items()}
    first = next(t for k, t in saved.items() if t.dim() == 4 and k.startswith(("blocks.0.", "0.")))
    last = next(t for t in saved.values() if t.dim() == 4 and t.shape[1] == 3)
    generator = Generator(size, first.shape[0], last.shape[0])
    if "0.weight" in saved:  # the reference's Sequential: the same layers in the same order
        by_place = sorted(saved.items(), key=lambda item: int(item[0].split(".")[0]))
        ours = list(generator.state_dict())
        saved = dict(zip(ours, in_our_order(by_place, ours), strict=True))
    generator.load_state_dict(saved)
    return generator


def in_our_order(by_place: list[tuple[str, torch.Tensor]], ours: list[str]) -> list[torch.Tensor]:
    """Of each layer the tensors under the names that ours has."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, t in by_place:
        place, _, leaf = name.partition(".")
        layers.setdefault(int(place), {})[leaf] = t
    queue = iter(layers.values())
    found, layer, owner = [], {}, None
    for name in ours:
        module, _, leaf = name.rpartition(".")
        if module != owner:
            owner, layer = module, next(queue)
        found.append(layer[leaf])
    return found


def sampled(generator: Generator, count: int, seed: int) -> np.ndarray:
    pieces = generate(generator, latents(seed, count, generator.latent))
    return np.concatenate([piece.numpy() for piece in pieces])


def sampled_from(path: Path, size: int, count: int, seed: int) -> np.ndarray:
    return sampled(generator_of(path, size), count, seed)


def judged(
    name: str, images: np.ndarray, real: np.ndarray, swd: RealSet, seed: int
) -> dict[str, Any]:
    """The row of a set."""
    began = time.perf_counter()
    distance = swd.swd(images)
    told = c2st(real, images, seed=seed)
    row = {
        "test": "training",
        "variant": name,
        "images": len(images),
        **{f"swd_{size}": value for size, value in distance.levels.items()},
        "swd_mean": distance.mean,
        "ms_ssim": diversity(images, seed=seed),
        "c2st": told.accuracy,
        "c2st_low": told.low,
        "c2st_high": told.high,
    }
    print(
        f"{name:<36} SWD {row['swd_mean']:7.2f}  MS-SSIM {row['ms_ssim']:.3f}  C2ST "
        f"{told.accuracy:.3f} [{told.low:.3f}, {told.high:.3f}]  "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return row


def timed(run: Path) -> dict[str, Any]:
    """Of a run that had the card to itself: how far it went, how long that took with its grids and
    checkpoints, and its rate between them.
    """
    ticks = [json.loads(line) for line in (run / "stats.jsonl").read_text("utf-8").splitlines()]
    rate = statistics.median(tick["img_per_s"] for tick in ticks[len(ticks) // 4 :])
    seconds = ticks[-1]["elapsed_s"]
    return {"kimg": ticks[-1]["kimg"], "seconds": seconds, "img_per_s": rate}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", nargs="+", metavar="NAME=WEIGHTS[,RUN]")
    parser.add_argument("--machine", type=Path, metavar="RECORD")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = config_from({"data": args.data, "size": args.size}, "--")
    every = prepare(config.data, config).images
    order = np.random.default_rng(args.seed).permutation(len(every))
    half = len(every) // 2
    real, other = every[np.sort(order[:half])], every[np.sort(order[half : 2 * half])]
    sets: dict[str, Callable[[], np.ndarray]] = {
        "real, the other half": lambda: other,
        "untrained generator": lambda: sampled(untrained(args.size), half, args.seed),
        "noise": lambda: np.random.default_rng(args.seed).integers(
            0, 256, real.shape, dtype=np.uint8
        ),
    }
    runs: dict[str, Path] = {}
    for given in args.weights:
        name, _, paths = given.rpartition("=")
        path, _, run = paths.partition(",")
        if run:
            runs[name] = Path(run)
        sets[name] = partial(sampled_from, Path(path), args.size, half, args.seed)
    machine = json.loads(args.machine.read_text("utf-8")) if args.machine else {}
    kept = {key: machine[key] for key in ("environment", "copy_gbps", "matmul_tflops") if machine}
    swd = RealSet(real, seed=args.seed)
    rows: list[dict[str, Any]] = []
    shown = []
    for name, make in sets.items():
        images = make()
        run = timed(runs[name]) if name in runs else {"seconds": None, "img_per_s": None}
        rows.append(judged(name, images, real, swd, args.seed) | run)
        if isinstance(make, partial):
            shown.append(images[:ROW])
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "environment": environment(torch.device("cpu")),
            **kept,
            "judged_on": environment(torch.device("cpu")),
            "rows": rows,
        }
        with beside(args.out) as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if args.picture:
        stacked = [tile(images) for images in shown]
        save_picture(Image.fromarray(np.concatenate(stacked)), args.picture)
    return 0


def tile(images: np.ndarray) -> np.ndarray:
    """A row of pictures."""
    return np.concatenate(
        [np.pad(i, ((1, 1), (1, 1), (0, 0)), constant_values=255) for i in images], 1
    )


def untrained(size: int) -> Generator:
    generator = Generator(size)
    init_weights(generator, torch.Generator().manual_seed(0))
    return generator.to(memory_format=torch.channels_last).eval()


if __name__ == "__main__":
    sys.exit(main())

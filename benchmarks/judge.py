"""How good the pictures of trained generators are, beside the real ones, on a CPU.

    python benchmarks/judge.py DATA OUT.json NAME=WEIGHTS.safetensors[,RUN] ...
                               [--machine RECORD.json] [--picture OUT.jpg] [--size 64] [--seed 0]
                               [--threads 2]

WEIGHTS are whatever `fastgan evaluate` takes for a generator's, the reference's, too
(`train_reference.py`). RUN is the folder of the run that they are of,
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

from fastgan.config import config_from  # noqa: E402
from fastgan.data.prepare import prepare  # noqa: E402
from fastgan.durable import beside  # noqa: E402
from fastgan.env import environment  # noqa: E402
from fastgan.metrics.c2st import c2st  # noqa: E402
from fastgan.metrics.ms_ssim import diversity  # noqa: E402
from fastgan.metrics.sources import Trained, open_source  # noqa: E402
from fastgan.metrics.swd import RealSet  # noqa: E402
from fastgan.models import Generator, init_weights  # noqa: E402
from fastgan.samples import save_picture  # noqa: E402

ROW = 12  # pictures of each generator that are shown


def sampled(path: str, size: int, count: int, seed: int) -> np.ndarray:
    source = open_source(path, "WEIGHTS", True, torch.device("cpu"))
    assert isinstance(source, Trained) and source.generator.size == size, path
    return source.images(count, seed, lambda done: None)


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
        "untrained generator": lambda: untrained(args.size).images(
            half, args.seed, lambda done: None
        ),
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
        sets[name] = partial(sampled, path, args.size, half, args.seed)
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


def untrained(size: int) -> Trained:
    """By the statistics that batch norms are made with; `fastgan evaluate` gives them a batch's."""
    generator = Generator(size)
    init_weights(generator, torch.Generator().manual_seed(0))
    generator.to(memory_format=torch.channels_last).eval()
    return Trained("untrained", Path(), generator, "")


if __name__ == "__main__":
    sys.exit(main())

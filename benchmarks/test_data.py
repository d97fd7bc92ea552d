"""From files to a cache: `fastgan prepare` beside torchvision and Pillow on all cores, and its
memory.

    pytest benchmarks --benchmark-only -k data
    FASTGAN_FACES=FOLDER pytest benchmarks --benchmark-only -k data --scale 4

`fastgan_x` is how many times as fast `fastgan prepare` is, `start_s` what it takes beyond its
images at the steady rate.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_process import in_own_process
from pictures import check_squares, drawn, framed_ref, jpeg_faces, repeated
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastgan.config import DataOptions
from fastgan.data.cache import open_cache
from fastgan.data.pool import DecodePool
from fastgan.data.prepare import prepare
from fastgan.env import cores, version_of

GPU = torch.cuda.is_available()
SIZE, ROUNDS = 64, 3
# files a core (on 2 cores a second or so of decoding), and the DataLoader's batch
SETS = {"JPEG 200 px": (2048 if GPU else 512, 64), "PNG 1024 px": (96 if GPU else 48, 16)}
MEMORY_IMAGES = (1000, 50_000)
MEMORY_GROWTH, MEMORY_MORE_MB = 1.25, 32
OURS = "fastgan prepare"
CLASSIC = transforms.Compose(
    [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()]
)
TENSOR = v2.Compose([v2.PILToTensor(), v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])
# Puts the time, and how many images came, behind each batch.
Mark = Callable[[int], None]
Way = Callable[[Mark], np.ndarray]


@dataclass(frozen=True)
class Run:
    """One run of a way over all files."""

    images: int
    seconds: float
    cpu_seconds: float  # of this process and its children
    steady_img_per_s: float | None

    @property
    def rate(self) -> float:
        return self.images / self.seconds


def run(way: Way, processes: int) -> tuple[np.ndarray, Run]:
    """What a way makes of the files, uint8 [N, size, size, 3], and how long it takes."""
    marks: list[tuple[float, int]] = []
    cpu, begin = _cpu_seconds(), time.perf_counter()
    squares = way(lambda count: marks.append((time.perf_counter(), count)))
    seconds = time.perf_counter() - begin
    of = len(squares), seconds, _cpu_seconds() - cpu
    return squares, Run(*of, steady(marks, processes))


def steady(marks: list[tuple[float, int]], processes: int) -> float | None:
    """Images a second when all processes are at it: from the answer that ends the first turn of all
    to the last; None where there are fewer than two turns after it.
    """
    later = marks[processes:]
    if len(later) < 2 * processes:
        return None
    return sum(count for _, count in later) / (later[-1][0] - marks[processes - 1][0])


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def by_fastgan(source: Path, out: Path, decoder: str, patch: pytest.MonkeyPatch) -> Way:
    decode = DecodePool.run

    def way(mark: Mark) -> np.ndarray:
        def marked(pool: DecodePool, batches: Any) -> Iterator[Any]:
            for decoded in decode(pool, batches):
                mark(len(decoded.reasons))
                yield decoded

        with patch.context() as patched:
            patched.setattr(DecodePool, "run", marked)
            return prepare(str(source), DataOptions(size=SIZE, decoder=decoder), out=out).images

    return way


def by_torchvision(source: Path, transform: Any, batch: int) -> Way:
    def way(mark: Mark) -> np.ndarray:
        batches = []
        for images, _ in DataLoader(ImageFolder(source, transform), batch, num_workers=cores()):
            batches.append(images)
            mark(len(images))
        squares = torch.cat(batches).permute(0, 2, 3, 1)
        if squares.is_floating_point():
            squares = squares.mul_(255).round_().to(torch.uint8)
        return squares.numpy()

    return way


def by_pillow(files: list[Path], batch: int) -> Way:
    def way(mark: Mark) -> np.ndarray:
        squares = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
        with ThreadPoolExecutor(cores()) as threads:
            for i, square in enumerate(threads.map(lambda file: framed_ref(file, SIZE), files)):
                squares[i] = square
                if i % batch == batch - 1:
                    mark(batch)
        return squares

    return way


@pytest.mark.parametrize("case", SETS, ids=lambda case: case.split()[0])
def test_data(case, scale, record_rows, benchmark, tmp_path, monkeypatch):
    """Images a second, from files in the page cache to uint8 [N, 64, 64, 3]: of the whole, with the
    start of all processes, and without it.
    """
    per_core, batch = SETS[case]
    count = max(16, round(per_core * cores() * scale))
    if case.startswith("JPEG"):
        files, kind = jpeg_faces(tmp_path / "distinct", count)
    else:
        files, kind = drawn(tmp_path / "distinct", "PNG", 1024), "drawn"
    source, out = tmp_path / "images", tmp_path / "cache"
    files = repeated(files, source, count)
    decoders = ["auto", "dali-gpu", "dali-cpu", "pillow"]
    if not GPU:
        decoders.remove("dali-gpu")
    if not version_of("nvidia-dali-cuda120"):
        decoders = ["auto", "pillow"]
    ours = {OURS if name == "auto" else f"{OURS} --decoder {name}": name for name in decoders}
    ways = {name: by_fastgan(source, out, of, monkeypatch) for name, of in ours.items()}
    ways["ImageFolder, DataLoader"] = by_torchvision(source, CLASSIC, batch)
    ways["ImageFolder, DataLoader, v2 on tensors"] = by_torchvision(source, TENSOR, batch)
    ways["Pillow in threads"] = by_pillow(files, batch)

    expected = ways["Pillow in threads"](lambda count: None)  # the definition; the files are read
    errors, used = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, "pillow")
    runs: dict[str, list[Run]] = {name: [] for name in ways}

    def measure() -> None:
        for name, way in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            squares, measured = run(way, cores())
            runs[name].append(measured)
            errors[name] = max(errors[name], check_squares(name, squares, expected))
            if name in ours:
                used[name] = open_cache(out).meta.decoder

    benchmark.pedantic(measure, rounds=ROUNDS if scale >= 1 else 1)
    rows = [
        {
            "case": f"{case}, {kind}",
            "variant": name,
            "decoder": used[name],
            **_figures(of, runs[OURS]),
            "images": count,
            "cores": cores(),
            "error": errors[name],
        }
        for name, of in runs.items()
    ]
    record_rows("data", rows)
    benchmark.extra_info |= {row["variant"]: row["img_per_s"] for row in rows}


def _figures(runs: list[Run], ours: list[Run]) -> dict[str, Any]:
    """Medians of the rounds; of the rate the lowest and the highest, too."""
    rates = [r.rate for r in runs]
    rate = statistics.median(rates)
    steadies = [r.steady_img_per_s for r in runs if r.steady_img_per_s is not None]
    starts = [r.seconds - r.images / r.steady_img_per_s for r in runs if r.steady_img_per_s]
    return {
        "img_per_s": rate,
        "low_img_per_s": min(rates),
        "high_img_per_s": max(rates),
        "img_per_s_core": rate / cores(),
        "fastgan_x": statistics.median(a.rate / b.rate for a, b in zip(ours, runs, strict=True)),
        "steady_img_per_s": statistics.median(steadies) if steadies else None,
        "start_s": statistics.median(starts) if starts else None,
        "cpu_ms": 1000 * statistics.median(r.cpu_seconds / r.images for r in runs),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_data_memory(scale, record_rows, benchmark, tmp_path):
    """The peak of `prepare` and its processes grows little with the number of images."""
    counts = [max(2, round(count * min(scale, 1))) for count in MEMORY_IMAGES]
    files = drawn(tmp_path / "distinct", "JPEG", 64)
    sources = {count: tmp_path / f"images-{count}" for count in counts}
    for count, source in sources.items():
        repeated(files, source, count)
    expected = [framed_ref(file, SIZE) for file in files]

    def measure() -> list[dict[str, Any]]:
        rows = []
        for count, source in sources.items():
            out = tmp_path / f"cache-{count}"
            found = in_own_process("memory", source, out, SIZE)
            images = open_cache(out).images
            wanted = np.stack([expected[i % len(files)] for i in range(count)])
            rows.append({**found, "error": check_squares(str(count), images, wanted)})
        return rows

    few, many = rows = benchmark.pedantic(measure, rounds=1)
    limit = MEMORY_GROWTH * few["peak_mb"] + MEMORY_MORE_MB
    assert many["peak_mb"] <= limit, f"{many['peak_mb']:.0f} MB, {limit:.0f} are allowed"
    record_rows("data_memory", [{"case": "JPEG 64 px", "variant": OURS, **row} for row in rows])

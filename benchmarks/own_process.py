"""What is measured in a process of its own, which prints what it found as JSON in its last line.

python benchmarks/own_process.py memory SOURCE OUT SIZE
python benchmarks/own_process.py fastgan|torchvision SOURCE OUT SIZE BATCH
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PERIOD_S = 0.01  # of looking at the memory
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def in_own_process(*args: Any) -> dict[str, Any]:
    """What this file finds as a program with these arguments."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Peak:
    """The most memory that this process and those it starts meanwhile have at a time, in RSS."""

    def __enter__(self) -> Peak:
        self._others = set(children(str(os.getpid())))
        self.own_bytes = self.workers_bytes = self.total_bytes = self.workers = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = str(os.getpid())
        while not self._done.wait(PERIOD_S):
            here, started = rss_bytes(own) or 0, set(children(own)) - self._others
            workers = [size for pid in started if (size := rss_bytes(pid))]
            self.own_bytes = max(self.own_bytes, here)
            self.workers_bytes = max(self.workers_bytes, sum(workers))
            self.total_bytes = max(self.total_bytes, here + sum(workers))
            self.workers = max(self.workers, len(workers))


def children(parent: str) -> list[str]:
    """The processes that this one started; not one that has yet to run a program of its own, whose
    memory is its parent's.
    """
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            of = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if of == parent and _command(pid) != _command(parent):
                found.append(pid)
    return found


def rss_bytes(pid: str) -> int | None:
    """None for a process that is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return None


def _command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def memory(source: str, out: str, size: int) -> dict[str, Any]:
    """The memory of `prepare`, the imports of the process that calls it among it."""
    from fastgan.config import DataOptions
    from fastgan.data.prepare import prepare

    with Peak() as peak:
        begin = time.perf_counter()
        cache = prepare(source, DataOptions(size=size), out=Path(out))
        seconds = time.perf_counter() - begin
    return {
        "images": cache.count,
        "seconds": seconds,
        "workers": peak.workers,
        "peak_mb": peak.total_bytes / 1e6,
        "parent_mb": peak.own_bytes / 1e6,
        "workers_mb": peak.workers_bytes / 1e6,
    }


def fastgan(source: str, out: str, size: int, batch: int) -> dict[str, Any]:
    """The first batch of a set that is prepared already, and what came before it."""
    import torch

    from fastgan.config import TrainConfig
    from fastgan.data.loader import open_feed
    from fastgan.data.prepare import prepare

    device = _device()
    clock, cpu = [time.perf_counter()], time.process_time()
    config = TrainConfig(data=source, size=size, batch=batch)
    cache = prepare(source, config, out=Path(out))
    clock.append(time.perf_counter())
    feed, _ = open_feed(cache, config, device)
    images, index = feed.next()
    pixels = images[index].cpu()  # the step gathers: it is ready when the pixels are
    clock.append(time.perf_counter())
    cpu = time.process_time() - cpu
    torch.save({"pixels": pixels, "rows": index.cpu()}, Path(out).with_suffix(".batch"))
    return _stages(clock, cpu, cache.count)


def torchvision(source: str, out: str, size: int, batch: int) -> dict[str, Any]:
    """The same by an ImageFolder with a DataLoader, from the files."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    from fastgan.env import cores

    device = _device()
    clock, cpu = [time.perf_counter()], time.process_time()
    crop = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    folder = ImageFolder(source, crop)
    clock.append(time.perf_counter())
    loader = DataLoader(folder, batch, shuffle=True, num_workers=cores())
    images, _ = next(iter(loader))
    pixels = images.to(device).permute(0, 2, 3, 1).cpu()
    clock.append(time.perf_counter())
    cpu = time.process_time() - cpu
    torch.save({"pixels": pixels, "rows": None}, Path(out).with_suffix(".batch"))
    return _stages(clock, cpu, len(folder))


def _device() -> Any:
    """The device, at work already: what the driver takes to start is no part of the data path."""
    import torch

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device).cpu()
    return device


def _stages(clock: list[float], cpu: float, count: int) -> dict[str, Any]:
    begin, opened, ready = clock
    return {
        "images": count,
        "open_ms": 1000 * (opened - begin),
        "feed_ms": 1000 * (ready - opened),
        "first_batch_ms": 1000 * (ready - begin),
        "cpu_ms": 1000 * cpu,  # without the DataLoader's processes
        "ready_at": ready,  # of a clock that all processes share
    }


if __name__ == "__main__":
    what, source, out, *numbers = sys.argv[1:]
    found = {"memory": memory, "fastgan": fastgan, "torchvision": torchvision}[what](
        source, out, *map(int, numbers)
    )
    print(json.dumps(found))

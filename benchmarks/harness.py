"""Time variants of one thing so that none of them is flattered.

Operations (`interleaved`): on a GPU every variant is captured once as a CUDA graph that walks over
several sets of buffers, of which no set is left in L2 when its turn comes again, and each set with
outputs of its own. The graphs are replayed in turn, variant after variant, round after round; a
time is the median of the rounds, with the tenth and ninetieth percentile beside it. On a CPU the
same without a graph.

Whole steps (`interleaved_steps`), which write far more than a cache holds: a stretch of steps of
each variant in turn, as the host launches them.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

ROUNDS, WARM_UP = 40, 3
GRAPH_MS = 1.0  # a graph repeats its sets for about this long: events resolve half a microsecond
QUEUED_CYCLES = 200_000  # a tenth of a millisecond, in which the host launches the graph
Call = Callable[[], Any]
Built = TypeVar("Built")
# What must be the same for the rows of two runs to stand in one record.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "commit", "clean")


@dataclass(frozen=True)
class Time:
    """Milliseconds a call."""

    ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Row:
    """One variant of one operation, as it goes into the record."""

    op: str
    case: str
    dtype: str
    variant: str
    ms: float
    low_ms: float
    high_ms: float
    bytes: int
    gbps: float
    share_of_copy: float | None
    error: float


def sets_beyond_l2(bytes_of_a_set: int, device: torch.device) -> int:
    """How many sets of buffers it takes to have none of them in the cache: twice its size."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * l2 // bytes_of_a_set) + 1))


def interleaved(variants: dict[str, Sequence[Call]], device: torch.device) -> dict[str, Time]:
    """The time of one call of each variant, which comes as a call for each set of buffers."""
    if device.type == "cuda":
        return _on_gpu(variants)
    return _on_cpu(variants)


def _on_gpu(variants: dict[str, Sequence[Call]]) -> dict[str, Time]:
    graphs = {name: _repeated(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(WARM_UP + ROUNDS):
        for name, (graph, count, _) in graphs.items():
            ms = _replay_ms(graph) / count
            if i >= WARM_UP:
                times[name].append(ms)
    return {name: summary(t) for name, t in times.items()}


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """How long the GPU takes for one replay, which is queued whole before the clock starts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUED_CYCLES)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _repeated(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int, list[Any]]:
    """A graph of about GRAPH_MS over the calls, how many it holds, and their outputs."""
    graph, _ = _captured(calls, 1)
    _replay_ms(graph)
    repeats = max(1, min(50, round(GRAPH_MS / max(_replay_ms(graph), 1e-3))))
    graph, kept = _captured(calls, repeats)
    return graph, repeats * len(calls), kept


def _captured(calls: Sequence[Call], repeats: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of the calls, and what keeps the outputs of each in memory of its own.

    Captured on the stream of its warm-up, where cuBLAS has its workspace by then: one that is made
    in a graph's pool would be used by later graphs when that one is gone (pytorch #193402).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=side):
        for _ in range(repeats):
            kept = [call() for call in calls]  # outputs of their own, a walk over the sets apart
    return graph, kept


def _on_cpu(variants: dict[str, Sequence[Call]]) -> dict[str, Time]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(WARM_UP + ROUNDS):
        for name, calls in variants.items():
            begin = time.perf_counter()
            for call in calls:
                call()
            if i >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begin) / len(calls))
    return {name: summary(t) for name, t in times.items()}


def interleaved_steps(
    variants: dict[str, Call], device: torch.device, stretch_s: float = 0.1, rounds: int = 9
) -> dict[str, Time]:
    """The time of one call of each variant, over stretches of about `stretch_s` that the GPU ends
    before the clock stops.
    """
    counts = {}
    for name, call in variants.items():
        stretch_ms(call, WARM_UP, device)
        counts[name] = max(1, round(1000 * stretch_s / stretch_ms(call, WARM_UP, device)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(stretch_ms(call, counts[name], device))
    return {name: summary(t) for name, t in times.items()}


def stretch_ms(call: Call, count: int, device: torch.device) -> float:
    """Milliseconds a call, of `count` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begin) / count


def summary(times: list[float]) -> Time:
    """Median, tenth and ninetieth percentile."""
    tenths = statistics.quantiles(times, n=10)
    return Time(statistics.median(times), tenths[0], tenths[-1])


def synchronised(call: Call) -> Call:
    """What pytest-benchmark's own clock can time."""

    def timed() -> None:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return timed


def reserved(device: torch.device) -> int:
    """Bytes that are taken from the GPU, without what PyTorch holds in store; 0 on a CPU."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def peak_mb(build: Callable[[], Built], device: torch.device) -> tuple[Built, float | None]:
    """What `build` makes, and the megabytes that PyTorch took from the GPU while it did, at the
    most and beyond those it had; None on a CPU.

    Of a step that is its warm-up, cuDNN's search and the capture, which decide whether a batch
    fits. CUDA's context and the code of kernels are not PyTorch's, and not in it.
    """
    before = reserved(device)
    if device.type != "cuda":
        return build(), None
    torch.cuda.reset_peak_memory_stats(device)
    built = build()
    torch.cuda.synchronize(device)
    return built, (torch.cuda.max_memory_reserved(device) - before) / 1e6


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels, copies and fills that one call has the GPU do; None on a CPU, and where the profiler
    sees none.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return len(on_the_gpu(profile)) or None


def on_the_gpu(profile: torch.profiler.profile) -> list[Any]:
    """The kernels, copies and fills of a profile, without the ranges that torch draws around."""
    kind = torch.autograd.DeviceType.CUDA
    return [
        event
        for event in profile.events()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]


def copy_gbps(
    device: torch.device, sizes_bytes: Sequence[int] = (1 << 30, 2 << 30, 4 << 30)
) -> float:
    """The bandwidth of a large copy on the device, bytes read and written: the best of these sizes
    and of two ways to copy.

    In a graph `copy_` is a memcpy node, which on an H200 (4,800 GB/s by its data sheet) gave 2,711
    GB/s. The other way is an elementwise kernel that reads and writes as much: the complement of
    int64.
    """
    return max(_copy_gbps(size, device) for size in sizes_bytes)


def _copy_gbps(size_bytes: int, device: torch.device) -> float:
    source = torch.empty(size_bytes // 8, dtype=torch.int64, device=device).random_()
    targets = [torch.empty_like(source) for _ in range(2)]
    ways: dict[str, Sequence[Call]] = {
        "copy_": [lambda t=t: t.copy_(source) for t in targets],
        "kernel": [lambda t=t: torch.bitwise_not(source, out=t) for t in targets],
    }
    fastest = min(time.ms for time in interleaved(ways, device).values())
    return 2 * source.nbytes / fastest / 1e6


def matmul_tflops(device: torch.device) -> float:
    """The rate of a large bfloat16 matrix product on the device: 8192 x 8192 x 8192."""
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    outputs = [torch.empty_like(a) for _ in range(2)]
    calls = [lambda out=out: torch.mm(a, b, out=out) for out in outputs]
    return 2 * n**3 / interleaved({"mm": calls}, device)["mm"].ms / 1e9


def error_of(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 error of any tensor; infinite where something is not finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        difference = (a.detach().double() - b.detach().double()).norm()
        error = float(difference / b.detach().double().norm().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def measure(
    op: str,
    case: str,
    dtype: str,
    variants: dict[str, Callable[[int], Call]],
    outputs: dict[str, Callable[[], Sequence[Tensor]]],
    expected: Sequence[Tensor],
    limit: float,
    nbytes: int,
    device: torch.device,
    copy: float | None,
) -> list[Row]:
    """Check every variant against `expected`, then time all of them together.

    Args:
        variants: for each name, a call on buffer set i.
        outputs: for each name, what it computes from set 0.
        limit: the largest relative L2 error that passes.
        nbytes: the bytes that the operation has to move, the same for every variant.
        copy: GB/s of a copy on the device.

    Raises:
        AssertionError: a variant is wrong; no figure is given then.
    """
    errors = {name: error_of(get(), expected) for name, get in outputs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"{op} {case} {dtype}: relative L2 errors over {limit:.1e}: {wrong}"
    sets = sets_beyond_l2(nbytes // 2, device)  # what is moved is touched about twice
    times = interleaved(
        {name: [make(i) for i in range(sets)] for name, make in variants.items()}, device
    )
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    rows = []
    for name, t in times.items():
        gbps = nbytes / t.ms / 1e6
        share = gbps / copy if copy else None
        rows.append(
            Row(op, case, dtype, name, **asdict(t), bytes=nbytes, gbps=gbps, share_of_copy=share,
                error=errors[name])
        )  # fmt: skip
    return rows


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record, with the rows of one that is there for all tests that were not run again, if
    it is of the same commit, a clean one, and of the same versions and card; else it is replaced.
    """
    rows = content["rows"]
    if path.is_file():
        try:
            old = json.loads(path.read_text("utf-8"))
            was, now = ({k: c["environment"].get(k) for k in SAME} for c in (old, content))
            if was == now and now["commit"] and now["clean"]:
                new = {row["test"] for row in rows}
                kept = [row for row in old["rows"] if row["test"] not in new]
                content = {**content, "rows": kept + rows}
        except (ValueError, KeyError, TypeError):  # cut short: kept, but not taken for a record
            path.replace(path.with_suffix(".damaged"))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    scratch.replace(path)

"""Where the time of a step goes: its kernels by time, and the gaps between them.

    python tools/profile_step.py OUT.json [--batch 128] [--size 64] [--width 64] [--steps 50]
                                 [--no-compile]

fastgan's step as `fastgan train --amp --compile` runs it, under torch.profiler; on a GPU the step
is a CUDA graph. A kernel's row: launches a step, microseconds a step, its share. The gaps are the
time in which no kernel ran. On a CPU the same for PyTorch's operators, without gaps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from harness import on_the_gpu  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from fastgan.config import TrainConfig, config_from  # noqa: E402
from fastgan.data.prepare import prepare  # noqa: E402
from fastgan.env import environment  # noqa: E402
from fastgan.errors import RunError, UsageError  # noqa: E402
from fastgan.modes import pick_modes  # noqa: E402
from fastgan.state import State  # noqa: E402


def spans(events: list[Any]) -> tuple[float, float]:
    """(microseconds from the first start to the last end, those in which something ran)."""
    if not events:
        raise RunError("the profiler saw no kernel (may this process use CUPTI?)")
    ranges = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, reached = 0.0, ranges[0][0]
    for start, end in ranges:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return reached - ranges[0][0], busy


def by_kernel(events: list[Any], steps: int) -> list[dict[str, Any]]:
    """A row a kernel, the longest first."""
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        row = rows.setdefault(event.name, {"kernel": event.name, "launches": 0.0, "us": 0.0})
        row["launches"] += 1 / steps
        row["us"] += event.time_range.elapsed_us() / steps
    total = sum(row["us"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["us"] / total
    return sorted(rows.values(), key=lambda row: -row["us"])


def profiled(config: TrainConfig, steps: int) -> dict[str, Any]:
    state = State(config, prepare(config.data, config), pick_modes(config))
    state.warm_up()
    on_gpu = state.device.type == "cuda"

    def run() -> None:
        for _ in range(steps):
            state.advance(state.feed.next())
        if on_gpu:
            torch.cuda.synchronize()

    run()
    kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        run()
    # of operators on a CPU the innermost: time is counted once
    innermost = [e for e in found.events() if not e.cpu_children]
    events = on_the_gpu(found) if on_gpu else innermost
    whole, busy = spans(events)
    return {
        "environment": environment(state.device),
        "options": {"size": config.size, "batch": config.batch, "compile": config.compile},
        "us_a_step": whole / steps,
        "idle_us_a_step": (whole - busy) / steps if on_gpu else None,
        "launches_a_step": len(events) / steps,
        "kernels": by_kernel(events, steps),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if not args.out.parent.is_dir() or args.out.is_dir():
        parser.error(f"OUT must be a file in a folder that is there: {args.out}")
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, got {args.steps}")
    options = {key: getattr(args, key) for key in ("size", "batch", "width", "compile")}
    try:
        config = config_from({"data": "faces:2000", "amp": True, **options}, "--")
        result = profiled(config, args.steps)
    except (UsageError, RunError) as error:
        parser.error(str(error))
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for row in result["kernels"][:40]:
        print(f"{row['us']:9.1f} us {row['share']:6.1%} {row['launches']:6.1f}x  {row['kernel']}")
    idle = result["idle_us_a_step"]
    print(
        f"{result['us_a_step']:,.0f} us a step, {result['launches_a_step']:.0f} launches"
        + (f", nothing running for {idle:,.0f} us" if idle is not None else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

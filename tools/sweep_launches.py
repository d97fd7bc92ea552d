"""Time the kernels of bn_act under other launch settings than theirs, on an NVIDIA GPU.

    python tools/sweep_launches.py [--batch 128 1024] [--out FILE]

For each layer of a 64 px DCGAN, each of the four launches and each setting: microseconds and share
of the copy bandwidth by that launch's own bytes, timed as the benchmarks time (`harness`). The
settings in use are marked; the table at the end names the best of each launch and layer. What is
learned goes into `bn_act_kernels` by hand, with its figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import harness  # noqa: E402
import torch  # noqa: E402

from fastgan_kernels import _launch  # noqa: E402
from fastgan_kernels import bn_act_kernels as ops  # noqa: E402

LAYERS = [(512, 4), (256, 8), (128, 16), (64, 32)]
TILE_BYTES, WARPS, PROGRAMS_PER_SM = (4 << 10, 8 << 10, 16 << 10, 32 << 10), (4, 8, 16), (1, 2, 4)
OPTIONS = (1e-5, "leaky_relu", 0.2)
PASSES = {"stats": 1, "apply": 2, "grad_sums": 2, "grad_apply": 3}


def settings_of(launch: str) -> Iterator[tuple[ops.Launch, int]]:
    """(tile and warps, programs a multiprocessor); the latter matters to the reductions alone."""
    reduction = launch in ("stats", "grad_sums")
    for tile, warps, programs in itertools.product(
        TILE_BYTES, WARPS, PROGRAMS_PER_SM if reduction else (ops.PROGRAMS_PER_SM,)
    ):
        if 1 <= tile // (32 * warps * 16) <= 8:  # 16-byte loads a thread
            yield ops.Launch(tile, warps), programs


def in_use(launch: str) -> tuple[ops.Launch, int]:
    used = {"stats": ops.OF_X_AND_NEXT, "apply": ops.OF_X}
    return used.get(launch, ops.OF_X_AND_DY), ops.PROGRAMS_PER_SM


def calls(launch: str, batch: int, channels: int, size: int, sets: int) -> list[Any]:
    """The launch on each of `sets` buffers."""
    found = []
    for i in range(sets):
        torch.manual_seed(i)
        x, dy = (
            torch.randn(batch, channels, size, size, device="cuda", dtype=torch.bfloat16)
            .mul_(2)
            .to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        vectors = [torch.rand(1, channels, device="cuda") + 0.5 for _ in range(4)]
        mean, var, weight, bias = vectors[0], vectors[1], vectors[2][0], vectors[3][0]
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        given, sums = (mean, var, weight, bias), torch.randn(1, 2, channels, device="cuda")
        found.append(
            {
                "stats": partial(ops.bn_act_stats, x, weight, bias, count, 1, 0.1, True),
                "apply": partial(ops.bn_act_apply, x, *given, *OPTIONS),
                "grad_sums": partial(ops.bn_act_grad_sums, x, dy, *given, *OPTIONS),
                "grad_apply": partial(ops.bn_act_grad_apply, x, dy, *given, sums, 1000, *OPTIONS),
            }[launch]
        )
    return found


def set_settings(launch: ops.Launch, programs: int) -> None:
    ops.OF_X = ops.OF_X_AND_NEXT = ops.OF_X_AND_DY = launch
    ops.PROGRAMS_PER_SM = programs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("sweep_launches: needs an NVIDIA GPU")
        return 1
    device = torch.device("cuda:0")
    copy = harness.copy_gbps(device)
    kept = {name: in_use(name) for name in PASSES}
    rows: list[dict[str, Any]] = []
    for batch, (channels, size), launch in itertools.product(args.batch, LAYERS, PASSES):
        nbytes = PASSES[launch] * batch * channels * size * size * 2
        sets = harness.sets_beyond_l2(nbytes, device)
        todo = calls(launch, batch, channels, size, sets)
        best: list[tuple[float, str]] = []
        for setting, programs in settings_of(launch):
            # captured under these settings, so a variant at a time, with counters anew: a graph
            # keeps its own for good
            _launch._COUNTERS.clear()
            set_settings(setting, programs)
            ms = harness.interleaved({"this": todo}, device)["this"].ms
            mark = " (in use)" if (setting, programs) == kept[launch] else ""
            name = (
                f"{setting.tile_bytes >> 10:>2} KB, {setting.warps:>2} warps, {programs} a SM{mark}"
            )
            best.append((ms, name))
            rows.append(
                {"launch": launch, "batch": batch, "channels": channels, "size": size, "ms": ms,
                 "tile_bytes": setting.tile_bytes, "warps": setting.warps,
                 "programs_per_sm": programs, "in_use": bool(mark),
                 "share_of_copy": nbytes / ms / 1e6 / copy}
            )  # fmt: skip
        used = (kept[name][0] for name in ("apply", "stats", "grad_sums"))
        ops.OF_X, ops.OF_X_AND_NEXT, ops.OF_X_AND_DY = used
        ops.PROGRAMS_PER_SM = kept["stats"][1]
        chosen = [pair for pair in best if "in use" in pair[1]]
        for ms, name in [*sorted(best)[:3], *chosen]:
            share = nbytes / ms / 1e6 / copy
            case = f"{launch:<10} {batch:>4}x{channels}x{size}x{size:<3}"
            print(f"{case} {1000 * ms:8.2f} us {share:6.1%}  {name}")
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text(json.dumps({"copy_gbps": copy, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

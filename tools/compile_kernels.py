"""Compile every kernel of fastgan_kernels for GPUs that are not here, and print what came of it.

    python tools/compile_kernels.py [--all] [--arch 80 90]

The kernels are launched as the operators launch them, on CPU tensors and with a driver that only
names a target, so that what is compiled is what a GPU of that kind would run. A row is a kernel, a
storage type and a target with its registers a thread, stack (where spilled registers go), shared
memory, and how many of its loads and stores are 16 bytes wide. Exit code 1 where a row breaks a
bound. --all takes every activation and odd channel counts, not only those of the DCGAN.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # to compile, not to interpret
    sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastgan_kernels import bn_act_kernels  # noqa: E402

NAMES = ("adam_ema", "bn_act_kernels", "conv4x4_kernels", "gather_u8", "guard", "tally")
MODULES = [sys.modules[f"fastgan_kernels.{name}"] for name in NAMES]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTS = ("relu", "leaky_relu", "none")
# 128 registers let two programs of 256 threads share a multiprocessor; 48 KB of shared memory is
# what every card gives without being asked for more.
MAX_REGISTERS, MAX_SHARED_BYTES = 128, 48 << 10
# Of the convolutions, which keep their tiles there: all that a thread and a program can have.
CONVS = "conv4x4_"
CONV_ARCH, CONV_REGISTERS, CONV_SHARED_BYTES, CONV_PROCESSORS = 90, 255, 227 << 10, 132
# Edge and channels of the large map, channels of the small one, in a 64 px DCGAN.
LAYERS = [(64, 3, 64), (32, 64, 128), (16, 128, 256), (8, 256, 512)]
ODD_LAYERS = [(64, 3, 32), (32, 32, 64), (32, 96, 192), (16, 160, 320)]
# The tensors of a 64 px discriminator, of an eighth of the width.
SHAPES = [(8, 3, 4, 4), (16, 8, 4, 4), (16,), (16,), (32, 16, 4, 4), (32,), (32,)]
SHAPES += [(64, 32, 4, 4), (64,), (64,), (1, 64, 4, 4)]
Due = dict[str, tuple[int, int]]  # by kernel: the loads and stores of 16 bytes that a thread has


class Row(NamedTuple):
    kernel: str
    case: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    due: tuple[int, int]  # how many of each there must be


class NamedTarget:
    """A driver with no device, which says what to compile for."""

    def __init__(self) -> None:
        self.arch = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def faults(row: Row) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if row.stack_bytes:
        found.append(f"{row.stack_bytes} bytes of stack: registers are spilled")
    most, shared = MAX_REGISTERS, MAX_SHARED_BYTES
    if row.kernel.startswith(CONVS):
        most, shared = CONV_REGISTERS, CONV_SHARED_BYTES
    if row.registers > most:
        found.append(f"{row.registers} registers, more than {most}")
    if row.shared_bytes > shared:
        found.append(f"{row.shared_bytes} bytes of shared memory, more than {shared}")
    loads, stores = row.due
    if row.wide_loads < loads or row.wide_stores < stores:
        found.append(f"fewer than {loads} loads and {stores} stores of 16 bytes")
    return found


def cases(everything: bool) -> Iterator[tuple[str, Due, Callable[[], Any]]]:
    """(name, what is due, a call of the operators) for each way to launch them."""
    shapes = [(64, 4), (512, 4)] + ([(100, 3), (3, 3), (1, 3)] if everything else [])
    acts = ACTS if everything else ("leaky_relu",)
    for name, dtype in DTYPES.items():
        for channels, size in shapes:
            for act in acts:
                due = bn_act_due(dtype, act) if channels * dtype.itemsize % 16 == 0 else {}
                call = partial(bn_act_calls, channels, size, dtype, act)
                yield f"{name} C={channels} {act}", due, call
        for flip in (False, True):
            gathered = {"gather_u8": (1, dtype.itemsize)}  # 16 bytes become 16 values
            yield f"{name} flip={flip}", gathered, partial(gather_call, dtype, flip)
    for name in ("bf16", "fp16") if everything else ("bf16",):
        for layer in [*LAYERS, *(ODD_LAYERS if everything else [])]:
            for batch in (128, 256, 1024) if everything else (256,):
                call = partial(conv_calls, batch, *layer, DTYPES[name])
                yield f"{name} conv {layer} batch {batch}", {}, call
    kinds = ["fp32", "bf16", "fp16"] if everything else ["fp32", "bf16"]
    for grad, low, extra in itertools.product(kinds, [None, *kinds[1:]], (False, True)):
        # p, m, v and g, and of p, m, v and low, 8 elements of each a tensor
        weights = sum(len(shape) == 4 for shape in SHAPES)
        loads = 8 * len(SHAPES) - (4 - DTYPES[grad].itemsize) // 2 * weights
        moved = {"adam_ema": (loads, 6 * len(SHAPES) + (low is not None) * weights)}
        call = partial(adam_call, DTYPES[grad], DTYPES[low] if low else None, extra)
        yield f"grad {grad} low {low} average, scale {extra}", moved, call
    for grad, scaled in itertools.product(kinds, (False, True)):
        # eight of each tensor in float32, half as many of one in 16 bits
        weights = sum(len(shape) == 4 for shape in SHAPES)
        read_once = {"guard": (8 * len(SHAPES) - (4 - DTYPES[grad].itemsize) * 2 * weights, 0)}
        yield f"grad {grad} scale {scaled}", read_once, partial(guard_call, DTYPES[grad], scaled)
    yield "statistics", {}, tally_call


def bn_act_due(dtype: torch.dtype, act: str) -> Due:
    """Four of the tile, those of the float32 vectors beside it, eight of the partial sums."""
    vector = 4 // dtype.itemsize
    mask = act != "none"  # which takes z, and so weight and bias
    return {
        "bn_act_stats": (4 + 8 + 1, 0),  # x, the partial sums, the pivot
        "bn_act_apply": (4 + 4 * vector, 4),
        "bn_act_grad_sums": (4 + (4 if mask else 2) * vector + 8, 0),
        "bn_act_grad_apply": (4 + (6 if mask else 5) * vector, 2),
    }


def bn_act_calls(channels: int, size: int, dtype: torch.dtype, act: str) -> None:
    ops = bn_act_kernels
    x = torch.zeros(4, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    vector, count = torch.zeros(channels), torch.zeros((), dtype=torch.int64)
    options = (1e-5, act, 0.2)
    mean, var = ops.bn_act_stats(x, vector, vector.clone(), count, 2, 0.1, True)
    ops.bn_act_stats(x, vector, vector.clone(), count, 2, 0.1, False)
    given = (mean, var, vector, vector)
    ops.bn_act_apply(x, *given, *options)
    sums, _, _ = ops.bn_act_grad_sums(x, x, *given, *options)
    ops.bn_act_grad_apply(x, x, *given, sums, 2, *options)


def conv_calls(batch: int, edge: int, cl: int, cs: int, dtype: torch.dtype) -> None:
    """In the tile that a card of so many processors is given."""
    for name in ("conv4x4", "conv4x4_kernels"):
        sys.modules[f"fastgan_kernels.{name}"].processors = (  # type: ignore[attr-defined]
            lambda device: CONV_PROCESSORS
        )
    large, small, weight = (
        torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
        for shape in ((batch, cl, edge, edge), (batch, cs, edge // 2, edge // 2), (cs, cl, 4, 4))
    )
    ops = torch.ops.fastgan_kernels
    ops.conv4x4_fwd(large, weight, 0.2)
    ops.conv4x4_dgrad(small, weight)
    ops.conv4x4_wgrad(large, small, small if cl == 3 else None, 0.2)


def gather_call(dtype: torch.dtype, flip: bool) -> None:
    images = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    flips = torch.zeros(4, dtype=torch.bool) if flip else None
    torch.ops.fastgan_kernels.gather_u8(images, torch.arange(4), flips, dtype, -1.0, 1.0)


def adam_call(grad: torch.dtype, low: torch.dtype | None, extra: bool) -> None:
    """As a network in mixed precision has it: the weights of convolutions with a gradient in
    `grad` and a copy, the vectors of batch norms with neither.
    """
    weights = [i for i, shape in enumerate(SHAPES) if len(shape) == 4]

    def like(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [
            torch.zeros(shape, dtype=dtype if i in weights else torch.float32)
            for i, shape in enumerate(SHAPES)
        ]

    scalar = torch.zeros(())
    torch.ops.fastgan_kernels.adam_ema(
        like(), like(grad), like(), like(), scalar, scalar.clone(), 0.5, 0.999, 1e-8,
        [like(low)[i] for i in weights] if low else [], weights if low else [],
        like() if extra else [], like()[2:4] if extra else [], like()[2:4] if extra else [],
        torch.zeros((), dtype=torch.float64) if extra else None, 100.0, 0.05,
        scalar.clone() if extra else None, scalar.clone() if extra else None,
    )  # fmt: skip


def guard_call(grad: torch.dtype, scaled: bool) -> None:
    """A step's last network, with gradients as `adam_call` has them."""
    grads = [
        torch.zeros(shape, dtype=grad if len(shape) == 4 else torch.float32) for shape in SHAPES
    ]
    scalar, flags = torch.zeros(()), torch.zeros(len(grads), dtype=torch.int32)
    torch.ops.fastgan_kernels.guard(
        grads, scalar, flags, torch.zeros((), dtype=torch.bool),
        torch.zeros((), dtype=torch.int64), scalar.clone(), scalar.clone(),
        scalar.clone() if scaled else None, 2.0**-16, True,
    )  # fmt: skip


def tally_call() -> None:
    count, sums = torch.zeros((), dtype=torch.int64), torch.zeros(5, dtype=torch.float64)
    values = [torch.zeros(()) for _ in range(4)]
    torch.ops.fastgan_kernels.tally(values, count, sums, sums.repeat(50, 1), count.clone())


def compiled(archs: list[int], everything: bool) -> Iterator[Row]:
    """Every kernel as it comes out of each case, once."""
    target = NamedTarget()
    triton.runtime.driver.set_active(target)
    seen: set[tuple[int, str]] = set()
    for name, due, call in cases(everything):
        launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        def note(kernel: Any, grid: Any, *args: Any, launched: Any = launched, **options: Any):
            del options["device"]
            launched.append((kernel, args, options))

        for module in MODULES:
            module.launch = note  # type: ignore[attr-defined]
        call()
        for arch in archs:
            target.arch = arch
            for kernel, args, options in launched:
                op = kernel.__name__.strip("_").removesuffix("_kernel")
                if op.startswith(CONVS) and arch < CONV_ARCH:
                    continue
                made = kernel.warmup(*args, grid=(1,), **options)
                if (arch, made.hash) not in seen:
                    seen.add((arch, made.hash))
                    yield read(op, name, due.get(op, (0, 0)), made)


def read(kernel: str, case: str, due: tuple[int, int], made: Any) -> Row:
    """A row from the machine code and the PTX of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, shared, local = map(int, found.groups())
    ptx = made.asm["ptx"]
    return Row(
        kernel, case, made.metadata.target.arch, registers, stack + local,
        max(shared, made.metadata.shared), count_wide("ld", ptx), count_wide("st", ptx), due,
    )  # fmt: skip


def count_wide(verb: str, ptx: str) -> int:
    """Accesses to global memory in the code that move 16 bytes."""
    found = re.findall(rf"\b{verb}\.global[\w.:]*?\.v(\d)\.[bfsu](\d+)", ptx)
    return sum(int(count) * int(bits) == 128 for count, bits in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every activation, odd channel counts")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90], help="80 is sm_80, ...",
        choices=[80, 86, 89, 90, 100, 103, 120],
    )  # fmt: skip
    args = parser.parse_args()
    print(f"triton {triton.__version__}")
    print(f"{'kernel':<18} {'case':<40} {'sm':>3} regs stack shared loads16 stores16")
    count = wrong = 0
    for row in compiled(args.arch, args.all):
        count += 1
        found = faults(row)
        wrong += bool(found)
        print(
            f"{row.kernel:<18} {row.case:<40} {row.arch:>3} {row.registers:>4} "
            f"{row.stack_bytes:>5} {row.shared_bytes:>6} {row.wide_loads:>7} {row.wide_stores:>8}"
            + "".join(f"  FAULT {f}" for f in found),
            flush=True,
        )
    print(f"{count} compiled, {wrong} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The ten convolutions of a 64 px DCGAN: fastgan's kernels, cuDNN, and plain matrix products where
a layer is one.

    pytest benchmarks --benchmark-only -k convs     fastgan's tiles as it chooses them
    pytest benchmarks --benchmark-only -k tiles     and the best of a few, to choose better

A test is one product of one geometry at one batch. A layer of D and the mirrored one of G share a
geometry, a large map, a small map and a weight: what is forward in one is the input gradient of the
other, the same call of cuDNN and the same kernel. Products are named as in `conv4x4_kernels`: fwd
from the large map to the small one, dgrad back, wgrad; each row says what that is in which layer.

Every variant is checked first, in its largest deviation relative to the largest value: against
float64, on a GPU for the layers of stride 2 against cuDNN in float32 without TF32. What is wrong,
or does not compile or launch, becomes a row with its reason and no time, and fails the test after
the rows are recorded. "fastgan" is the operator with the tile that it chooses; "best tile" the best
of a few by a first timing, timed again beside the others: where it is faster, the choice is to be
mended (both are in tiles.json). Bytes are both maps and the weight once; operations those of the
layer itself, without what padding adds to them.

"8 channels": cuDNN with the image and its weight filled up with zeros, beforehand. G1's input
gradient is no part of training.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Time, interleaved, sets_beyond_l2, synchronised
from torch import Tensor
from torch.backends import cudnn

from fastgan_kernels import conv4x4_kernels as kernels
from fastgan_kernels._launch import INTERPRETED, triton
from fastgan_kernels.conv4x4_kernels import Block

GPU = torch.cuda.is_available()
DTYPE, EXACT = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)
CANDIDATES = torch.cuda.get_device_capability() >= (9, 0) if GPU else INTERPRETED
SIZE, WIDTH = (64, 64) if GPU else (32, 32)
# Edge of the large map, its channels, those of the small map.
HALVING = {
    "D1/G5": (SIZE, 3, WIDTH),
    "D2/G4": (SIZE // 2, WIDTH, 2 * WIDTH),
    "D3/G3": (SIZE // 4, 2 * WIDTH, 4 * WIDTH),
    "D4/G2": (SIZE // 8, 4 * WIDTH, 8 * WIDTH),
}
# 4x4 pixels to one and back: channels of the small side.
ENDS = {"D5": 1, "G1": 100}
KINDS = ("fwd", "dgrad", "wgrad")
BATCHES = [128, 256] if GPU else [2]  # 256: D's real and fake images in one pass
LARGE = [1024] if GPU else []
# Two roundings of bfloat16: some of PyTorch's products add up parts that are already rounded.
LIMIT = 2**-7 if GPU else 1e-5

INNER = [
    Block(128, 128, 64, 4, 3),
    Block(128, 128, 64, 8, 4),
    Block(64, 128, 64, 4, 4),
    Block(128, 64, 64, 4, 4),
    Block(256, 128, 64, 8, 3),
]
WGRAD = [*INNER[:3], *(replace(block, programs=2) for block in INNER[:3])]
IMAGE = [Block(64, 64, k, 4, s) for k, s in ((16, 3), (16, 4))] + [Block(128, 64, 16, 4, 3)]
DGRAD_IMAGE = [Block(m, 16, 64, w, 3) for m, w in ((64, 4), (128, 4), (32, 4), (64, 2))]
WGRAD_IMAGE = [
    Block(64, 64, k, 4, 3, programs) for k, programs in ((64, 1), (64, 2), (128, 2), (64, 4))
]
INTERPRETED_ONE = Block(32, 32, 32, 4, 2)


class Variant(NamedTuple):
    """One way to compute a product."""

    run: Callable[[int], Tensor]  # on set i of the buffers
    seen: Callable[[Tensor], Tensor]  # what it gave, laid out as what is expected
    expected: Callable[[], Tensor]


@pytest.fixture(autouse=True)
def strongest_cudnn(monkeypatch):
    """cuDNN's algorithm is the one that it measures as the fastest."""
    monkeypatch.setattr(cudnn, "benchmark", True)


def without_tf32():
    return cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False)


def convolution(kind: str, large: Tensor, small: Tensor, weight: Tensor, stride: int) -> Tensor:
    """cuDNN's, of channels-last tensors: fwd, or one gradient of it, as autograd takes it."""
    padding = [1, 1] if stride == 2 else [0, 0]
    geometry = ([stride, stride], padding, [1, 1], False, [0, 0], 1)
    if kind == "fwd":
        return torch.ops.aten.convolution(large, weight, None, *geometry)
    mask = [kind == "dgrad", kind == "wgrad", False]
    backward = torch.ops.aten.convolution_backward
    return backward(small, large, weight, None, *geometry, mask)[mask.index(True)]


class Halving:
    """A layer pair of kernel 4, stride 2, padding 1, and the ways to compute one product of it."""

    def __init__(self, layer: str, kind: str, batch: int, device: torch.device) -> None:
        self.edge, self.cl, self.cs = HALVING[layer]
        self.layer, self.kind, self.batch, self.device = layer, kind, batch, device
        self.maps = functools.cache(self._maps)
        self.expected = functools.cache(self._expected)
        maps = batch * self.edge**2 * (self.cl + self.cs / 4)
        self.elements = int(maps) + 16 * self.cl * self.cs
        self.operations = 2 * batch * (self.edge // 2) ** 2 * 16 * self.cl * self.cs

    def _maps(self, i: int, channels: int) -> tuple[Tensor, ...]:
        """L, S and W of set i, channels-last; L and W with zeros up to `channels`."""
        random = torch.Generator(self.device).manual_seed(i)

        def normal(channels_to: int, *shape: int) -> Tensor:
            x = torch.randn(*shape, generator=random, device=self.device)
            return F.pad(x, (0, channels_to - shape[-1])).to(DTYPE).permute(0, 3, 1, 2)

        half = self.edge // 2
        large = normal(channels, self.batch, self.edge, self.edge, self.cl)
        small = normal(self.cs, self.batch, half, half, self.cs)
        return large, small, normal(channels, self.cs, 4, 4, self.cl) * 0.05

    def _expected(self) -> Tensor:
        """The product on set 0."""
        tensors = (t.to(EXACT) for t in self.maps(0, self.cl))
        with without_tf32():
            return convolution(self.kind, *tensors, stride=2)

    def cudnn(self, channels: int) -> Variant:
        def cut(y: Tensor) -> Tensor:
            return y if self.kind == "fwd" else y[:, : self.cl]

        def run(i: int) -> Tensor:
            return convolution(self.kind, *self.maps(i, channels), stride=2)

        return Variant(run, cut, self.expected)

    def fixed(self) -> dict[str, Variant]:
        found = {}
        if CANDIDATES:
            call = getattr(torch.ops.fastgan_kernels, f"conv4x4_{self.kind}")
            more = {"fwd": (1.0,), "wgrad": (None, 1.0)}.get(self.kind, ())  # no LeakyReLU
            found["fastgan"] = Variant(
                lambda i: call(*self._operands(i), *more), same, self.expected
            )
        found["cudnn"] = self.cudnn(self.cl)
        if self.cl == 3:
            found["cudnn, 8 channels"] = self.cudnn(8)
        return found

    def _operands(self, i: int) -> tuple[Tensor, ...]:
        large, small, weight = self.maps(i, self.cl)
        return {"fwd": (large, weight), "dgrad": (small, weight)}.get(self.kind, (large, small))

    def tiles(self) -> dict[str, Variant]:
        """The kernel with each of the tiles to try, cut to the channels that there are."""
        if not CANDIDATES:
            return {}
        image, wgrad = self.cl == 3, self.kind == "wgrad"
        blocks = WGRAD if wgrad else INNER
        if image:
            blocks = {"fwd": IMAGE, "dgrad": DGRAD_IMAGE, "wgrad": WGRAD_IMAGE}[self.kind]
        n = self.cl if self.kind == "dgrad" and not image else self.cs
        m = self.cl if wgrad and not image else 0
        k = {"fwd": 16 * self.cl if image else self.cl, "dgrad": self.cs, "wgrad": 0}[self.kind]
        cut = [(block if GPU else INTERPRETED_ONE).fitted(m, n, k) for block in blocks]
        return {f"best tile, {block}": self.tile(block) for block in dict.fromkeys(cut)}

    def tile(self, block: Block) -> Variant:
        function = getattr(kernels, self.kind + ("_image" if self.cl == 3 else ""))

        def run(i: int) -> Tensor:
            shape = self.expected().shape
            layout = torch.channels_last
            out = torch.empty(shape, dtype=DTYPE, device=self.device, memory_format=layout)
            function(*(t.permute(0, 2, 3, 1) for t in (*self._operands(i), out)), block)
            return out

        return Variant(run, same, self.expected)


def same(y: Tensor) -> Tensor:
    return y


class End:
    """D5 or G1: between 4 x 4 pixels of the widest map and one, which is a matrix product
    [B, 16 * CL] by [16 * CL, CS], too.
    """

    def __init__(self, layer: str, kind: str, batch: int, device: torch.device) -> None:
        self.layer, self.kind, self.batch, self.device = layer, kind, batch, device
        self.cs = ENDS[layer]
        self.length = 16 * 8 * WIDTH
        self.maps = functools.cache(self._maps)
        self.expected = functools.cache(self._expected)
        self.elements = batch * (self.length + self.cs) + self.length * self.cs
        self.operations = 2 * batch * self.length * self.cs

    def _maps(self, i: int) -> tuple[Tensor, ...]:
        """Large map [B, 16 * CL] over (y, x, cl), small map [B, CS], weight [CS, 16 * CL]; the
        small map again, in rows that begin at a multiple of 16 bytes.
        """
        random = torch.Generator(self.device).manual_seed(i)
        large, small, weight = (
            torch.randn(*shape, generator=random, device=self.device).to(DTYPE)
            for shape in ((self.batch, self.length), (self.batch, self.cs), (self.cs, self.length))
        )
        aligned = small.new_empty(self.batch, -(-self.cs // 8) * 8)[:, : self.cs].copy_(small)
        return large, small, weight, aligned

    def _expected(self) -> Tensor:
        return product(self.kind, *(t.double() for t in self.maps(0)))

    def variant(self, call: Callable[..., Tensor]) -> Variant:
        return Variant(
            lambda i: call(*self.maps(i)),
            lambda y: y.reshape(self.expected().shape),
            self.expected,
        )

    def convolved(self, large: Tensor, small: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        def pixels(t: Tensor) -> Tensor:
            return t.view(len(t), 4, 4, -1).permute(0, 3, 1, 2)

        y = convolution(self.kind, pixels(large), small[:, :, None, None], pixels(weight), stride=1)
        return y.permute(0, 2, 3, 1)

    def fixed(self) -> dict[str, Variant]:
        calls = {"cudnn": self.convolved, "matmul": functools.partial(product, self.kind)}
        if self.cs == 1:
            calls |= {
                "fwd": {"mv": lambda large, small, weight, _: torch.mv(large, weight[0])},
                "dgrad": {"broadcast": lambda large, small, weight, _: small * weight},
                "wgrad": {"mv": lambda large, small, weight, _: torch.mv(large.t(), small[:, 0])},
            }[self.kind]
        else:
            calls["matmul, aligned rows"] = functools.partial(product_aligned, self.kind)
        return {name: self.variant(call) for name, call in calls.items()}


def product(kind: str, large: Tensor, small: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    if kind == "fwd":
        return large @ weight.t()
    return small @ weight if kind == "dgrad" else small.t() @ large


def product_aligned(
    kind: str, large: Tensor, small: Tensor, weight: Tensor, aligned: Tensor
) -> Tensor:
    """With rows of the small map, read or written, that begin at a multiple of 16 bytes."""
    if kind != "fwd":
        return product(kind, large, aligned, weight, small)
    y = large.new_empty(len(large), aligned.stride(0))[:, : aligned.shape[1]]
    return torch.mm(large, weight.t(), out=y)


def meaning(layer: str, kind: str) -> str:
    """What a product is in the layers that share it."""
    network = {"fwd": "D", "dgrad": "G", "wgrad": ""}[kind]  # that goes forward by it
    backward = "input gradient" if network else "weight gradient"
    return ", ".join(
        f"{name} {'forward' if name[0] == network else backward}" for name in layer.split("/")
    )


def deviation(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where one is not finite."""
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    largest = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(largest) if largest.isfinite() else math.inf


def checked(name: str, variant: Variant) -> dict[str, Any]:
    """A row with its error and, where it must not be timed, the reason."""
    row: dict[str, Any] = {"variant": name, "error": None, "reason": None, "tried_ms": None}
    expected = variant.expected()
    try:
        row["error"] = deviation(variant.seen(variant.run(0)), expected)
    except torch.AcceleratorError as e:
        pytest.exit(f"{name}: {e}: the GPU's context is lost, nothing more can be measured")
    except Exception as e:  # whatever a compiler and a driver raise
        row["reason"] = f"{type(e).__name__}: {str(e).strip()[-300:]}"
        return row
    if not row["error"] <= LIMIT:
        row["reason"] = f"off by {row['error']:.1e}, over {LIMIT:.1e}"
    return row


def compile_ahead(variants: Iterable[Variant]) -> None:
    """Compile what the variants launch, a kernel a core, before the first of them has to wait. What
    does not compile says so again where it is launched.
    """

    def only_compile(kernel: Any, grid: Any, *args: Any, device: torch.device, **options: Any):
        kernel.warmup(*args, grid=grid, **options)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(kernels, "launch", only_compile)
        for variant in variants:
            with contextlib.suppress(Exception):
                variant.run(0)


class Comparison:
    """The rows of one product: what is right is timed together."""

    def __init__(
        self, problem: Halving | End, device: torch.device, tiles: dict[str, Variant]
    ) -> None:
        self.sets = sets_beyond_l2(problem.elements * DTYPE.itemsize, device)
        self.device = device
        self.rows: dict[str, dict[str, Any]] = {}
        if GPU:
            compile_ahead([*problem.fixed().values(), *tiles.values()])
        self.timed = self.right(problem.fixed())
        if not GPU:  # interpreted: checked, not timed
            self.timed.pop("fastgan", None)
        if good := self.right(tiles):
            tried = {name: t.ms for name, t in self.times(good).items()} if GPU else {}
            best = min(good, key=lambda name: tried.get(name, 0.0))
            self.rows = {n: row for n, row in self.rows.items() if n == best or n not in good}
            self.rows[best]["tried_ms"] = tried or None
            self.timed |= {best: good[best]} if GPU else {}

    def right(self, variants: dict[str, Variant]) -> dict[str, Variant]:
        """Those that pass their check, of which each becomes a row."""
        self.rows |= {name: checked(name, variant) for name, variant in variants.items()}
        return {n: variant for n, variant in variants.items() if self.rows[n]["reason"] is None}

    def times(self, variants: dict[str, Variant]) -> dict[str, Time]:
        sets = range(self.sets)
        calls = {n: [functools.partial(v.run, i) for i in sets] for n, v in variants.items()}
        return interleaved(calls, self.device)

    def finished(self) -> list[dict[str, Any]]:
        found = self.times(self.timed)
        nothing = dict.fromkeys(("ms", "low_ms", "high_ms"))
        return [row | (asdict(found[n]) if n in found else nothing) for n, row in self.rows.items()]


def cases() -> list[Any]:
    layers = [(layer, b) for layer in (*HALVING, *ENDS) for b in BATCHES]
    layers += [(layer, b) for layer in HALVING if layer != "D1/G5" for b in LARGE]
    return [
        pytest.param(layer, kind, b, id=f"{layer.replace('/', '-')} {kind} {b}")
        for layer, b in layers
        for kind in KINDS
    ]


@pytest.mark.parametrize(("layer", "kind", "batch"), cases())
def test_convs(layer, kind, batch, device, copy_gbps, matmul_tflops, record_rows, benchmark):
    problem = (Halving if layer in HALVING else End)(layer, kind, batch, device)
    measure("convs", problem, {}, copy_gbps, matmul_tflops, record_rows, benchmark)


@pytest.mark.parametrize(("layer", "kind", "batch"), [c for c in cases() if c.values[0] in HALVING])
def test_tiles(layer, kind, batch, device, copy_gbps, matmul_tflops, record_rows, benchmark):
    problem = Halving(layer, kind, batch, device)
    tiles = problem.tiles()
    measure("tiles", problem, tiles, copy_gbps, matmul_tflops, record_rows, benchmark)


def measure(
    record: str,
    problem: Halving | End,
    tiles: dict[str, Variant],
    copy_gbps: float | None,
    matmul_tflops: float | None,
    record_rows: Callable[..., None],
    benchmark: Any,
) -> None:
    """Compare, write the rows into `record`, and fail where one is wrong."""
    rows = Comparison(problem, problem.device, tiles).finished()
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
    nbytes = problem.elements * DTYPE.itemsize
    layer, kind = problem.layer, problem.kind
    of = {"layer": layer, "direction": f"{kind}: {meaning(layer, kind)}", "batch": problem.batch}
    of["dtype"] = str(DTYPE).removeprefix("torch.")
    for i, row in enumerate(rows):
        tflops = problem.operations / row["ms"] / 1e9 if row["ms"] else None
        checks = {key: row.pop(key) for key in ("error", "reason", "tried_ms")}
        rows[i] = {
            **of,
            **row,
            "tflops": tflops,
            "share_of_peak": tflops / matmul_tflops if tflops and matmul_tflops else None,
            "floor_ms": nbytes / copy_gbps / 1e6 if copy_gbps else None,
            **checks,
        }
    record_rows(record, rows)
    first = next(iter(problem.fixed().values()))
    benchmark.extra_info |= {row["variant"]: row["ms"] for row in rows}
    benchmark.pedantic(synchronised(lambda: first.run(0)), rounds=20, warmup_rounds=2)
    wrong = {row["variant"]: row["reason"] for row in rows if row["reason"]}
    assert not wrong, f"without a time: {wrong}"

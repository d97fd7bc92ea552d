"""Every operator of fastgan_kernels against what else a user could take.

    pytest benchmarks --benchmark-only -k kernels

A test is one operation at one shape: all its variants are checked against float64 on the same
inputs, and then timed together (`harness`). pytest-benchmark's own table shows the first variant;
the table at the end shows all, and on a GPU they are recorded.
"""

from __future__ import annotations

import functools
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from harness import measure, synchronised
from roofline import layers
from torch import Tensor

from fastgan.models import Discriminator, Generator
from fastgan_kernels import Adam, Average, adam_ema, bn_act, bn_act_ref, gather_u8

GPU = torch.cuda.is_available()
# Channels, edge and activation of the DCGAN's batch norms at 64 px, by layer.
IN_D, IN_G = layers(64, 100, 64)
LAYERS = {f"G{i}": (x.cout, x.large, "relu") for i, x in enumerate(IN_G[:-1], 1)}
LAYERS |= {f"D{i}": (x.cout, x.small, "leaky_relu") for i, x in enumerate(IN_D[1:-1], 2)}
BATCHES = [128, 1024] if GPU else [8]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16} if GPU else {"fp32": torch.float32}
# A rounding of what is stored, and of what PyTorch's own stores between batch norm and activation;
# and masks that the second one turns.
LIMIT = {"bf16": 3e-2, "fp16": 1e-2, "fp32": 1e-4}
# torch.compile as it is, and with the setting that keeps the masked gradient out of memory
COMPILED = {
    "torch.compile": {},
    "torch.compile, reads 20": {"options": {"realize_reads_threshold": 20}},
}
RAMP = 0.05  # of the average: its weight at the first step is 1 - 2^-20
STATISTICS = {"training": True, "momentum": 0.1, "eps": 1e-5}


def plain_bn_act(x, weight, bias, mean, var, act):
    z = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
    return F.relu(z) if act == "relu" else F.leaky_relu(z, 0.2)


def bn_act_variants(act):
    """Functions of x, weight, bias, running_mean, running_var by name."""
    options = {**STATISTICS, "act": act}
    variants = {"triton": functools.partial(bn_act, impl="triton", **options)} if GPU else {}
    variants["eager"] = functools.partial(bn_act, impl="torch", **options)
    if not GPU:
        return variants | {"ref": functools.partial(bn_act, impl="ref", **options)}
    for name, how in COMPILED.items():
        compiled = torch.compile(plain_bn_act, fullgraph=True, dynamic=False, **how)
        variants[name] = functools.partial(compiled, act=act)
    return variants


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layer", LAYERS)
def test_bn_act(layer, batch, dtype, device, copy_gbps, record_rows, benchmark):
    """Forward and backward of one layer: 3 and 5 passes over a tensor of its size."""
    torch._dynamo.reset()  # a limit on compilations must not end as an eager call
    channels, size, act = LAYERS[layer]
    kind = DTYPES[dtype]
    elements = batch * channels * size * size

    @functools.cache
    def buffers(i):
        torch.manual_seed(i)
        x, dy = (
            torch.randn(batch, channels, size, size, device=device, dtype=kind)
            .mul_(scale)
            .to(memory_format=torch.channels_last)
            for scale in (2.0, 1.0)
        )
        vectors = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
        return [t.requires_grad_() for t in (x, *vectors[:2])], vectors[2:], dy

    def both_ways(run, i):
        leaves, statistics, dy = buffers(i)
        y = run(*leaves, *statistics)
        return y, *torch.autograd.grad(y, leaves, dy)

    def checked(run):
        """On statistics that start the same for every variant; they belong to what is checked."""
        statistics = buffers(0)[1]
        kept = [t.clone() for t in statistics]
        results = [*both_ways(run, 0), *(t.clone() for t in statistics)]
        for t, before in zip(statistics, kept, strict=True):
            t.copy_(before)
        return results

    def in_float64():
        leaves, statistics, dy = buffers(0)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        moved = [t.double() for t in statistics]
        y = bn_act_ref(*wide, *moved, act=act, **STATISTICS)
        return [y, *torch.autograd.grad(y, wide, dy.double()), *moved]

    variants = bn_act_variants(act)
    rows = measure(
        "bn_act",
        f"{layer} {batch}x{channels}x{size}x{size}",
        dtype,
        {name: lambda i, run=run: lambda: both_ways(run, i) for name, run in variants.items()},
        {name: functools.partial(checked, run) for name, run in variants.items()},
        in_float64(),
        LIMIT[dtype],
        8 * elements * kind.itemsize,
        device,
        copy_gbps,
    )
    record_rows("kernels", [asdict(row) for row in rows])
    first = next(iter(variants.values()))
    benchmark.extra_info |= {row.variant: row.ms for row in rows}
    benchmark.pedantic(synchronised(lambda: both_ways(first, 0)), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("flips", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gather_u8(batch, dtype, flips, device, copy_gbps, record_rows, benchmark):
    torch._dynamo.reset()
    kind = DTYPES[dtype]
    count = 70_000 if GPU else 500  # FFHQ
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, device=device)

    @functools.cache
    def arguments(i):
        torch.manual_seed(i)
        index = torch.randint(0, count, (batch,), device=device)
        return index, torch.rand(batch, device=device) < 0.5 if flips else None

    def gathered(impl):
        return lambda index, flip: gather_u8(images, index, flip, dtype=kind, impl=impl)

    variants = {"triton": gathered("triton")} if GPU else {}
    variants["eager"] = gathered("torch")
    if GPU:
        variants["torch.compile"] = torch.compile(gathered("ref"), fullgraph=True, dynamic=False)
    index, flip = arguments(0)
    rows = measure(
        "gather_u8",
        f"{batch}x64x64x3" + (" flip" if flips else ""),
        dtype,
        {n: lambda i, run=run: lambda: run(*arguments(i)) for n, run in variants.items()},
        {n: lambda run=run: [run(*arguments(0))] for n, run in variants.items()},
        [gather_u8(images, index, flip, dtype=torch.float64)],
        {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-22}[dtype],
        batch * 64 * 64 * 3 * (1 + kind.itemsize),
        device,
        copy_gbps,
    )
    record_rows("kernels", [asdict(row) for row in rows])
    first = next(iter(variants.values()))
    benchmark.extra_info |= {row.variant: row.ms for row in rows}
    benchmark.pedantic(synchronised(lambda: first(*arguments(0))), rounds=20, warmup_rounds=2)


class Followed:
    """A network's parameters with an optimizer, and what follows them."""

    def __init__(self, make, seed, extras, impl, device):
        torch.manual_seed(seed)
        net = make().to(device, memory_format=torch.channels_last)
        self.params = list(net.parameters())
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.average, self.low = None, []
        if extras:
            self.low = [torch.empty_like(p, dtype=torch.bfloat16) for p in self.params]
            count = torch.zeros((), dtype=torch.float64, device=device)
            copies = [p.detach().clone() for p in self.params]
            self.average = Average(copies, [], count, 100.0, RAMP)
        if impl == "torch":
            self.adam = torch.optim.Adam(
                self.params, lr=torch.tensor(2e-4, device=device), betas=(0.5, 0.999),
                fused=True, capturable=device.type == "cuda",
            )  # fmt: skip
        else:
            self.adam = Adam(
                self.params, 2e-4, (0.5, 0.999), low=self.low, average=self.average, impl=impl
            )
        self.apart = impl == "torch"

    def __call__(self):
        self.adam.step()
        if self.apart and self.low:
            with torch.no_grad():
                torch._foreach_copy_(self.low, self.params)
                # as torch.optim.swa_utils moves one, by the weight that the first step has
                torch._foreach_lerp_(self.average.params, self.params, 1 - 0.5 ** (1 / RAMP))

    def tensors(self):
        return [*self.params, *self.low, *(self.average.params if self.average else [])]


@pytest.mark.parametrize("extras", [False, True], ids=["", "copies"])
@pytest.mark.parametrize("network", ["G", "D"])
def test_adam_ema(network, extras, device, copy_gbps, record_rows, benchmark):
    """One step of a 64 px network: 28 bytes a parameter, and 10 for a bf16 copy and an average."""
    width = 64 if GPU else 8
    make = {"G": lambda: Generator(64, 100, width), "D": lambda: Discriminator(64, width)}[network]
    count = sum(p.numel() for p in make().parameters())
    impls = {"triton": "triton", "torch fused": "torch"} if GPU else {"torch fused": "torch"}
    made = functools.cache(lambda impl, i: Followed(make, i, extras, impl, device))

    def in_float64():
        wide = Followed(make, 1000, extras, "ref", device)
        params = [p.detach().double() for p in wide.params]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        step = torch.zeros((), device=device)
        copies = [p.clone() for p in params]
        average = Average(
            copies, [], torch.zeros((), dtype=torch.float64, device=device), 100.0, RAMP
        )
        adam_ema(
            params, [p.grad.double() for p in wide.params], *moments, step,
            torch.tensor(2e-4, dtype=torch.float64, device=device), betas=(0.5, 0.999),
            average=average, impl="ref",
        )  # fmt: skip
        low = [p.to(torch.bfloat16) for p in params]
        return [*params, *(low if extras else []), *(copies if extras else [])]

    def checked(impl) -> list[Tensor]:
        one = Followed(make, 1000, extras, impl, device)
        one()
        return one.tensors()

    rows = measure(
        "adam_ema",
        f"{network} {count / 1e6:.2f} M" + (" copies" if extras else ""),
        "fp32",
        {n: lambda i, impl=impl: made(impl, i) for n, impl in impls.items()},
        {n: functools.partial(checked, impl) for n, impl in impls.items()},
        in_float64(),
        # float32 roundings beside weights of 0.02, and where one turns that of the copy: a few in a
        # hundred thousand, each by 2^-8
        1e-6 + (2**-8 * 1e-2 if extras else 0),
        count * (38 if extras else 28),
        device,
        copy_gbps,
    )
    record_rows("kernels", [asdict(row) for row in rows])
    benchmark.extra_info |= {row.variant: row.ms for row in rows}
    first = made(next(iter(impls.values())), 0)
    benchmark.pedantic(synchronised(first), rounds=20, warmup_rounds=2)

"""Whole training steps to compare: fastgan's with each part off in turn, and what a user could
build from the tutorial with PyTorch alone.

Every contender trains the same networks on the same batch. Those of PyTorch get it ready made, as
floats on the device; fastgan's gather it from resident bytes in the step. A contender is checked by
its first step, against the reference in float64 on the latents that it drew itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from harness import error_of
from torch import Tensor, nn

from fastgan.compiling import compiled
from fastgan.config import split_size
from fastgan.data.feed import Batch
from fastgan.graph import Graphed
from fastgan.models import Discriminator, Generator
from fastgan.optim import Ema, Trained
from fastgan.reference import Reference, make_discriminator, make_generator
from fastgan.state import State
from fastgan.step import Step, without_gradients

LR, BETAS, SEED = 2e-4, (0.5, 0.999), 7
Networks, Adams = Sequence[nn.Module], Sequence[torch.optim.Optimizer]
SCALE = 1024.0  # of float16's losses: large enough, and without an overflow in the first step


@dataclass(frozen=True)
class Case:
    size: int
    batch: int
    latent: int = 100
    width: int = 64

    def __str__(self) -> str:
        return f"{self.size} px, batch {self.batch}"


def limits(precision: str, case: Case) -> tuple[float, float, float]:
    """The limits of D's gradient, of G's (behind D's first update, where Adam turns rounding noise
    into steps), both in L2, and of running means in standard deviations: half of what fake before
    real in them makes (0.02 and more).
    """
    _, doublings = split_size(case.size)

    def gradient(roundoff: float) -> float:
        # a share of the masks turns in each layer (derived in tests/test_step.py)
        return ((2 * doublings + 1) * 2 * 0.4 * 4 * roundoff) ** 0.5

    return {
        "fp32": (gradient(2e-6), gradient(6e-4), 5e-3),
        "tf32": (gradient(2**-11), 2 * gradient(2**-11), 8e-3),
        "bf16": (gradient(2**-9), 1.5 * gradient(2**-9), 15e-3),
        "fp16": (gradient(2**-12), 2 * gradient(2**-12), 8e-3),
    }[precision]


class Data:
    """A batch of smooth random pictures: as bytes of a resident set, and ready made."""

    def __init__(self, case: Case, device: torch.device, count: int = 10_000) -> None:
        random = torch.Generator(device).manual_seed(SEED)
        coarse = torch.rand(case.batch, 3, 5, 5, generator=random, device=device) * 255
        fine = nn.functional.interpolate(coarse, case.size, mode="bilinear", align_corners=True)
        pictures = fine.round().to(torch.uint8).permute(0, 2, 3, 1)
        images = torch.randint(
            256, (count, case.size, case.size, 3), dtype=torch.uint8, device=device
        )
        index = torch.randperm(count, generator=random, device=device)[: case.batch]
        images[index] = pictures
        self.batch = Batch(images, index)
        self.real = (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


class Contender:
    """One way to run the step, before its first.

    Attributes:
        networks, adams: G and D with their optimizers.
        precision: whose `limits` apply.
        latents: what the last step drew, B rows.
        advance: a step.
    """

    networks: Networks
    adams: Adams
    precision: str
    latents: Tensor
    advance: Callable[[], Any]


class Tutorial(Contender):
    """The eager reference itself: float32, convolutions in TF32 if `tf32` (PyTorch's default)."""

    def __init__(self, case: Case, data: Data, tf32: bool) -> None:
        self.reference = Reference(
            case.size, case.latent, case.width, lr=LR, device=data.real.device
        )
        self.networks = self.reference.netG, self.reference.netD
        self.adams = self.reference.optimizerG, self.reference.optimizerD
        self.precision = "tf32" if tf32 and data.real.is_cuda else "fp32"
        draw = self.reference.draw

        def drawn(count: int) -> Tensor:
            self.latents = draw(count)
            return self.latents

        def advance() -> None:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
                self.reference.step(data.real)

        self.reference.draw, self.advance = drawn, advance  # type: ignore[method-assign]


class FromOnePixel(nn.ConvTranspose2d):
    """The generator's first layer, [B, latent, 1, 1] to [B, C, base, base], as the matrix product
    that it is.

    Inductor takes the strides of one pixel in channels-last memory for others than cuDNN returns,
    and fails in the convolution's backward (torch 2.11).
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        weight = self.weight.permute(0, 2, 3, 1)  # the order of channels-last memory
        y = x.flatten(1) @ weight.flatten(1)
        return y.view(-1, *weight.shape[1:]).permute(0, 3, 1, 2)


class ToOnePixel(nn.Conv2d):
    """The discriminator's last layer, [B, C, base, base] to [B, 1], likewise."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))
        return nn.functional.linear(x, weight)


def tuned_networks(case: Case) -> tuple[nn.Sequential, nn.Sequential]:
    """The tutorial's G, and D up to its logits (autocast refuses BCELoss), with those two layers;
    parameters, their names and their order are the tutorial's.
    """
    g = make_generator(case.size, case.latent, case.width)
    d = make_discriminator(case.size, case.width)[:-1]
    base, _ = split_size(case.size)
    g[0] = FromOnePixel(case.latent, g[0].out_channels, base, bias=False)
    d[-1] = ToOnePixel(d[-1].in_channels, 1, base, bias=False)
    return g, d


class Tuned(Contender):
    """The tutorial's loop with what PyTorch offers a user who wants speed; the loop reads no number
    back (GradScaler does, but for a fused Adam).

    Args:
        amp: autocast to bfloat16 or float16 (with GradScaler); None for float32.
        compile: torch.compile's options; None for eager.
        fused: torch's fused Adam, and D frozen while G is updated; else PyTorch's default, foreach.
        graph: the whole step as one CUDA graph.
    """

    def __init__(
        self,
        case: Case,
        data: Data,
        *,
        amp: torch.dtype | None = None,
        compile: dict[str, Any] | None = None,
        fused: bool = False,
        graph: bool = False,
    ) -> None:
        device = data.real.device
        g, d = tuned_networks(case)
        for network in (g, d):
            network.to(device).to(memory_format=torch.channels_last)
        self.networks = g, d
        rate = torch.tensor(LR, device=device) if graph else LR
        options = {"lr": rate, "betas": BETAS, "fused": fused or None, "capturable": graph}
        self.adams = [torch.optim.Adam(n.parameters(), **options) for n in self.networks]
        self.precision = precision_of(amp, device)
        self.scaler = torch.amp.GradScaler(device.type, SCALE, enabled=amp == torch.float16)
        self.amp, self.freeze = amp, fused
        self.real = data.real.contiguous(memory_format=torch.channels_last)
        self.random = torch.Generator(device).manual_seed(SEED)
        self.latents = torch.empty(case.batch, case.latent, 1, 1, device=device)
        self.ones = torch.ones(case.batch, device=device)
        self.zeros = torch.zeros(case.batch, device=device)
        self.criterion = nn.BCEWithLogitsLoss()
        self.g, self.d = g, d
        if compile is not None:
            how = {"fullgraph": True, "dynamic": False, "options": compile}
            self.g, self.d = torch.compile(g, **how), torch.compile(d, **how)
        self.advance = self._captured(data.batch) if graph else self._step

    def _step(self) -> None:
        adam_g, adam_d = self.adams
        self.latents.normal_(generator=self.random)
        adam_d.zero_grad()
        with self._autocast():
            on_real = self.d(self.real).view(-1)
            loss = self.criterion(on_real, self.ones)
        self.scaler.scale(loss).backward()
        with self._autocast():
            fake = self.g(self.latents)
            loss = self.criterion(self.d(fake.detach()).view(-1), self.zeros)
        self.scaler.scale(loss).backward()
        self.scaler.step(adam_d)
        adam_g.zero_grad()
        with (
            without_gradients(self.networks[1]) if self.freeze else nullcontext(),
            self._autocast(),
        ):
            loss = self.criterion(self.d(fake).view(-1), self.ones)
        self.scaler.scale(loss).backward()
        self.scaler.step(adam_g)
        self.scaler.update()

    def _autocast(self) -> torch.autocast:
        on, kind = self.amp is not None, self.real.device.type
        return torch.autocast(kind, dtype=self.amp, enabled=on, cache_enabled=False)

    def _captured(self, batch: Batch) -> Callable[[], Any]:
        self._step()  # makes the optimizers' state
        state = [t for network in self.networks for t in network.state_dict().values()]
        if self.scaler.is_enabled():
            state += [self.scaler._scale, self.scaler._growth_tracker]
        for adam in self.adams:
            moments = [t for of_p in adam.state.values() for t in of_p.values()]
            torch._foreach_zero_(moments)
            state += moments
        graphed = Graphed(lambda _: self._step(), batch, state, self.random)
        return lambda: graphed(batch)


class Ours(Contender):
    """fastgan's step as the trainer runs it, with some of its parts off.

    Args:
        low: bfloat16 or float16; None for float32.
        kernels, adam: "triton" or "torch".
        convs: "auto" or "torch", cuDNN's convolutions; None as the kernels.
        compile: all three passes (True), or those of `Step` that are named.
    """

    def __init__(
        self,
        case: Case,
        data: Data,
        *,
        low: torch.dtype | None = None,
        kernels: str = "torch",
        adam: str = "torch",
        convs: str | None = None,
        one_pass: bool = True,
        compile: bool | tuple[str, ...] = False,
        graph: bool = False,
    ) -> None:
        device = data.real.device
        shape = (case.size, case.latent, case.width)
        g, average = (Generator(*shape, impl=kernels, conv_impl=convs) for _ in range(2))
        d = Discriminator(case.size, case.width, kernels, convs)
        for network in (g, d, average):
            network.to(device).to(memory_format=torch.channels_last)
        ema = Ema(g, average, case.batch, 10_000)
        sides = (
            Trained(g, LR, BETAS, low=low, ema=ema, impl=adam),
            Trained(d, LR, BETAS, low=low, impl=adam),
        )
        random = torch.Generator(device).manual_seed(SEED)
        self.step = Step(
            *sides, ema, batch=case.batch, random=random, one_pass=one_pass,
            compile=compile is True, impl=kernels,
        )  # fmt: skip
        for name in compile if isinstance(compile, tuple) else ():
            setattr(self.step, name, compiled(getattr(self.step, name)))
        self.step.scale.scale.fill_(SCALE if self.step.scale.enabled else 1.0)
        self.networks, self.adams = (g, d), [side.adam for side in sides]
        self.latents = self.step.latents
        self.precision = precision_of(low, device)
        call = Graphed(self.step, data.batch, self.step.tensors(), random) if graph else self.step
        self.advance = lambda: call(data.batch)


class OfState(Contender):
    """A run's own step, to be checked."""

    def __init__(self, state: State, batch: Batch) -> None:
        step = state.step
        self.networks = step.g.network, step.d.network
        self.adams, self.latents = (step.g.adam, step.d.adam), step.latents
        self.precision = precision_of(state.modes.low, state.device)
        self.advance = lambda: state.advance(batch)


def check_rate(case: Case) -> float:
    """Adam's learning rate in the step that is checked: D moves so far that G's gradient shows
    which D judged it (0.4 and more in L2 for the one before), and no further, to where D is sure
    and G's gradient is noise. Tried for widths 8 to 64 and sizes 32 to 256.
    """
    return LR * 64 / case.width * min(1.0, (128 / case.size) ** 2)


@torch.no_grad()
def check(contender: Contender, case: Case, real: Tensor) -> float:
    """Give it the reference's weights, run its first step, and compare: the relative L2 error of
    G's gradients or D's, whichever is larger.

    Raises:
        AssertionError: gradients or running means are off by more than its precision allows.
    """
    rate = check_rate(case)
    reference = Reference(
        case.size, case.latent, case.width, lr=rate, dtype=torch.float64, device=real.device
    )
    networks = reference.netG, reference.netD
    for ours, theirs in zip(contender.networks, networks, strict=True):
        for norm in norms(theirs):  # as if there were none: what the step adds is then all of them
            norm.running_mean.zero_(), norm.running_var.zero_()
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            a.copy_(b)
    for adam in contender.adams:
        set_rate(adam, rate)
        if write := getattr(adam, "write_low", None):
            write()
    with torch.enable_grad():
        contender.advance()
        noise = contender.latents.double().view(case.batch, case.latent, 1, 1)
        reference.draw = lambda count: noise  # type: ignore[method-assign]
        # once in this shape: no search for the fastest
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            reference.step(real.double())
    for adam in contender.adams:
        set_rate(adam, LR)
    got = gradients(contender.networks, contender.adams)
    expected = gradients(networks, (reference.optimizerG, reference.optimizerD))
    g_error, d_error = (error_of([a], [b]) for a, b in zip(got, expected, strict=True))
    shift = max(
        float(((a.running_mean.double() - b.running_mean) / b.running_var.sqrt()).abs().max())
        for ours, theirs in zip(contender.networks, networks, strict=True)
        for a, b in zip(norms(ours), norms(theirs), strict=True)
    )
    found = {"D's gradient": d_error, "G's gradient": g_error, "a running mean": shift}
    allowed = dict(zip(found, limits(contender.precision, case), strict=True))
    wrong = [
        f"{name} is off by {found[name]:.2g}, {limit:.2g} is allowed"
        for name, limit in allowed.items()
        if not found[name] <= limit
    ]
    assert not wrong, "; ".join(wrong)
    return max(g_error, d_error)


def set_rate(adam: torch.optim.Optimizer, lr: float) -> None:
    """Of a learning rate that is a number, or a tensor which a graph reads."""
    (group,) = adam.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def precision_of(low: torch.dtype | None, device: torch.device) -> str:
    """The name in `limits`; float32's convolutions are TF32 on a GPU, PyTorch's default."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[low] if low else "tf32" if device.type == "cuda" else "fp32"


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def gradients(networks: Networks, adams: Adams) -> list[Tensor]:
    """Of the first step, a vector for each network: they are in Adam's moments."""
    return [
        torch.cat([adam.state[p]["exp_avg"].double().flatten() for p in network.parameters()])
        / (1 - BETAS[0])
        for network, adam in zip(networks, adams, strict=True)
    ]

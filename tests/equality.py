"""How the fast step is compared with the reference: same weights, same images, same latents.

Weights after N float32 steps are no test: Adam's first steps are about lr * sign(gradient), and
another order of summation flips enough signs that two right implementations differ by a quarter of
the update. So float64 is compared after 20 steps, and everything else is compared step by step,
each from the reference's own state ("teacher-forced"), in the gradients before Adam and in the
running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastgan.data.feed import Batch
from fastgan.distributed import Ranks
from fastgan.graph import Graphed
from fastgan.losses import Objective
from fastgan.models import Discriminator, Generator, SpectralDiscriminator
from fastgan.optim import MOMENTS, Ema, Trained
from fastgan.reference import Reference
from fastgan.sight import Sight
from fastgan.step import Step, StepStats

STEPS = 20
SEED = 7
LR = 2**-12  # 2.4e-4, the same in float32: what CUDA's fused Adam takes its rate in


@dataclass(frozen=True)
class Case:
    """A small DCGAN: big enough to have every kind of layer, small enough for a laptop."""

    size: int = 32
    latent: int = 16
    width: int = 8
    batch: int = 8


def images(case: Case, count: int = 64) -> np.ndarray:
    """uint8 [count, size, size, 3]: smooth random pictures, whose statistics are not noise's."""
    random = np.random.default_rng(SEED)
    coarse = torch.from_numpy(random.uniform(0, 255, (count, 3, 5, 5)))
    fine = nn.functional.interpolate(coarse, case.size, mode="bilinear", align_corners=True)
    return fine.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def batches(case: Case, steps: int = STEPS, device: str = "cpu") -> Iterator[Batch]:
    """The same batches for both sides."""
    everything = torch.from_numpy(images(case)).to(device)
    random = np.random.default_rng(SEED + 1)
    for _ in range(steps):
        index = torch.from_numpy(random.integers(0, len(everything), case.batch))
        yield Batch(everything, index.to(device))


def share(ranks: Ranks, batch: Batch) -> Batch:
    """A rank's part of a batch of all."""
    count = len(batch.index) // ranks.world
    return Batch(batch.images, batch.index[ranks.rank * count :][:count])


def as_reference(batch: Batch, dtype: torch.dtype) -> Tensor:
    """A batch as the tutorial's transforms give it: ToTensor, then Normalize(0.5, 0.5)."""
    return (
        ((batch.images[batch.index].to(dtype) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
    )


def make_reference(case: Case, device: torch.device) -> Reference:
    return Reference(
        case.size, case.latent, case.width, lr=LR, seed=SEED, dtype=torch.float64, device=device
    )


def make_step(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    kind: type[Step] = Step,
    channels_last: bool = True,
    amp_dtype: torch.dtype | None = None,
    one_pass: bool = True,
    compile: bool = False,
    device: str = "cpu",
    impl: str = "torch",
    with_ema: bool = False,
    flip: bool = False,
    ranks: Ranks | None = None,
    sync_bn: bool = False,
    objective: Objective | None = None,
    policies: tuple = (),
    noise: float = 0.0,
    penalty: float = 0.0,
    latent_dist: str = "normal",
    spectral: bool = False,
) -> Step:
    """The fast step, its latents seeded as the reference's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (case.size, case.latent, case.width)
    g = Generator(*shape, impl=impl, latent_dist=latent_dist)
    d = (SpectralDiscriminator if spectral else Discriminator)(case.size, case.width, impl)
    if spectral:
        d.reset(torch.Generator().manual_seed(SEED))
    for network in (g, d):
        network.to(device, dtype).to(memory_format=layout)
    sight = None
    if policies or noise:
        mine = (ranks or Ranks()).share_of(case.batch)
        sight = Sight(case.size, case.batch, mine, policies, noise, dtype=dtype, device=device)
    ema = None
    if with_ema:
        average = Generator(*shape, impl=impl).to(device, dtype).to(memory_format=layout)
        ema = Ema(g, average, case.batch, 100 * case.batch)
    return kind(
        Trained(g, LR, (0.5, 0.999), low=amp_dtype, ema=ema, impl=impl),
        Trained(d, LR, (0.5, 0.999), low=amp_dtype, impl=impl),
        ema,
        batch=case.batch,
        random=torch.Generator(device).manual_seed(SEED),
        objective=objective,
        sight=sight,
        penalty=penalty,
        flip=flip,
        one_pass=one_pass,
        compile=compile,
        impl=impl,
        ranks=ranks,
        sync_bn=sync_bn,
    )


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(our name, our tensor, their tensor): the layers come in the same order in both."""
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert [tuple(t.shape) for t in mine.values()] == [tuple(t.shape) for t in yours.values()]
    return [(name, mine[name], t) for name, t in zip(mine, yours.values(), strict=True)]


@torch.no_grad()
def load(step: Step, reference: Reference) -> None:
    """Give the fast step the reference's whole state: weights, running statistics, both Adams."""
    sides = (
        (step.g, reference.netG, reference.optimizerG),
        (step.d, reference.netD, reference.optimizerD),
    )
    for side, theirs, adam in sides:
        for _, mine, yours in pairs(side.network, theirs):
            mine.copy_(yours)
        for p, q in zip(side.network.parameters(), theirs.parameters(), strict=True):
            if q in adam.state:
                for key in ("step", *MOMENTS):
                    side.adam.state[p][key].copy_(adam.state[q][key])
        side.adam.write_low()


def relative(ours: Tensor, theirs: Tensor, scale: Tensor) -> float:
    """L2(ours - theirs) / L2(scale), in float64."""
    return float((ours.double() - theirs.double()).norm() / scale.double().norm().clamp_min(1e-300))


def float64_distance(step: Step, case: Case, steps: int = STEPS) -> dict[str, float]:
    """After float64 steps: L2(difference) / L2(update) of every weight and running statistic. Of
    several ranks, each takes its share.
    """
    reference = make_reference(case, step.device)
    load(step, reference)
    sides = {"g": (step.g.network, reference.netG), "d": (step.d.network, reference.netD)}
    start = {
        f"{side}.{name}": t.clone() for side, pair in sides.items() for name, _, t in pairs(*pair)
    }
    for batch in batches(case, steps, step.device.type):
        step(share(step.ranks, batch))
        reference.step(as_reference(batch, torch.float64))
    return {
        f"{side}.{name}": relative(mine, yours, yours - start[f"{side}.{name}"])
        for side, pair in sides.items()
        for name, mine, yours in pairs(*pair)
    }


@dataclass
class Errors:
    """The largest errors met over the teacher-forced steps, with the name they were met at."""

    worst: dict[str, tuple[float, str]] = field(default_factory=dict)

    def note(self, kind: str, value: float, name: str) -> None:
        # written so that NaN, which is not below anything, counts as the worst and stays
        if not value <= self.worst.get(kind, (-1.0, ""))[0]:
            self.worst[kind] = (value, name)

    def __getitem__(self, kind: str) -> float:
        return self.worst[kind][0]


def teacher_forced(step: Step, case: Case, steps: int = STEPS, graphed: bool = False) -> Errors:
    """One step at a time from the reference's float64 state, as a CUDA graph if `graphed`; what
    differs in each. Of several ranks, each takes its share and has the whole reference.

    Kinds: `d_grad`, `g_grad`: L2(difference) / L2(gradient) over a network, as Adam gets the
    gradients; `mean`, `var`: the largest difference of a running mean in running standard
    deviations, and of a running variance relative to it; `loss`: of either loss.
    """
    reference = make_reference(case, step.device)
    # torch draws other normals in float32 than in float64: ours are the reference's, rounded.
    exact = torch.empty(step.latents.shape, dtype=torch.float64, device=step.device)

    def draw_latents() -> None:
        step.latents.copy_(exact.normal_(generator=step.random))

    step.draw_latents = draw_latents  # type: ignore[method-assign]
    advance: Callable[[Batch], StepStats] = step
    if graphed:
        (first,) = batches(case, 1, step.device.type)
        advance = Graphed(step, first, step.tensors(), step.random)
    theirs = _watch(reference.optimizerD, reference.optimizerG)
    errors = Errors()
    for batch in batches(case, steps, step.device.type):
        load(step, reference)
        got = advance(share(step.ranks, batch))
        expected = reference.step(as_reference(batch, torch.float64))
        # ours stay as Adam got them until the next step; D's get nothing while G is updated
        for kind, side, yours in (("d_grad", step.d, theirs[0]()), ("g_grad", step.g, theirs[1]())):
            mine = side.adam.gradients()
            a = torch.cat([t.double().flatten() for t in mine]) / float(step.scale.scale)
            b = torch.cat([t.double().flatten() for t in yours])
            errors.note(kind, relative(a, b, b), "all parameters")
        for network, ref in (
            (step.g.network, reference.netG),
            (step.d.network, reference.netD),
        ):
            found = {name: (a, b) for name, a, b in pairs(network, ref)}
            for name, (a, b) in found.items():
                if name.endswith("running_mean"):
                    std = found[name.replace("mean", "var")][1].double().sqrt()
                    errors.note("mean", float(((a.double() - b) / std).abs().max()), name)
                elif name.endswith("running_var"):
                    errors.note("var", float(((a.double() - b) / b).abs().max()), name)
                elif name.endswith("num_batches_tracked"):
                    errors.note("batches", float((a - b).abs()), name)
        errors.note("loss", abs(float(got.d_loss) - expected.d_loss), "d_loss")
        errors.note("loss", abs(float(got.g_loss) - expected.g_loss), "g_loss")
        errors.note("probability", abs(float(got.d_real) - expected.d_x), "d_real")
        errors.note("probability", abs(float(got.d_fake) - expected.d_g_z1), "d_fake")
    return errors


def _watch(*adams: torch.optim.Optimizer) -> list[Callable[[], list[Tensor]]]:
    """For each optimizer, a function that gives the gradients of its last step."""
    kept: list[list[Tensor]] = [[] for _ in adams]

    def keep(place: int) -> Callable[..., None]:
        def hook(adam: torch.optim.Optimizer, *_: object) -> None:
            kept[place] = [p.grad.detach().clone() for p in adam.param_groups[0]["params"]]

        return hook

    for i, adam in enumerate(adams):
        adam.register_step_pre_hook(keep(i))
    return [lambda i=i: kept[i] for i in range(len(adams))]

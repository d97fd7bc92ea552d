"""The step with other losses, latents, augmentation, noise, R1 and spectral norm, against the same
written by hand with PyTorch's modules, in float64.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equality import LR, Case, as_reference, batches, make_step, relative
from fastgan.augment import diff_augment
from fastgan.losses import Objective
from fastgan.models import init_weights
from fastgan.reference import make_discriminator, make_generator
from fastgan.sight import AGAIN, FAKE, Sight
from test_step import gradient_tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case(size=32, latent=16, width=8, batch=8)
STEPS = 6
EVERY = 3  # steps between two with R1
# float64 rounding, 1e-16, times steps of Adam's sign-like updates (test_step.py)
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Options:
    loss: str = "non-saturating"
    smoothing: float = 0.0
    policies: tuple = ()
    noise: float = 0.0
    gamma: float = 0.0
    latent_dist: str = "normal"
    spectral: bool = False


def make(options, dtype=torch.float64, **how):
    """The fast step with these options, its weights drawn."""
    step = make_step(
        CASE,
        dtype,
        objective=Objective(options.loss, options.smoothing),
        policies=options.policies,
        noise=options.noise,
        penalty=options.gamma / 2 * EVERY,
        latent_dist=options.latent_dist,
        spectral=options.spectral,
        device=DEVICE,
        **how,
    )
    random = torch.Generator().manual_seed(3)
    for side in (step.g, step.d):
        drawn = copy.deepcopy(side.network).cpu().float()
        init_weights(drawn, random)
        side.network.load_state_dict(drawn.state_dict())
        side.adam.write_low()
    return step


def d_loss(options, real, fake):
    keep = 1 - options.smoothing
    if options.loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if options.loss == "least-squares":
        return ((real - keep) ** 2).mean() / 2 + (fake**2).mean() / 2
    ones, zeros = torch.full_like(real, keep), torch.zeros_like(fake)
    cross = F.binary_cross_entropy_with_logits
    return cross(real, ones) + cross(fake, zeros)


def g_loss(options, fake):
    if options.loss == "hinge":
        return -fake.mean()
    if options.loss == "least-squares":
        return ((fake - 1) ** 2).mean() / 2
    if options.loss == "minimax":
        return torch.log(1 - torch.sigmoid(fake)).mean()
    return -torch.log(torch.sigmoid(fake)).mean()


class ByHand:
    """Both networks as PyTorch's modules, with the weights that a step begins with."""

    def __init__(self, step, options):
        self.options = options
        self.g = make_generator(CASE.size, CASE.latent, CASE.width).double().to(DEVICE)
        self.d = make_discriminator(CASE.size, CASE.width).double().to(DEVICE)[:-1]  # to logits
        if options.spectral:
            bare = [m for m in self.d if not isinstance(m, nn.BatchNorm2d)]
            for i, m in enumerate(bare):
                if isinstance(m, nn.Conv2d):
                    shape = (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)
                    bare[i] = nn.Conv2d(*shape).double().to(DEVICE)
            self.d = nn.Sequential(*bare)
        theirs = [t for n, t in step.d.network.state_dict().items() if "spectral" not in n]
        for ours, given in (
            (self.g.state_dict().values(), step.g.network.state_dict().values()),
            (self.d.state_dict().values(), theirs),
        ):
            for mine, other in zip(ours, given, strict=True):
                mine.copy_(other)
        if options.spectral:
            self._normalise(step.d.network)
        adam = {"lr": LR, "betas": (0.5, 0.999)}
        self.adam_g = torch.optim.Adam(self.g.parameters(), **adam)
        self.adam_d = torch.optim.Adam(self.d.parameters(), **adam)

    def _normalise(self, network):
        """PyTorch's spectral norm, which iterates in training mode alone, from the step's u."""
        norms = [*(block.spectral for block in network.blocks), network.spectral]
        self.d.eval()
        for conv, norm in zip((m for m in self.d if isinstance(m, nn.Conv2d)), norms, strict=True):
            torch.nn.utils.parametrizations.spectral_norm(conv)
            conv.parametrizations.weight[0]._u.copy_(norm.u)

    @torch.no_grad()
    def begin(self):
        """One power iteration a step (Miyato et al. 2018, algorithm 1)."""
        for conv in self.d if self.options.spectral else ():
            if isinstance(conv, nn.Conv2d):
                held = conv.parametrizations.weight
                matrix, norm = held.original.flatten(1), held[0]
                norm._v.copy_(F.normalize(matrix.T @ norm._u, dim=0))
                norm._u.copy_(F.normalize(matrix @ norm._v, dim=0))

    def seen(self, step, images, look):
        sight, options = step.sight, self.options
        if options.policies:
            images = diff_augment(images, options.policies, sight._uniform[look], (-1.0, 1.0))
        if options.noise:
            images = images + options.noise * sight._noise[look]
        return images

    def judge(self, images):
        return self.d(images).flatten()

    def step(self, fast, real, penalised):
        """After `fast` has taken the same step, whose random numbers are taken."""
        options = self.options
        self.begin()
        fake = self.g(fast.latents[:, :, None, None])
        seen = self.seen(fast, real, 0)
        loss = d_loss(options, self.judge(seen), self.judge(self.seen(fast, fake.detach(), 1)))
        if penalised:
            buffers = copy.deepcopy(dict(self.d.named_buffers()))
            x = seen.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.judge(x).sum(), x, create_graph=True)
            norm = slope.square().sum((1, 2, 3)).mean()
            for name, buffer in self.d.named_buffers():  # the penalty's look leaves no trace
                buffer.data = buffers[name]
            loss = loss + options.gamma / 2 * EVERY * norm
        self.adam_d.zero_grad()
        loss.backward()
        self.adam_d.step()
        self.adam_g.zero_grad()
        g_loss(options, self.judge(self.seen(fast, fake, 2))).backward()
        self.adam_g.step()


CASES = {
    "minimax": Options("minimax"),
    "hinge": Options("hinge"),
    "least squares, smoothed": Options("least-squares", 0.1),
    "smoothed": Options(smoothing=0.2),
    "uniform latents": Options(latent_dist="uniform"),
    "augmented": Options(policies=("color", "translation", "cutout")),
    "noise": Options(noise=0.3),
    "R1": Options(gamma=5.0),
    "spectral norm": Options("hinge", spectral=True),
    "all of it": Options("hinge", 0.0, ("translation", "cutout"), 0.1, 2.0, "uniform", True),
}


def distances(fast, options):
    """L2(difference) / L2(update) of every weight and running statistic after some steps."""
    hand = ByHand(fast, options)
    before = [copy.deepcopy(net.state_dict()) for net in (hand.g, hand.d)]
    for number, batch in enumerate(batches(CASE, STEPS, DEVICE)):
        penalised = options.gamma > 0 and number % EVERY == 0
        fast(batch, penalised=penalised)
        hand.step(fast, as_reference(batch, torch.float64), penalised)
    found = []
    for side, theirs, was in zip((fast.g, fast.d), (hand.g, hand.d), before, strict=True):
        # PyTorch's names of a normalised layer come in another order: by kind and shape it is one
        ours = {n: t for n, t in side.network.state_dict().items() if "spectral" not in n}
        held = {n: t for n, t in theirs.state_dict().items() if not n.endswith(("_u", "_v"))}
        for (_, mine), (name, other) in zip(_in_order(ours), _in_order(held), strict=True):
            if mine.is_floating_point():
                found.append(relative(mine, other, other - was[name]))
            else:
                assert torch.equal(mine, other)
    return max(found)


def _in_order(state):
    """(name, tensor), layer by layer; PyTorch puts a normalised weight behind its bias."""
    layers = list(dict.fromkeys(_layer(name) for name in state))
    return sorted(
        state.items(), key=lambda item: (layers.index(_layer(item[0])), item[0].endswith("bias"))
    )


def _layer(name):
    return name.replace(".parametrizations.weight.original", ".weight").rpartition(".")[0]


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_step_is_what_is_written_by_hand(options, one_pass):
    assert distances(make(options, one_pass=one_pass), options) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["augmented", "all of it"])
def test_compiled_it_is_too(name):
    torch._dynamo.reset()
    assert distances(make(CASES[name], compile=True), CASES[name]) < TOLERANCE


WRONG = {
    "another loss": (CASES["smoothed"], {"loss": "minimax"}),
    "fake smoothed less": (CASES["smoothed"], {"smoothing": 0.19}),
    "less noise": (CASES["noise"], {"noise": 0.29}),
    "a smaller penalty": (CASES["R1"], {"gamma": 4.9}),
}


@pytest.mark.parametrize(("options", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_a_number_that_is_a_little_off_shows(options, wrong):
    assert distances(make(replace(options, **wrong)), options) > 1e5 * TOLERANCE


@pytest.mark.parametrize(
    "options", [CASES["augmented"], CASES["noise"]], ids=["augmented", "noise"]
)
def test_one_look_with_the_numbers_of_another_shows(options, monkeypatch):
    step, see = make(options), Sight.__call__
    mixed = {AGAIN: FAKE}
    monkeypatch.setattr(
        Sight, "__call__", lambda self, x, look: see(self, x, mixed.get(look, look))
    )
    assert distances(step, options) > 1e5 * TOLERANCE


def gradients(options, **how):
    """Of one step with R1, where there is one, D's and G's, unscaled."""
    step = make(options, **how)
    if step.scale.enabled:
        step.scale.scale.fill_(SCALE)
    step(next(batches(CASE, 1, DEVICE)), penalised=options.gamma > 0)
    scale = SCALE if step.scale.enabled else 1.0
    return {
        name: torch.cat([leaf.grad.double().flatten() for leaf in side.adam.leaves()]) / scale
        for name, side in (("d", step.d), ("g", step.g))
    }


SCALE = 64.0  # of fp16's loss: neither under nor over it
LOW = {
    "kernels": ({"impl": "triton"}, 2.0**-24),
    "bf16": ({"amp_dtype": torch.bfloat16}, 2.0**-9),
    "fp16": ({"amp_dtype": torch.float16}, 2.0**-12),
    "kernels, bf16": ({"impl": "triton", "amp_dtype": torch.bfloat16}, 2.0**-9),
}


@pytest.mark.parametrize(("how", "roundoff"), LOW.values(), ids=LOW.keys())
@pytest.mark.parametrize("name", ["R1", "spectral norm", "augmented"])
def test_kernels_and_16_bits_give_the_same_gradients(name, how, roundoff):
    exact = gradients(CASES[name], dtype=torch.float32)
    got = gradients(CASES[name], dtype=torch.float32, **how)
    # G's gradient lies behind D's Adam: as in test_step
    behind = {2.0**-9: 1.5, 2.0**-12: 2.0}.get(roundoff, 1.0)
    for side, factor in (("d", 1.0), ("g", behind)):
        limit = max(factor * gradient_tolerance(roundoff), 3e-2)  # and a mask that flips
        assert relative(got[side], exact[side], exact[side]) < limit, side


def penalty_gradients(amp_dtype, gamma):
    """Of the penalty alone, unscaled, at the same images."""
    step = make(replace(CASES["R1"], gamma=gamma), torch.float32, amp_dtype=amp_dtype)
    if step.scale.enabled:
        step.scale.scale.fill_(SCALE)
    real = as_reference(next(batches(CASE, 1, DEVICE)), step.dtype)
    grads = step._penalty_grads(real.contiguous(memory_format=torch.channels_last))
    return torch.cat([g.flatten() for g in grads]) / step.scale.scale


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_the_penalty_is_float32s_whatever_the_step_computes_in(amp_dtype):
    """But for the images, which are 16 bits: at most a rounding, and the masks that flip for it."""
    exact = penalty_gradients(None, 5.0)
    limit = 0.03
    assert relative(penalty_gradients(amp_dtype, 5.0), exact, exact) < limit
    assert relative(penalty_gradients(amp_dtype, 4.75), exact, exact) > limit  # 5% off


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_the_working_copy_divides_by_the_norm_that_the_network_has(amp_dtype):
    step = make(CASES["spectral norm"], torch.float32, amp_dtype=amp_dtype)
    x = torch.randn(64, 3, CASE.size, CASE.size, generator=torch.Generator().manual_seed(2))
    x = x.to(DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact, got = step.d.network(x), step.d.working(x.to(amp_dtype))
        limit = 0.02  # four layers' roundings of 2^-9, of weight, input, product and sum
        assert relative(got, exact, exact) < limit
        step.d.network.blocks[1].spectral.u.mul_(1.05)  # sigma 5% off, in the network and its copy
        assert relative(step.d.working(x.to(amp_dtype)), exact, exact) > limit

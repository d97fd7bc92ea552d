"""The fast step equals the reference, by three kinds of evidence, and planted mistakes do
not.
"""

import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equality import (
    Case,
    Errors,
    as_reference,
    batches,
    float64_distance,
    make_step,
    teacher_forced,
)
from fastgan import reference
from fastgan.config import TrainConfig, split_size
from fastgan.data.feed import Batch
from fastgan.data.prepare import prepare
from fastgan.modes import pick_modes
from fastgan.state import State
from fastgan.step import StepStats
from fastgan_kernels import INTERPRETED
from planted import EvalInG, FakeFirst, NotANumber, StaleD, Ungrouped

FLOAT64_TOLERANCE = (
    1e-9  # float64 rounding, 1e-16, times 20 steps of Adam's early sign-like updates
)
CASE = Case(size=32, latent=32, width=16, batch=16)


def gradient_tolerance(roundoff: float) -> float:
    """How far a network's gradient may be off for roundings of relative size `roundoff`.

    The roundings themselves are small beside what they do at the kinks of ReLU and LeakyReLU.
    After batch norm a pre-activation is about N(0, 1), off by about 4 roundings (conv, input,
    norm, store); so a share p = 2 * 0.4 * 4 * roundoff of the masks flips, each a wrong term of
    the gradient's own size: a relative L2 error of sqrt(p) a layer, and the independent errors of
    up to 9 layers add in squares.
    """
    return (9 * 2 * 0.4 * 4 * roundoff) ** 0.5


def one_mask(case: Case) -> float:
    """How far D's gradient may be off for a single mask that flips.

    Of the N pre-activations of D's smallest map, real and fake, one whose gradient is of the usual
    size (their root mean square) is 1 / sqrt(N) of it in L2, and it may be one of four times that:
    of 2,000 that were flipped by hand, in all of D's maps, the largest was 4.3 times the usual in
    its map, and 3.2 in the smallest.
    """
    base, doublings = split_size(case.size)
    count = 2 * case.batch * base**2 * case.width * 2 ** (doublings - 1)
    return 4 / count**0.5


def float32(case: Case) -> dict[str, float]:
    """The limits of float32: sums of up to 1,024 terms, random signs, in whatever order: 2^-24 *
    sqrt(1024).

    The share of the masks that flips is less than one element of a map then: most steps are off by
    1e-6, and a step in which one flips is off by that one. One Adam sits between the two gradients:
    D weights whose gradient is rounding noise step the other way, 2 * lr = 4e-4 beside weights of
    0.02: a relative change of 2%, for about one weight in a thousand: 6e-4 in L2.
    """
    d_grad = (gradient_tolerance(2e-6) ** 2 + one_mask(case) ** 2) ** 0.5
    limits = {"d_grad": d_grad, "g_grad": gradient_tolerance(6e-4), "batches": 0.0}
    return limits | {"mean": 1.5e-4, "var": 1.5e-4, "loss": 1e-3, "probability": 1e-4}


FLOAT32 = float32(CASE)
# bf16 rounds to 2^-9, fp16 to 2^-12. The statistics move by 0.1 of a batch's error, three times a
# step.
BF16 = {"d_grad": gradient_tolerance(2**-9), "g_grad": 1.5 * gradient_tolerance(2**-9)}
BF16 |= {"mean": 5e-3, "var": 5e-3, "batches": 0.0, "loss": 5e-2, "probability": 2e-2}
FP16 = {"d_grad": gradient_tolerance(2**-12), "g_grad": 2 * gradient_tolerance(2**-12)}
FP16 |= {"mean": 1e-3, "var": 1e-3, "batches": 0.0, "loss": 1e-2, "probability": 5e-3}


def within(errors: Errors, limits: dict[str, float]) -> None:
    over = {k: (*errors.worst[k], limits[k]) for k in limits if not errors[k] <= limits[k]}
    assert not over, f"(error, where, limit): {over}"


RIGHT = {
    "one pass": {},
    "two passes": {"one_pass": False},
    "contiguous": {"channels_last": False},
}


@pytest.mark.parametrize("case", [CASE, Case(size=56, width=4), Case(size=64, width=4)], ids=str)
@pytest.mark.parametrize("how", RIGHT.values(), ids=RIGHT)
def test_float64_equals_the_reference_after_20_steps(how, case):
    off = float64_distance(make_step(case, torch.float64, **how), case)
    networks = (reference.make_generator(case.size), reference.make_discriminator(case.size))
    assert len(off) == sum(len(network.state_dict()) for network in networks)  # every tensor
    assert all(v <= FLOAT64_TOLERANCE for v in off.values()), off


@pytest.mark.slow
def test_compiled_float64_equals_the_reference_after_20_steps():
    off = float64_distance(make_step(CASE, torch.float64, compile=True), CASE)
    assert all(v <= FLOAT64_TOLERANCE for v in off.values()), off


@pytest.mark.parametrize(
    ("amp_dtype", "limits"),
    [
        (torch.bfloat16, BF16),
        pytest.param(None, FLOAT32, marks=pytest.mark.slow),
        pytest.param(torch.float16, FP16, marks=pytest.mark.slow),
    ],
    ids=["bf16", "fp32", "fp16"],
)
@pytest.mark.parametrize(
    "how",
    [{}, pytest.param({"one_pass": False}, marks=pytest.mark.slow)],
    ids=["one pass", "two passes"],
)
def test_compiled_it_equals_the_reference_step_by_step(how, amp_dtype, limits):
    torch._dynamo.reset()
    step = make_step(CASE, amp_dtype=amp_dtype, compile=True, **how)
    if amp_dtype == torch.float16:
        step.scale.scale.fill_(1024.0)
    within(teacher_forced(step, CASE), limits)


@pytest.mark.parametrize("mistake", [Ungrouped, FakeFirst, EvalInG, StaleD])
@pytest.mark.slow
def test_compiled_a_planted_mistake_shows(mistake):
    torch._dynamo.reset()
    step = make_step(CASE, kind=mistake, amp_dtype=torch.bfloat16, compile=True)
    with pytest.raises(AssertionError):
        within(teacher_forced(step, CASE), BF16)


@pytest.mark.parametrize("how", RIGHT.values(), ids=RIGHT)
def test_float32_equals_the_reference_step_by_step(how):
    within(teacher_forced(make_step(CASE, **how), CASE), FLOAT32)


# In Triton's interpreter a step takes a second: a smaller network, fewer steps, batches that are
# not a power of two, and bfloat16 cut off instead of rounded: an error twice as large.
KERNELS = Case(size=32, latent=8, width=6, batch=6)
CUT_OFF = {k: v * 2 for k, v in BF16.items()} if INTERPRETED else BF16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels on a GPU where there is one


@pytest.mark.parametrize(
    ("amp_dtype", "limits"),
    [(None, float32(KERNELS)), (torch.bfloat16, CUT_OFF), (torch.float16, FP16)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
def test_the_kernels_equal_the_reference_step_by_step(amp_dtype, limits, one_pass, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    how = {"one_pass": one_pass, "impl": "triton", "device": DEVICE}
    step = make_step(KERNELS, amp_dtype=amp_dtype, **how)
    if amp_dtype == torch.float16:
        step.scale.scale.fill_(1024.0)
    within(teacher_forced(step, KERNELS, steps=4), limits)


@pytest.mark.parametrize("mistake", [Ungrouped, FakeFirst, EvalInG, StaleD])
def test_teacher_forcing_shows_a_planted_mistake_with_the_kernels(mistake, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    step = make_step(KERNELS, kind=mistake, impl="triton", device=DEVICE)
    with pytest.raises(AssertionError):
        within(teacher_forced(step, KERNELS, steps=2), float32(KERNELS))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_average_follows_the_generator_through_the_steps(impl):
    step = make_step(KERNELS, impl=impl, with_ema=True, device=DEVICE)
    ours, theirs = step.ema.network.state_dict(), step.g.network.state_dict()
    expected = {name: t.double() for name, t in ours.items()}
    for count, batch in enumerate(batches(KERNELS, 3, DEVICE), 1):
        step(batch)
        keep = 0.5 ** (1 / min(100, 0.05 * count))
        for name, t in theirs.items():
            expected[name] = keep * expected[name] + (1 - keep) * t.double()
            if t.dtype == torch.int64:
                expected[name] = t
            torch.testing.assert_close(
                ours[name].double(), expected[name].double(), rtol=1e-5, atol=1e-7
            )
    assert float(step.ema.steps) == 3


@pytest.mark.parametrize("how", RIGHT.values(), ids=RIGHT)
def test_bf16_equals_the_reference_step_by_step(how):
    within(teacher_forced(make_step(CASE, amp_dtype=torch.bfloat16, **how), CASE), BF16)


def test_fp16_with_a_scaler_equals_the_reference_step_by_step():
    step = make_step(CASE, amp_dtype=torch.float16)
    step.scale.scale.fill_(1024.0)
    within(teacher_forced(step, CASE), FP16)


PLANTED = [Ungrouped, FakeFirst, EvalInG, StaleD, NotANumber]


@pytest.mark.parametrize("mistake", PLANTED)
def test_float64_shows_a_planted_mistake(mistake):
    off = float64_distance(make_step(CASE, torch.float64, kind=mistake), CASE)
    assert any(not v <= 1000 * FLOAT64_TOLERANCE for v in off.values())


@pytest.mark.parametrize("mistake", PLANTED)
@pytest.mark.parametrize(
    ("amp_dtype", "limits"), [(None, FLOAT32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_teacher_forcing_shows_a_planted_mistake(mistake, amp_dtype, limits):
    errors = teacher_forced(make_step(CASE, kind=mistake, amp_dtype=amp_dtype), CASE)
    with pytest.raises(AssertionError):
        within(errors, limits)


def test_a_step_overflowing_in_fp16_changes_no_weight_and_lowers_the_scale():
    step = make_step(CASE, amp_dtype=torch.float16)
    step.scale.scale.fill_(2.0**40)
    before = [p.detach().clone() for p in step.g.network.parameters()]
    step(next(batches(CASE)))
    for was, now in zip(before, step.g.network.parameters(), strict=True):
        assert torch.equal(was, now)
    assert float(step.scale.scale) == 2.0**39


class Syncs(TorchDispatchMode):
    """Notes what makes the host wait for a GPU: reading a value or a count back, and a number or a
    tensor of the host's that goes to the device.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = ("_local_scalar_dense", "nonzero", "lift_fresh")
        moved = "_to_copy" in str(func) and kwargs.get("device") is not None
        if any(name in str(func) for name in waits) or moved:
            self.seen.append(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def state(tmp_path):
    def make(device: str, **options) -> State:
        config = TrainConfig(
            data="faces:20", size=32, width=4, latent=8, batch=16, kimg=1, **options
        )
        cache = prepare(config.data, config, root=tmp_path)
        return State(config, cache, pick_modes(config.model_copy(update={"device": device})))

    return make


def one_step(state: State) -> None:
    """What the loop does between two ticks; most of these cross the end of an epoch of 20."""
    state.advance(state.feed.next())


OPTIONS = {
    "plain": {},
    "options": {
        **{"loss": "hinge", "spectral_norm": True, "latent_dist": "uniform"},
        **{"diffaug": ("color", "translation", "cutout"), "instance_noise": 0.1, "r1": 1.0},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_read_back_to_the_host_between_ticks(state, options):
    made = state("cpu", **options)
    one_step(made)
    for _ in range(4):
        with Syncs() as syncs:
            batch = made.feed.next()
        # an epoch's order is copied from pinned memory, which waits for nothing
        assert set(syncs.seen) <= {"aten.lift_fresh.default"}
        with Syncs() as syncs:
            made.advance(batch)
            made.penalised(batch)
        assert syncs.seen == []
    for call in (
        lambda: made.stats.sums[0].item(),
        lambda: made.stats.sums.add_(torch.tensor(1.0)),
        lambda: made.stats.sums.to("meta"),
        lambda: made.stats.sums.nonzero(),
    ):
        with Syncs() as syncs:
            call()
        assert syncs.seen  # the watch does see each


def test_the_statistics_of_a_step_are_scalars_on_the_device():
    stats = make_step(CASE)(next(batches(CASE)))
    assert isinstance(stats, StepStats)
    assert all(s.shape == () and s.dtype == torch.float32 and not s.requires_grad for s in stats)


def test_a_step_draws_only_from_its_own_generator():
    step = make_step(CASE)
    state = torch.get_rng_state()
    first = step(next(batches(CASE)))
    assert torch.equal(torch.get_rng_state(), state)
    again = make_step(CASE)
    torch.manual_seed(12345)
    assert float(first.g_loss) != float(step(next(batches(CASE))).g_loss)  # fresh latents each step
    # the same generator state gives the same latents
    a, b = make_step(CASE), again
    a.draw_latents(), b.draw_latents()
    assert torch.equal(a.latents, b.latents)


def test_the_frozen_discriminator_gets_its_gradients_back():
    step = make_step(CASE)
    step(next(batches(CASE)))
    for network in (step.d.network, step.d.working):
        assert all(p.requires_grad for p in network.parameters())


def test_flips_are_fair_and_mirror_left_and_right():
    step = make_step(CASE, flip=True)
    seen = []
    logits = step._logits
    step._logits = lambda images, groups: (seen.append(images), logits(images, groups))[1]
    mirrored = []
    for batch in batches(CASE, 40):
        step(batch)
        real = seen[-2][: CASE.batch]
        plain = as_reference(batch, real.dtype)
        flips = step.flips < 0.5
        expected = torch.where(flips.view(-1, 1, 1, 1), plain.flip(3), plain)
        assert torch.allclose(real, expected, atol=1e-6)
        mirrored.append(flips)
    share = torch.cat(mirrored).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / (40 * CASE.batch) ** 0.5  # 5 sigma
    assert len({tuple(flips.tolist()) for flips in mirrored}) > 30  # anew in each step


@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_the_discriminator_sees_the_configured_pixel_range(pixel_range):
    step = make_step(CASE)
    step.pixel_range = pixel_range
    seen = []
    d = step._logits
    step._logits = lambda images, groups: (seen.append(images), d(images, groups))[1]
    black_and_white = torch.zeros(CASE.batch, CASE.size, CASE.size, 3, dtype=torch.uint8)
    black_and_white[::2] = 255
    step(Batch(black_and_white, torch.arange(CASE.batch)))
    real = seen[0][: CASE.batch]
    assert real[1].unique().tolist() == [pixel_range[0]]
    assert real[0].unique().tolist() == [pixel_range[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("how", [*RIGHT.values(), {"compile": True}], ids=[*RIGHT, "compiled"])
def test_on_a_gpu_float64_equals_the_reference_after_20_steps(how):
    step = make_step(CASE, torch.float64, device="cuda", **how)
    off = float64_distance(step, CASE)
    assert all(v <= FLOAT64_TOLERANCE for v in off.values()), off


ON_A_GPU = RIGHT | {"compiled": {"compile": True}, "kernels": {"impl": "triton"}}
ON_A_GPU |= {"kernels, two passes": {"impl": "triton", "one_pass": False}}
ON_A_GPU |= {"kernels, compiled": {"impl": "triton", "compile": True}}


@pytest.mark.gpu
@pytest.mark.parametrize("graphed", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("how", ON_A_GPU.values(), ids=ON_A_GPU)
@pytest.mark.parametrize(
    ("amp_dtype", "limits"),
    [(None, FLOAT32), (torch.bfloat16, BF16), (torch.float16, FP16)],
    ids=["fp32", "bf16", "fp16"],
)
def test_on_a_gpu_the_step_equals_the_reference_step_by_step(
    how, amp_dtype, limits, graphed, monkeypatch
):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    step = make_step(CASE, amp_dtype=amp_dtype, device="cuda", **how)
    if amp_dtype == torch.float16:
        step.scale.scale.fill_(1024.0)
    within(teacher_forced(step, CASE, graphed=graphed), limits)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"graph": False},
        {"kernels": "torch"},
        {"amp": True, "graph": False},
        {"amp": True, "compile": True},
        {"amp": True, "amp_dtype": "fp16", "graph": False},
        {"amp": True, "compile": True, **OPTIONS["options"]},
    ],
    ids=str,
)
def test_on_a_gpu_nothing_between_ticks_makes_the_host_wait(state, options):
    torch._dynamo.reset()
    made = state("cuda", **options)
    made.warm_up()
    for _ in range(3):
        one_step(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            one_step(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_the_step_keeps_up_with_the_reference_on_a_cpu():
    """As the trainer runs it there, no slower than the eager reference; interleaved medians."""
    case = Case(64, 100, 64, 128)
    step = make_step(case, one_pass=False, with_ema=True)
    rival = reference.Reference(64, 100, 64)
    (batch,) = batches(case, 1)
    real = as_reference(batch, torch.float32)
    times: dict[str, list[float]] = {"step": [], "reference": []}
    for _ in range(9):
        for name, call in (("step", lambda: step(batch)), ("reference", lambda: rival.step(real))):
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(t[1:])) for name, t in times.items()}
    assert medians["step"] <= medians["reference"], medians

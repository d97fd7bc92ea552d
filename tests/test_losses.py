"""The losses against PyTorch's own on probabilities and targets, and against derivatives written
out.
"""

import pytest
import torch
from torch import nn

from fastgan.losses import Objective

LOSSES = ["non-saturating", "minimax", "hinge", "least-squares"]
SMOOTHED = [(loss, s) for loss in LOSSES for s in (0.0, 0.1) if not (s and loss == "hinge")]
BCE, LOGITS, MSE = nn.BCELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss()


def logits(count=64, scale=3.0):
    return (torch.randn(count, dtype=torch.float64) * scale).requires_grad_()


def theirs(loss, s, real, fake):
    """D's and G's loss by PyTorch's functions on targets."""
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    if loss == "hinge":
        margin = nn.HingeEmbeddingLoss(margin=1.0)  # with target -1 it is relu(1 - x)
        return margin(real, -ones) + margin(-fake, -ones), -fake.mean()
    if loss == "least-squares":
        return MSE(real, ones - s) / 2 + MSE(fake, zeros) / 2, MSE(fake, ones) / 2
    d = LOGITS(real, ones - s) + LOGITS(fake, zeros)
    return d, -LOGITS(fake, zeros) if loss == "minimax" else LOGITS(fake, ones)


def derivatives(loss, s, real, fake):
    """d D / d real, d D / d fake, d G / d fake, written out; of each logit, before the mean."""
    if loss == "hinge":
        return -(real < 1).double(), (fake > -1).double(), -torch.ones_like(fake)
    if loss == "least-squares":
        return real - (1 - s), fake, fake - 1
    p, q = real.sigmoid(), fake.sigmoid()
    return p - (1 - s), q, -q if loss == "minimax" else q - 1


@pytest.mark.parametrize(("loss", "s"), SMOOTHED)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_values_and_gradients(loss, s, scale):
    real, fake = logits(scale=scale), logits(scale=scale)
    ours = Objective(loss, s)
    d, g = ours.d(real, fake), ours.g(fake)
    expected = theirs(loss, s, real, fake)
    # sums of 64 terms of order 1: a few units of 1e-16 each
    torch.testing.assert_close((d, g), expected, rtol=1e-13, atol=1e-15)
    grads = [*torch.autograd.grad(d, (real, fake)), *torch.autograd.grad(g, fake)]
    for ours_, written in zip(grads, derivatives(loss, s, real, fake), strict=True):
        torch.testing.assert_close(ours_, written.detach() / 64, rtol=1e-12, atol=1e-16)


def test_the_tutorials_is_the_bce_of_probabilities():
    real, fake = logits(), logits()
    ones, zeros = torch.ones(64).double(), torch.zeros(64).double()
    d = BCE(real.sigmoid(), ones) + BCE(fake.sigmoid(), zeros)
    torch.testing.assert_close(Objective().d(real, fake), d, rtol=1e-12, atol=0)
    torch.testing.assert_close(Objective().g(fake), BCE(fake.sigmoid(), ones), rtol=1e-12, atol=0)


def test_only_targets_of_real_images_are_smoothed():
    real, fake = logits(), logits()
    plain, smooth = (
        torch.autograd.grad(Objective("non-saturating", s).d(real, fake), (real, fake))
        for s in (0.0, 0.2)
    )
    torch.testing.assert_close(smooth[0], plain[0] + 0.2 / 64)
    assert torch.equal(smooth[1], plain[1])
    with pytest.raises(ValueError, match="label_smoothing must be 0 for hinge, got 0.1"):
        Objective("hinge", 0.1)


@pytest.mark.parametrize(("loss", "s"), SMOOTHED)
def test_extreme_logits_give_finite_values_and_the_gradients_of_their_limits(loss, s):
    ends = torch.tensor([-1e4, -80.0, 80.0, 1e4])
    real, fake = (ends.clone().requires_grad_() for _ in range(2))
    ours = Objective(loss, s)
    d, g = ours.d(real, fake), ours.g(fake)
    assert d.isfinite() and g.isfinite() and d.dtype == g.dtype == torch.float32
    grads = [*torch.autograd.grad(d, (real, fake)), *torch.autograd.grad(g, fake)]
    # of float32: sigmoid(-80) is 2e-35, far below what the rest is rounded to
    for ours_, written in zip(grads, derivatives(loss, s, ends, ends), strict=True):
        torch.testing.assert_close(ours_, written.float() / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened_first(loss, dtype):
    real, fake = (torch.randn(16).to(dtype) for _ in range(2))
    ours = Objective(loss)
    assert ours.d(real, fake).dtype == ours.g(fake).dtype == torch.float32
    assert torch.equal(ours.d(real, fake), ours.d(real.float(), fake.float()))
    assert torch.equal(ours.g(fake), ours.g(fake.float()))
    assert torch.equal(ours.probability(fake), ours.probability(fake.float()))


@pytest.mark.parametrize(
    ("loss", "s"), [*((loss, 0.0) for loss in LOSSES), ("minimax", 0.2), ("least-squares", 0.2)]
)
def test_the_best_discriminators_logit_is_the_threshold_where_it_cannot_tell(loss, s):
    """Where as many images are real as fake, D does best with the threshold itself: its loss is
    least there, and the probability 1/2, or half of the smoothed target.
    """
    ours = Objective(loss, s)
    at = torch.full((4,), ours.threshold, dtype=torch.float64)
    torch.testing.assert_close(ours.probability(at), torch.full_like(at, (1 - s) / 2))
    for step in (-0.05, 0.05):
        assert ours.d(at + step, at + step) >= ours.d(at, at)
    far = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    low, high = ours.probability(far)
    assert 0 <= low < 1e-9 and 1 - 1e-9 < high <= 1


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("loss", ["non-saturating", "minimax", "least-squares"])
def test_the_best_logit_is_the_share_of_real_images_as_a_probability(loss, share):
    """D's loss of one place that `share` of its images are real in, least where its derivative is
    0: the logit of p for the cross-entropies, p itself for least squares.
    """
    p = torch.tensor(share, dtype=torch.float64)
    best = (p.clone() if loss == "least-squares" else p.logit()).requires_grad_()
    ours = Objective(loss)
    none = torch.zeros(1, dtype=torch.float64)
    on_real = ours.d(best[None], none) - ours.d(none, none)
    on_fake = ours.d(none, best[None]) - ours.d(none, none)
    (slope,) = torch.autograd.grad(p * on_real + (1 - p) * on_fake, best)
    assert abs(slope) < 1e-12
    torch.testing.assert_close(ours.probability(best[None]), p[None], rtol=1e-12, atol=0)


def test_minimax_and_non_saturating_pull_the_same_way_with_other_weights():
    """Goodfellow et al. 2014, section 3: where D is sure, the first gives G nothing."""
    fake = torch.full((4,), -30.0, dtype=torch.float64, requires_grad=True)
    (weak,) = torch.autograd.grad(Objective("minimax").g(fake), fake)
    (strong,) = torch.autograd.grad(Objective().g(fake), fake)
    assert (weak < 0).all() and (weak > -1e-12).all()
    torch.testing.assert_close(strong, torch.full_like(fake, -0.25))


def test_all_of_it_compiles_as_a_whole():
    real, fake = logits(), logits()

    def both(real, fake, objective):
        return objective.d(real, fake), objective.g(fake), objective.probability(real)

    run = torch.compile(both, fullgraph=True, backend="aot_eager")
    for loss, s in SMOOTHED:
        objective = Objective(loss, s)
        for ours, plain in zip(
            run(real, fake, objective), both(real, fake, objective), strict=True
        ):
            torch.testing.assert_close(ours, plain)

"""The losses against the binary cross-entropy of probabilities, values and gradients."""

import pytest
import torch
from torch import nn

from fastgan.losses import d_non_saturating, g_non_saturating

BCE = nn.BCELoss()


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_they_are_the_tutorials_bce(scale):
    real = (torch.randn(64, dtype=torch.float64) * scale).requires_grad_()
    fake = (torch.randn(64, dtype=torch.float64) * scale).requires_grad_()
    ones, zeros = torch.ones(64).double(), torch.zeros(64).double()
    ours_d, ours_g = d_non_saturating(real, fake), g_non_saturating(fake)
    theirs_d = BCE(real.sigmoid(), ones) + BCE(fake.sigmoid(), zeros)
    theirs_g = BCE(fake.sigmoid(), ones)
    torch.testing.assert_close(ours_d, theirs_d, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours_g, theirs_g, rtol=1e-12, atol=0)
    for ours, theirs in ((ours_d, theirs_d), (ours_g, theirs_g)):
        grads = torch.autograd.grad(ours, (real, fake), retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(theirs, (real, fake), retain_graph=True, allow_unused=True)
        for a, b in zip(grads, expected, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_saturated_logits_keep_their_gradient():
    fake = torch.full((4,), -80.0, requires_grad=True)  # a sigmoid is 0 here, and its gradient gone
    g_non_saturating(fake).backward()
    torch.testing.assert_close(fake.grad, torch.full((4,), -0.25))


def test_half_precision_logits_are_widened_first():
    logits = torch.tensor([0.1, -0.3], dtype=torch.bfloat16)
    assert g_non_saturating(logits).dtype == torch.float32
    torch.testing.assert_close(g_non_saturating(logits), g_non_saturating(logits.float()))

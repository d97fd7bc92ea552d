"""500 steps on drawn faces: losses and D(x) are where those of five runs of the reference are.

This sees what drifts, not every mistake: a D that is one update old ends in the same place, and is
for test_step.py to find.
"""

import functools

import numpy as np
import pytest
import torch

from equality import Case, as_reference, load, make_step
from fastgan.data.faces import draw_faces
from fastgan.data.feed import ResidentFeed, Sampler
from fastgan.graph import Graphed
from fastgan.reference import Reference

STEPS, TAIL = 500, 200  # what is compared are the means of the last ones
CASE = Case(size=32, latent=32, width=16, batch=32)
RATES = {"d": 1e-4, "g": 4e-4}  # quickstart's: at equal ones D wins on drawings, and G stands still
SEEDS = range(5)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
BF16 = {"amp_dtype": torch.bfloat16}
WAYS = {
    "fp32, two passes": {"one_pass": False},
    "bf16": BF16,
    "fp16": {"amp_dtype": torch.float16},
    "bf16, compiled": {**BF16, "compile": True},
}
if GPU:
    WAYS |= {"kernels, fp32": {"impl": "triton"}, "kernels, bf16": {"impl": "triton", **BF16}}
    WAYS |= {"kernels, bf16, compiled": {"impl": "triton", "compile": True, **BF16}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def feed(seed):
    return ResidentFeed(
        draw_faces(2000, CASE.size), Sampler(2000, CASE.batch, seed), torch.device(DEVICE)
    )


def begun(seed):
    reference = Reference(CASE.size, CASE.latent, CASE.width, seed=seed, device=DEVICE)
    reference.optimizerD.param_groups[0]["lr"] = RATES["d"]
    reference.optimizerG.param_groups[0]["lr"] = RATES["g"]
    return reference


@functools.cache
def band():
    """Mean and standard deviation over the seeds of d_loss, g_loss and D(x)."""
    ends = []
    for seed in SEEDS:
        reference, images = begun(seed), feed(seed)
        rows = [reference.step(as_reference(images.next(), torch.float32)) for _ in range(STEPS)]
        ends.append(np.mean([(r.d_loss, r.g_loss, r.d_x) for r in rows[-TAIL:]], axis=0))
    return np.mean(ends, axis=0), np.std(ends, axis=0, ddof=1)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_500_steps_end_where_the_references_do(way):
    torch._dynamo.reset()
    seed = len(SEEDS)
    step, images = make_step(CASE, device=DEVICE, **way), feed(seed)
    load(step, begun(seed))
    for side, trained in (("d", step.d), ("g", step.g)):
        trained.adam.param_groups[0]["lr"].fill_(RATES[side])
    advance = Graphed(step, images.next(), step.tensors(), step.random) if GPU else step
    rows = [[float(x) for x in advance(images.next())[:3]] for _ in range(STEPS)]
    got = np.mean(rows[-TAIL:], axis=0)
    mean, sigma = band()
    assert (np.abs(got - mean) <= 3 * sigma).all(), (got, mean, sigma)
    assert (sigma < 0.12 * mean).all(), (mean, sigma)  # a band that says something

"""What a run's options come to in its state: what the step minimises and what D sees, when it is
penalised, and that two graphs replayed in turn are the plain steps.
"""

from dataclasses import replace

import pytest
import torch

from fastgan.config import TrainConfig
from fastgan.data.prepare import prepare
from fastgan.losses import Objective
from fastgan.modes import pick_modes
from fastgan.state import State
from tape import in_the_place_of_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"data": "faces:20", "size": 32, "width": 4, "latent": 8, "batch": 8, "device": DEVICE}
MANY = {
    **{"loss": "hinge", "spectral_norm": True, "latent_dist": "uniform"},
    **{"diffaug": ("color", "translation", "cutout"), "instance_noise": 0.1, "noise_kimg": 0.04},
}


@pytest.fixture
def make(tmp_path):
    def made(graph=False, **options):
        config = TrainConfig(**SMALL | options)
        modes = replace(pick_modes(config), graph=graph)
        return State(config, prepare(config.data, config, root=tmp_path), modes)

    return made


def test_the_step_is_made_by_the_options(make):
    options = {"loss": "least-squares", "label_smoothing": 0.1, "latent_dist": "uniform"}
    options |= {"r1": 3.0, "r1_every": 5, "diffaug": ("color",), "pixel_range": (0.0, 1.0)}
    state = make(**options, instance_noise=0.25)
    step = state.step
    assert step.objective == Objective("least-squares", 0.1)
    assert step.penalty == 3.0 / 2 * 5
    assert (state.g.network.latent_dist, state.ema.network.latent_dist) == ("uniform", "uniform")
    assert step.pixel_range == (0.0, 1.0) and float(step.sight.noise_std) == 0.25
    # what it sees of a picture in the middle of the range: the middle, but for the noise
    step.sight._noise.zero_()
    step.sight._uniform.fill_(0.5)
    grey = torch.full((8, 3, 32, 32), 0.5, device=state.device)
    torch.testing.assert_close(step.sight(grey, 0), grey)
    step.sight._uniform.fill_(0.75)  # brighter by a quarter of half of the range
    torch.testing.assert_close(step.sight(grey, 0), grey + 0.125)
    plain = make()
    assert plain.step.objective == Objective() and plain.step.sight is None


@pytest.mark.parametrize(("r1", "steps"), [(1.0, [0, 3, 6]), (0.0, [])])
def test_every_so_many_steps_are_penalised(make, r1, steps):
    state = make(r1=r1, r1_every=3)
    met = []
    state.penalised = lambda batch: met.append(state.step_count)
    for _ in range(8):
        state.take(state.feed.next())
    assert met == steps


KINDS = {
    "float32": MANY,
    "batch norm, bf16": {"amp": True, "amp_dtype": "bf16", "diffaug": ("cutout",)},
    "fp16": {**MANY, "amp": True, "amp_dtype": "fp16"},
}


@pytest.mark.parametrize("every", [3, 1])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_two_graphs_in_turn_are_the_plain_steps_bit_for_bit(make, monkeypatch, options, every):
    if DEVICE == "cpu":
        in_the_place_of_cuda(monkeypatch)
    else:  # the same algorithms in each run
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = {**options, "r1": 1.0, "r1_every": every}
    plain, graphed = make(**options), make(graph=True, **options)
    torch.backends.cudnn.benchmark = False  # which a state turns on
    graphed.warm_up()
    assert (graphed.advance == graphed._advance) == (every == 1)  # which is never replayed
    for count in range(7):
        for state in (plain, graphed):
            state.take(state.feed.next())
        pairs = zip(plain.tensors(), graphed.tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"step {count}"
    assert torch.equal(plain.random.get_state(), graphed.random.get_state())

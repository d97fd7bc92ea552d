"""A captured step is the step: bit for bit, whatever is changed between two replays."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from equality import Case, batches, make_step
from fastgan import graph
from fastgan.data.feed import Batch
from fastgan.errors import RunError
from fastgan.graph import WARM_UP, Graphed, warm_up
from fastgan.losses import Objective
from fastgan.stats import Accumulator
from fastgan.step import Step
from tape import in_the_place_of_cuda

CASE = Case(width=4, latent=6, batch=4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "fp32": {},
    "two passes": {"one_pass": False},
    "flipped": {"flip": True},
    "bf16": {"amp_dtype": torch.bfloat16},
    "fp16": {"amp_dtype": torch.float16},
    "kernels": {"impl": "triton"},
    "kernels, bf16": {"impl": "triton", "amp_dtype": torch.bfloat16},
    "kernels, fp16": {"impl": "triton", "amp_dtype": torch.float16},
    "options": {
        "objective": Objective("hinge"),
        "policies": ("color", "translation", "cutout"),
        "noise": 0.1,
        "penalty": 1.0,
        "latent_dist": "uniform",
        "spectral": True,
    },
}
if torch.cuda.is_available():  # torch.compile refuses to run under a tape
    KINDS |= {f"{name}, compiled": {**how, "compile": True} for name, how in KINDS.items()}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    if DEVICE == "cpu":
        in_the_place_of_cuda(monkeypatch)
    else:  # the same algorithms in each run
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with torch._dynamo.config.patch(recompile_limit=64):  # all kinds in one process
        yield


class Loop:
    """A step with its statistics, as the trainer has them."""

    def __init__(self, kind=Step, **how):
        torch.manual_seed(1)
        self.step = make_step(CASE, kind=kind, with_ema=True, device=DEVICE, **how)
        self.stats = Accumulator(self.step.device)
        self.step.scale.scale.fill_(2.0**40 if self.step.scale.enabled else 1.0)  # it overflows
        self.state = [*self.step.tensors(), *self.stats.tensors().values()]

    def advance(self, batch: Batch):
        stats = self.step(batch, penalised=self.step.penalty > 0)
        self.stats.add(stats, self.step.health.frozen)
        return stats

    def graphed(self) -> Graphed:
        return Graphed(self.advance, first_batch(), self.state, self.step.random)


def first_batch():
    return next(batches(CASE, 1, DEVICE))


def everything(loop: Loop) -> list[torch.Tensor]:
    """What a step leaves behind, listed here and not by the step."""
    step, kept = loop.step, [loop.stats.sums, loop.step.random.get_state()]
    for side in (step.g, step.d):
        kept += [*side.network.state_dict().values(), *side.working.state_dict().values()]
        kept += [t for state in side.adam.state.values() for t in state.values()]
    kept += [*step.ema.network.state_dict().values(), step.ema.steps]
    return kept + [step.scale.scale, step.scale._good_steps]


def same(a: Loop, b: Loop) -> bool:
    return all(torch.equal(s, t) for s, t in zip(everything(a), everything(b), strict=True))


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_graphed_step_is_the_plain_step_bit_for_bit(how):
    plain, graphed = Loop(**how), Loop(**how)
    advance = graphed.graphed()
    assert same(plain, graphed)  # the capture trained nothing and drew nothing
    for count, batch in enumerate(batches(CASE, 4, DEVICE)):
        if count == 2:  # a schedule, and a loss scale that overflows no more
            for loop in (plain, graphed):
                loop.step.d.adam.param_groups[0]["lr"].mul_(0.5)
                loop.step.scale.scale.clamp_(max=2.0**10)
        expected, got = plain.advance(batch), advance(batch)
        assert [float(x) for x in got] == [float(x) for x in expected]
        assert same(plain, graphed), f"step {count}"
    assert plain.stats.take() == graphed.stats.take()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has one version of PyTorch")
@pytest.mark.parametrize("registers", [True, False])
def test_a_graph_is_told_what_it_draws_from_by_versions_that_ask(registers, monkeypatch):
    monkeypatch.setattr(graph, "REGISTERS", registers)
    plain, graphed = Loop(), Loop()
    advance = graphed.graphed()
    plain.advance(first_batch()), advance(first_batch())
    assert same(plain, graphed)
    assert advance._graph.registered == ([graphed.step.random] if registers else [])


@pytest.mark.parametrize("how", [KINDS["fp32"], KINDS["kernels, fp16"]], ids=["fp32", "fp16"])
def test_a_graph_goes_on_from_whatever_state_is_put_back(how):
    loop = Loop(**how)
    advance = loop.graphed()
    first, second = batches(CASE, 2, DEVICE)
    saved, random = [t.clone() for t in loop.state], loop.step.random.get_state()
    advance(first), advance(second)
    there, losses = [t.clone() for t in loop.state], loop.stats.take()
    for t, was in zip(loop.state, saved, strict=True):
        t.copy_(was)
    loop.step.random.set_state(random)
    advance(first), advance(second)
    assert all(torch.equal(t, was) for t, was in zip(loop.state, there, strict=True))
    assert loop.stats.take() == losses


class CountsOnTheHost(Step):
    """Planted: each step's latents are scaled by a number that Python counts."""

    calls = 0

    def draw_latents(self):
        super().draw_latents()
        self.calls += 1
        self.latents.mul_(1 + self.calls)


def test_a_graph_keeps_what_it_computes_on():
    """Its replays read and write that memory, whoever else has let it go."""

    class Counts:
        def __init__(self):
            self.count = torch.zeros((), device=DEVICE)

        def advance(self, batch):
            self.count += 1
            return self.count

    counts = Counts()
    gone, random = weakref.ref(counts), torch.Generator(DEVICE)
    batch = Batch(
        torch.zeros(4, 8, 8, 3, dtype=torch.uint8, device=DEVICE), torch.arange(2, device=DEVICE)
    )
    graphed = Graphed(counts.advance, batch, [counts.count], random)
    del counts
    gc.collect()
    assert gone() is not None
    assert float(graphed(batch)) > 0


def test_a_number_that_the_host_keeps_is_seen(monkeypatch):
    plain, graphed = Loop(kind=CountsOnTheHost), Loop(kind=CountsOnTheHost)
    advance = graphed.graphed()
    for batch in batches(CASE, 2, DEVICE):
        plain.advance(batch), advance(batch)
    assert not same(plain, graphed)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_warm_up_leaves_no_trace(how):
    fresh, warm = Loop(**how), Loop(**how)
    warm_up(warm.advance, first_batch(), warm.state, warm.step.random)
    assert same(fresh, warm)
    for batch in batches(CASE, 2, DEVICE):
        fresh.advance(batch), warm.advance(batch)
    assert same(fresh, warm)


def test_a_warm_up_shows_what_is_missing_in_the_state():
    """The check above can fail: without one of the tensors there is a trace."""
    fresh, warm = Loop(), Loop()
    left_out = warm.step.d.adam.state[next(warm.step.d.network.parameters())]["exp_avg"]
    state = [t for t in warm.state if t.data_ptr() != left_out.data_ptr()]
    assert len(state) == len(warm.state) - 1
    warm_up(warm.advance, first_batch(), state, warm.step.random)
    assert not same(fresh, warm)


def failing(loop, error):
    """A step that fails in the capture alone, which then cannot be ended either."""
    calls = []

    def advance(batch):
        calls.append(1)
        if len(calls) > WARM_UP:
            raise error
        return loop.advance(batch)

    return advance


@pytest.fixture
def captures_that_do_not_end(monkeypatch):
    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_capture_says_why_and_names_the_flag(ends, request):
    if not ends:
        request.getfixturevalue("captures_that_do_not_end")
    loop = Loop()
    advance = failing(loop, RuntimeError("not permitted when stream is capturing\nmore"))
    with pytest.raises(RunError, match=r"could not be captured .*is capturing\).*--no-graph"):
        Graphed(advance, first_batch(), loop.state, loop.step.random)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("captures_that_do_not_end")
def test_what_ended_a_capture_is_what_is_raised(error):
    loop = Loop()
    with pytest.raises(type(error)) as raised:
        Graphed(failing(loop, error), first_batch(), loop.state, loop.step.random)
    assert raised.value is error

"""What is not finite is never applied, and the run ends with what was right."""

import json

import pytest
import torch

from equality import LR, Case, batches, make_step
from fastgan import checkpoint
from fastgan.cli import main
from fastgan.data.feed import ResidentFeed
from fastgan.errors import RunError
from fastgan.graph import Graphed
from fastgan.health import ALIGNED_BYTES, LEAST_SCALE, Health
from fastgan.optim import Trained
from fastgan.step import Step
from tape import in_the_place_of_cuda
from test_trainer import FLAGS, only_run, tensors

CASE = Case()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels on a GPU where there is one
BAD = 3  # the step that is not finite
FP16 = {"amp_dtype": torch.float16}


def watched(impl="torch", **how):
    """A step with its average and its watch; `impl`: the watch's."""
    step = make_step(CASE, with_ema=True, device=DEVICE, **how)
    step.health = Health({"d": step.d, "g": step.g}, step.scale, impl)
    return step


@pytest.fixture(autouse=True)
def pinned_algorithms(monkeypatch):
    """Of a GPU's, those that give the same bits every time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def numbers(step):
    """Every number that must stay, by name."""
    networks = {"g": step.g, "d": step.d}
    named = {f"ema.{k}": t for k, t in step.ema.network.state_dict().items()}
    for side, trained in networks.items():
        named |= {f"{side}.{k}": t for k, t in trained.network.state_dict().items()}
        named |= {f"{side}.adam.{k}": t for k, t in trained.state().items()}
        low = [t for t in trained.adam.low if t is not None]
        named |= {f"{side}.low.{i}": t for i, t in enumerate(low)}
    scale = {k: t for k, t in step.scale.tensors().items() if k != "skipped"}
    named |= scale | {"ema.steps": step.ema.steps}
    return {name: t.detach().clone() for name, t in named.items()}


def different(before, after):
    return {name for name, t in before.items() if not torch.equal(t, after[name])}


def spoil_loss(part, value):
    def spoil(step):
        kept = getattr(step, part)

        def spoiled(*args):
            loss = kept(*args)
            return (loss[0] * value, *loss[1:]) if isinstance(loss, tuple) else loss * value

        setattr(step, part, spoiled)
        return lambda: setattr(step, part, kept)

    return spoil


def spoil_gradient(side, layer, value):
    def spoil(step):
        names = [name for name, _ in getattr(step, side).network.named_parameters()]
        leaf = getattr(step, side).adam.leaves()[names.index(layer)]
        return leaf.register_hook(lambda grad: grad * value).remove

    return spoil


def spoil_latents(step):
    kept = step.draw_latents

    def spoiled():
        kept()
        step.latents[1, 2] = torch.nan

    step.draw_latents = spoiled
    return lambda: setattr(step, "draw_latents", kept)


SPOILED = {
    "D's loss is NaN": (spoil_loss("_judge", torch.nan), "d"),
    "D's loss is Inf": (spoil_loss("_judge", torch.inf), "d"),
    "G's loss is NaN": (spoil_loss("_fool", torch.nan), "g"),
    "a gradient of D is Inf": (spoil_gradient("d", "first.weight", torch.inf), "d"),
    "a gradient of G is NaN": (spoil_gradient("g", "blocks.1.norm.bias", torch.nan), "g"),
    "an input is NaN": (spoil_latents, "d"),
}


HOW = [{}, {"one_pass": False}, {"amp_dtype": torch.bfloat16}, {"impl": "triton"}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", SPOILED)
def test_from_the_first_step_that_is_not_finite_on_nothing_changes(name, how):
    spoil, side = SPOILED[name]
    step = watched(**how)
    for i, batch in enumerate(batches(CASE, 8, DEVICE), 1):
        if i == BAD:
            before, mend = numbers(step), spoil(step)
        step(batch)
        if i == BAD:
            mend()  # the next steps would be right again
            after = numbers(step)
        assert int(step.health.frozen) == max(0, i - BAD + 1)
    # where it is G's, D had taken its own update of that step, and keeps it
    mine = {n for n in before if not n.startswith("d.") or n.endswith("running_mean")}
    changed = different(before, after)
    assert not changed if side == "d" else not changed & mine
    assert not different(after, numbers(step))
    found = step.health.diagnosis()
    broken = found[side]
    if name.startswith("a gradient"):
        layer = {"d": "first.weight", "g": "blocks.1.norm.bias"}[side]
        assert broken["not_finite"] == [layer] and broken["loss"] > 0
    elif "loss" in name:
        assert not abs(broken["loss"]) < float("inf") and broken["not_finite"]
    if name != "an input is NaN":  # which is in both
        other = "g" if side == "d" else "d"
        assert found[other] == {"learning_rate": pytest.approx(LR)}


def test_finite_steps_are_the_same_with_the_watch_as_without(monkeypatch):
    """Bit for bit: it only looks."""
    torch.manual_seed(1)
    step = watched()
    for batch in batches(CASE, 5, DEVICE):
        step(batch)
    monkeypatch.setattr("fastgan.health.Health.check", lambda *_: None)
    monkeypatch.setattr("fastgan.health.Health.end", lambda _: None)
    torch.manual_seed(1)
    plain = make_step(CASE, with_ema=True, device=DEVICE)
    for batch in batches(CASE, 5, DEVICE):
        plain(batch)
    assert not different(numbers(step), numbers(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_running_statistics_lie_side_by_side(dtype):
    """All of both networks', each aligned as it was alone, with what was in it."""
    torch.manual_seed(1)
    step = make_step(CASE, dtype, with_ema=True)
    step(next(batches(CASE, 1)))
    buffers = [*step.d.network.buffers(), *step.g.network.buffers()]
    held = [(b.dtype, b.shape, b.clone()) for b in buffers]
    step.health = Health({"d": step.d, "g": step.g}, step.scale)
    spans = sorted((b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers)
    gaps = [start - end for (_, end), (start, _) in zip(spans, spans[1:], strict=False)]
    assert all(0 <= gap < ALIGNED_BYTES for gap in gaps)
    assert len({b.untyped_storage()._cdata for b in buffers}) == len(buffers)
    for b, (kind, shape, values) in zip(buffers, held, strict=True):
        assert b.data_ptr() % ALIGNED_BYTES == 0
        assert (b.dtype, b.shape) == (kind, shape) and torch.equal(b, values)
    assert {b.dtype for b in buffers} == {dtype, torch.int64}
    step.health.begin()
    for b in buffers:
        b.fill_(3)
    step.health.end()
    assert all((b == 3).all() for b in buffers)
    step.health.bad.fill_(True)
    step.health.end()
    assert all(torch.equal(b, values) for b, (_, _, values) in zip(buffers, held, strict=True))


def test_a_network_without_running_statistics_is_watched_too():
    step = make_step(CASE)
    side = Trained(torch.nn.Linear(2, 1), 1e-3, (0.5, 0.9))
    health = Health({"d": side}, step.scale)
    health.begin()
    grads = [torch.ones(1, 2), torch.tensor([torch.inf])]
    assert float(health.check("d", torch.zeros(()), grads)) == 1
    health.end()
    assert int(health.frozen) == 1 and health.diagnosis()["d"]["not_finite"] == ["bias"]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_overflow_of_float16_is_skipped_and_counted_and_no_error(impl):
    step = watched(impl, **FP16)
    first, *rest = batches(CASE, 6, DEVICE)
    step(first)
    scale = float(step.scale.scale)
    before, mend = numbers(step), spoil_gradient("g", "last.weight", torch.inf)(step)
    step(rest[0])
    mend()
    after = numbers(step)
    assert float(step.scale.scale) == scale / 2 and int(step.scale.skipped) == 1
    stays = ("g.adam", "g.low", "ema.blocks.0.conv", "ema.steps")
    assert not {n for n in different(before, after) if n.startswith(stays)}
    for batch in rest[1:]:
        step(batch)
    assert not step.health.frozen and int(step.scale.skipped) == 1
    assert different(after, numbers(step)) >= {"g.last.weight", "d.first.weight", "ema.steps"}


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_in_float16_a_loss_that_is_not_finite_is_an_error_and_so_is_a_scale_without_end(impl):
    step = watched(impl, **FP16)
    first, second = batches(CASE, 2, DEVICE)
    mend = spoil_loss("_judge", torch.nan)(step)
    step(first)
    mend()
    assert int(step.health.frozen) == 1 and int(step.scale.skipped) == 0
    step = watched(impl, **FP16)
    spoil_gradient("d", "last.weight", torch.nan)(step)  # for good: no scale will do
    step.scale.scale.fill_(4 * LEAST_SCALE)
    for batch in batches(CASE, 3, DEVICE):
        step(batch)
    assert int(step.health.frozen) == 1 and int(step.scale.skipped) == 2
    assert step.health.diagnosis()["d"]["not_finite"] == ["last.weight"]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [{}, FP16], ids=str)
def test_a_captured_step_freezes_too(monkeypatch, how, impl):
    if DEVICE == "cpu":
        in_the_place_of_cuda(monkeypatch)
    step = watched(impl, **how)
    first, *rest = batches(CASE, 5, DEVICE)
    advance = Graphed(step, first, step.tensors(), step.random)
    advance(first)
    step.d.adam.leaves()[0].data[0, 0, 0, 0] = torch.nan
    before = numbers(step)
    for batch in rest:
        advance(batch)
    assert int(step.health.frozen) == len(rest)
    after = numbers(step)
    changed = different(before, after)  # NaN is not equal to itself
    assert changed <= {"d.first.weight", "d.low.0"}


@pytest.fixture
def spoiled(monkeypatch):
    """Runs whose D has a loss of NaN at one step."""

    def spoil(at, part="_judge"):
        kept, count = getattr(Step, part), iter(range(1, 10**6))

        def judge(self, *args):
            loss = kept(self, *args)
            if next(count) != at:
                return loss
            return (loss[0] * torch.nan, *loss[1:]) if isinstance(loss, tuple) else loss * torch.nan

        monkeypatch.setattr(Step, part, judge)
        return lambda: monkeypatch.setattr(Step, part, kept)

    return spoil


@pytest.mark.parametrize("due", ["--tick-kimg=0.04", "--save-kimg=0.04", "--sample-kimg=9"])
def test_a_run_ends_with_the_last_good_weights_and_a_diagnosis(tmp_path, spoiled, capsys, due):
    """Whether a tick, a checkpoint or the end finds it."""
    flags = [*FLAGS, "--kimg=0.08", "--tick-kimg=9", due]
    assert main(["train", *flags, f"--out={tmp_path / 'a'}", "--kimg=0.016"]) == 0
    mend = spoiled(at=3)
    capsys.readouterr()
    assert main(["train", *flags, f"--out={tmp_path / 'b'}"]) == 1
    said = capsys.readouterr().err
    run = only_run(tmp_path / "b")
    assert "step 3 (0.024 kimg) was not finite, and was not applied: D's loss is nan" in said
    assert f"--resume {run}" in said and "--lr-d 0.0001 --lr-g 0.0001" in said
    assert "Traceback" not in said and "000000.016kimg" in said
    status = {"status": "failed", "step": 2, "kimg": 0.016}
    assert json.loads((run / "run.json").read_text()) == status
    good, saved = tensors(only_run(tmp_path / "a")), tensors(run)
    assert checkpoint.newest(run).meta["feed"] == {"epoch": 0, "offset": 16}
    wrong = different({k: t for k, t in good.items() if not k.startswith("state.")}, saved)
    assert not wrong and torch.equal(good["state.ema.steps"], saved["state.ema.steps"])
    state = {name: t for name, t in saved.items() if name.startswith("state.")}
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    assert saved["state.stats.steps"] == 2 and not saved["state.stats.recent"][2:].any()
    assert torch.equal(good["state.random.latents"], saved["state.random.latents"])
    found = json.loads((run / "diagnosis.json").read_text())
    assert found["step"] == 3 and found["networks"]["d"]["loss"] == "nan"
    assert found["networks"]["d"]["learning_rate"] == pytest.approx(2e-4)
    assert [row["step"] for row in found["last_steps"]] == [1, 2, 3]
    assert found["last_steps"][2]["d_loss"] == "nan" and found["last_steps"][1]["d_loss"] > 0
    mend()
    assert main(["train", f"--resume={run}", "--lr-d=0.0001", "--lr-g=0.0001"]) == 0
    assert json.loads((run / "run.json").read_text())["step"] == 10


def test_what_comes_of_it_does_not_depend_on_when_it_is_seen(tmp_path, spoiled):
    """Feed and random numbers go back to the step before."""
    runs = []
    for name, tick in (("soon", "--tick-kimg=0.024"), ("late", "--tick-kimg=0.064")):
        mend = spoiled(at=3)
        flags = [*FLAGS, "--kimg=0.08", "--flip", tick, f"--out={tmp_path / name}"]
        assert main(["train", *flags]) == 1
        mend()
        runs.append(only_run(tmp_path / name))
        assert main(["train", f"--resume={runs[-1]}"]) == 0
    assert main(["train", *flags, f"--out={tmp_path / 'whole'}"]) == 0
    whole, soon, late = map(tensors, (only_run(tmp_path / "whole"), *runs))
    kept = {name: t for name, t in whole.items() if not name.startswith("state.stats")}
    assert not different(kept, soon) and not different(kept, late)


def test_a_feed_that_fails_after_such_a_step_saves_what_was_before_it(
    tmp_path, spoiled, monkeypatch, capsys
):
    spoiled(at=3)
    kept, calls = ResidentFeed.next, iter(range(10**6))

    def failing(self):
        if next(calls) == 5:
            raise RunError("the images are gone")
        return kept(self)

    monkeypatch.setattr(ResidentFeed, "next", failing)
    flags = [*FLAGS, "--kimg=0.8", "--tick-kimg=0.4", f"--out={tmp_path}"]
    assert main(["train", *flags]) == 1
    said = capsys.readouterr().err
    assert "step 3 (0.024 kimg) was not finite" in said
    found = checkpoint.newest(only_run(tmp_path))
    assert found.meta["step"] == 2 and found.meta["feed"] == {"epoch": 0, "offset": 16}


def test_skipped_steps_are_in_the_statistics_of_float16_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("fastgan.precision.SCALE", 2.0**40)  # it overflows, for a while
    for flags, kind in ((["--amp", "--amp-dtype=fp16"], int), ([], type(None))):
        out = tmp_path / kind.__name__
        flags = [*flags, "--kimg=0.08", "--tick-kimg=0.04", f"--out={out}"]
        assert main(["train", *FLAGS, *flags]) == 0
        lines = (only_run(out) / "stats.jsonl").read_text().splitlines()
        skipped = [json.loads(line)["skipped_steps"] for line in lines]
        assert all(isinstance(count, kind) for count in skipped)
        assert kind is not int or 0 < skipped[0] <= skipped[1] <= 10

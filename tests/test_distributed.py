"""Several processes: what they add up and agree on, that two are one with the same batch, and what
becomes of them when one is gone.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from equality import (
    Case,
    batches,
    float64_distance,
    load,
    make_reference,
    make_step,
    share,
    teacher_forced,
)
from fastgan import checkpoint, distributed, step
from fastgan.config import TrainConfig
from fastgan.data.face_files import write_faces
from fastgan.data.feed import Sampler
from fastgan.distributed import Mean, Ranks, Stop
from fastgan.errors import RunError, UsageError
from fastgan.models import init_weights
from fastgan.state import State
from fastgan.trainer import train
from ranks import Started, in_ranks
from test_step import BF16, FLOAT64_TOLERANCE, float32, within

CASE = Case(batch=16)


# What is added up.


def noise(rank, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def sums(ranks):
    t = noise(ranks.rank, 1000)
    given = ranks.sum_(t)
    assert given is t
    counts = ranks.sum_(torch.tensor([1, 2**60, ranks.rank]))
    return t.numpy(), ranks.sum_(noise(ranks.rank, 1000).float()).numpy(), counts.tolist()


def test_sums_are_right_and_the_same_bits_on_all_ranks():
    world = 3
    got = in_ranks(world, sums)
    expected = sum(noise(rank, 1000) for rank in range(world))
    for wide, narrow, counts in got:
        np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(narrow, expected, rtol=0, atol=1e-5)
        assert counts == [world, world * 2**60, sum(range(world))]
    for wide, narrow, _ in got[1:]:
        assert wide.tobytes() == got[0][0].tobytes() and narrow.tobytes() == got[0][1].tobytes()


def of_rank(rank):
    """Tensors of every kind that a run has."""
    images = noise(rank, 4, 3, 5, 6).float().contiguous(memory_format=torch.channels_last)
    return [
        images,
        torch.nn.Parameter(noise(rank, 7)),
        torch.tensor(rank + 0.5),
        torch.tensor([rank + 5, -(2**62)]),
        torch.Generator().manual_seed(rank).get_state(),
        noise(rank, 6).bfloat16(),
        noise(rank, 4, 6).t(),
    ]


def broadcast(ranks):
    tensors = of_rank(ranks.rank)
    strides = [t.stride() for t in tensors]
    ranks.broadcast_(tensors)
    assert [t.stride() for t in tensors] == strides
    return [t.detach().double().numpy() for t in tensors]


def test_rank_0s_tensors_come_to_all_in_the_memory_layout_that_they_have_there():
    expected = [t.detach().double().numpy() for t in of_rank(0)]
    for got in in_ranks(3, broadcast):
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


VALUES = [
    None,
    "",
    0,
    False,
    [],
    "runs/00003-ä €",
    "x" * 300_000,
    {"a": [1.5, {"b": None}], "é": 2},
]


def values_shared(ranks):
    return [ranks.share(value if ranks.first else f"rank {ranks.rank}'s") for value in VALUES]


def test_rank_0s_value_is_shared():
    assert in_ranks(3, values_shared) == [VALUES] * 3
    assert [Ranks().share(value) for value in VALUES] == VALUES


def compared(ranks):
    last = float(ranks.rank == ranks.world - 1)
    pairs = [7.0, -7.0, 0.0, 1e300, float(2**48 - 1)]
    others = [last, -last, 1e300 * last, 2**48 - 2 + last, 1 + last * 2**-52]
    return [ranks.same(value) for value in pairs], [ranks.same(value) for value in others]


def test_one_rank_with_another_number_is_noticed():
    assert in_ranks(3, compared) == [([True] * 5, [False] * 5)] * 3


def averaged(ranks, dtype):
    leaves = [
        noise(0, 8, 4, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last),
        noise(0, 5).to(dtype),
        noise(0, 2, 3, 4, 4).to(dtype),
    ]
    mean = Mean(ranks, leaves, 2)
    kept = []
    for round_ in range(2):
        grads = [noise(10 * round_ + ranks.rank, *leaf.shape).to(dtype) for leaf in leaves]
        grads[0] = grads[0].contiguous(memory_format=torch.channels_last)
        assert not grads[0].is_contiguous() and grads[2].is_contiguous()
        numbers = [torch.tensor(float(ranks.rank + round_)), torch.tensor(0.1 * ranks.rank)]
        kept.append(([*grads], mean(grads, numbers)))
    # the first round's, looked at only now: the second has written over none of them
    return [([g.double().numpy() for g in grads], [float(n) for n in ns]) for grads, ns in kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_and_numbers_are_averaged_to_the_same_bits_on_all_ranks(dtype):
    world = 3
    got = in_ranks(world, averaged, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # of the mean, off by a sum of three and a division, and once more when stored
    tolerance = 4 * torch.finfo(wide).eps + torch.finfo(dtype).eps
    shapes = [(8, 4, 3, 3), (5,), (2, 3, 4, 4)]
    for round_ in range(2):
        for place, shape in enumerate(shapes):
            each = [noise(10 * round_ + rank, *shape).to(dtype).double() for rank in range(world)]
            expected = (sum(each) / world).numpy()
            for rank in range(world):
                mine = got[rank][round_][0][place]
                np.testing.assert_allclose(mine, expected, rtol=0, atol=3 * tolerance)
                assert mine.tobytes() == got[0][round_][0][place].tobytes()
        for rank in range(world):
            assert got[rank][round_][1] == pytest.approx([1 + round_, 0.1], rel=1e-6)
            assert got[rank][round_][1] == got[0][round_][1]


# What is agreed on.

LONG = "Größe: " + "x" * 6000


def failing_together(ranks, cases):
    """What each of these blocks raises."""
    seen = []
    for failures in cases:
        done = False
        try:
            with ranks.together():
                if ranks.rank in failures:
                    kind, text = failures[ranks.rank]
                    raise {"usage": UsageError, "run": RunError, "os": OSError}[kind](text)
                done = True
            seen.append(None)
        except (UsageError, RunError) as error:
            seen.append((type(error).__name__, str(error), error.everywhere))
        assert done == (ranks.rank not in failures)
    return seen


TOGETHER = [
    ({}, None),
    ({0: ("usage", "--data is\nwrong: ä")}, ("UsageError", "--data is\nwrong: ä", True)),
    ({1: ("usage", "--data")}, ("UsageError", "rank 1: --data", True)),
    ({2: ("run", "disk")}, ("RunError", "rank 2: disk", True)),
    ({0: ("run", "a"), 1: ("usage", "b"), 2: ("run", "c")}, ("RunError", "a", True)),
    ({1: ("usage", "b"), 2: ("run", "c")}, ("UsageError", "rank 1: b", True)),
    ({1: ("run", "")}, ("RunError", "rank 1: ", True)),
    ({0: ("os", "disk full")}, ("RunError", "disk full", True)),
    ({}, None),
]


def test_what_fails_on_one_rank_fails_on_all_with_the_same_error():
    expected = [what for _, what in TOGETHER]
    assert in_ranks(3, failing_together, [failures for failures, _ in TOGETHER]) == [expected] * 3


def test_a_message_that_is_too_long_for_the_others_is_cut():
    for (got,) in in_ranks(2, failing_together, [{1: ("run", LONG)}]):
        kind, text, everywhere = got
        assert (kind, everywhere) == ("RunError", True)
        assert text.startswith("rank 1: Größe: xxx") and 4000 < len(text) < 4200


def test_a_rank_alone_raises_its_own_error_as_it_is():
    with pytest.raises(UsageError) as raised, Ranks().together():
        raise UsageError(LONG)
    assert str(raised.value) == LONG and not raised.value.everywhere


def stopped(ranks, caught_at, step_s):
    """The step at which a loop ends and by which signal; how often the ranks met for that."""
    caught = []
    meetings = 0
    meet = ranks._max_

    def counted(t):
        nonlocal meetings
        meetings += 1
        meet(t)

    ranks._max_ = counted
    at, number = caught_at.get(ranks.rank, (None, None))
    stop = Stop(ranks, caught, 100)
    for n in range(100, 3000):
        if n == at:
            caught.append(number)
        if found := stop.by(n):
            return n, found, meetings
        time.sleep(step_s[ranks.rank])
    return None


@pytest.mark.parametrize(
    ("caught_at", "number"),
    [
        ({0: (400, signal.SIGTERM)}, signal.SIGTERM),
        ({1: (400, signal.SIGUSR1)}, signal.SIGUSR1),
        ({1: (100, signal.SIGINT)}, signal.SIGINT),
        # at one and the same step, so that both are asked at once
        ({0: (100, signal.SIGINT), 1: (100, signal.SIGTERM)}, signal.SIGTERM),
    ],
)
def test_a_signal_to_any_rank_stops_all_at_the_same_step(caught_at, number):
    # rank 1 takes three times as long for a step
    first, other = in_ranks(2, stopped, caught_at, [0.001, 0.003])
    assert first == other
    at, found, meetings = first
    began = max(n for n, _ in caught_at.values())
    assert found == number and at >= began
    if began == 100:
        assert (at, meetings) == (100, 1)  # the first step asks at once
    else:
        assert meetings <= 40  # by time, not by step


def orphaned(ranks):
    if ranks.rank == 1:
        ranks._watcher.gone = "Connection reset by peer"
    stop, step = Stop(ranks, [], 0), 0
    while not (number := stop.by(step)):
        step += 1
        time.sleep(0.01)
    return number, step


def test_ranks_whose_meeting_place_is_gone_stop_together_and_can_save():
    """As after `kill -9` of torchrun."""
    (one, other) = in_ranks(2, orphaned)
    assert one == other and one[0] == signal.SIGTERM


def test_a_rank_alone_stops_at_once_and_meets_nobody():
    caught = []
    stop = Stop(Ranks(), caught, 0)
    assert [stop.by(n) for n in range(3)] == [0, 0, 0]
    caught += [signal.SIGUSR1, signal.SIGTERM]
    assert stop.by(3) == signal.SIGUSR1  # the first, which is the one to end by


@pytest.mark.parametrize(
    "values",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
        {"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_a_launchers_variables_that_do_not_fit_are_named(values, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
        if name in values:
            monkeypatch.setenv(name, values[name])
    with pytest.raises(UsageError) as raised:
        Ranks.from_environment()
    for name, value in values.items():
        assert f"{name}={value}" in str(raised.value)


# Two are one.


def arrays(of):
    """A step's weights and running statistics."""
    return {
        f"{name}.{key}": t.double().numpy()
        for name, side in (("g", of.g), ("d", of.d))
        for key, t in side.network.state_dict().items()
    }


def float64_off(ranks, options, steps=20):
    made = make_step(CASE, torch.float64, ranks=ranks, sync_bn=True, **options)
    return float64_distance(made, CASE, steps), arrays(made)


def assert_one(got):
    """The same bits on all ranks, and all of them the reference's to within the limit."""
    for off, mine in got:
        assert off and all(v <= FLOAT64_TOLERANCE for v in off.values()), off
        for name, t in mine.items():
            assert t.tobytes() == got[0][1][name].tobytes(), name


@pytest.mark.parametrize(
    ("world", "one_pass", "steps"), [(2, True, 20), (2, False, 20), (4, True, 5)]
)
def test_ranks_with_sync_bn_are_the_reference_with_the_same_batch(world, one_pass, steps):
    assert_one(in_ranks(world, float64_off, {"one_pass": one_pass}, steps))


@pytest.mark.slow
def test_compiled_ranks_with_sync_bn_are_the_reference_with_the_same_batch():
    assert_one(in_ranks(2, float64_off, {"compile": True}, within_s=280))


def run_alike(ranks, options, steps):
    """What a step is given and makes, of this rank's rows; and the weights in the end."""
    made = make_step(CASE, torch.float64, ranks=ranks, **options)
    load(made, make_reference(CASE, made.device))
    rows = []
    make, judge = made._make, made._judge

    def noted_make(latents):
        fake = make(latents)
        rows.append([latents.clone().numpy(), None])
        return fake

    def noted_judge(real, fake):
        rows[-1][1] = real.numpy()
        return judge(real, fake)

    made._make, made._judge = noted_make, noted_judge
    for batch in batches(CASE, steps):
        made(share(ranks, batch))
    return rows, arrays(made)


def test_each_rank_takes_its_own_rows_of_the_same_latents_flips_and_images():
    steps = 20
    options = {"flip": True, "sync_bn": True}
    whole, weights = run_alike(Ranks(), options, steps)
    both = in_ranks(2, run_alike, options, steps)
    for n in range(steps):
        latents, real = (np.concatenate([rows[n][k] for rows, _ in both]) for k in range(2))
        np.testing.assert_array_equal(latents, whole[n][0])
        np.testing.assert_array_equal(real, whole[n][1])  # mirrored where the other is
    plain, _ = run_alike(Ranks(), {}, steps)
    mirrored = [(a[1] != b[1]).any((1, 2, 3)) for a, b in zip(whole, plain, strict=True)]
    assert 0.3 < np.mean(mirrored) < 0.7
    start = make_reference(CASE, torch.device("cpu"))
    start = {"g": start.netG.state_dict(), "d": start.netD.state_dict()}
    before = [t.double().numpy() for side in start.values() for t in side.values()]
    for _, mine in both:
        for (name, t), was in zip(weights.items(), before, strict=True):
            off = np.linalg.norm(mine[name] - t) / np.linalg.norm(t - was)
            assert off <= FLOAT64_TOLERANCE, name


LOOKS = {"policies": ("color", "translation", "cutout"), "noise": 0.2, "spectral": True}


def options_alike(ranks, steps):
    """Weights after steps with what D sees changed, and R1 in each: nothing is read of a batch."""
    made = make_step(CASE, torch.float64, ranks=ranks, penalty=1.0, sync_bn=True, **LOOKS)
    init_weights(made.g.network, torch.Generator().manual_seed(1))
    init_weights(made.d.network, torch.Generator().manual_seed(2))
    start = {name: t.copy() for name, t in arrays(made).items()}
    for batch in batches(CASE, steps):
        made(share(ranks, batch), penalised=True)
    return start, arrays(made)


def test_ranks_augment_add_noise_and_penalise_as_one_process_does():
    start, whole = options_alike(Ranks(), 5)
    for _, mine in in_ranks(2, options_alike, 5):
        for name, t in whole.items():
            off = np.linalg.norm(mine[name] - t)
            assert off <= FLOAT64_TOLERANCE * max(np.linalg.norm(t - start[name]), 1e-3), name


def forced(ranks, low):
    made = make_step(CASE, amp_dtype=low, ranks=ranks, sync_bn=True)
    return teacher_forced(made, CASE)


@pytest.mark.parametrize(
    ("low", "limits"), [(None, float32(CASE)), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_ranks_equal_the_reference_step_by_step(low, limits):
    for errors in in_ranks(2, forced, low):
        within(errors, limits)


# Batch norm of each rank's own share.


class Alone(Ranks):
    """One rank of two that has nobody: what it adds up is its own twice."""

    def sum_(self, t):
        return t.mul_(self.world)


def one_step(ranks, _):
    """Gradients, and running statistics, of a first step in which D stays as it is."""
    made = make_step(CASE, torch.float64, ranks=ranks)
    load(made, make_reference(CASE, made.device))
    made.d.adam.param_groups[0]["lr"].zero_()  # G's gradients are of one and the same D then
    for batch in batches(CASE, 1):
        made(share(ranks, batch))
    grads = [g.numpy() for side in (made.d, made.g) for g in side.adam.gradients()]
    return grads, {k: t for k, t in arrays(made).items() if "running" in k}


def test_with_batch_norm_of_its_own_a_rank_is_a_process_alone_but_for_the_mean_of_gradients():
    halves = [one_step(Alone(rank, 2, rank, 2), None) for rank in range(2)]
    both = in_ranks(2, one_step, None)
    assert both[0][0][0].shape == halves[0][0][0].shape
    for place, (a, b) in enumerate(zip(halves[0][0], halves[1][0], strict=True)):
        mean = (a + b) / 2
        for grads, _ in both:
            assert np.linalg.norm(grads[place] - mean) <= 1e-12 * np.linalg.norm(mean)
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(mean)  # the halves do differ
    for rank in range(2):
        for name, t in halves[rank][1].items():
            np.testing.assert_array_equal(both[rank][1][name], t)
            assert (t != halves[1 - rank][1][name]).any()


def weights_after(ranks, steps):
    made = make_step(CASE, amp_dtype=torch.bfloat16, ranks=ranks, flip=True, with_ema=True)
    for batch in batches(CASE, steps):
        made(share(ranks, batch))
    networks = (made.g.network, made.d.network, made.ema.network)
    return [p.detach().numpy().tobytes() for net in networks for p in net.parameters()]


def test_with_batch_norm_of_its_own_all_ranks_have_the_same_weights_to_the_bit():
    first, *others = in_ranks(4, weights_after, 10)
    assert all(other == first for other in others)


# Planted mistakes.


def planted(ranks, mistake):
    """How far two ranks of which something is wrong are off."""
    if mistake == "summed":
        divided = Mean.__call__

        def summed(self, grads, numbers):
            numbers = divided(self, grads, numbers)
            torch._foreach_mul_(list(grads), ranks.world)
            return numbers

        Mean.__call__ = summed
    made = make_step(CASE, torch.float64, ranks=ranks, sync_bn=mistake != "own batch norm")
    if mistake == "the same latents":
        rows = made._share
        made._share = slice(0, rows.stop - rows.start)
    if mistake == "a batch behind" and ranks.rank == 1:
        late = []

        def behind(batch):
            late.append(batch)
            return right(late[max(0, len(late) - 2)])

        right, made = made, Delegated(made, behind)
    if mistake == "averaged late":
        made._means = {"d": made._means["d"], "g": lambda grads, numbers: numbers}
    return float64_distance(made, CASE, steps=4)


class Delegated:
    """A step that is called otherwise."""

    def __init__(self, made, call):
        self.__dict__.update(made=made, call=call)

    def __getattr__(self, name):
        return getattr(self.made, name)

    def __call__(self, batch):
        return self.call(batch)


@pytest.mark.parametrize(
    "mistake", ["summed", "the same latents", "own batch norm", "a batch behind", "averaged late"]
)
def test_a_planted_mistake_shows(mistake):
    got = in_ranks(2, planted, mistake)
    # Adam is nearly blind to a factor of its gradients: only its epsilon tells
    times = 10 if mistake == "summed" else 1e4
    assert any(not v <= times * FLOAT64_TOLERANCE for off in got for v in off.values())


# Whole runs.

SMALL = {"data": "faces:20", "size": 32, "width": 4, "latent": 8, "batch": 8, "device": "cpu"}
SMALL |= {"grid": 4, "sample_kimg": 9, "tick_kimg": 0.04, "save_kimg": 0.08}


def config(out, **options):
    return TrainConfig(**{**SMALL, "out": out, "cache": out.parent / "cache", **options})


def trained(ranks, out, plant, at, options):
    """The error that a run ends with, and what it comes to on this rank; with something wrong on
    rank 1 alone in step `at`.
    """
    noted = {}
    undo, state_of = State.undo_frozen, State.__init__

    def undone(self):
        frozen = undo(self)
        if frozen:
            noted.update(frozen=frozen, step=self.step_count, weights=digest(self))
        return frozen

    def made(self, *args, **kwargs):
        state_of(self, *args, **kwargs)
        noted["state"] = self

    State.undo_frozen, State.__init__ = undone, made
    if ranks.rank == 1:
        plant_in_rank_1(plant, at)
    try:
        noted["code"] = train(config(out, **options))
    except (UsageError, RunError) as error:
        noted |= {"error": str(error), "kind": type(error).__name__, "told": error.everywhere}
    state = noted.pop("state", None)
    return {**noted, "ended": state and state.step_count}


def plant_in_rank_1(plant, at):
    calls = 0

    def now():
        nonlocal calls
        calls += 1
        return calls == at

    if plant == "images":
        gather = step.gather_u8

        def gathered(*args, **kwargs):
            real = gather(*args, **kwargs)
            return real.fill_(torch.nan) if now() else real

        step.gather_u8 = gathered
    elif plant == "gradients":
        call = Mean.__call__

        def averaged(self, grads, numbers):
            if len(numbers) == 1 and now():  # G's
                first(grads[-1]).fill_(torch.inf)
            return call(self, grads, numbers)

        Mean.__call__ = averaged
    elif plant == "weights":
        take = State.take

        def nudged(self, batch):
            take(self, batch)
            if now():
                weight = first(next(self.d.network.parameters()).data)
                weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))

        State.take = nudged


def first(t):
    """The first number of a tensor, to be written to."""
    return t[(0,) * t.dim()]


def digest(state):
    parts = [t for part in state.parts().values() for t in part.values()]
    whole = b"".join(t.detach().contiguous().numpy().tobytes() for t in parts)
    return hashlib.sha256(whole).hexdigest()


def only_run(out):
    (run,) = out.glob("0*")
    return run


def tensors(run, step):
    found = checkpoint.find(run / "checkpoints" / checkpoint.kimg_name(8 * step))
    return {f"{part}.{k}": t for part in checkpoint.PARTS for k, t in found.tensors(part).items()}


def assert_same_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, t in mine.items():
        assert t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]), name


PLANTED_AT = 13
SYNCED = {"sync_bn": True}  # so that the ranks' statistics are the same, too


@pytest.fixture(scope="module")
def until_then(tmp_path_factory):
    """A run that ends before the step in which others are given what is not finite."""
    out = tmp_path_factory.mktemp("whole")
    options = {**SYNCED, "kimg": (PLANTED_AT - 1) * 8 / 1000}
    for each in in_ranks(2, trained, out, None, 0, options, joined=False):
        assert each["code"] == 0
    return only_run(out)


@pytest.mark.parametrize(("plant", "culprit"), [("images", "d"), ("gradients", "g")])
def test_what_is_not_finite_on_one_rank_stops_all_before_that_step(
    plant, culprit, until_then, tmp_path
):
    at, options = PLANTED_AT, {**SYNCED, "kimg": 0.2}
    got = in_ranks(2, trained, tmp_path, plant, at, options, joined=False)
    # seen at the tick after step 15: steps 13, 14 and 15 have changed nothing
    for each in got:
        assert each["kind"] == "RunError" and each["told"] and each["ended"] == at - 1
        assert (each["frozen"], each["step"]) == (3, at - 1)
        assert each["error"].startswith(f"step {at} ")
        assert f"{culprit.upper()}'s loss is" in each["error"]
    assert got[0]["weights"] == got[1]["weights"]
    run = only_run(tmp_path)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert json.loads((run / "diagnosis.json").read_text())["step"] == at
    # what was kept is what a run without it had then
    kept, right = tensors(run, at - 1), tensors(until_then, at - 1)
    # the tick was cut short: its sums are in the log of the run without it
    for name in [name for name in kept if name == "state.stats.sums"]:
        del kept[name], right[name]
    if culprit == "g":  # D had taken its own update of that step, which was right
        kept, right = (
            {k: t for k, t in whole.items() if ".d." not in k} for whole in (kept, right)
        )
    assert_same_tensors(kept, right)


def test_weights_that_have_come_apart_are_noticed_before_they_are_saved(tmp_path):
    got = in_ranks(2, trained, tmp_path, "weights", 13, {"kimg": 0.2}, joined=False)
    for each in got:
        assert each["kind"] == "RunError" and each["told"]
        assert "weights have come apart by step 20" in each["error"]
    assert [p.name for p in checkpoint.checkpoints(only_run(tmp_path))] == ["000000.080kimg"]


def with_other_data(ranks, out, options):
    return trained(ranks, out, None, 0, options[ranks.rank])


@pytest.mark.parametrize("other", ["faces:21", "another folder"])
def test_other_images_on_one_rank_are_noticed(other, tmp_path):
    data = ["faces:20", other]
    if other == "another folder":  # of as many images with the same names
        data = [str(tmp_path / f"faces.{seed}") for seed in range(2)]
        for seed, folder in enumerate(data):
            Path(folder).mkdir()
            write_faces(Path(folder), 20, 32, seed)
    options = [{"kimg": 0.04, "data": source} for source in data]
    for each in in_ranks(2, with_other_data, tmp_path, options, joined=False):
        assert each["kind"] == "RunError" and each["told"] and each["ended"] == 0
        assert "is not the same set for all ranks" in each["error"]
    assert not list(tmp_path.glob("0*"))


# The order of the images.


def test_all_numbers_of_ranks_take_the_same_images_in_the_same_order():
    batch, count, steps = 24, 50, 40
    alone = Sampler(count, batch, 5)
    whole = [alone.next() for _ in range(steps)]
    for world in (1, 2, 3, 4, 6, 8):
        samplers = [Sampler(count, batch, 5, rank, world) for rank in range(world)]
        for n in range(steps):
            shares = [sampler.next() for sampler in samplers]
            assert {len(part) for part in shares} == {batch // world}
            np.testing.assert_array_equal(np.concatenate(shares), whole[n])
    # and a change of their number on the way
    position, taken = {"epoch": 0, "offset": 0}, []
    for n, world in enumerate((1, 8, 3, 6, 2, 4) * 3):
        samplers = [Sampler(count, batch, 5, rank, world) for rank in range(world)]
        for sampler in samplers:
            sampler.load_state_dict(position)
        taken.append(np.concatenate([sampler.next() for sampler in samplers]))
        positions = [sampler.state_dict() for sampler in samplers]
        assert all(p == positions[0] for p in positions)
        position = positions[0]
        np.testing.assert_array_equal(taken[n], whole[n])


# Ends.


def leaving(ranks):
    """When this rank was ready to leave, and when it had."""
    ranks.join(on_gpu=False)
    time.sleep(0.5 if ranks.first else 0)
    ready = time.monotonic()
    ranks.leave(failed=False)
    return ready, time.monotonic()


def test_no_rank_leaves_before_all_are_ready_to():
    """torchrun ends the others once one has ended by a signal: rank 0 may still be writing."""
    times = in_ranks(2, leaving, joined=False)
    assert times[1][1] >= times[0][0] > times[1][0]


def with_other_options(ranks, out, options):
    return trained(ranks, out, None, 0, options[ranks.rank])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kimg", 0.8),
        ("batch", 16),
        ("lr_g", 0.1),
        ("width", 8),
        ("amp", True),
        ("kernels", "torch"),
    ],
)
def test_other_options_on_one_rank_are_refused_before_anything_is_decoded(key, value, tmp_path):
    """They would train on, each in its way, or wait for each other for ever."""
    options = [{"kimg": 0.2}, {"kimg": 0.2, key: value}]
    for each in in_ranks(2, with_other_options, tmp_path, options, joined=False):
        assert each["kind"] == "UsageError" and each["told"] and each["ended"] is None
        assert f"rank 1: --{key.replace('_', '-')} is {value} here and " in each["error"]
    assert not list(tmp_path.iterdir())


def rescued_slowly(ranks, out):
    distributed.BEAT_S, distributed.GRACE_S = 0.1, 0.5
    save = checkpoint.save

    def slow(*args):
        time.sleep(3)
        return save(*args)

    checkpoint.save = slow
    return trained(ranks, out, "images", PLANTED_AT, {"kimg": 0.2, "save_kimg": 9})


def test_the_others_wait_for_what_rank_0_saves_after_a_step_that_was_not_finite(tmp_path):
    """However long its disk takes."""
    for each in in_ranks(2, rescued_slowly, tmp_path, joined=False):
        assert each["kind"] == "RunError" and each["told"]
        assert each["error"].startswith(f"step {PLANTED_AT} ")
    run = only_run(tmp_path)
    assert checkpoint.newest(run).meta["step"] == PLANTED_AT - 1
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


# A rank that is gone.


def test_a_rank_that_is_gone_ends_the_others_within_a_minute():
    """By the real numbers; the others here are quick ones."""
    longest = distributed.SILENT_S + distributed.GRACE_S + 3 * distributed.BEAT_S
    assert longest < 60


QUICK = {"BEAT_S": 0.1, "SILENT_S": 1.5, "GRACE_S": 2.0}
ENDS_S = 30  # far below TIMEOUT_S, far above what any of these takes on a busy machine


def meeting(ranks, gone, how, folder):
    """Meets until it is told to stop, or rank `gone` leaves; `how` says in which way."""
    n = 0
    while ranks.share(not (folder / "stop").exists()):
        n += 1
        ranks.sum_(torch.ones(4))
        (folder / f"met.{ranks.rank}").touch()
        if n == 5 and ranks.rank == gone and how == "dies":
            os._exit(9)
        if n == 5 and ranks.rank == gone and how == "fails":
            raise RunError("its own reason")
        if n == 5 and ranks.rank != gone and how == "fails":
            time.sleep(600)  # as in a library that knows nothing of that


def wait_for(true):
    deadline = time.monotonic() + ENDS_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("gone", [0, 2])
def test_when_a_rank_dies_in_a_meeting_the_others_end_and_say_which(gone, tmp_path):
    with Started(tmp_path, 3, meeting, gone, "dies", tmp_path, settings=QUICK) as started:
        others = [rank for rank in range(3) if rank != gone]
        for code, line in started.ends(*others, within_s=ENDS_S):
            assert code == 1
            # rank 0 keeps the place that they met at
            assert f"rank {gone} gives no sign of life" in line or (gone == 0 and "rank 0" in line)
        assert started.children[gone].exitcode == 9


@pytest.mark.parametrize("gone", [0, 1])
def test_when_a_rank_is_silent_the_other_is_ended_and_says_which(gone, tmp_path):
    with Started(tmp_path, 2, meeting, None, "", tmp_path, settings=QUICK) as started:
        wait_for(lambda: all((tmp_path / f"met.{rank}").exists() for rank in range(2)))
        os.kill(started.children[gone].pid, signal.SIGSTOP)
        ((code, line),) = started.ends(1 - gone, within_s=ENDS_S)
        assert code == 1
        assert f"rank {1 - gone}: ended, since" in line and f"rank {gone}" in line
        assert "silent for 1.5 s" in line


def test_a_rank_that_fails_ends_one_that_waits_for_ever(tmp_path):
    with Started(tmp_path, 2, meeting, 1, "fails", tmp_path, settings=QUICK) as started:
        (code, line), (their_code, theirs) = started.ends(0, 1, within_s=ENDS_S)
        assert (code, their_code) == (1, 1)
        assert line == "fastgan: rank 0: ended, since rank 1 failed"
        assert theirs == "fastgan: rank 1: its own reason"


def training(ranks, gone):
    made = make_step(CASE, ranks=ranks, sync_bn=True)
    for n, batch in enumerate(batches(CASE, 100)):
        if n == 3 and ranks.rank == gone:
            os._exit(9)
        made(share(ranks, batch))


def test_a_rank_that_dies_is_told_also_by_synchronised_batch_norm(tmp_path):
    with Started(tmp_path, 2, training, 1, settings=QUICK) as started:
        ((code, line),) = started.ends(0, within_s=ENDS_S)
        assert code == 1, started.lines(0)
        assert "another process of the run has ended (rank 1 gives no sign of life)" in line


def test_a_rank_that_failed_ends_though_something_holds_it_up(tmp_path):
    with Started(tmp_path, 2, meeting, 1, "fails", tmp_path, settings=QUICK, linger_s=600) as it:
        ((code, line),) = it.ends(1, within_s=ENDS_S)
        assert (code, line) == (1, "fastgan: rank 1: its own reason")


def test_ranks_that_were_suspended_together_go_on(tmp_path):
    with Started(tmp_path, 2, meeting, None, "", tmp_path, settings=QUICK) as started:
        wait_for(lambda: all((tmp_path / f"met.{rank}").exists() for rank in range(2)))
        # a little apart, so that rank 0 has begun to miss rank 1
        for rank, number, wait_s in (
            (1, signal.SIGSTOP, 0.3),
            (0, signal.SIGSTOP, 1.5 * QUICK["SILENT_S"]),
            (0, signal.SIGCONT, 0.3),
            (1, signal.SIGCONT, 0),
        ):
            os.kill(started.children[rank].pid, number)
            time.sleep(wait_s)
        time.sleep(1.25 * QUICK["GRACE_S"])
        assert [child.exitcode for child in started.children.values()] == [None, None]
        (tmp_path / "stop").touch()
        assert started.ends(0, 1, within_s=ENDS_S) == [(0, ""), (0, "")]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_not_waited_for_for_ever(missing, tmp_path):
    settings = {**QUICK, "MEET_S": 1.0}
    with Started(
        tmp_path, 2, meeting, None, "", tmp_path, settings=settings, missing={missing}
    ) as started:
        ((code, line),) = started.ends(1 - missing, within_s=ENDS_S)
        assert code == 1 and "the 2 processes of the run could not meet" in line

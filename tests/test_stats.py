"""The log of a run: lines, array and picture say the same, also after a kill and a resume."""

import json

import numpy as np
import pytest
import torch

from fastgan.stats import COLUMNS, RECENT, Accumulator, StatsLog
from fastgan.step import StepStats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def row(step):
    return {
        "step": step,
        "kimg": step / 10,
        "d_loss": 1.1,
        "g_loss": 0.1 + step,
        "d_real": 0.6,
        "d_fake": 0.4,
    }


def test_rows_after_the_checkpoint_are_dropped_and_a_cut_line_too(tmp_path):
    log = StatsLog(tmp_path)
    for step in (10, 20, 30):
        log.add(row(step))
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 40, "ki')  # killed here
    again = StatsLog(tmp_path, up_to_step=20)
    assert [r["step"] for r in again.rows] == [10, 20]
    again.add(row(25))
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 25]
    losses = np.load(tmp_path / "losses.npy", allow_pickle=False)
    assert json.loads((tmp_path / "losses.json").read_text()) == list(COLUMNS)
    np.testing.assert_array_equal(
        losses[:, COLUMNS.index("g_loss")], np.float32([10.1, 20.1, 25.1])
    )


DAMAGE = [b"\xff\x00", b"[1, 2]", b'{"step": 25}', b"null", b"[" * 100_000, b""]
DAMAGE += [
    json.dumps({**row(15), **wrong}).encode()
    for wrong in (
        {"d_real": "x"},
        {"d_real": 10**400},
        {"g_loss": float("nan")},
        {"diversity": [1]},
        {"step": 5},
    )
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_lines_are_left_out_and_kept_beside(tmp_path, damage, capsys):
    StatsLog(tmp_path).add(row(10))
    path = tmp_path / "stats.jsonl"
    path.write_bytes(path.read_bytes() + damage + b"\n" + json.dumps(row(20)).encode() + b"\n")
    before = path.read_bytes()
    assert [r["step"] for r in StatsLog(tmp_path, up_to_step=50).rows] == [10, 20]
    said = capsys.readouterr().err
    assert f"1 lines of {path} are damaged: left out, and kept in" in said
    assert (tmp_path / "stats.damaged.jsonl").read_bytes() == before
    assert [r["step"] for r in StatsLog(tmp_path, up_to_step=50).rows] == [10, 20]
    assert not capsys.readouterr().err


def test_an_empty_log_has_an_empty_array_and_a_picture(tmp_path):
    log = StatsLog(tmp_path)
    assert np.load(tmp_path / "losses.npy").shape == (0, len(COLUMNS))
    log.plot()
    empty = (tmp_path / "losses.png").read_bytes()
    log.add(row(1)), log.add(row(2))
    log.plot()
    assert (tmp_path / "losses.png").read_bytes() != empty
    assert not list(tmp_path.glob("*tmp*"))


def step_stats(step):
    return StepStats(*(torch.tensor(step + i / 4, device=DEVICE) for i in range(4)))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("steps", [0, 1, 2, RECENT, RECENT + 1, 2 * RECENT + 7])
def test_the_last_steps_in_their_order(steps, impl):
    stats, applied = Accumulator(DEVICE, impl), torch.tensor(0, device=DEVICE)
    for step in range(1, steps + 1):
        stats.add(step_stats(step), applied)
    rows = stats.last(steps)
    assert [r["step"] for r in rows] == list(range(max(1, steps - RECENT + 1), steps + 1))
    for r in rows:
        assert [r[name] for name in StepStats._fields] == [r["step"] + i / 4 for i in range(4)]
    first = {} if not steps else {"d_loss": (steps + 1) / 2, "d_fake": (steps + 1) / 2 + 0.75}
    means = stats.take()
    assert {name: means[name] for name in first} == first
    assert not any(stats.take().values()) and stats.last(steps) == rows


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_of_the_steps_that_were_not_applied_the_first_is_shown_and_none_is_counted(impl):
    stats = Accumulator(DEVICE, impl)
    for step, frozen in enumerate([0, 0, 1, 2, 3], 1):
        values = step_stats(step)
        if frozen:
            values = values._replace(d_loss=torch.tensor(torch.nan, device=DEVICE))
        stats.add(values, torch.tensor(frozen, device=DEVICE))
    rows = stats.last(3)
    assert [(r["step"], r["g_loss"]) for r in rows] == [(1, 1.25), (2, 2.25), (3, 3.25)]
    assert rows[2]["d_loss"] != rows[2]["d_loss"]
    assert stats.take()["d_loss"] == 1.5


def test_what_is_kept_goes_on():
    """Into a new one, of which the ring goes on where it was."""
    whole, first, second = (Accumulator(DEVICE) for _ in range(3))
    applied = torch.tensor(0, device=DEVICE)
    for step in range(RECENT + 9):
        whole.add(step_stats(step), applied)
        (first if step < RECENT + 3 else second).add(step_stats(step), applied)
        if step == RECENT + 2:
            for name, t in second.tensors().items():
                t.copy_(first.tensors()[name])
    assert second.last(7) == whole.last(7) and second.take() == whole.take()

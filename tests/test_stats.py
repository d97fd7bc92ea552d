"""The log of a run: lines, array and picture say the same, also after a kill and a resume."""

import json

import numpy as np
import pytest

from fastgan.stats import COLUMNS, StatsLog


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


@pytest.mark.parametrize("damage", [b"\xff\x00\n", b"[1, 2]\n", b'{"step": 25}\n', b"null\n"])
def test_a_damaged_log_is_read_up_to_the_damage(tmp_path, damage):
    StatsLog(tmp_path).add(row(10))
    with open(tmp_path / "stats.jsonl", "ab") as file:
        file.write(damage + json.dumps(row(20)).encode() + b"\n")
    assert [r["step"] for r in StatsLog(tmp_path, up_to_step=50).rows] == [10]


def test_an_empty_log_has_an_empty_array_and_a_picture(tmp_path):
    log = StatsLog(tmp_path)
    assert np.load(tmp_path / "losses.npy").shape == (0, len(COLUMNS))
    log.plot()
    empty = (tmp_path / "losses.png").read_bytes()
    log.add(row(1)), log.add(row(2))
    log.plot()
    assert (tmp_path / "losses.png").read_bytes() != empty
    assert not list(tmp_path.glob("*tmp*"))

"""Checkpoints of every format that fastgan has written are read, and runs go on from them."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastgan import formats
from fastgan.checkpoint import PARTS, checkpoints, find
from fastgan.cli import main
from fastgan.config import config_from
from fastgan.errors import RunError
from fastgan.formats import VERSION, upgraded, upgraded_config
from fastgan.precision import LossScale
from fastgan.stats import Accumulator
from fastgan.step import StepStats

RUNS = sorted(p.parent for p in (Path(__file__).parent / "formats").glob("*/config.json"))
MAX_BYTES = 200_000


def read(run):
    (path,) = checkpoints(run)
    meta = json.loads((path / "meta.json").read_text())
    return meta, safetensors.torch.load_file(path / "state.safetensors")


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request):
    return request.param


def test_there_is_a_run_of_each_format():
    versions = {read(run)[0]["format_version"] for run in RUNS}
    assert versions >= set(range(1, VERSION))
    for run in RUNS:
        sizes = [p.stat().st_size for p in run.rglob("*") if p.is_file()]
        assert sum(sizes) < MAX_BYTES, run


def test_upgraded_is_what_this_fastgan_writes(run):
    """Names, types and shapes of the state; the record; a configuration that is taken as it is."""
    then, old_state = read(run)
    kept = json.dumps(then), set(old_state)
    meta, state = upgraded(then, "X", old_state)
    assert (json.dumps(then), set(old_state)) == kept  # what was given is left as it was
    assert meta["format_version"] == VERSION and meta["world"] == 1 and "scaler" not in meta
    assert (meta["step"], meta["images"], meta["device"]) == (8, 64, "cpu")
    assert meta["data"]["count"] == 20
    assert (meta["data"]["identity"] is None) == (then["format_version"] == 1)
    config = config_from(meta["config"], "")
    assert config.keep_checkpoints == 3 and config.keep == 1.0
    scale = LossScale(torch.device("cpu"), config.amp)
    wanted = {f"loss_scale.{name}": t for name, t in scale.tensors().items()}
    stats = Accumulator(torch.device("cpu")).tensors()
    wanted |= {f"stats.{name}": t for name, t in stats.items()}
    wanted |= {"ema.steps": torch.zeros((), dtype=torch.float64)}
    wanted |= {"random.latents": torch.Generator().get_state()}
    assert {k: (t.shape, t.dtype) for k, t in state.items()} == {
        k: (t.shape, t.dtype) for k, t in wanted.items()
    }
    assert state["stats.sums"][-1] == 2  # steps since the last tick, which was at the sixth
    assert torch.equal(state["stats.sums"][:4], old_state["stats.sums"][:4])
    meta["world"], state["stats.recent"] = 2, torch.rand(50, 5)  # what the newest form holds stays
    again = upgraded(meta, "X", state)
    assert again[0] == meta and all(torch.equal(again[1][k], t) for k, t in state.items())


def test_the_record_alone(run):
    then, state = read(run)
    assert upgraded(then, "X")[0] == upgraded(then, "X", state)[0]


def test_a_gradscaler_of_format_1_becomes_the_loss_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 7})
    then, state = read(RUNS[0])
    meta, state = upgraded({**then, "scaler": scaler.state_dict()}, "X", state)
    scale = LossScale(torch.device("cpu"), True).tensors()
    found = {k.removeprefix("loss_scale."): t for k, t in state.items() if "loss_scale." in k}
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
        k: (t.shape, t.dtype) for k, t in scale.items()
    }
    assert (found["scale"], found["good_steps"], found["skipped"]) == (2.0**13, 7, 0)
    assert "scaler" not in meta


@pytest.mark.parametrize(("state_bytes", "device"), [(5376, "cpu"), (336, "cuda")])
def test_the_first_records_named_no_device(state_bytes, device):
    """A generator's state tells it: a CPU's is longer than a GPU's whole file."""
    then, _ = read(RUNS[0])
    del then["device"]
    then["files"]["state"]["bytes"] = state_bytes
    then["data"] = {"fingerprint": then["data"]["identity"], "count": 20}
    meta, _ = upgraded(then, "X")
    assert meta["device"] == device and meta["data"] == {"identity": None, "count": 20}


def test_format_2_written_as_1():
    """For some commits the state was that of 2 and the number still 1."""
    then, state = read(next(run for run in RUNS if run.name == "v2-fp16"))
    assert then["format_version"] == 2
    as_2, as_1 = upgraded(then, "X", state), upgraded({**then, "format_version": 1}, "X", state)
    assert as_1[0] == as_2[0]
    assert as_1[1].keys() == as_2[1].keys()
    assert all(torch.equal(as_1[1][k], t) for k, t in as_2[1].items())
    assert as_1[1]["loss_scale.scale"] == 4096


def test_upgrades_are_applied_in_order(monkeypatch):
    """A version that is to come: each step gets what the one before it made."""
    monkeypatch.setattr(formats, "VERSION", 4)

    def from_3(meta, state):
        assert meta["world"] == 1 and "stats.recent" in state
        return {**meta, "new": True}, state

    monkeypatch.setattr(formats, "STEPS", [*formats.STEPS, from_3])
    then, state = read(RUNS[0])
    meta, _ = upgraded(then, "X", state)
    assert meta["new"] and meta["format_version"] == 4


@pytest.mark.parametrize("version", [99, VERSION + 1])
def test_a_newer_format_says_so(version):
    rule = (
        f"checkpoint X has format {version}, this fastgan reads 1 to {VERSION}: it was written by "
        "a newer version of fastgan; update fastgan"
    )
    with pytest.raises(RunError, match=re.escape(rule)):
        upgraded({"format_version": version}, "X")


@pytest.mark.parametrize("version", [None, 0, -1, True, "2", 2.0, [2]])
def test_what_is_no_version(version):
    with pytest.raises(RunError, match="checkpoint X is damaged: meta.json has no right format"):
        upgraded({"format_version": version}, "X")


@pytest.mark.parametrize(
    "damage",
    [
        {"scaler": {"scale": "large", "_growth_tracker": 0}},
        {"scaler": {"scale": 2.0}},
        {"scaler": {"scale": 2.0, "_growth_tracker": 1 << 99}},
        {"scaler": [1]},
        {"device": None, "files": None},
    ],
)
def test_damaged_records_are_named(damage):
    then, state = read(RUNS[0])
    then = {k: v for k, v in {**then, **damage}.items() if v is not None}
    with pytest.raises(RunError, match="checkpoint X is damaged: .* in format 1"):
        upgraded(then, "X", state)


def test_a_damaged_state_is_named():
    then, state = read(RUNS[0])
    del state["stats.sums"]
    with pytest.raises(RunError, match="checkpoint X is damaged: .*stats.sums.* in format 1"):
        upgraded(then, "X", state)
    with pytest.raises(RunError, match="checkpoint X is damaged: .* in format 1"):
        upgraded(then, "X", {"stats.sums": torch.zeros(4), "stats.count": torch.zeros(3)})


@pytest.mark.parametrize("key", ["config", "data"])
def test_a_record_without_its_tables_is_left_to_who_checks_it(key):
    then, _ = read(RUNS[0])
    for wrong in (None, [], 3):
        assert upgraded({**then, key: wrong}, "X")[0][key] == wrong


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"data": "x", "keep": 3}, {"data": "x", "keep_checkpoints": 3}),
        ({"crop": "none", "keep": 0.5}, {"crop": "none", "keep": 0.5}),
        ({"crop": "none", "keep": 1}, {"crop": "none", "keep": 1}),
        (
            {"crop": "none", "keep": 1.0, "keep_checkpoints": 2},
            {"crop": "none", "keep": 1.0, "keep_checkpoints": 2},
        ),
        ({"keep": 0.5, "keep_checkpoints": 2}, {"keep": 0.5, "keep_checkpoints": 2}),
        ({"data": "x"}, {"data": "x"}),
        ({}, {}),
    ],
)
def test_configurations(old, new):
    assert upgraded_config(old) == new


def test_an_old_run_goes_on(run, tmp_path, monkeypatch, capsys):
    """The three steps that were undisturbed then give the same statistics when they are done again
    from the checkpoint.
    """
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "runs" / f"00000-{run.name}"
    shutil.copytree(run, copy)
    then = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in then] == [3, 6, 9, 10]
    assert main(["train", "--resume", str(copy), "--kimg", "0.096", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    unknown = "cannot be checked" in said.out + said.err
    assert unknown == (run.name == "v1")
    now = [json.loads(line) for line in (copy / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in now] == [3, 6, 9, 12]
    assert now[:2] == then[:2]
    # of steps 7 and 8, which the checkpoint held, and 9, done again
    rounding = 1e-2 if "fp16" in run.name else 1e-4
    for name in StepStats._fields:
        assert math.isclose(now[2][name], then[2][name], rel_tol=rounding), name
    assert json.loads((copy / "run.json").read_text())["status"] == "done"
    newest = find(copy)
    assert newest.path.name == "000000.096kimg"
    assert newest.meta["step"] == 12 and newest.meta["feed"] == {"epoch": 4, "offset": 16}
    assert newest.meta["data"]["identity"] is not None  # from now on they can be told
    assert json.loads((newest.path / "meta.json").read_text())["format_version"] == VERSION
    assert {part for part in PARTS if newest.tensors(part)} == set(PARTS)


def test_an_old_run_is_sampled(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    pictures = []
    for flags in ([], ["--no-ema"]):
        out = tmp_path / f"grid{len(flags)}.png"
        assert (
            main(["sample", str(tmp_path / "run"), "--count", "4", "--out", str(out), *flags]) == 0
        )
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]

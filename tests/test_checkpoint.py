"""Checkpoints: complete or absent, and no damage goes unseen."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgan import checkpoint
from fastgan.errors import RunError, UsageError

PARTS = {
    "model": {
        "g.a": torch.randn(3, 4, 4, 4).to(memory_format=torch.channels_last),
        "d.b": torch.arange(5, dtype=torch.int64),
    },
    "optim": {"g.a.step": torch.tensor(3.0), "g.a.exp_avg": torch.randn(7, dtype=torch.float64)},
    "state": {"random.latents": torch.Generator().get_state()},
}
META = {"step": 7, "device": "cpu", "feed": {}, "data": {}, "config": {}}
FILES = ["model.safetensors", "optim.safetensors", "state.safetensors", "meta.json"]


@pytest.fixture
def run(tmp_path):
    for images in (1000, 2500):
        checkpoint.save(tmp_path / "checkpoints", images, PARTS, {**META, "step": images})
    return tmp_path


def test_what_was_saved_is_read_back_bit_for_bit(run):
    found = checkpoint.newest(run)
    assert found.path.name == "000002.500kimg"
    assert found.meta["images"] == found.meta["step"] == 2500
    for part, tensors in PARTS.items():
        read = found.tensors(part)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert checkpoint.under(found.tensors("model"), "g.").keys() == {"a"}


def test_files_get_the_umasks_mode(run):
    mask = os.umask(0)
    os.umask(mask)
    for name in FILES:
        mode = stat.S_IMODE((checkpoint.newest(run).path / name).stat().st_mode)
        assert mode == 0o666 & ~mask


@given(st.sets(st.integers(0, 10**10), min_size=2))
def test_checkpoints_are_in_order_of_the_images_seen(images):
    with tempfile.TemporaryDirectory() as folder:
        for count in images:
            (Path(folder) / "checkpoints" / checkpoint.kimg_name(count)).mkdir(parents=True)
        found = checkpoint.checkpoints(Path(folder))
    assert [p.name for p in found] == [checkpoint.kimg_name(count) for count in sorted(images)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99, "one byte short", "gone"])
def test_a_truncated_file_is_named_and_passed_over(run, name, keep, capsys):
    path = run / "checkpoints" / "000002.500kimg" / name
    content = path.read_bytes()
    if keep == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:-2] if keep == "one byte short" else content[: int(len(content) * keep)]
        )
    with pytest.raises(RunError, match=f"000002.500kimg.*{name}"):
        checkpoint.open_checkpoint(path.parent)
    assert checkpoint.newest(run).path.name == "000001.000kimg"
    assert "000002.500kimg" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999])
def test_one_flipped_bit_is_seen(run, name, where):
    path = run / "checkpoints" / "000002.500kimg" / name
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{name} does not have the recorded SHA-256"):
        checkpoint.open_checkpoint(path.parent)


def test_another_format_version_says_so(run):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(RunError, match="has format 99, this fastgan reads 2"):
        checkpoint.open_checkpoint(path.parent)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("at", range(6))
def test_a_failure_at_any_point_of_a_save_leaves_the_ones_before(run, monkeypatch, call, at):
    counts = {"left": at}

    def failing(real):
        def wrapped(*args, **kwargs):
            counts["left"] -= 1
            if counts["left"] == -1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return wrapped

    if call == "write":
        monkeypatch.setattr(checkpoint, "write_flushed", failing(checkpoint.write_flushed))
    else:
        monkeypatch.setattr(os, call, failing(getattr(os, call)))
    failed = False
    try:
        checkpoint.save(run / "checkpoints", 9000, PARTS, META)
    except OSError:
        failed = True
    monkeypatch.undo()
    # three parts and the record are written, each flushed; not every file system flushes folders
    assert failed == (at < {"write": 4, "fsync": 4, "rename": 1}[call])
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {"000001.000kimg", "000002.500kimg"} <= names
    assert not [n for n in names if n.startswith(".")]  # nothing half-written stays
    for path in checkpoint.checkpoints(run):
        checkpoint.open_checkpoint(path)  # what is there is whole


def test_a_killed_saves_leftover_is_no_checkpoint_and_is_swept(run):
    leftover = run / "checkpoints" / ".000009.000kimg.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(run).path.name == "000002.500kimg"
    checkpoint.save(run / "checkpoints", 9000, PARTS, META)
    assert not leftover.exists() and checkpoint.newest(run).path.name == "000009.000kimg"


def test_saving_a_step_twice_keeps_the_first(run):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    before = path.read_bytes()
    checkpoint.save(run / "checkpoints", 2500, PARTS, {**META, "step": -1})
    assert path.read_bytes() == before


def test_prune_keeps_the_newest(run):
    checkpoint.save(run / "checkpoints", 9000, PARTS, META)
    checkpoint.prune(run, 2)
    assert [p.name for p in checkpoint.checkpoints(run)] == ["000002.500kimg", "000009.000kimg"]


def test_find_takes_a_run_or_a_checkpoint(run, tmp_path_factory):
    assert checkpoint.find(run).path.name == "000002.500kimg"
    assert checkpoint.find(run / "checkpoints" / "000001.000kimg").meta["images"] == 1000
    empty = tmp_path_factory.mktemp("empty")
    (empty / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        checkpoint.find(empty)


@pytest.mark.parametrize(
    ("key", "value"), [("step", None), ("step", "x"), ("data", 3), ("feed", None), ("config", [])]
)
def test_a_record_without_what_belongs_there_is_damaged(run, key, value, capsys):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    meta = json.loads(path.read_text()) | {key: value}
    if value is None:
        del meta[key]
    path.write_text(json.dumps(meta))
    with pytest.raises(RunError, match=f"is damaged: meta.json has no right {key}"):
        checkpoint.open_checkpoint(path.parent)
    assert checkpoint.newest(run).path.name == "000001.000kimg"


def test_other_folders_among_the_checkpoints_are_let_be(run):
    for name in ("1akimg", "000002.500kimg copy.kimg", "nankimg"):
        (run / "checkpoints" / name).mkdir()
    assert [p.name for p in checkpoint.checkpoints(run)] == ["000001.000kimg", "000002.500kimg"]


def test_a_checkpoint_that_is_gone_names_those_that_are_there(run):
    with pytest.raises(UsageError, match="there are 000001.000kimg, 000002.500kimg"):
        checkpoint.find(run / "checkpoints" / "000009.000kimg")

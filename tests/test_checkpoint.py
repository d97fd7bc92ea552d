"""Checkpoints: complete or absent, and no damage goes unseen."""

import errno
import json
import os
import shutil
import stat
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgan import checkpoint, durable, formats
from fastgan.errors import RunError, UsageError

PARTS = {
    "model": {
        "g.a": torch.randn(3, 4, 4, 4).to(memory_format=torch.channels_last),
        "d.b": torch.arange(5, dtype=torch.int64),
        "d.c": torch.randn(3, 1, 4).to(torch.bfloat16),
        "d.d": torch.empty(0, 2),
        "d.e": torch.tensor([True, False]),
        "d.name": torch.tensor(7, dtype=torch.int32),
    },
    "optim": {"g.a.step": torch.tensor(3.0), "g.a.exp_avg": torch.randn(7, dtype=torch.float64)},
    "state": {"random.latents": torch.Generator().get_state()},
}
META = {"step": 7, "world": 1, "device": "cpu", "feed": {}, "data": {}, "config": {}}
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


def test_any_flipped_bit_of_the_record_is_seen(run, capsys):
    """Also one that makes another right number, or another format version, of it."""
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    content, right = path.read_bytes(), json.loads(path.read_text())
    passed = []
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        if checkpoint.looks_whole(path.parent):
            passed.append(json.loads(damaged))
    assert all(meta == right for meta in passed)  # 1e-05 as 1E-05
    assert len(passed) < 10
    path.write_bytes(content.replace(b'"format_version": 3', b'"format_version": 2'))
    with pytest.raises(RunError, match="damaged: meta.json does not have its recorded SHA-256"):
        checkpoint.open_checkpoint(path.parent)
    assert checkpoint.newest(run).path.name == "000001.000kimg"


@pytest.mark.parametrize(("one", "other"), [FILES[:2], FILES[1:3], FILES[2:]])
def test_two_files_swapped_are_seen(run, one, other):
    folder = run / "checkpoints" / "000002.500kimg"
    (folder / one).rename(folder / "third")
    (folder / other).rename(folder / one)
    (folder / "third").rename(folder / other)
    with pytest.raises(RunError, match=f"000002.500kimg.*({one}|{other})"):
        checkpoint.open_checkpoint(folder)
    assert checkpoint.newest(run).path.name == "000001.000kimg"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_seen(tmp_path, name):
    for images in (1000, 2000):  # of the same size, each
        parts = {part: {"x": torch.randn(100)} for part in PARTS}
        checkpoint.save(tmp_path / "checkpoints", images, parts, {**META, "step": images})
    old, new = (tmp_path / "checkpoints" / f"00000{i}.000kimg" for i in (1, 2))
    (old / name).replace(new / name)
    with pytest.raises(RunError, match="000002.000kimg is (damaged|another one)"):
        checkpoint.open_checkpoint(new)


def test_a_checkpoint_under_anothers_name_is_seen(run):
    path = run / "checkpoints" / "000002.500kimg"
    with pytest.raises(RunError, match="is another one: meta.json is of 2,500 images"):
        checkpoint.open_checkpoint(path.rename(path.with_name("000004.000kimg")))
    taken_out = (run / "checkpoints" / "000004.000kimg").rename(run / "mine")
    assert checkpoint.find(taken_out).meta["images"] == 2500


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"meta"', "null", "{}", "[" * 100_000])
def test_a_record_that_is_none_is_named_and_passed_over(run, text, capsys):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    path.write_text(text)
    with pytest.raises(RunError, match="000002.500kimg.*meta.json cannot be read"):
        checkpoint.open_checkpoint(path.parent)
    assert checkpoint.newest(run).path.name == "000001.000kimg"
    assert not checkpoint.looks_whole(path.parent)


def rewrite(path, change):
    """Change a meta.json, digest and all."""
    meta = json.loads(path.read_text()) | change
    meta = {k: v for k, v in meta.items() if v is not None}
    path.write_text(json.dumps(checkpoint.sealed(meta)))


def test_a_newer_format_version_says_so(run):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    rewrite(path, {"format_version": 99})
    with pytest.raises(RunError, match="has format 99, this fastgan reads 1 to 3"):
        checkpoint.open_checkpoint(path.parent)


def test_an_older_format_needs_no_digest_of_its_record_and_is_brought_up(run):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    old = json.loads(path.read_text()) | {"format_version": 2}
    for key in ("sha256", "world"):
        del old[key]
    path.write_text(json.dumps(old))
    found = checkpoint.open_checkpoint(path.parent)
    assert found.meta["world"] == 1 and found.meta["format_version"] == formats.VERSION
    assert "stats.recent" in found.tensors("state")
    assert found.tensors("model").keys() == PARTS["model"].keys()
    assert checkpoint.looks_whole(path.parent)


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


def place(run, images):
    return run / "checkpoints" / checkpoint.kimg_name(images)


def names(run):
    return [int(1000 * float(p.name.removesuffix("kimg"))) for p in checkpoint.checkpoints(run)]


@pytest.fixture
def five(tmp_path):
    for images in (1000, 2000, 3000, 4000, 5000):
        checkpoint.save(tmp_path / "checkpoints", images, PARTS, META)
    return tmp_path


def test_prune_keeps_the_newest(five):
    assert checkpoint.prune(five, 2) == []
    assert names(five) == [4000, 5000]
    assert len(list((five / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("name", FILES)
def test_prune_deletes_no_whole_checkpoint_in_favour_of_a_damaged_one(five, name):
    path = place(five, 5000) / name
    path.write_bytes(path.read_bytes()[:-2])
    checkpoint.prune(five, 2)
    assert names(five) == [3000, 4000, 5000]
    (place(five, 3000) / name).unlink()
    (place(five, 4000) / name).unlink()
    checkpoint.prune(five, 2)  # fewer are whole than should stay: all do
    assert names(five) == [3000, 4000, 5000]


def test_the_best_is_never_pruned(five):
    assert checkpoint.best(five) is None
    checkpoint.mark_best(five, place(five, 2000), "swd", 8.25)
    text = json.loads((five / "best.json").read_text())
    assert text == {"checkpoint": "000002.000kimg", "metric": "swd", "value": 8.25}
    checkpoint.prune(five, 2)
    assert names(five) == [2000, 4000, 5000]
    assert checkpoint.best(five) == place(five, 2000)
    checkpoint.mark_best(five, place(five, 5000), "swd", 8.0)
    checkpoint.prune(five, 2)
    assert names(five) == [4000, 5000]


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoint": 3}', '{"checkpoint": "../../x"}'])
def test_a_wrong_best_is_none(five, text):
    (five / "best.json").write_text(text)
    assert checkpoint.best(five) is None
    checkpoint.prune(five, 4)
    assert names(five) == [2000, 3000, 4000, 5000]


def test_the_best_is_none_when_its_checkpoint_is_gone_or_damaged(five):
    checkpoint.mark_best(five, place(five, 2000), "swd", 8.25)
    (place(five, 2000) / "meta.json").unlink()
    assert checkpoint.best(five) is None
    shutil.rmtree(place(five, 2000))
    assert checkpoint.best(five) is None


def test_while_the_best_cannot_be_read_nothing_is_pruned(five, monkeypatch):
    checkpoint.mark_best(five, place(five, 1000), "swd", 8.25)
    read_text = Path.read_text

    def failing(path, *args):
        if path.name == "best.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(path, *args)

    monkeypatch.setattr(Path, "read_text", failing)
    failed = checkpoint.prune(five, 2)
    assert [path.name for path, _ in failed] == [
        checkpoint.kimg_name(i) for i in (3000, 2000, 1000)
    ]
    assert names(five) == [1000, 2000, 3000, 4000, 5000] and checkpoint.best(five) is None


def test_a_best_that_is_set_aside_is_the_best_no_longer(five):
    """Another checkpoint comes by its name."""
    checkpoint.mark_best(five, place(five, 2000), "swd", 8.25)
    checkpoint.set_aside_newer(five, 3000, place(five, 3000))
    assert checkpoint.best(five) == place(five, 2000) and names(five) == [1000, 2000, 3000]
    checkpoint.set_aside_newer(five, 1000, place(five, 1000))
    assert checkpoint.best(five) is None and not (five / "best.json").exists()


def test_what_cannot_be_deleted_is_told_and_the_others_are_deleted(five, monkeypatch):
    rename = os.rename

    def refused(path, *args):
        if "000002" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, *args)

    monkeypatch.setattr(os, "rename", refused)
    ((path, error),) = checkpoint.prune(five, 2)
    assert path == place(five, 2000) and isinstance(error, PermissionError)
    assert names(five) == [2000, 4000, 5000]


def test_a_disk_too_small_is_told_before_anything_is_written(run, monkeypatch):
    usage = shutil.disk_usage(run)
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=durable.SPARE_BYTES + 1000)
    )
    with pytest.raises(OSError, match="MB are needed, and 1.0 MB are free") as caught:
        checkpoint.save(run / "checkpoints", 9000, PARTS, META)
    assert caught.value.errno == errno.ENOSPC and sorted(run.rglob("*")) == before
    sizes = [(place(run, 2500) / name).stat().st_size for name in FILES[:3]]
    free = durable.SPARE_BYTES + sum(sizes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free - 1))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run / "checkpoints", 9000, PARTS, META)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    checkpoint.save(run / "checkpoints", 9000, PARTS, META)


def test_find_takes_a_run_or_a_checkpoint(run, tmp_path_factory):
    assert checkpoint.find(run).path.name == "000002.500kimg"
    assert checkpoint.find(run / "checkpoints" / "000001.000kimg").meta["images"] == 1000
    empty = tmp_path_factory.mktemp("empty")
    (empty / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        checkpoint.find(empty)


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", None), ("step", "x"), ("world", "2"), ("data", 3), ("feed", None), ("config", [])],
)
def test_a_record_without_what_belongs_there_is_damaged(run, key, value, capsys):
    path = run / "checkpoints" / "000002.500kimg" / "meta.json"
    rewrite(path, {key: value})
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


def test_tensors_in_one_memory_are_kept_under_each_name(tmp_path):
    step, rows = torch.tensor(3.0), torch.randn(6, 5)
    model = {"a.step": step, "b.step": step, "rows": rows[2:4], "columns": rows[:, 1], "all": rows}
    checkpoint.save(tmp_path, 1000, PARTS | {"model": model}, META)
    read = checkpoint.open_checkpoint(tmp_path / "000001.000kimg").tensors("model")
    assert all(torch.equal(read[name], t) for name, t in model.items())


def test_a_part_is_not_copied_to_be_written(tmp_path):
    model = {"g.large": torch.randn(1 << 22), "g.more": torch.randn(1 << 22)}
    tracemalloc.start()
    checkpoint.save(tmp_path, 1000, PARTS | {"model": model}, META)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # and each of the two has 16.8 million bytes


def test_a_type_that_the_format_does_not_have_is_named(tmp_path):
    model = {"g.wave": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="torch.complex64 has no place in"):
        checkpoint.save(tmp_path, 1000, PARTS | {"model": model}, META)
    assert list(tmp_path.iterdir()) == []

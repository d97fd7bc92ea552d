"""What may change when a run goes on, option by option; and which of several processes says so."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastgan import checkpoint
from fastgan.cli import main, parse
from fastgan.config import TrainConfig, flag_of, to_plain
from fastgan.errors import RunError, UsageError
from fastgan.resume import (
    CHANGES,
    Change,
    _newest_record,
    allowed_changes,
    check_changes,
    load_config,
    run_to_resume,
)

NEVER, NAMED, TOLD, CODE, FREE = Change


def going_on(config, resume, allow_change=()):
    """What `run_to_resume` finds, and its changes printed as the run's start prints them."""
    path = run_to_resume(config, resume, allow_change)
    if path is not None:
        start, meta = _newest_record(path)
        for line in check_changes(config, start, meta, allowed_changes(allow_change)):
            print(line)
    return path


# For each option what a change of it is, an old and a new value, and these as they are shown.
ROWS = [
    ("data", NAMED, "/sets/a", "/sets/b", "/sets/a", "/sets/b"),
    ("size", NEVER, 32, 64, "32", "64"),
    ("crop", NAMED, "center", "178x178", "center", "178x178"),
    ("filter", NAMED, "triangular", "lanczos", "triangular", "lanczos"),
    ("min_size", NAMED, 1, 64, "1", "64"),
    ("max_pixels", NAMED, 1000, 2000, "1000", "2000"),
    ("limit", NAMED, None, 500, "not set", "500"),
    ("keep", NAMED, 1.0, 0.5, "1", "0.5"),
    ("holdout", NAMED, 0.0, 0.1, "0", "0.1"),
    ("on_bad", FREE, "skip", "stop", "", ""),
    ("decoder", FREE, "auto", "pillow", "", ""),
    ("flip", TOLD, False, True, "False", "True"),
    ("loader", FREE, "auto", "stream", "", ""),
    ("batch", NAMED, 8, 16, "8", "16"),
    ("kimg", FREE, 1.0, 2.0, "", ""),
    ("epochs", FREE, 1.0, 2.0, "", ""),
    ("amp", TOLD, False, True, "False", "True"),
    ("amp_dtype", TOLD, "auto", "fp16", "auto", "fp16"),
    ("compile", CODE, False, True, "False", "True"),
    ("graph", CODE, True, False, "True", "False"),
    ("sync_bn", TOLD, False, True, "False", "True"),
    ("kernels", CODE, "auto", "torch", "auto", "torch"),
    ("device", CODE, "auto", "cpu", "auto", "cpu"),
    ("seed", NAMED, 999, 5, "999", "5"),
    ("arch", NEVER, "dcgan", "two-rate", "dcgan", "two-rate"),
    ("latent", NEVER, 8, 16, "8", "16"),
    ("latent_dist", NEVER, "normal", "uniform", "normal", "uniform"),
    ("spectral_norm", NEVER, False, True, "False", "True"),
    ("init_g", NEVER, None, "netG.pth", "not set", "netG.pth"),
    ("init_d", NEVER, None, "netD.pth", "not set", "netD.pth"),
    ("loss", TOLD, "non-saturating", "hinge", "non-saturating", "hinge"),
    ("label_smoothing", TOLD, 0.0, 0.1, "0", "0.1"),
    ("instance_noise", TOLD, 0.0, 0.1, "0", "0.1"),
    ("noise_kimg", TOLD, None, 50.0, "not set", "50"),
    ("diffaug", TOLD, (), ("color", "cutout"), "none", "color cutout"),
    ("r1", TOLD, 0.0, 10.0, "0", "10"),
    ("r1_every", TOLD, 16, 4, "16", "4"),
    ("width", NEVER, 4, 8, "4", "8"),
    ("pixel_range", NEVER, (-1.0, 1.0), (0.0, 1.0), "-1 1", "0 1"),
    ("lr_g", TOLD, 2e-4, 1e-4, "0.0002", "0.0001"),
    ("lr_d", TOLD, 2e-4, 1e-5, "0.0002", "1e-05"),
    ("beta1", TOLD, 0.5, 0.0, "0.5", "0"),
    ("beta2", TOLD, 0.999, 0.99, "0.999", "0.99"),
    ("ema_kimg", TOLD, 10.0, 20.0, "10", "20"),
    ("out", FREE, "runs", "elsewhere", "", ""),
    ("cache", FREE, None, "/cache", "", ""),
    ("tick_kimg", FREE, None, 1.0, "", ""),
    ("sample_kimg", FREE, None, 1.0, "", ""),
    ("save_kimg", FREE, 1.0, None, "", ""),
    ("tick_epochs", FREE, None, 1.0, "", ""),
    ("eval_kimg", FREE, None, 1.0, "", ""),
    ("eval_count", FREE, 64, 128, "", ""),
    ("eval_metrics", FREE, ("swd",), ("swd", "c2st"), "", ""),
    ("keep_checkpoints", FREE, 3, 9, "", ""),
    ("grid", FREE, 64, 16, "", ""),
    ("logger", FREE, "none", "tensorboard", "", ""),
]
SMALL = {"size": 32, "width": 4, "latent": 8, "batch": 8, "data": "faces:20"}
FLAGS = [f"--{key}={value}" for key, value in SMALL.items()]
FLAGS += ["--grid=4", "--sample-kimg=9", "--device=cpu"]


def each_row():
    return pytest.mark.parametrize(
        ("key", "change", "old", "new", "was", "now"), ROWS, ids=[row[0] for row in ROWS]
    )


def plant(out, now, then=None, images=40, fastgan="0.1.0"):
    """A run that holds no more than its configurations: config.json's, and a checkpoint's."""
    run = out / "00000-planted"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write(run / "config.json", to_plain(now))
    write(run / "env.json", {"fastgan": fastgan})
    parts = {part: {"x": torch.zeros(1)} for part in checkpoint.PARTS}
    meta = {"fastgan": fastgan, "config": to_plain(then or now)}
    checkpoint.save(run / "checkpoints", images, parts, meta)
    return run


def write(path, values):
    path.write_text(json.dumps(values))


def read(path):
    return json.loads(path.read_text())


def with_(key, value, **others):
    if key == "noise_kimg":
        others["instance_noise"] = 0.1
    if value == "two-rate":
        others |= {"size": 64, "latent": 125, "width": 64, "pixel_range": (0.0, 1.0)}
    return TrainConfig(**{"kimg": None, "epochs": None, **SMALL, **others, key: value})


def refused(config, resume, *allowed):
    with pytest.raises(UsageError) as caught:
        going_on(config, str(resume), allowed)
    return str(caught.value)


# The table.


def test_every_option_is_in_one_class_and_has_a_row():
    keys = sorted(key for keys in CHANGES.values() for key in keys)
    assert keys == sorted(TrainConfig.model_fields)  # none is missing, none comes twice
    assert {row[0]: row[1] for row in ROWS} == {k: c for c, keys in CHANGES.items() for k in keys}
    assert len(ROWS) == len(keys)


@each_row()
def test_a_change_is_refused_told_or_nothing(tmp_path, capsys, key, change, old, new, was, now):
    run = plant(tmp_path, with_(key, old))
    config = with_(key, new)
    by_contents = key == "data"  # the images are compared, not their path
    if change is NEVER:
        said = refused(config, run)
        assert f"{flag_of(key)} cannot change within a run: {run} has {was}, got {now}; a" in said
        assert "networks stay what they are" in said
    elif change is NAMED and not by_contents:
        said = refused(config, run, "lr_g")  # another name is none
        assert f"{flag_of(key)} is part of what a run is: {run} has {was}, got {now}" in said
        assert f"--allow-change {key} goes on with {now}" in said
        assert going_on(config, str(run), [key]) == run
        assert capsys.readouterr().out == f"changed    {key}: {was} -> {now}\n"
    else:
        assert going_on(config, str(run)) == run
        told = f"changed    {key}: {was} -> {now}\n" if change is not FREE else ""
        assert capsys.readouterr().out == told


@each_row()
def test_resume_auto_looks_at_what_a_run_is(tmp_path, capsys, key, change, old, new, was, now):
    out = {"out": tmp_path} if key != "out" else {}
    run = plant(tmp_path, with_(key, old, **out))
    config = with_(key, new, **out).model_copy(update={"out": tmp_path})
    found = going_on(config, "auto")
    said = capsys.readouterr().out
    if change in (CODE, FREE):
        assert found == run
        assert ("changed" in said) == (change is CODE)
        return
    assert found is None and f"is nearest, but for {flag_of(key)}" in said
    assert ("--allow-change" in said) == (change is not NEVER)
    if change is not NEVER:
        assert going_on(config, "auto", [flag_of(key)]) == run
        assert capsys.readouterr().out == f"changed    {key}: {was} -> {now}\n"


def test_all_refusals_are_told_at_once_and_lines_in_the_order_of_the_options(tmp_path, capsys):
    run = plant(tmp_path, TrainConfig(**SMALL))
    other = TrainConfig(**SMALL | {"batch": 16, "width": 8}, seed=5, lr_g=1e-4)
    said = refused(other, run, "seed").splitlines()
    assert [line.split()[0] for line in said] == ["--width", "--batch"]
    assert capsys.readouterr().out == ""  # nothing is told of a run that does not go on
    other = TrainConfig(**SMALL | {"batch": 16}, seed=5, lr_g=1e-4, amp=True, kimg=9)
    going_on(other, str(run), ["--seed", "batch"])
    assert capsys.readouterr().out.splitlines() == [
        "changed    batch: 8 -> 16",
        "changed    amp: False -> True",
        "changed    seed: 999 -> 5",
        "changed    lr_g: 0.0002 -> 0.0001",
    ]


def test_names_are_taken_as_a_key_and_as_a_flag():
    assert allowed_changes(["lr_g", "lr-d", "--amp-dtype", "--seed"]) == {
        "lr_g",
        "lr_d",
        "amp_dtype",
        "seed",
    }
    assert allowed_changes([]) == frozenset()
    with pytest.raises(UsageError, match="option of a run, got '--lr-q'; did you mean lr_"):
        allowed_changes(["--lr-q"])
    with pytest.raises(UsageError, match="got 'zzz'; see fastgan train --help"):
        allowed_changes(["seed", "zzz"])
    for key in CHANGES[NEVER]:
        with pytest.raises(UsageError, match=f"{flag_of(key)} cannot change, since a run's netw"):
            allowed_changes([key])


# config.json and the checkpoint.


def test_a_change_that_was_killed_before_its_first_checkpoint_is_still_wanted(tmp_path, capsys):
    """config.json is what the last command asked for; the checkpoint is from before."""
    run = plant(tmp_path, TrainConfig(**SMALL, lr_g=1e-4), TrainConfig(**SMALL))
    config = load_config(run)
    assert config.lr_g == 1e-4
    going_on(config, str(run))
    assert capsys.readouterr().out == "changed    lr_g: 0.0002 -> 0.0001\n"
    going_on(TrainConfig(**SMALL), str(run))  # a flag that takes it back
    said = capsys.readouterr().out
    assert said == "changed    lr_g: 0.0001 -> 0.0002, as 000000.040kimg was written\n"


def test_what_a_run_is_made_of_changes_by_name_again_after_such_a_kill(tmp_path, capsys):
    run = plant(tmp_path, TrainConfig(**SMALL | {"batch": 16}), TrainConfig(**SMALL))
    place = run / "checkpoints" / "000000.040kimg"
    said = refused(load_config(run), run)
    assert f"--batch is part of what a run is: {place} has 8, got 16" in said
    assert going_on(load_config(run), str(run), ["batch"]) == run
    assert capsys.readouterr().out == "changed    batch: 8 -> 16\n"
    assert going_on(TrainConfig(**SMALL), str(run)) == run


def test_a_named_checkpoint_goes_on_as_it_was_and_as_long_as_the_run(tmp_path, capsys):
    old = TrainConfig(**SMALL, lr_g=2e-4, kimg=1, kernels="triton", keep_checkpoints=3)
    new = TrainConfig(**SMALL | {"batch": 16}, lr_g=1e-4, epochs=7, keep_checkpoints=5)
    plant(tmp_path, new, old, images=40)
    run = plant(tmp_path, new, new, images=80)
    early, late = (run / "checkpoints" / f"000000.0{n}0kimg" for n in (4, 8))
    config = load_config(early)
    assert (config.lr_g, config.batch) == (2e-4, 8)
    # how long, how often, and by which code: the latest
    assert (config.kimg, config.epochs, config.kernels) == (None, 7, "auto")
    assert config.keep_checkpoints == 5
    assert going_on(config, str(early)) == early
    assert capsys.readouterr().out.splitlines() == [
        "changed    batch: 16 -> 8, as 000000.040kimg was written",
        "changed    kernels: triton -> auto",
        "changed    lr_g: 0.0001 -> 0.0002, as 000000.040kimg was written",
    ]
    assert "000000.040kimg has 8, got 16" in refused(load_config(late), early)
    assert load_config(late) == load_config(run) == new
    aside = run / "checkpoints" / "set-aside"
    aside.mkdir()
    assert load_config(early.rename(aside / early.name)).lr_g == 2e-4


def test_of_a_damaged_checkpoint_the_one_before_is_compared(tmp_path, capsys):
    """As it is the one that is gone on from; with none that is whole, config.json is."""
    run = plant(tmp_path, TrainConfig(**SMALL, lr_g=1e-4), TrainConfig(**SMALL), images=40)
    plant(tmp_path, TrainConfig(**SMALL, lr_g=1e-4), images=80)
    config = TrainConfig(**SMALL, lr_g=1e-4)
    going_on(config, str(run))
    assert capsys.readouterr().out == ""
    early, late = (run / "checkpoints" / f"000000.0{n}0kimg" for n in (4, 8))
    (late / "optim.safetensors").write_bytes(b"cut short")
    going_on(config, str(run))
    assert capsys.readouterr().out == "changed    lr_g: 0.0002 -> 0.0001\n"
    for text in ("{", "[]", "{}"):
        (early / "meta.json").write_text(text)
        for named in (run, early):  # what is wrong with it is told when it is opened
            assert going_on(config, str(named)) == named
        assert capsys.readouterr().out == ""


def test_the_trainer_asks_again_of_the_checkpoint_that_it_opened(tmp_path):
    """Which is another when the newest is damaged: what it was written with decides."""
    run = plant(tmp_path, TrainConfig(**SMALL))
    place, meta = run / "checkpoints" / "000000.040kimg", {"config": to_plain(with_("seed", 5))}
    with pytest.raises(UsageError, match="--seed is part of what a run is: .*kimg has 5, got 999"):
        check_changes(TrainConfig(**SMALL), place, meta)
    lines = check_changes(TrainConfig(**SMALL), place, meta, {"seed"})
    assert lines == ["changed    seed: 5 -> 999"]


# Other versions.


@pytest.mark.parametrize("where", ["config.json", "checkpoint"])
def test_a_newer_version_is_named_with_the_options_it_has(tmp_path, where, capsys):
    run = plant(tmp_path, TrainConfig(**SMALL, kimg=1), fastgan="12.3.0rc1")
    place = run / "checkpoints" / "000000.040kimg"
    if where == "config.json":
        write(run / "config.json", read(run / "config.json") | {"zoom": 2, "blur": 1})
    else:
        meta = read(place / "meta.json")
        meta["config"] |= {"zoom": 2, "blur": 1}
        write(place / "meta.json", checkpoint.sealed(meta))
    assert main(["train", f"--resume={run}"]) == 1
    said = capsys.readouterr().err
    name = run / "config.json" if where == "config.json" else f"checkpoint {place}"
    assert f"fastgan: {name}: written by fastgan 12.3.0rc1; this is " in said
    assert "has options that it does not know (blur, zoom): go on with 12.3.0rc1 or newer" in said
    assert "did you mean" not in said


def test_a_value_of_a_newer_version_too(tmp_path):
    run = plant(tmp_path, TrainConfig(**SMALL), fastgan="0.2.0")
    write(run / "config.json", read(run / "config.json") | {"filter": "mitchell"})
    with pytest.raises(RunError, match="by fastgan 0.2.0; .* for which it is not right .*mitchell"):
        load_config(run)
    write(run / "env.json", {"fastgan": "0.1.0"})  # by this one: somebody edited it
    with pytest.raises(UsageError, match="filter must be .*, got 'mitchell'"):
        load_config(run)
    write(run / "config.json", {"widht": 4})
    with pytest.raises(UsageError, match="unknown key 'widht'; did you mean width"):
        load_config(run)
    (run / "env.json").unlink()
    with pytest.raises(UsageError, match="unknown key 'widht'; did you mean width"):
        load_config(run)
    write(run / "config.json", [])
    with pytest.raises(RunError, match="config.json is damaged"):
        load_config(run)


def test_resume_auto_passes_over_a_newer_run_and_says_so(tmp_path, capsys):
    config = TrainConfig(**SMALL, out=tmp_path)
    run = plant(tmp_path, config, fastgan="12.3.0")
    older = Path(shutil.copytree(run, tmp_path / "00000-older"))
    run = run.rename(tmp_path / "00001-newer")
    write(run / "config.json", read(run / "config.json") | {"zoom": 2})
    assert going_on(config, "auto") == older
    assert "passes over a run" in (said := capsys.readouterr().err) and "12.3.0" in said


def test_an_older_run_is_compared_in_the_newest_form(tmp_path, capsys):
    """When `keep` was a number of checkpoints, and pictures had one crop."""
    run = plant(tmp_path, TrainConfig(**SMALL), fastgan="0.0.9")
    old = {key: to_plain(TrainConfig(**SMALL))[key] for key in (*SMALL, "kimg", "lr_g", "out")}
    write(run / "config.json", old | {"keep": 5})
    meta = run / "checkpoints" / "000000.040kimg" / "meta.json"
    write(meta, checkpoint.sealed(read(meta) | {"config": old | {"keep": 4}}))
    config = load_config(run)
    assert (config.keep, config.keep_checkpoints) == (1, 5)
    assert going_on(config, str(run)) == run and capsys.readouterr().out == ""
    assert going_on(config.model_copy(update={"out": tmp_path}), "auto") == run


# Whole runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five steps."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", *FLAGS, "--kimg=0.04", f"--out={out}"]) == 0
    (run,) = out.glob("0*")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / trained.name))


def tensors(run):
    found = checkpoint.newest(run)
    return {f"{part}.{k}": v for part in checkpoint.PARTS for k, v in found.tensors(part).items()}


def changes(capsys):
    """What was said to change since the last look."""
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("changed    ") for line in lines if line.startswith("changed    ")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--width=8"], "--width cannot change within a run"),
        (["--pixel-range", "0", "1"], "has -1 1, got 0 1; a run's networks stay what they are"),
        (["--batch=16"], "--batch is part of what a run is"),
        (["--holdout=0.5", "--allow-change=keep"], "--holdout is part of what a run is"),
        (["--seed=5"], "has 999, got 5; --allow-change seed goes on with 5"),
        (["--width=8", "--allow-change=width"], "--allow-change width: --width cannot change"),
        (["--allow-change=sede"], "got 'sede'; did you mean seed"),
        (["--data=faces:40"], "is not what the run was trained on: 20 images then, 40 now"),
    ],
)
def test_a_refused_run_stays_as_it_was(run, capsys, flags, said):
    before = {p: p.read_bytes() for p in run.rglob("*.json*")}
    assert main(["train", f"--resume={run}", "--kimg=0.08", *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert {p: p.read_bytes() for p in run.rglob("*.json*")} == before


@pytest.mark.parametrize(
    ("flags", "told", "kept"),
    [
        (["--lr-g=1e-4"], ["lr_g: 0.0002 -> 0.0001"], {"lr_g": 1e-4}),
        (
            ["--flip", "--amp", "--ema-kimg=0"],
            ["flip: False -> True", "amp: False -> True", "ema_kimg: 10 -> 0"],
            {"flip": True, "amp": True, "ema_kimg": 0},
        ),
        (["--seed=5", "--allow-change", "--seed"], ["seed: 999 -> 5"], {"seed": 5}),
        (["--batch=4", "--allow-change=batch"], ["batch: 8 -> 4"], {"batch": 4}),
        (
            ["--data=faces:40", "--allow-change=data"],
            ["the set: 20 -> 40 images", "data: faces:20 -> faces:40"],
            {"data": "faces:40"},
        ),
        (
            ["--holdout=0.5", "--allow-change=holdout"],
            ["the set: 20 -> 10 images", "holdout: 0 -> 0.5"],
            {"holdout": 0.5},
        ),
        (["--kernels=torch", "--no-graph"], ["graph: True -> False", "kernels: auto -> torch"], {}),
        (["--keep-checkpoints=2", "--grid=9", "--loader=stream"], [], {"grid": 9}),
    ],
)
def test_a_changed_run_goes_on_and_keeps_what_it_is_now(run, capsys, flags, told, kept):
    assert main(["train", f"--resume={run}", "--kimg=0.056", *flags]) == 0
    assert changes(capsys) == told
    config, meta = read(run / "config.json"), checkpoint.newest(run).meta
    assert meta["images"] == 56 and meta["config"] == config
    assert config.items() >= kept.items()
    assert main(["train", f"--resume={run}", "--kimg=0.064"]) == 0  # as it is now: no change
    assert changes(capsys) == []
    assert read(run / "config.json") == config | {"kimg": 0.064}


def test_resume_auto_takes_the_run_with_a_change_that_is_named(run, capsys):
    command = ["train", *FLAGS, f"--out={run.parent}", "--kimg=0.056", "--resume=auto"]
    command += ["--lr-d=1e-4", "--allow-change=lr-d"]
    assert main(command) == 0
    assert "changed    lr_d: 0.0002 -> 0.0001" in capsys.readouterr().out
    assert read(run / "run.json")["step"] == 7
    assert main(command) == 0  # the same command again
    said = capsys.readouterr().out
    assert "nothing to do" in said and "changed   " not in said
    assert len(list(run.parent.glob("0*"))) == 1


def test_going_back_before_a_change_undoes_it(run, tmp_path, capsys):
    """The named checkpoint's own configuration: the run ends as if nothing had been changed."""
    plain = Path(shutil.copytree(run, tmp_path / "plain"))
    assert main(["train", f"--resume={run}", "--kimg=0.064", "--lr-g=0.01", "--flip"]) == 0
    changed = tensors(run)
    capsys.readouterr()
    assert main(["train", f"--resume={run / 'checkpoints' / '000000.040kimg'}"]) == 0
    assert changes(capsys) == [
        "flip: True -> False, as 000000.040kimg was written",
        "lr_g: 0.01 -> 0.0002, as 000000.040kimg was written",
    ]
    assert (
        read(run / "config.json")["lr_g"] == checkpoint.newest(run).meta["config"]["lr_g"] == 2e-4
    )
    assert main(["train", f"--resume={plain}", "--kimg=0.064"]) == 0
    a, b = tensors(run), tensors(plain)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["model.g.last.weight"], changed["model.g.last.weight"])


def test_the_same_images_elsewhere_are_the_same_data(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["faces", "--count=6", "--size=40", f"--out={first}"]) == 0
    flags = [f for f in FLAGS if not f.startswith("--data")] + [f"--out={tmp_path / 'runs'}"]
    assert main(["train", *flags, f"--data={first}", "--kimg=0.04"]) == 0
    (run,) = (tmp_path / "runs").glob("0*")
    first.rename(second)
    assert main(["train", f"--resume={run}", f"--data={second}", "--kimg=0.056"]) == 0
    assert f"changed    data: {first} -> {second}" in capsys.readouterr().out


def test_flags_that_need_a_run(capsys):
    for flag in ("--allow-change=seed", "--elastic"):
        assert main(["train", flag, "--dry-run"]) == 2
        assert f"{flag.split('=')[0]} needs --resume" in capsys.readouterr().err
    command = parse(["train", "--resume=auto", "--elastic", "--allow-change", "--lr-g"])
    assert command.elastic and command.allow_change == ("--lr-g",)
    command = parse(
        ["train", "--allow_change", "--seed", "--allow-change", "lr_g", "--resume=auto"]
    )
    assert command.allow_change == ("--seed", "lr_g")


def test_the_trainer_gets_the_keys(run, monkeypatch):
    given = {}
    monkeypatch.setattr("fastgan.trainer.train", lambda config, **rest: given.update(rest) or 0)
    flags = ["--allow-change=--lr-g", "--allow-change=batch", "--elastic", "--exit-zero"]
    assert main(["train", f"--resume={run}", *flags]) == 0
    assert given == {
        "resume": str(run),
        "allow_change": ("--lr-g", "batch"),
        "elastic": True,
        "exit_zero": True,
    }


# Several processes.


@pytest.fixture
def rank(monkeypatch):
    def be(rank, local=None, world=8):
        values = {"RANK": rank, "LOCAL_RANK": rank if local is None else local, "WORLD_SIZE": world}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return be


WRONG_FOR_ALL = [
    ["train", "--batc=3"],  # refused by tyro
    ["trian"],
    ["train", "--size=100"],
    ["train", "--elastic"],
    ["train", "--resume=auto", "--allow-change=size"],
    ["train", "--resume=x", "--recipe=quickstart"],
    ["train", "--resume=not there"],
    ["train", "--recipe=not there"],
]


@pytest.mark.parametrize("args", WRONG_FOR_ALL, ids=" ".join)
def test_of_a_wrong_command_line_rank_0_alone_speaks(rank, capsys, args):
    rank(0)
    assert main(args) == 2
    first = capsys.readouterr()
    assert first.err and "rank" not in first.err
    rank(3)
    assert main(args) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"], ["train"]])
def test_what_is_printed_is_printed_once(rank, capsys, args):
    args = ["train", "--dry-run"] if args == ["train"] else args
    rank(0)
    assert main(args) == 0 and capsys.readouterr().out
    rank(3)
    assert main(args) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flag", ["--resume", "--recipe"])
def test_a_file_that_is_not_on_a_node_is_told_by_its_first_process(rank, capsys, flag):
    rank(4, local=0)
    assert main(["train", f"{flag}=not there"]) == 2
    assert capsys.readouterr().err.startswith(f"fastgan: rank 4: {flag} must be")


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (RunError, 1)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_goes_wrong_later_is_told_by_whom_it_met(
    rank, monkeypatch, capsys, error, code, everywhere
):
    def fail(config, **rest):
        raise error("the disk is gone", everywhere)

    monkeypatch.setattr("fastgan.trainer.train", fail)
    rank(3)
    assert main(["train", *FLAGS]) == code
    said = "" if everywhere else "fastgan: rank 3: the disk is gone\n"
    assert capsys.readouterr() == ("", said)
    rank(0)
    assert main(["train", *FLAGS]) == code
    assert capsys.readouterr().err == "fastgan: the disk is gone\n"


NOT_SEVERAL = [
    {"RANK": "3"},
    {"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "3"},
    {"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
]


@pytest.mark.parametrize("values", NOT_SEVERAL)
def test_a_process_that_is_not_one_of_several_speaks(monkeypatch, capsys, values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--size=100"]) == 2
    assert capsys.readouterr().err.startswith("fastgan: --size must be")

"""`fastgan evaluate`: rows beside their baselines, what is counted, kept and marked, and what is
refused.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastgan
from fastgan.checkpoint import BEST, best, checkpoints, find, mark_best
from fastgan.cli import main
from fastgan.config import DataOptions
from fastgan.data.prepare import prepare
from fastgan.latents import latents
from fastgan.metrics import c2st, inception, plan, records, rows, swd
from fastgan.metrics.baselines import Known
from fastgan.metrics.inception import Features
from fastgan.metrics.nearest import neighbours, picture
from fastgan.metrics.sources import open_source
from fastgan.metrics.table import LONGEST, tables
from fastgan.models import Discriminator, Generator, init_weights
from fastgan.reference import make_discriminator, make_generator
from fastgan.samples import generate, to_uint8

CPU = torch.device("cpu")
SHAPE = ["--size=32", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--device=cpu"]
CHEAP = ("swd", "ms_ssim")
NOTHING = ["--device=cpu", "--metrics", *CHEAP]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Fewer directions and steps, no Inception in the user's home."""
    monkeypatch.setattr(swd, "DIRECTIONS", 64)
    monkeypatch.setattr(c2st, "STEPS", 12)
    monkeypatch.setattr(c2st, "BATCH", 32)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on drawn faces, with two checkpoints."""
    out = tmp_path_factory.mktemp("runs")
    flags = [*SHAPE, "--kimg=0.08", "--save-kimg=0.04", "--tick-kimg=0.08", "--sample-kimg=9"]
    flags += [f"--out={out}", f"--cache={out / 'cache'}"]
    assert main(["train", "--data=faces:160", *flags]) == 0
    (folder,) = out.glob("0*")
    return folder


@pytest.fixture
def own_run(run, tmp_path):
    """A copy of it, to be written into."""
    return shutil.copytree(run, tmp_path / run.name)


@pytest.fixture
def folder(tmp_path):
    """80 small pictures."""
    return pictures(tmp_path / "pictures", 80, 32)


def pictures(path, count, size):
    path.mkdir()
    random = np.random.default_rng(count)
    for number in range(count):
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(path / f"{number:03d}.png")
    return path


def refused(capsys, *args, code=2):
    """What stderr says in one line."""
    capsys.readouterr()
    try:
        got = main(["evaluate", *map(str, args)])
    except SystemExit as exit_:  # tyro's own
        got = exit_.code
    said = capsys.readouterr()
    assert got == code, said
    assert "Traceback" not in said.err
    return " ".join(said.err.replace("│", " ").split())


def by_role(record):
    return {row["role"]: row for row in record["rows"]}


def test_a_run_beside_its_baselines(own_run, capsys, monkeypatch):
    assert main(["evaluate", str(own_run), "--device=cpu"]) == 0
    said = capsys.readouterr().out
    (record,) = records.read(own_run / "metrics.jsonl")
    found = by_role(record)
    assert list(found) == ["real", "model", "untrained", "noise"]
    assert record["count"] == 80 and "80 images each: half of the 160" in said
    assert "--count 10,000 is more" in said and "inception  fid" in said
    for row in found.values():
        assert row["swd"]["mean"] == pytest.approx((row["swd"]["32"] + row["swd"]["16"]) / 2)
        told = row["c2st"]
        assert told["low"] <= told["accuracy"] <= told["high"] + 1e-9 and told["count"] == 80
    assert found["real"]["swd"]["mean"] < min(
        found[role]["swd"]["mean"] for role in ("model", "untrained", "noise")
    )
    assert found["noise"]["ms_ssim"] < found["real"]["ms_ssim"]
    assert found["model"]["d_accuracy"]["held_out"] is None
    newest = checkpoints(own_run)[-1]
    assert record["checkpoint"] == newest.name and record["images_seen"] == 80
    assert record["ema"] is True and len(record["weights_sha256"]) == 64
    data = record["data"]
    assert (data["crop"], data["filter"], data["size"]) == ("center", "triangular", 32)
    assert record["environment"].keys() >= {"fastgan", "commit", "torch", "numpy", "python"}
    with Image.open(own_run / "nearest.png") as shown:
        assert shown.mode == "RGB" and min(shown.size) > 8 * 32
    assert best(own_run) == newest
    lines = said.splitlines()
    titles = next(line for line in lines if "MS-SSIM" in line)
    for row in lines[lines.index(titles) + 1 :][:4]:
        assert len(row) <= len(titles)  # nearest, the last, is of the model alone
    assert lines[-1].startswith("took ") and record["seconds"].keys() >= {"swd", "c2st", "images"}

    def never(*_):
        raise AssertionError("known already")

    # what the baselines are is kept; what is measured again is the same
    for name in ("untrained", "noise"):
        monkeypatch.setattr("fastgan.metrics.evaluate." + name, never)
    assert main(["evaluate", str(own_run), "--device=cpu"]) == 0
    again = records.read(own_run / "metrics.jsonl")[1]
    assert again["rows"] == record["rows"] and again["weights_sha256"] == record["weights_sha256"]


def test_checkpoints_compete_on_the_same_terms(own_run, capsys):
    for path in checkpoints(own_run):
        assert main(["evaluate", str(path), *NOTHING]) == 0
    values = {r["checkpoint"]: records.swd_of(r) for r in records.read(own_run / "metrics.jsonl")}
    assert len(values) == 2 and best(own_run).name == min(values, key=values.get)
    held = json.loads((own_run / BEST).read_text())
    assert held["metric"] == "swd" and held["value"] == min(values.values())
    other = next(path for path in checkpoints(own_run) if path != best(own_run))
    capsys.readouterr()
    assert main(["evaluate", str(other), *NOTHING, "--seed=1"]) == 0
    assert "stays, which was not evaluated like this" in capsys.readouterr().out
    assert json.loads((own_run / BEST).read_text()) == held
    before = (own_run / "metrics.jsonl").read_bytes()
    # other images, or a record elsewhere: the run stays as it is
    assert main(["evaluate", str(other), *NOTHING, "--data=faces:200", "--out=a/m.jsonl"]) == 0
    assert (own_run / "metrics.jsonl").read_bytes() == before
    assert records.read(own_run.parent / "a" / "m.jsonl")[0]["data"]["images"] == 200


def test_a_better_checkpoint_takes_the_place(own_run):
    older, newer = checkpoints(own_run)
    terms = {"data": {}, "count": 90, "seed": 0, "ema": True}

    def record(path, value):
        row = {"role": "model", "swd": {"mean": value}}
        return {**terms, "checkpoint": path.name, "rows": [row]}

    first, worse, better = record(older, 5.0), record(newer, 6.0), record(newer, 4.0)
    records.append(own_run / records.RECORDS, first)
    records.mark(own_run, older, first)
    records.mark(own_run, newer, worse)
    assert best(own_run) == older
    records.mark(own_run, newer, better)
    assert best(own_run) == newer
    mark_best(own_run, older, "swd", 1.0)  # it has a record: 5
    records.mark(own_run, newer, better)
    assert best(own_run) == newer
    records.mark(own_run, older, record(older, 1.0) | {"count": 63})
    assert best(own_run) == newer  # too few images to say so


def test_baselines_that_are_none_are_measured_again(tmp_path):
    known = Known(tmp_path, {"size": 32})
    known.add("real", {"swd": {"mean": 1.0}, "ms_ssim": 0.3})
    text = known.path.read_text()
    for old, new in (('{\n    "mean": 1.0\n   }', '"x"'), ("1.0", "NaN"), ("1.0", '"1"')):
        assert old in text
        known.path.write_text(text.replace(old, new))
        assert "swd" not in Known(tmp_path, {"size": 32}).of("real")
    known.path.write_text(text)
    assert Known(tmp_path, {"size": 32}).of("real") == {"swd": {"mean": 1.0}, "ms_ssim": 0.3}


def test_a_line_after_one_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2, "c')
    records.append(path, {"d": 3})
    assert records.read(path) == [{"a": 1}, {"d": 3}]
    assert records.read(tmp_path / "none") == []


@pytest.fixture(scope="module")
def generator():
    """The reference's, with statistics of its own."""
    torch.manual_seed(1)
    network = make_generator(32, 8, 4)
    for _ in range(8):
        network(torch.randn(16, 8, 1, 1))
    return network.eval()


def test_weights_of_any_layout(generator, tmp_path):
    """.pth of pytorch/examples, its tensors as they are, half precision, our own names."""
    saved = generator.state_dict()
    torch.save({f"main.{k}": v for k, v in saved.items()}, tmp_path / "netG.pth")
    save_file({f"module.{k}": v for k, v in saved.items()}, tmp_path / "plain.safetensors")
    pth = open_source(str(tmp_path / "netG.pth"), "WHAT", True, CPU)
    own = {f"ema.{k}": v.contiguous() for k, v in pth.generator.state_dict().items()}
    own |= {"d.first.weight": torch.zeros(3)}
    save_file(own, tmp_path / "model.safetensors")
    with torch.no_grad():
        z = next(latents(5, 20, 8))
        expected = to_uint8(generator(z[:, :, None, None]), (-1.0, 1.0)).numpy()
    digests = set()
    for name in ("netG.pth", "plain.safetensors", "model.safetensors"):
        source = open_source(str(tmp_path / name), "WHAT", True, CPU)
        images = source.images(20, 5, lambda done: None)
        assert np.abs(images.astype(int) - expected).max() <= 1
        digests.add(source.digest)
    assert len(digests) == 1
    halved = {k: v.half() if v.dim() == 4 else v for k, v in saved.items()}
    save_file(halved, tmp_path / "half.safetensors")
    half = open_source(str(tmp_path / "half.safetensors"), "WHAT", True, CPU)
    assert half.digest not in digests
    assert next(half.generator.parameters()).dtype == torch.float32
    images = half.images(20, 5, lambda done: None)
    assert np.abs(images.astype(int) - expected).mean() < 1


def test_weights_that_are_no_generator(generator, tmp_path, capsys):
    data = ["--data=faces:64", *NOTHING]
    path = tmp_path / "netD.pth"
    torch.save(make_discriminator(32, 4).state_dict(), path)
    assert f"weights {path} are of no generator" in refused(capsys, path, *data, code=1)
    ours = tmp_path / "d.safetensors"
    save_file(Discriminator(32, 4).state_dict(), ours)
    assert "are of no generator" in refused(capsys, ours, *data, code=1)
    saved = Generator(32, 8, 4).state_dict()
    save_file({k: v for k, v in saved.items() if k != "blocks.1.norm.bias"}, ours)
    assert "do not fit: blocks.1.norm.bias" in refused(capsys, ours, *data, code=1)
    save_file({**saved, "blocks.0.conv.weight": torch.zeros(8, 24, 4, 4)}, ours)
    assert "24 channels at first where 16 belong" in refused(capsys, ours, *data, code=1)
    save_file({**saved, "last.weight": torch.full((4, 3, 4, 4), torch.nan)}, ours)
    assert "not all of them are finite" in refused(capsys, ours, *data, code=1)
    ours.write_bytes(b"\0" * 99)
    assert f"weights {ours}: is damaged" in refused(capsys, ours, *data, code=1)


def test_runs_of_one_name_are_told_apart(own_run, run):
    """Two --out folders both begin with 00000."""
    assert main(["evaluate", str(own_run), "--count=8", *NOTHING, "--against", str(run)]) == 0
    (record,) = records.read(own_run / "metrics.jsonl")
    _, mine, theirs, *_ = (row["set"] for row in record["rows"])
    assert mine.startswith(run.name) and theirs == f"{mine} ({run.parent.name})"


def test_images_of_a_folder(folder, tmp_path, capsys):
    """Pictures of the data's size are taken to the bit, others are resized with a word; the
    smallest set gives the count.
    """
    large = pictures(tmp_path / "large", 40, 48)
    flags = ["--data=faces:200", "--size=32", *NOTHING]
    assert main(["evaluate", str(folder), *flags, "--against", str(large), "faces:80"]) == 0
    said = capsys.readouterr().out
    assert "large: images of 48x48 px, brought to 32 px as the data is" in said
    assert "pictures: images of" not in said
    assert "40 images each: all of large (--count 10,000 is more)" in said
    (record,) = records.read(tmp_path / "metrics.jsonl")
    names = ["real, the other half", "pictures", "large", "faces:80"]
    names += ["untrained generator", "noise"]
    assert [row["set"] for row in record["rows"]] == names
    assert record["weights_sha256"] is None and record["path"] == str(folder)
    assert by_role(record)["real"]["swd"]["mean"] < by_role(record)["model"]["swd"]["mean"]
    # nothing is cropped or filtered twice
    source = open_source(str(folder), "WHAT", True, CPU)
    cropped = DataOptions(size=32, crop="100x100", filter="lanczos")
    images = source.prepare(cropped, None).images
    assert np.array_equal(images[7], np.asarray(Image.open(folder / "007.png")))


def test_a_cache_keeps_its_framing(folder, tmp_path, capsys, run):
    made = ["--size=32", "--crop=24x24", "--holdout=0.2"]
    assert main(["prepare", str(folder), *made, "--out=set"]) == 0
    assert main(["evaluate", "faces:80", "--data=set", *NOTHING]) == 0
    (record,) = records.read(tmp_path / "metrics.jsonl")
    assert record["data"]["crop"] == "24x24" and record["data"]["holdout"] == 0.2
    assert record["count"] == record["data"]["images"] // 2
    said = refused(capsys, "faces:80", "--data=set", "--crop=none")
    assert "--crop none is not what the cache" in said and "was made with (24x24)" in said
    assert main(["prepare", "faces:80", "--size=64", "--out=set64"]) == 0
    said = refused(capsys, run, "--data=set64")
    assert f"--data {tmp_path / 'set64'}: images of 64 px are asked for, and {run.name}" in said
    assert "--size: images of 64 px" in refused(capsys, run, "--size=64")


def test_c2st_takes_those_held_out(tmp_path, monkeypatch, capsys):
    seen = []

    def told(real, fake, **_):
        seen.append(np.array(real))
        return c2st.TwoSample(0.5, 0.4, 0.6, 2 * len(real))

    monkeypatch.setattr(rows, "c2st", told)
    flags = ["--size=32", "--holdout=0.5", "--metrics", "c2st", "--device=cpu", "--seed=3"]
    assert main(["evaluate", "faces:80", "--data=faces:300", *flags]) == 0
    assert "too few for C2ST, which takes 512" in capsys.readouterr().out
    cache = prepare("faces:300", DataOptions(size=32, holdout=0.5))
    half = len(cache.images) // 2
    assert all(len(real) == min(80, half) for real in seen)
    monkeypatch.setattr(plan, "HELD_OUT", 100)
    (tmp_path / "metrics.jsonl").unlink()
    seen.clear()
    for stale in (cache.path.parent / "metrics").glob("*.json"):
        stale.unlink()  # HELD_OUT is no option
    assert main(["evaluate", "faces:80", "--data=faces:300", *flags]) == 0
    assert f"C2ST by {len(cache.held_out)} held out" in capsys.readouterr().out
    (record,) = records.read(tmp_path / "metrics.jsonl")
    assert all(np.array_equal(real, cache.held_out[: record["count"]]) for real in seen)


def test_bad_input(capsys, tmp_path, folder, run, own_run, monkeypatch):
    few = pictures(tmp_path / "few", 3, 32)
    data = ["--data=faces:300", "--size=32", "--device=cpu"]
    said = refused(capsys, few, *data)
    assert "c2st needs 64 images or more of each set, and there are 3 (all of few)" in said
    assert "--metrics swd ms_ssim nearest can do with them" in said
    assert main(["evaluate", str(few), *data, "--metrics", *CHEAP]) == 0
    one = pictures(tmp_path / "one", 1, 32)
    assert "swd needs 2 images" in refused(capsys, one, *data, "--metrics", *CHEAP)
    missing, text = tmp_path / "missing", tmp_path / "text.txt"
    text.write_text("text")
    said = refused(capsys, missing, *data)
    assert "WHAT must be a run, a checkpoint, weights (.safetensors, .pth), a folder of" in said
    assert f"images, a .zip, a cache or faces:N; no such path: {missing}" in said
    assert f"it is another file: {text}" in refused(capsys, text, *data)
    assert "--against must be a run" in refused(capsys, folder, *data, "--against", missing)
    assert "--data must name the real images: pictures is no run" in refused(capsys, folder)
    assert "--data must be a folder of images" in refused(capsys, folder, "--data", missing)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "WHAT: no images" in refused(capsys, nothing, *data)
    (nothing / "a.png").write_bytes(b"no image")
    assert "1 of 1 images in" in refused(capsys, nothing, *data)
    assert "--size must be 4, 5, 6 or 7 times" in refused(capsys, folder, *data, "--size=33")
    assert "--metrics" in refused(capsys, folder, *data, "--metrics", "beauty")
    assert "needs a run: pictures" in refused(capsys, folder, *data, "--metrics", "d_accuracy")
    assert "--count must be" in refused(capsys, folder, *data, "--count=1")
    assert f"got the folder {few}" in refused(capsys, folder, *data, "--out", few)
    assert "--out must end in .jsonl" in refused(capsys, folder, *data, "--out", text)
    assert "device or pipe /dev/null" in refused(capsys, folder, *data, "--out", "/dev/null")
    assert f"{run} is a run: leave --data out" in refused(capsys, folder, "--data", run)
    assert "--against must not be empty" in refused(capsys, folder, *data, "--against", "")
    monkeypatch.chdir(run)
    assert "the current folder is a run" in refused(capsys, folder, *data)
    monkeypatch.chdir(tmp_path)
    assert "makes images of 32 px, and 64 px" in refused(
        capsys, folder, "--data=faces:300", "--against", run
    )
    for path in checkpoints(own_run):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert "this run has no checkpoint yet" in refused(capsys, own_run)


def test_inception_that_is_missing_or_wrong(capsys, tmp_path, folder):
    data = ["--data=faces:300", "--size=32", "--device=cpu"]
    assert "--metrics inception: fid" in refused(capsys, folder, *data, "--metrics", "inception")
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"wrong")
    said = refused(capsys, folder, *data, "--inception", wrong)
    assert f"--inception: {wrong}" in said and inception.SHA256 in said
    said = refused(capsys, folder, *data, "--inception", wrong, "--metrics", "swd")
    assert "--inception needs inception among --metrics" in said


def test_inception_beside_the_others(monkeypatch, folder, capsys, tmp_path):
    asked = []

    class Network:
        def __init__(self, path, device):
            assert path == tmp_path / "weights.pth"

        def features(self, images, progress=None):
            asked.append(len(images))
            flat = images.reshape(len(images), -1).astype(np.float32)
            return Features(flat[:, :8], flat[:, 8:16])

    def scored(real, fake):
        return {"fid": float(np.abs(real.pool.mean(0) - fake.pool.mean(0)).sum()), "is": 1.0}

    monkeypatch.setattr(inception, "find", lambda named: named)
    monkeypatch.setattr(inception, "Inception", Network)
    monkeypatch.setattr(rows, "scores", scored)
    flags = ["--data=faces:300", "--size=32", "--device=cpu", "--metrics", "inception"]
    flags += ["--inception", str(tmp_path / "weights.pth")]
    assert main(["evaluate", str(folder), *flags]) == 0
    assert asked == [80] * 5  # the real ones and four rows
    said = capsys.readouterr().out
    assert " FID " in said and "kid is left out: it is of subsets of 1,000 images" in said
    assert main(["evaluate", str(folder), *flags]) == 0
    first, again = records.read(tmp_path / "metrics.jsonl")
    assert asked[5:] == [80] and first["rows"] == again["rows"]  # all else is kept
    found = by_role(first)
    assert found["real"]["inception"]["fid"] < found["model"]["inception"]["fid"]


def test_what_is_kept_may_be_damaged(tmp_path):
    known = Known(tmp_path / "new", {"count": 3})
    known.add("noise", {"swd": {"mean": 1.5}})
    known.keep_features(np.ones((3, 2), np.float32), np.zeros((3, 1), np.float32))
    again = Known(tmp_path / "new", {"count": 3})
    assert again.of("noise") == {"swd": {"mean": 1.5}} and again.of("real") == {}
    assert again.features()[0].shape == (3, 2)
    assert Known(tmp_path / "new", {"count": 4}).of("noise") == {}
    for file in (tmp_path / "new").iterdir():
        for damage in (b"", b"[1]", b'{"about": 1}', b"PK\3\4 no zip", file.read_bytes()[:-9]):
            file.write_bytes(damage)
            read = Known(tmp_path / "new", {"count": 3})
            assert read.of("noise") == {} or file.suffix == ".npz"
            assert read.features() is None or file.suffix == ".json"
    (tmp_path / "file").write_text("in the way")
    Known(tmp_path / "file", {}).add("noise", {})  # a warning, and no error


def test_nearest_neighbours():
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (2500, 8, 8, 3), np.uint8)
    samples = random.integers(0, 256, (5, 8, 8, 3), np.uint8)
    samples[0] = train[1300]
    samples[1] = np.clip(train[2400].astype(int) + 2, 0, 255)
    found = neighbours(samples, train)
    apart = train[None].astype(float) - samples[:, None]
    slow = np.sqrt((apart**2).mean((2, 3, 4)))
    assert np.array_equal(found.rows, np.argsort(slow, 1)[:, :3])
    assert np.allclose(found.distances, np.sort(slow, 1)[:, :3])
    assert found.rows[0, 0] == 1300 and found.distances[0, 0] == 0 and found.rows[1, 0] == 2400
    ratios = found.distances[:, 0] / found.distances[:, 1]
    assert found.ratio == pytest.approx(np.median(ratios)) and ratios[2] > 0.9
    copies = neighbours(train[:4], np.concatenate([train, train]))  # each is there twice
    assert copies.ratio == 0
    shown = np.asarray(picture(samples, train, found))
    assert any(
        (shown[y : y + 8, x : x + 8] == train[1300]).all() for y in range(4) for x in range(8, 20)
    )


def test_neighbours_of_large_images_are_those_of_their_means():
    random = np.random.default_rng(0)
    train = np.repeat(np.repeat(random.integers(0, 256, (9, 64, 64, 3), np.uint8), 2, 1), 2, 2)
    found = neighbours(train[3:5] ^ 1, train)
    assert found.rows[:, 0].tolist() == [3, 4] and np.allclose(found.distances[:, 0], 1)


def test_d_is_asked_in_evaluation_mode(run):
    found = find(run)
    source = open_source(str(run), "WHAT", True, CPU)
    critic = rows.Critic(found, source.config, CPU)
    images = source.images(30, 0, lambda done: None)
    d = Discriminator(32, 4)
    d.load_state_dict({k[2:]: t for k, t in found.tensors("model").items() if k[:2] == "d."})
    with torch.no_grad():
        logits = d.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    share = float((logits > 0).float().mean())
    assert critic.real_share(images) == pytest.approx(share)
    assert critic.accuracy(images, images[:0], images) == {
        "real": pytest.approx(share),
        "held_out": None,
        "fake": pytest.approx(1 - share),
        "count": 30,
    }


def test_an_untrained_generator_is_not_flat():
    """And its batch norms are as they were, but for their statistics."""
    shape = (32, 8, 4)
    trained = Generator(*shape)
    new = rows.untrained(trained, 3, CPU)
    fresh = Generator(*shape)
    init_weights(fresh, torch.Generator().manual_seed(3))
    for name, value in new.state_dict().items():
        same = torch.equal(value, fresh.state_dict()[name])
        assert same != ("running" in name or "tracked" in name), name
    (images,) = generate(new, latents(0, 64, 8))
    (grey,) = generate(fresh, latents(0, 64, 8))
    assert images.float().std() > 5 and grey.float().std() < 1


def test_a_table_of_what_there_is():
    swd_ = {"mean": 1234.5, "32": 1.0}
    lines = tables([("a", {"swd": swd_, "nearest": {"ratio": 0.5}}), ("b" * 99, {"swd": swd_})])
    assert lines[0].split() == ["SWD", "32", "px", "nearest"]
    assert lines[1].split() == ["a", "1,234.50", "1.00", "0.50"]
    assert lines[2].startswith("...b") and lines[2].split()[-1] == "-"
    assert len(lines[2].split()[0]) == LONGEST and len({len(line) for line in lines}) == 1


def test_the_function(folder, tmp_path):
    record = fastgan.evaluate(folder, data="faces:90", size=32, metrics=CHEAP, device="cpu")
    assert record == records.read(tmp_path / "metrics.jsonl")[0]
    with pytest.raises(AttributeError, match="no attribute 'evaluates'"):
        _ = fastgan.evaluates


def test_importing_fastgan_imports_no_torch():
    code = "import sys, fastgan; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""`fastgan export`: folders that others load, complete or absent, which give nothing away."""

import errno
import importlib.util
import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from examples_dcgan import NetD, NetG
from fastgan import card, export, onnx_file
from fastgan.checkpoint import checkpoints, find, under
from fastgan.cli import main
from fastgan.config import NetworkOptions, config_from
from fastgan.errors import RunError, UsageError
from fastgan.generators import open_generator
from fastgan.latents import latents
from fastgan.layouts import digest_of, read_discriminator, read_generator
from fastgan.models import init_weights, make_discriminator, make_generator
from fastgan.samples import generate, grid
from fastgan.tensor_file import write_tensors

CPU = torch.device("cpu")
SHAPE = ["--size=64", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--device=cpu"]
ALL = ["safetensors", "onnx", "torch-examples"]
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None,
    reason="needs onnx and onnxscript",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on faces whose newest checkpoint was evaluated."""
    out = tmp_path_factory.mktemp("runs")
    flags = [*SHAPE, "--data=faces:160", "--kimg=0.08", "--tick-kimg=0.08", "--sample-kimg=9"]
    assert main(["train", *flags, f"--out={out}", f"--cache={out / 'cache'}"]) == 0
    folder = next(out.glob("0*"))
    metrics = ["--metrics", "ms_ssim", "--device=cpu"]
    assert main(["evaluate", str(folder), *metrics]) == 0
    return folder


def refused(capsys, *args, code=2):
    """What stderr says in one line."""
    capsys.readouterr()
    try:
        got = main(["export", *map(str, args)])
    except SystemExit as exit_:  # tyro's own
        got = exit_.code
    said = capsys.readouterr()
    assert got == code and "Traceback" not in said.err, said
    return " ".join(said.err.replace("│", " ").split())


def weights(path, **values):
    """A file of drawn weights of these options, with their record."""
    options = NetworkOptions(**values)
    network = make_generator(options, "torch")
    init_weights(network, torch.Generator().manual_seed(0))
    about = {"options": options.model_dump_json()}
    write_tensors(path, network.state_dict(), about)
    return path


@needs_onnx
def test_all_of_a_run(run, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(run), "--out", str(out), "--seed=3", "--format", *ALL]
    capsys.readouterr()
    assert main(["export", *args]) == 0
    said = capsys.readouterr().out
    assert "opset 18, within " in said or "not compared" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "discriminator.safetensors",
        "generator.onnx",
        "generator.safetensors",
        "netD.pth",
        "netG.pth",
        "samples.png",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    newest = find(checkpoints(run)[-1])
    g, d = (under(newest.tensors("model"), prefix) for prefix in ("ema.", "d."))
    for name, state, read in (
        ("generator", g, read_generator),
        ("discriminator", d, read_discriminator),
    ):
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            about = file.metadata()
            assert all(torch.equal(file.get_tensor(k), t) for k, t in state.items())
            assert set(file.keys()) == set(state)
        assert about["sha256"] == digest_of(state) and about["network"] == name
        options = NetworkOptions(size=64, width=4, latent=8)
        assert read(out / f"{name}.safetensors")[1] == options
    values = json.loads((out / "config.json").read_text())
    assert values.pop("fastgan") == newest.meta["fastgan"]
    assert NetworkOptions(**values) == options
    generator = open_generator(str(run), "RUN", True, CPU).generator
    z = next(latents(3, 64, 8))
    _as_theirs(out, generator, d, z)
    expected = grid(next(generate(generator, iter([z]))))
    assert np.array_equal(np.asarray(Image.open(out / "samples.png")), np.asarray(expected))
    for path in (p for p in out.iterdir() if p.suffix != ".png"):
        content = path.read_bytes()
        for private in (str(tmp_path), str(run.parent), str(Path(export.__file__).parent)):
            assert private.encode() not in content, path


def _as_theirs(out, generator, d, z):
    """pytorch/examples' classes load the files, and compute the same."""
    net_g, net_d = NetG(8, 4).eval(), NetD(4).eval()
    net_g.load_state_dict(torch.load(out / "netG.pth", weights_only=True), strict=True)
    net_d.load_state_dict(torch.load(out / "netD.pth", weights_only=True), strict=True)
    with torch.no_grad():
        images = net_g(z[:, :, None, None])
        # float32's rounding, 6e-8, over a few hundred terms and five layers
        assert torch.allclose(generator(z), images, rtol=0, atol=2e-5)
        ours = make_discriminator(NetworkOptions(size=64, width=4), "torch").eval()
        ours.load_state_dict(d)
        assert torch.allclose(torch.sigmoid(ours(images)), net_d(images), rtol=0, atol=2e-5)


@torch.no_grad()
def drawn(network):
    """Every tensor drawn, statistics too."""
    random = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=random)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return random


@needs_onnx
@pytest.mark.parametrize(
    "values",
    [
        {"size": 112, "width": 2, "latent": 5, "pixel_range": (0.0, 1.0)},
        {"arch": "two-rate", "size": 64, "latent": 125, "pixel_range": (0.0, 1.0)},
    ],
    ids=["dcgan-112", "two-rate"],
)
def test_onnx_computes_the_same(values, tmp_path):
    """Of any batch, in float32 beside PyTorch in float64."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    options = NetworkOptions(**values)
    network = make_generator(options, "torch")
    random = drawn(network)
    path = tmp_path / "g.onnx"
    said = onnx_file.write_onnx(path, options, network.state_dict(), {"a": "b"})
    assert "of PyTorch on random latents at batch 1 and 5 (onnxruntime" in said
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("a", "b")]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch", 3, options.size, options.size]
    for batch in (1, 3, 70):
        z = torch.randn(batch, options.latent, generator=random)
        (images,) = session.run(["images"], {"latents": z.numpy()})
        with torch.no_grad():
            exact = network.double().eval()(z.double())
        assert exact.std() > 0.01
        assert np.abs(images - exact.numpy()).max() < 1e-5 * max(1, float(exact.abs().max()))
        network.float()


@needs_onnx
def test_an_onnx_file_that_computes_something_else_is_seen(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    options = NetworkOptions(size=32, width=8, latent=4)
    made, network = onnx_file._model, make_generator(options, "torch")
    drawn(network)
    assert network.eval()(torch.randn(4, 4)).std() > 0.01

    def wrong(generator, about):
        last = generator.last.weight.clone()
        generator.last.weight.mul_(1.001)
        model = made(generator, about)
        generator.last.weight.copy_(last)
        return model

    monkeypatch.setattr(onnx_file, "_model", wrong)
    with pytest.raises(RunError, match="--format onnx: at batch 1 its images are .* from PyTorch"):
        onnx_file.write_onnx(tmp_path / "g.onnx", options, network.state_dict(), {})
    assert not list(tmp_path.iterdir())


def test_an_exported_folder_is_exported_again(run, tmp_path):
    """And weights alone, whose card says what is known of them."""
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "--no-ema"]) == 0
    again = ["--format", "torch-examples", "safetensors"]
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *again]) == 0
    for name in ("generator.safetensors", "discriminator.safetensors", "samples.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert main(["export", str(tmp_path / "b/netG.pth"), "--out", str(tmp_path / "c")]) == 0
    assert not (tmp_path / "c/discriminator.safetensors").exists()
    found = [open_generator(str(tmp_path / name), "RUN", True, CPU) for name in "abc"]
    trained = open_generator(str(run), "RUN", False, CPU)
    assert {one.digest for one in found} == {trained.digest}
    texts = [(tmp_path / name / "README.md").read_text() for name in "abc"]
    assert (
        "as trained, not averaged" in texts[0] and "| Data | faces:160 (160 images) |" in texts[0]
    )
    assert "## Evaluation" not in texts[0]  # the averaged weights were
    assert "## Training" not in texts[1] and "## Training" not in texts[2]
    assert all(trained.digest in text for text in texts)


def test_spectral_norm_goes_along(tmp_path):
    (tmp_path / "a").mkdir()
    options = NetworkOptions(size=32, width=2, latent=4, spectral_norm=True, latent_dist="uniform")
    for name, make in (("generator", make_generator), ("discriminator", make_discriminator)):
        network = make(options, "torch")
        init_weights(network, torch.Generator().manual_seed(0))
        about = {"options": options.model_dump_json()}
        write_tensors(tmp_path / "a" / f"{name}.safetensors", network.state_dict(), about)
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    for name, read in (("generator", read_generator), ("discriminator", read_discriminator)):
        assert read(tmp_path / "b" / f"{name}.safetensors")[1] == options
    assert json.loads((tmp_path / "b/config.json").read_text())["spectral_norm"] is True
    assert "2 * torch.rand(16, generator.latent) - 1" in (tmp_path / "b/README.md").read_text()


def front_matter(text):
    lines = text.splitlines()
    assert lines[0] == "---"
    return lines[1 : lines.index("---", 1)]


def test_the_card(run):
    found = open_generator(str(run), "RUN", True, CPU)
    text = card.card(found, "faces", ["generator.safetensors"], True, 0)
    head = front_matter(text)
    assert "library_name: fastgan" in head and "- dcgan" in head
    assert head[0].startswith("license: other")
    assert "0.080 kimg, 10 steps" in text and "averaged over training" in text
    assert (
        "| MS-SSIM |" in text and "| untrained generator | " in text and "80 images of each" in text
    )
    recipe = text.split("```toml\n")[1].split("```")[0]
    told = config_from(tomllib.loads(recipe), "")
    config = found.config
    assert all(
        getattr(told, key) == getattr(config, key) for key in ("data", "size", "batch", "kimg")
    )
    assert "out" not in tomllib.loads(recipe) and "cache" not in tomllib.loads(recipe)
    code = text.split("```python\n")[1].split("```")[0].replace('"."', repr(str(run)))
    space = {}
    exec(code, space)  # the three lines
    assert space["images"].shape == (16, 3, 64, 64)
    text = card.card(found, "faces", ["generator.onnx"], True, 0)
    assert 'InferenceSession("generator.onnx")' in text and "load_generator" not in text


def test_a_card_of_hostile_names(run, tmp_path):
    found = open_generator(str(run), "RUN", True, CPU)
    name = "a|b](x)<img src=x>`````\n---\n# *h*\u2028"
    config = found.config.model_copy(
        update={"data": f"/secret/place/{name}", "init_g": tmp_path / "q"}
    )
    text = card.card(replace(found, config=config), f"{name}", ["config.json"], True, 0)
    assert "secret" not in text and str(tmp_path) not in text and 'init_g = "q"' in text
    escaped = r"a\|b\](x)\<img src=x\>\`\`\`\`\` --- \# \*h\*"  # and U+2028 is a space
    assert f"# {escaped}\n" in text and f"| Data | {escaped} (160 images) |" in text
    assert text.count("<img") == text.count(r"\<img") + 1  # in the recipe's fence
    fence, rest = text.split("toml\n", 1)
    fence = fence.splitlines()[-1]
    assert set(fence) == {"`"} and len(fence) == 6 and rest.count(f"\n{fence}\n") == 1
    assert tomllib.loads(rest.split(f"\n{fence}\n")[0])["data"] == name
    assert front_matter(text) == front_matter(card.card(found, "a", [], True, 0))


def test_records_that_are_none_are_passed_over(run, tmp_path):
    own = shutil.copytree(run, tmp_path / run.name)
    found = open_generator(str(own), "RUN", True, CPU)
    (good,) = (own / "metrics.jsonl").read_text().splitlines()
    record = json.loads(good)
    bad = [{**record, "rows": 3}, {**record, "rows": [1, {"set": 2, "ms_ssim": "x"}]}]
    (own / "metrics.jsonl").write_text("\n".join(["{", good, json.dumps(bad[0]), ""]))
    assert "| untrained generator | " in card.card(found, "a", [], True, 0)
    (own / "metrics.jsonl").write_text(json.dumps(bad[1]))
    assert "untrained" not in card.card(found, "a", [], True, 0)
    (own / "env.json").write_text("[")
    assert "commit" not in card.card(found, "a", [], True, 0)


@pytest.mark.parametrize("kept", [False, True])
def test_complete_or_absent(run, tmp_path, capsys, monkeypatch, kept):
    out = tmp_path / "place" / "out"
    if kept:
        out.mkdir(parents=True)

    def full(path, content):
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stopped(path, content):
        raise KeyboardInterrupt

    for fails, code in ((full, 1), (stopped, 130)):
        with monkeypatch.context() as patch:
            patch.setattr(export, "write_flushed", fails)
            said = refused(capsys, run, "--out", out, code=code)
        assert code == 130 or f"--out {out} cannot be written: No space left" in said
        assert [*out.parent.iterdir()] == [out] * kept and (not kept or not [*out.iterdir()])
    inode = out.stat().st_ino if kept else None
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert [*out.parent.iterdir()] == [out] and len([*out.iterdir()]) == 5
    assert inode in (None, out.stat().st_ino)  # somebody may stand in it


def test_bad_input(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    kinds = "RUN must be a run, a checkpoint, an exported folder or weights (.safetensors, .pth)"
    assert f"{kinds}; no such path: {tmp_path / 'x'}" in refused(
        capsys, tmp_path / "x", "--out", out
    )
    assert "--out must be a new or an empty folder" in refused(capsys, run, "--out", run)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, run, "--out", tmp_path / "file")
    assert "'torch-examples'" in refused(capsys, run, "--out", out, "--format", "torch")
    assert "--format" in refused(capsys, run, "--out", out, "--format")
    own = shutil.copytree(run, tmp_path / run.name)
    for path in checkpoints(own):
        shutil.rmtree(path)
    assert "this run has no checkpoint yet" in refused(capsys, own, "--out", out)
    theirs = ["--format", "torch-examples", "--out", out]
    sigmoid = weights(tmp_path / "01.safetensors", size=64, width=2, pixel_range=(0, 1))
    assert "--pixel-range 0 1" in refused(capsys, sigmoid, *theirs)
    fixed = {"arch": "two-rate", "size": 64, "latent": 125, "pixel_range": (0.0, 1.0)}
    other = weights(tmp_path / "t.safetensors", **fixed)
    assert "these are --arch two-rate: give --format" in refused(capsys, other, *theirs)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        said = refused(capsys, run, "--out", out, "--format", "onnx")
    assert said.endswith("needs onnx and onnxscript: pip install 'fastgan[export]'")
    assert not out.exists()
    small = weights(tmp_path / "32.safetensors", size=32, width=2)
    assert main(["export", str(small), *map(str, theirs)]) == 0
    assert "pytorch/examples' classes are of 64 px, and this is of 32 px" in capsys.readouterr().err


def test_a_discriminator_with_spectral_norm_is_none_of_theirs(run, tmp_path):
    found = open_generator(str(run), "RUN", True, CPU)
    export._check_examples(found, None)
    critic = ({}, NetworkOptions(size=64, width=4, spectral_norm=True))
    with pytest.raises(UsageError, match="D has spectral norm, theirs has batch norm"):
        export._check_examples(found, critic)


def test_a_file_that_cannot_say_what_its_latents_are_has_it_beside_it(tmp_path):
    source = weights(tmp_path / "g.safetensors", size=64, latent=8, width=2, latent_dist="uniform")
    out = tmp_path / "out"
    assert main(["export", str(source), "--format=torch-examples", f"--out={out}"]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "config.json", "netG.pth", "samples.png")
    ]
    assert read_generator(out / "netG.pth")[1].latent_dist == "uniform"


def test_a_discriminator_of_another_shape_is_not_taken_along(tmp_path, capsys):
    folder = tmp_path / "pair"
    folder.mkdir()
    weights(folder / "generator.safetensors", size=32, latent=8, width=2)
    other = make_discriminator(NetworkOptions(size=64, width=3), "torch")
    init_weights(other, torch.Generator().manual_seed(0))
    write_tensors(folder / "discriminator.safetensors", other.state_dict())
    said = refused(capsys, folder, "--out", tmp_path / "out", code=1)
    assert "is of 64 px and width 3, and the generator beside it of 32 px and width 2" in said
    assert not (tmp_path / "out").exists()


def test_the_card_of_a_relu_says_that_pixels_pass_1(tmp_path):
    values = {"arch": "two-rate", "latent": 125, "pixel_range": (0.0, 1.0)}
    found = open_generator(str(weights(tmp_path / "g.safetensors", **values)), "RUN", True, CPU)
    assert "some are over 1, and as white" in card.card(found, "a", [], True, 0)

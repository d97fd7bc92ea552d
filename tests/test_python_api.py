"""`import fastgan`: light, complete to a type checker, and the commands as functions."""

import inspect
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
from fastgan import api
from fastgan.checkpoint import checkpoints
from fastgan.config import TrainConfig, recorded_config
from fastgan.errors import UsageError
from fastgan.resume import load_config

EXAMPLE = Path(__file__).parents[1] / "docs" / "example.py"
TINY = {"size": 32, "width": 4, "latent": 8, "batch": 8, "grid": 4, "device": "cpu"}


def test_names_come_with_their_first_use():
    code = (
        "import sys, fastgan\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert set(fastgan.__all__) <= set(dir(fastgan))\n"
        "fastgan.TrainConfig()\n"
        "assert 'torch' not in sys.modules\n"
        "for name in fastgan.__all__: assert getattr(fastgan, name) is not None\n"
        "assert fastgan.Generator.__module__ == 'fastgan.models.dcgan'\n"
        "from fastgan import *\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'fastgan' has no attribute 'trian'"):
        _ = fastgan.trian


def test_a_type_checker_sees_the_same_names():
    """Those under TYPE_CHECKING are those that `__getattr__` finds."""
    source = inspect.getsource(fastgan)
    for name, home in fastgan.HOMES.items():
        module = home().__name__.removeprefix("fastgan.")
        assert f"from .{module} import {name} as {name}\n" in source
    assert {*fastgan.HOMES, "__version__"} == set(fastgan.__all__)


def test_train_goes_on_from_what_it_returned(tmp_path):
    out = tmp_path / "runs"
    run = fastgan.train(data="faces:16", kimg=0.016, out=out, sample_kimg=9, **TINY)
    assert run == next(out.iterdir()) and checkpoints(run)[-1].name == "000000.016kimg"
    config = load_config(run)
    assert (config.width, config.kimg, config.data) == (4, 0.016, "faces:16")
    again = fastgan.train(resume=run, kimg=0.032)
    assert again == run and checkpoints(run)[-1].name == "000000.032kimg"
    assert fastgan.train(resume=run) == run  # nothing to do
    generator = fastgan.load_generator(run)
    assert isinstance(generator, fastgan.Generator) and generator.size == 32
    other = fastgan.train(config, seed=7, kimg=0.008)
    assert other.parent == out and other != run
    with pytest.raises(UsageError, match="train: out does not go with resume"):
        fastgan.train(resume=run, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"widht": 4}, "train: unknown option 'widht'; did you mean width"),
        ({"size": 100}, "train: size must be 4, 5, 6 or 7 times a power of two"),
        ({"batch": "many"}, "train: batch must be a valid integer"),
        ({"kimg": 1, "epochs": 1}, "kimg and epochs are two ways to give the length"),
        ({"recipe": "quikstart"}, "did you mean quickstart"),
        ({"data": "", "width": 4}, "train: data must not be empty"),
        ({"config": TrainConfig(), "recipe": "quickstart"}, "two configurations"),
        ({"resume": "/nowhere"}, "/nowhere"),
        ({"allow_change": ["width"], "data": "faces:16"}, "allow_change and elastic need resume"),
        ({"allow_change": "width", "resume": "auto"}, "--allow-change width: --width cannot"),
        ({"config": {"data": "faces:16"}}, "config must be a TrainConfig, got dict"),
        ({"data": None}, "train: data must be a valid string"),
    ],
)
def test_what_does_not_fit_is_named(options, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        fastgan.train(**options)
    assert rule in str(error.value)
    assert not list(tmp_path.iterdir())


def started(monkeypatch, tmp_path, code=0, **given):
    """The configuration that the trainer is called with."""
    seen = []

    def run(config, began, **_):
        seen.append(config)
        began(tmp_path)
        return code

    monkeypatch.setattr(api, "run", run)
    assert fastgan.train(**given) == tmp_path
    return seen[0]


def test_what_options_are_laid_over(monkeypatch, tmp_path):
    """As on the command line: a flag beats the recipe, the recipe the default."""
    quick = recorded_config(api.load_recipe("quickstart").model_dump(mode="json"), "", None)
    assert started(monkeypatch, tmp_path) == quick
    assert started(monkeypatch, tmp_path, recipe="quickstart", lr_g=1e-3) == quick.model_copy(
        update={"lr_g": 1e-3}
    )
    plain = started(monkeypatch, tmp_path, data=tmp_path / "faces")
    assert plain == TrainConfig(data=str(tmp_path / "faces"))
    assert started(monkeypatch, tmp_path, data="x", epochs=2).kimg is None
    base = TrainConfig(data="x", epochs=3, tick_epochs=1)
    assert started(monkeypatch, tmp_path, config=base, kimg=2, tick_kimg=1) == TrainConfig(
        data="x", kimg=2, tick_kimg=1
    )
    file = tmp_path / "r.toml"
    file.write_text("width = 8\nepochs = 1\n")
    assert started(monkeypatch, tmp_path, recipe=file, crop="none") == TrainConfig(
        width=8, epochs=1, crop="none"
    )


def test_a_signal_that_ended_it(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        started(monkeypatch, tmp_path, code=128 + signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        started(monkeypatch, tmp_path, code=128 + signal.SIGTERM)
    assert ended.value.code == 143


def test_the_example(tmp_path, monkeypatch, capsys):
    """docs/example.py, with fewer images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path / "cache"))
    source = EXAMPLE.read_text()
    for name, value in (("FACES", 160), ("KIMG", 0.016), ("WIDTH", 2), ("COUNT", 64)):
        (line,) = (line for line in source.splitlines() if line.startswith(f"{name} = "))
        source = source.replace(line, f"{name} = {value}")
    source = source.replace('device="cpu", out', 'device="cpu", batch=8, out')
    exec(compile(source, str(EXAMPLE), "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    assert "MS-SSIM" in said and said.endswith("'samples.png']\n")
    assert {"faces.png", "walk.png", "exported", "runs"} <= {p.name for p in tmp_path.iterdir()}

"""No file that a command reads can run code: pickles that would, in every place that takes a path
and in the place of every file of a run, a checkpoint and a cache; and no code that could read one.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.checkpoint import checkpoints, sealed
from fastgan.cli import main

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "32", "--width", "4", "--latent", "8", "--batch", "8", "--grid", "4"]


class Bomb:
    """Unpickled, it makes the folder `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.makedirs, (str(self.marker),)


def pickled(marker):
    return pickle.dumps(Bomb(marker))


def by_torch(marker, zipped=True):
    file = io.BytesIO()
    torch.save({"a": Bomb(marker)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def by_numpy(marker):
    file = io.BytesIO()
    np.save(file, np.array([Bomb(marker)], object), allow_pickle=True)
    return file.getvalue()


def in_a_zip(marker):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("a.png", "a.pkl", "data.pkl"):
            archive.writestr(name, pickled(marker))
    return file.getvalue()


FORMS = {  # by the name that it is given
    "bomb": pickled,
    "bomb.pkl": pickled,
    "bomb.jpg": pickled,
    "bomb.toml": pickled,
    "bomb.pt": by_torch,
    "bomb.pth": lambda marker: by_torch(marker, zipped=False),
    "bomb.safetensors": pickled,
    "bomb.npy": by_numpy,
    "bomb.zip": in_a_zip,
}


@pytest.fixture
def marker(tmp_path):
    """What must not be there at the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.fixture(params=FORMS)
def bomb(request, tmp_path, marker):
    path = tmp_path / request.param
    path.write_bytes(FORMS[request.param](marker))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished tiny run in runs/ and its cache."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--kimg", "0.016", "--device", "cpu", "--cache", str(folder / "cache")]
    assert main(["train", "--data", "faces:20", *TINY, *flags, "--out", str(folder / "runs")]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, to put bombs into."""
    monkeypatch.setenv("FASTGAN_CACHE", str(trained / "cache"))
    (path,) = (trained / "runs").iterdir()
    return Path(shutil.copytree(path, tmp_path / path.name))


@pytest.fixture
def cache(trained, tmp_path):
    """A copy of the run's cache."""
    (path,) = (trained / "cache").glob("faces-*")
    return Path(shutil.copytree(path, tmp_path / "copied-cache"))


def refused(capsys, *args):
    """What a command says, which refuses in one line that names no code of its own."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code in (1, 2), (code, out, err)
    assert "Traceback" not in out + err
    said = [line for line in err.splitlines() if line.startswith("fastgan: ")]
    assert len(said) == 1 and err.endswith(said[0] + "\n"), err
    return said[0]


def test_the_bombs_are_real(tmp_path):
    """Each goes off where it is read without care."""

    def from_zip(path):
        with zipfile.ZipFile(path) as archive:
            return pickle.loads(archive.read("data.pkl"))

    careless = {
        ".npy": lambda path: np.load(path, allow_pickle=True),
        ".zip": from_zip,
        ".pt": lambda path: torch.load(path, weights_only=False),
        ".pth": lambda path: torch.load(path, weights_only=False),
    }
    for name, form in FORMS.items():
        marker, path = tmp_path / f"marker-{name}", tmp_path / name
        path.write_bytes(form(marker))
        assert not marker.exists()
        careless.get(path.suffix, lambda path: pickle.loads(path.read_bytes()))(path)
        assert marker.is_dir(), name


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--resume"],
        ["train", "--recipe"],
        ["train", "--device", "cpu", *TINY, "--data"],
        ["train", "--device", "cpu", *TINY, "--data", "faces:8", "--cache"],
        ["train", "--device", "cpu", *TINY, "--data", "faces:8", "--out"],
        ["sample"],
        ["evaluate", "--data", "faces:8"],
        ["evaluate", "faces:8", "--data"],
        ["evaluate", "faces:8", "--data", "faces:8", "--inception"],
        ["report"],
        ["prepare"],
        ["prepare", "--check"],
        ["prepare", "faces:8", "--size", "32", "--out"],
        ["faces", "--count", "1", "--out"],
    ],
    ids=" ".join,
)
def test_a_bomb_for_a_path(command, bomb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bomb.name in refused(capsys, *command, bomb)


def test_a_bomb_for_a_picture(marker, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "b.png", "c.webp", "d.tif", "e.pgm", "f.bmp"):
        (folder / name).write_bytes(pickled(marker))
    said = refused(capsys, "prepare", folder, "--size", "32")
    assert "of 6 images" in said and "more than half" in said


def put(path, part, content):
    """A file of a checkpoint, with the record made right for it."""
    (path / f"{part}.safetensors").write_bytes(content)
    meta = json.loads((path / "meta.json").read_text())
    assert meta["files"][part].keys() >= {"bytes", "sha256"}
    digest = hashlib.sha256(content).hexdigest()
    meta["files"][part] |= {"bytes": len(content), "sha256": digest}
    (path / "meta.json").write_text(json.dumps(sealed(meta)))


@pytest.mark.parametrize("form", ["bomb", "bomb.pt", "bomb.pth", "bomb.npy"])
@pytest.mark.parametrize("part", ["model", "optim", "state", "meta.json"])
def test_a_bomb_in_a_checkpoint(form, part, run, marker, capsys):
    path = checkpoints(run)[-1]
    content = FORMS[form](marker)
    if part == "meta.json":
        (path / part).write_bytes(content)
    else:
        put(path, part, content)
    assert path.name in refused(capsys, "train", "--resume", path, "--kimg", "0.032")
    if part in ("model", "meta.json"):
        assert path.name in refused(capsys, "sample", path)


@pytest.mark.parametrize("form", ["bomb", "bomb.npy"])
def test_bombs_in_a_run(form, run, marker, capsys):
    """Files that a run writes and never reads, or reads as far as they are rows, are written anew;
    what says what the run is, is an error.
    """
    content = FORMS[form](marker)
    names = {p.name for p in run.iterdir() if p.is_file()}
    assert names >= {"config.json", "env.json", "run.json", "stats.jsonl", "losses.npy", "run.lock"}
    for name in names - {"config.json"}:
        (run / name).write_bytes(content)
    assert main(["train", "--resume", str(run), "--kimg", "0.032"]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and "done: 0.032 kimg" in out
    for name in ("run.json", "env.json"):
        json.loads((run / name).read_text())
    assert [json.loads(row)["step"] for row in (run / "stats.jsonl").open()] == [3, 4]
    np.load(run / "losses.npy", allow_pickle=False)
    (run / "config.json").write_bytes(content)
    assert "config.json" in refused(capsys, "train", "--resume", run, "--kimg", "0.064")


@pytest.mark.parametrize("form", ["bomb", "bomb.pt", "bomb.npy"])
@pytest.mark.parametrize("name", ["images.npy", "meta.json", "files.jsonl", "skipped.jsonl"])
def test_a_bomb_in_a_cache(form, name, cache, marker, tmp_path, capsys):
    (cache / name).write_bytes(FORMS[form](marker))
    assert cache.name in refused(capsys, "prepare", "--check", cache)
    if name in ("images.npy", "meta.json"):  # all that training reads
        flags = ["--data", cache, *TINY, "--device", "cpu", "--out", tmp_path / "runs"]
        assert cache.name in refused(capsys, "train", *flags)


def test_a_pickled_array_of_the_right_length_in_a_cache(cache, marker, tmp_path, capsys):
    """What tells it from the pixels is its header alone."""
    whole = (cache / "images.npy").read_bytes()
    (cache / "images.npy").write_bytes(by_numpy(marker).ljust(len(whole), b"\0"))
    flags = ["--data", cache, *TINY, "--device", "cpu", "--out", tmp_path / "runs"]
    assert "images.npy" in refused(capsys, "train", *flags)


# The source.

# pickles, code in other forms, and what fetches from elsewhere
MODULES = "pickle _pickle marshal shelve dbm joblib dill cloudpickle yaml runpy code urllib urllib3"
MODULES += " requests httpx aiohttp http ftplib smtplib xmlrpc telnetlib socketserver"
FORBIDDEN = {*MODULES.split(), "torch.hub", "torch.jit", "torch.package", "torch.distributed.rpc"}
BY_PICKLE = re.compile(r"(broadcast|scatter|gather|send|recv)_object")
WEIGHTS, EXPORT = ROOT / "fastgan" / "weights.py", ROOT / "fastgan" / "export.py"


def dotted(node):
    """`torch.hub.load` of an expression of names, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def forbidden(name):
    parts = name.split(".")
    return any(".".join(parts[:n]) in FORBIDDEN for n in range(1, len(parts) + 1))


def faults(source, weights=False, export=False):
    """What in a module could read a pickle, write one or fetch something, by line; `weights` may
    use torch.load, and `export` torch.save, of tensors for a program that reads nothing else.
    """
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("torch."):
            names = [dotted(node)]
        else:
            names = []
        yield from (f"{line}: {name}" for name in names if name and forbidden(name))
        named = getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
        if isinstance(named, str) and BY_PICKLE.search(named):
            yield f"{line}: {named}"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        safe = {
            "torch.load": weights and given.get("weights_only") is True,
            "np.load": given.get("allow_pickle") is False,
            "numpy.load": given.get("allow_pickle") is False,
        }
        if not safe.get(called, True) or given.get("allow_pickle") is True:
            yield f"{line}: {called}"
        if called == "torch.save" and export:
            continue
        if called in ("eval", "exec", "__import__", "os.system", "os.popen", "torch.save"):
            yield f"{line}: {called}"
        if called.rpartition(".")[2] == "import_module":
            name = getattr(node.args[0], "value", None) if node.args else None
            if not isinstance(name, str) or forbidden(name):
                yield f"{line}: {called} of {name}"
        if given.get("shell"):
            yield f"{line}: {called} in a shell"
    for match in re.finditer(r"from (torch|numpy) import [^\n]*\bload\b", source):
        yield match[0]


def test_each_dependency_has_its_reason():
    """In pyproject.toml, beside it or in the lines above it."""
    text = (ROOT / "pyproject.toml").read_text()
    lines = text.partition("\ndependencies = [\n")[2].partition("\n]\n")[0].splitlines()
    wanted = [at for at, line in enumerate(lines) if line.strip().startswith('"')]
    assert len(wanted) < 16
    for at in wanted:
        assert "#" in lines[at] or lines[at - 1].strip().startswith("#"), lines[at]


def test_no_module_reads_pickles_or_fetches_anything():
    paths = [*(ROOT / "fastgan").rglob("*.py"), *(ROOT / "kernels/fastgan_kernels").rglob("*.py")]
    assert len(paths) > 50 and {WEIGHTS, EXPORT} <= set(paths)
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in paths
        for fault in faults(path.read_text(), path == WEIGHTS, path == EXPORT)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import urllib.request as r",
        "from http import client",
        "from torch import hub",
        "import torch\ntorch.hub.load('a', 'b')",
        "from torch.distributed import broadcast_object_list",
        "dist.all_gather_object(a, b)",
        "torch.load(path)",
        "torch.save(network, path)",
        "torch.load(path, weights_only=True)",
        "from torch import nn, load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "eval('1')",
        "exec(text)",
        "importlib.import_module(name)",
        "import_module('pickle')",
        "__import__('pickle')",
        "subprocess.run(text, shell=True)",
        "torch.jit.load(path)",
    ],
)
def test_the_watch_sees(source):
    assert list(faults(source))


def test_the_watch_lets_pass():
    good = ["generator.eval()", "np.load(path, allow_pickle=False)", "import pickletools"]
    good += ["import_module('fcntl')", "requests.put(3)", "from .http import x"]
    for source in good:
        assert not list(faults(source)), source
    assert not list(faults("torch.load(path, weights_only=True)", weights=True))
    assert list(faults("torch.load(path, weights_only=False)", weights=True))
    assert list(faults("torch.load(path)", weights=True))

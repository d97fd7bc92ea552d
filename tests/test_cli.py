"""The command line as a user meets it: messages, exit codes, files. No traceback for what can be
mended.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import modes
from fastgan.cli import main, parse

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "32", "--width", "4", "--latent", "8", "--batch", "8", "--grid", "4"]
TINY += ["--device", "cpu"]


def fastgan(*args):
    """A process of its own, as a shell would start it."""
    return subprocess.run(
        [sys.executable, "-m", "fastgan", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(capsys, *args, code=2):
    """What stderr says when the command line is refused, on one line."""
    try:
        got = main([str(a) for a in args])
    except SystemExit as exit_:  # tyro's own
        got = exit_.code
    said = capsys.readouterr()
    assert got == code, said
    assert "Traceback" not in said.err
    text = said.err.replace("│", " ")
    return " ".join(text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGAN_CACHE", str(out / "cache"))
        assert (
            main(["train", "--data", "faces:32", *TINY, "--kimg", "0.08", "--out", str(out)]) == 0
        )
    (folder,) = out.glob("0*")
    return folder


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from fastgan.cli import main\n"
        "try:\n    main(['train', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "took = time.perf_counter() - start\n"
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
        "print('took', took)"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--kimg" in done.stdout
        times.append(float(done.stdout.split()[-1]))
    assert min(times) < 1.0, times


def test_version():
    done = fastgan("--version")
    assert done.returncode == 0 and done.stdout.startswith("fastgan 0.")


def test_wrong_flags_and_values(capsys, tmp_path):
    assert "Perhaps you meant: --batch" in refused(capsys, "train", "--batc", "3")
    assert (
        "--size must be 4, 5, 6 or 7 times a power of two, 32 to 256 (nearest: 96, 112), got "
        in (refused(capsys, "train", "--size", "100"))
    )
    assert "--batch must be greater than or equal to 2, got 0" in refused(
        capsys, "train", "--batch", "0"
    )
    assert "--batch" in refused(capsys, "train", "--batch", "many")
    assert "--pixel-range must be -1 1 or 0 1, got 0 2" in refused(
        capsys, "train", "--pixel-range", "0", "2"
    )
    assert "only one may be given" in refused(capsys, "train", "--kimg", "1", "--epochs", "1")
    assert "train, prepare, sample, interpolate, animate" in refused(capsys, "trian")
    assert "--recipe must be a TOML file or one of celeba112" in refused(
        capsys, "train", "--recipe", "nothing"
    )
    assert "--count must be greater" in refused(capsys, "faces", "--out", tmp_path, "--count", "0")


def test_kernels_that_cannot_run_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "INTERPRETED", False)
    args = ["train", "--data", "faces:32", *TINY, "--out", tmp_path]
    said = refused(capsys, *args, "--kernels", "triton")
    assert "--kernels triton: the kernels need an NVIDIA GPU; auto takes PyTorch's own here" in said
    assert "--kernels" in refused(capsys, *args, "--kernels", "cuda")
    assert not list(tmp_path.glob("*"))  # nor is anything decoded


def test_wrong_recipes(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('batches = 3\nwidth = "wide"\n')
    said = refused(capsys, "train", "--recipe", path)
    assert f"--recipe {path}: unknown key 'batches'; did you mean batch?" in said
    assert "width must be a valid integer, got 'wide'" in said


def test_wrong_data(capsys, tmp_path):
    out = ["--out", tmp_path / "runs"]
    missing, file, empty = tmp_path / "missing", tmp_path / "file.txt", tmp_path / "empty"
    file.write_text("text")
    empty.mkdir()
    assert (
        f"--data must be a folder of images, a .zip, a cache or faces:N; no such path: {missing}"
        in (refused(capsys, "train", "--data", missing, *out))
    )
    assert f"it is a file: {file}" in refused(capsys, "train", "--data", file, *out)
    assert "--data: no images" in refused(capsys, "train", "--data", empty, *out)
    assert "faces:N needs a whole number N" in refused(capsys, "train", "--data", "faces:x", *out)
    (empty / "a.png").write_bytes(b"not an image")
    assert "1 of 1 images in" in refused(capsys, "train", "--data", empty, *out)
    assert "SOURCE" in refused(capsys, "prepare", missing)
    assert not (tmp_path / "runs").exists()  # nothing was left behind


def test_wrong_output_folders(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    assert f"--out must be a folder, or a path where one can be made: {file} is a file" in refused(
        capsys, "train", "--out", file / "runs"
    )
    assert f"{file} is a file" in refused(capsys, "train", "--out", file)
    assert f"{file} is a file" in refused(capsys, "faces", "--out", file / "x")
    assert f"{file} is a file" in refused(
        capsys, "train", "--data", "faces:8", "--out", tmp_path / "runs", "--cache", file / "x"
    )
    assert "--out must be a new or an empty folder" in refused(capsys, "faces", "--out", tmp_path)


def test_wrong_resume(capsys, tmp_path, run):
    assert "--resume must be auto, a run folder or one of its checkpoints" in refused(
        capsys, "train", "--resume", tmp_path / "none"
    )
    assert "--recipe does not go with --resume RUN" in refused(
        capsys, "train", "--resume", run, "--recipe", "quickstart"
    )
    assert "--out does not go with --resume RUN" in refused(
        capsys, "train", "--resume", run, "--out", tmp_path
    )
    assert "holds no run" in refused(capsys, "train", "--resume", tmp_path)
    assert f"--size cannot change within a run: {run} has 32, got 64" in refused(
        capsys, "train", "--resume", run, "--size", "64"
    )
    assert "is not what the run was trained on: 32 images then, 40 now" in refused(
        capsys, "train", "--resume", run, "--data", "faces:40"
    )


def test_wrong_runs_to_sample(capsys, tmp_path, run):
    assert f"no such path: {tmp_path / 'none'}" in refused(capsys, "sample", tmp_path / "none")
    assert "RUN must be a run, a checkpoint, an exported folder or weights" in refused(
        capsys, "sample", tmp_path
    )
    assert "--out must end in .png" in refused(capsys, "sample", run, "--out", tmp_path / "a.bmp")
    assert "give one of them" in refused(
        capsys, "sample", run, "--out", tmp_path / "a.png", "--each", tmp_path / "b"
    )
    assert "--each must be a new or an empty folder" in refused(
        capsys, "sample", run, "--each", run
    )
    assert "at most 4,096 for a grid" in refused(capsys, "sample", run, "--count", "5000")


def test_out_of_memory_is_said_in_a_line(capsys, monkeypatch):
    def no_room(command):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand more")

    monkeypatch.setattr("fastgan.samples.sample", no_room)
    assert main(["sample", "run"]) == 1
    assert capsys.readouterr().err == (
        "fastgan: out of memory (tried to allocate 9 GiB): ask for less at once\n"
    )


def test_flag_beats_recipe_beats_default(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("batch = 32\nwidth = 16\nepochs = 2.0\ntick_epochs = 1.0\n")

    def resolved(*args):
        assert main(["train", "--recipe", str(path), "--dry-run", *args]) == 0
        return tomllib.loads(capsys.readouterr().out)

    plain = resolved()
    assert (plain["batch"], plain["width"], plain["epochs"]) == (32, 16, 2.0)
    assert plain["latent"] == 100 and "kimg" not in plain
    assert resolved("--batch", "8")["batch"] == 8
    longer = resolved("--kimg", "7")
    assert longer["kimg"] == 7.0 and "epochs" not in longer
    assert resolved("--kimg=1000")["kimg"] == 1000.0  # the default's value, said explicitly
    often = resolved("--tick-kimg", "2")
    assert often["tick_kimg"] == 2.0 and "tick_epochs" not in often
    assert resolved("--tick-epochs=3")["tick_epochs"] == 3.0


def test_dry_run_prints_what_recipe_reads_back(capsys, tmp_path):
    given = ["--size", "48", "--epochs", "3", "--amp", "--data", 'a "folder"', "--cache", "c\\d"]
    assert main(["train", *given, "--dry-run"]) == 0
    first = capsys.readouterr().out
    path = tmp_path / "again.toml"
    path.write_text(first)
    assert main(["train", "--recipe", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == first


def test_no_argument_is_the_quickstart(capsys):
    assert main(["train", "--dry-run"]) == 0
    values = tomllib.loads(capsys.readouterr().out)
    assert values["data"].startswith("faces:") and (values["size"], values["width"]) == (64, 32)
    assert main(["train", "--data", "somewhere", "--dry-run"]) == 0
    values = tomllib.loads(capsys.readouterr().out)
    assert (values["width"], values["batch"]) == (64, 128)  # the tutorial's, not the quickstart's


def test_amp_and_compile_say_what_they_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastgan.modes.cxx_compiler", lambda: None)
    monkeypatch.setattr("fastgan.modes.cpu_flags", set)
    args = ["train", "--data", "faces:16", *TINY, "--kimg", "0.016", "--out", str(tmp_path)]
    assert main([*args, "--amp", "--compile"]) == 0
    said = capsys.readouterr().out
    assert "precision  float32: --amp changes nothing on this CPU" in said
    assert "compile    off: torch.compile on a CPU needs a C++ compiler (g++)" in said


def test_prepare_then_train_from_the_cache(tmp_path, capsys):
    cache = tmp_path / "set"
    assert main(["prepare", "faces:24", "--size", "32", "--out", str(cache)]) == 0
    assert np.load(cache / "images.npy").shape == (24, 32, 32, 3)
    args = ["--data", str(cache), "--kimg", "0.016", "--out", str(tmp_path / "runs")]
    assert main(["train", *TINY, *args]) == 0
    assert "24 images of 32 px" in capsys.readouterr().out
    said = refused(capsys, "train", "--data", cache, "--size", "64", "--out", tmp_path / "runs")
    assert "holds images of 32 px, but --size is 64" in said


def test_prepare_takes_every_option_and_checks(tmp_path, capsys):
    folder, cache = tmp_path / "faces", tmp_path / "set"
    assert main(["faces", "--count", "30", "--size", "50", "--out", str(folder)]) == 0
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    (tmp_path / "plain").mkdir()
    options = ["--crop", "40x44+2+3", "--filter", "lanczos", "--min-size", "20", "--keep", "0.9"]
    options += ["--limit", "20", "--holdout", "0.2", "--max-pixels", "5000", "--size", "32"]
    options += ["--on-bad", "stop", "--decoder", "pillow", "--verify"]
    assert main(["prepare", str(tmp_path / "faces.zip"), *options, "--out", str(cache)]) == 0
    meta = json.loads((cache / "meta.json").read_text())
    assert (meta["count"], meta["options"]["crop"]) == (20, "40x44+2+3") and meta["held_out"]
    capsys.readouterr()
    assert main(["prepare", "--check", str(cache)]) == 0
    assert capsys.readouterr().out.endswith(f"held out in {cache}: whole, by its checksums\n")
    train = ["--data", str(cache), "--kimg", "0.016", "--out", str(tmp_path / "runs")]
    assert main(["train", *TINY, *train]) == 0
    assert (
        "(crop 40x44+2+3, filter lanczos, min-size 20, max-pixels 5000" in capsys.readouterr().out
    )
    said = refused(capsys, "train", *TINY, *train, "--crop", "none")
    assert "--crop none is not what the cache" in said and "(40x44+2+3)" in said
    with open(cache / "images.npy", "r+b") as file:
        file.seek(1000)
        file.write(b"!")
    said = refused(capsys, "prepare", "--check", cache, code=1)
    assert "images.npy is not what was written" in said
    assert "is not a cache" in refused(capsys, "prepare", "--check", folder)
    said = refused(capsys, "prepare", "--check", cache, "--size", "48", "--verify")
    assert "--check takes a cache alone, without --size, --verify" in said
    assert "home directory that is not known" in refused(capsys, "prepare", "--check", "~nobody9/x")


def test_prepare_needs_no_torch(tmp_path):
    """Which takes seconds to import, and half a gigabyte."""
    assert main(["faces", "--count", "4", "--size", "40", "--out", str(tmp_path / "faces")]) == 0
    code = (
        "import sys\n"
        "from fastgan.cli import main\n"
        "assert main(['prepare', sys.argv[1], '--size', '32', '--out', sys.argv[2]]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "faces"), str(tmp_path / "cache")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_data_options(capsys, tmp_path):
    for flag, value, rule in [
        ("--crop", "12", "must be center, none, WxH or WxH+X+Y in pixels, got '12'"),
        ("--keep", "0", "greater than 0"),
        ("--holdout", "1", "less than 1"),
        ("--min-size", "0", "greater than or equal to 1"),
        ("--limit", "0", "greater than or equal to 1"),
        ("--max-pixels", "0", "greater than or equal to 1"),
    ]:
        for verb in (["train", "--data"], ["prepare"]):
            said = refused(capsys, *verb, tmp_path, flag, value)
            assert rule in said and flag in said
    out = ["--out", tmp_path / "runs"]
    said = refused(capsys, "train", "--data", "faces:9", "--loader", "dali", *out)
    assert "--loader dali needs a folder of images or a .zip; --data is faces:9" in said
    assert "no such path" in refused(capsys, "train", "--data", tmp_path / "a.zip", *out)


def test_sample_writes_a_grid_and_single_files(run, tmp_path, capsys):
    grid, files = tmp_path / "grid.png", tmp_path / "files"
    sample = ["sample", str(run), "--device", "cpu", "--count"]
    assert main([*sample, "9", "--seed", "3", "--out", str(grid)]) == 0
    picture = Image.open(grid)
    assert picture.size == (3 * 34 + 2, 3 * 34 + 2)
    assert main([*sample, "5", "--seed", "3", "--each", str(files)]) == 0
    assert sorted(p.name for p in files.iterdir()) == [f"{i:06d}.png" for i in range(5)]
    # image i of a seed is the same, whatever the count and the form
    first = np.asarray(Image.open(files / "000000.png"))
    assert np.array_equal(np.asarray(picture)[2:34, 2:34], first)
    assert main([*sample, "4"]) == 0
    assert (run / "samples" / "sample-seed0.png").is_file()


def test_faces_writes_pngs_and_their_factors(tmp_path, capsys):
    from fastgan.data.faces import FACTOR_NAMES, factors, render

    out = tmp_path / "faces"
    assert main(["faces", "--count", "3", "--size", "40", "--seed", "5", "--out", str(out)]) == 0
    with open(out / "factors.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", *FACTOR_NAMES]
    assert [row[0] for row in rows] == ["000000.png", "000001.png", "000002.png"]
    table = np.array([[float(v) for v in row[1:]] for row in rows], np.float32)
    np.testing.assert_allclose(table, factors(3, 5), rtol=1e-5)
    drawn = np.asarray(Image.open(out / "000002.png"))
    assert np.array_equal(drawn, render(factors(3, 5), 40)[2])


def test_info_names_machine_fast_paths_and_recipes():
    done = fastgan("info")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "device", "--amp", "--compile", "Triton", "decoder", "quickstart"):
        assert word in done.stdout


def test_a_reader_that_goes_away_leaves_no_traceback():
    piped = f"{sys.executable} -m fastgan train --dry-run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", piped],
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        capture_output=True,
        text=True,
    )
    assert (done.stderr, done.returncode) == ("", 1)


@pytest.mark.parametrize("verb", ["info", "--help", "train --dry-run"])
@pytest.mark.parametrize(
    ("redirect", "code", "words"),
    [(">/dev/full", 1, "No space left on device"), (">&-", 0, ""), ("2>&-", 0, "")],
)
def test_a_full_or_closed_stdout_is_no_traceback(verb, redirect, code, words):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m fastgan {verb} {redirect}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert words in done.stderr


def test_a_terminal_that_knows_only_ascii(tmp_path):
    out = str(tmp_path / "r\u00fc\U0001f600")
    args = ["train", "--data", "faces:16", *TINY, "--kimg", "0.016", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "fastgan", *args],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "r\\xfc\\U0001f600" in done.stdout


def test_a_home_that_is_not_known(capsys, monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTGAN_CACHE")
    monkeypatch.setattr(Path, "expanduser", unknown)
    said = refused(capsys, "train", "--data", "~/x")
    assert "--out begins with a home directory that is not known" in said or "--data begins" in said


def test_a_cache_that_cannot_fit_is_refused_at_once(capsys, tmp_path):
    huge = f"faces:{10**13}"
    said = refused(capsys, "prepare", huge, "--out", tmp_path / "set", code=1)
    assert "it needs 122,880,000.00 GB" in said and "name another place with --out" in said
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_decoding_leaves_nothing_behind(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "fastgan", "prepare", "faces:200000", f"--out={tmp_path / 'set'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob(".set.building-*/images.npy")):
        time.sleep(0.02)
    child.terminate()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (143, "fastgan: terminated by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_stand_in_the_way(capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link is a link to nothing" in refused(capsys, "train", "--out", tmp_path / "link")
    long = "x" * 300
    assert "cannot be made: File name too long" in refused(
        capsys, "faces", "--out", tmp_path / long
    )
    assert "--recipe must be a TOML file or one of" in refused(capsys, "train", "--recipe", long)
    assert "is a file" in refused(capsys, "train", "--resume", __file__)
    assert "does not exist" in refused(capsys, "train", "--resume", long)


def test_paths_that_are_not_utf8_are_named(capsys):
    assert "--data must be valid UTF-8" in refused(
        capsys, "train", "--data", "a\udcff", "--dry-run"
    )


def test_the_package_is_light():
    code = "import sys, fastgan; assert 'torch' not in sys.modules; print(fastgan.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()
    assert (ROOT / "LICENSE").is_file()


VERB = re.compile(
    r"(?:^|[`/ ])fastgan ((?:train|prepare|sample|interpolate|animate|evaluate|export|report|faces"
    r"|info)\b[^`\n#]*)",
    re.M,
)
DOCUMENTS = ["README.md", "docs/metrics.md", "docs/recipes.md", "kernels/README.md"]
DOCUMENTS += [f"fastgan/recipes/{path.name}" for path in (ROOT / "fastgan/recipes").iterdir()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_the_documents_can_be_given(name, monkeypatch):
    """Their flags are there. NAME, DIR and the like are the reader's own."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text().replace("\\\n", " ").replace("--recipe NAME", "")
    given = [re.split(r"\s{3,}| && ", found)[0].strip(" .,;:") for found in VERB.findall(text)]
    assert given or name.endswith(".toml") or name == "kernels/README.md"
    for command in given:
        flags = [flag for flag in shlex.split(command) if flag != "--help"]
        if len(flags) == 1 and flags != ["train"]:  # the command's name, in a sentence
            continue
        try:
            parse(flags)
        except SystemExit as error:
            pytest.fail(f"fastgan {command}: exit {error.code}")

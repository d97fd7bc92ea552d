"""Before the command line is there: a Ctrl-C while it is imported."""

import os
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import fastgan.__main__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    """Those that other tests have left, which `main` would end the process for."""
    monkeypatch.setattr("fastgan.__main__.threading.enumerate", lambda: [])


def started(folder, tyro, args=("info", "--nothing"), **options):
    """`python -m fastgan`, with a tyro that is `tyro` and then the real one."""
    folder.mkdir()
    real = Path(import_module("tyro").__file__)
    text = f"import importlib.util, os, signal, sys, time\n{tyro}\n"
    text += f"spec = importlib.util.spec_from_file_location('tyro', {str(real)!r}, "
    text += f"submodule_search_locations=[{str(real.parent)!r}])\n"
    text += "module = sys.modules['tyro'] = importlib.util.module_from_spec(spec)\n"
    text += "spec.loader.exec_module(module)\n"
    (folder / "tyro.py").write_text(text)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "fastgan", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


KILL = "os.kill(os.getpid(), signal.SIGINT)"
SWALLOWED = f"try: {KILL}; time.sleep(9)\nexcept BaseException: pass"
WRAPPED = f"class A:\n    def __set_name__(self, *_): {KILL}\nclass B:\n    a = A()"


@pytest.mark.parametrize("tyro", [KILL, SWALLOWED, WRAPPED, "raise KeyboardInterrupt"])
def test_ctrl_c_in_the_midst_of_an_import(tmp_path, tyro):
    process = started(tmp_path / "stub", tyro)
    assert process.communicate(timeout=60) == ("", "fastgan: interrupted\n")
    assert process.returncode == 130


def test_ctrl_c_by_hand(tmp_path):
    process = started(tmp_path / "stub", "print('here', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "fastgan: interrupted\n")
    assert process.returncode == 130


def test_a_closed_stderr(tmp_path):
    process = started(tmp_path / "stub", f"os.close(2)\n{KILL}", args=["--version"])
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_where_it_is_ignored_it_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = started(tmp_path / "stub", KILL, args=["--version"], preexec_fn=ignore)
    out, err = process.communicate(timeout=60)
    assert out.startswith("fastgan 0.") and not err and process.returncode == 0


def test_afterwards_the_command_line_answers_it(monkeypatch):
    """Python's own handler is back when cli runs, which puts right what it has begun."""
    monkeypatch.setattr("fastgan.cli.main", lambda: signal.getsignal(signal.SIGINT))
    assert fastgan.__main__.main() is signal.default_int_handler


def test_ctrl_c_between_the_two(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("fastgan.cli.main", interrupted)
    assert fastgan.__main__.main() == 130
    assert capsys.readouterr().err == "fastgan: interrupted\n"


def test_the_console_script_goes_the_same_way():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["fastgan"].partition(":")
    assert (module, name) == ("fastgan.__main__", "main")
    assert callable(getattr(import_module(module), name))
    assert callable(import_module("fastgan.cli").main)

"""What is said of the machine, on machines that are not this one."""

import subprocess
from pathlib import Path

import torch

from fastgan import env

ROOT = Path(__file__).resolve().parents[1]


def test_the_commit_is_that_of_our_own_checkout_only(monkeypatch, tmp_path):
    package = tmp_path / "repo" / "lib" / "fastgan"
    package.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for args in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *args], cwd=tmp_path / "repo", check=True)
    monkeypatch.setattr(env, "__file__", str(package / "env.py"))
    assert env.commit() == (None, False)  # installed inside somebody else's repository
    own = tmp_path / "repo" / "fastgan"
    own.mkdir()
    monkeypatch.setattr(env, "__file__", str(own / "env.py"))
    sha, clean = env.commit()
    assert sha and len(sha) == 40 and clean
    (Path(own) / "new.py").write_text("")
    assert env.commit() == (sha, False)


def test_environment_names_versions_and_machine():
    found = env.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["cores"] >= 1 and found["cpu"]


def test_a_copy_of_a_tree_knows_its_commit_from_the_environment(monkeypatch):
    """Also one that was laid over a checkout of another commit, where git would name that; where
    both name the same one, git knows whether it is clean.
    """
    answers = {"--show-toplevel": str(ROOT), "HEAD": "a" * 40, "--porcelain": " M README.md"}
    monkeypatch.setattr(env, "_git", lambda root, *args: answers[args[-1]])
    assert env.commit() == ("a" * 40, False)
    for named, found in (("c" * 40, ("c" * 40, True)), ("a" * 40, ("a" * 40, False))):
        monkeypatch.setenv("FASTGAN_COMMIT", named)
        assert env.commit() == found
        assert env.environment(torch.device("cpu"))["commit_named"] == named

    def no_git(*_):
        raise FileNotFoundError("git")

    monkeypatch.setattr(env, "_git", no_git)
    assert env.commit() == ("a" * 40, True)
    monkeypatch.delenv("FASTGAN_COMMIT")
    assert env.commit() == (None, False)

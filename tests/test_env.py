"""What is said of the machine, on machines that are not this one."""

import subprocess
from pathlib import Path

import pytest
import torch

from fastgan import env
from fastgan.errors import UsageError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_device_cuda_without_a_gpu_says_why(no_gpu, monkeypatch):
    monkeypatch.setattr(env, "driver_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UsageError, match="--device cuda needs a GPU.*no NVIDIA driver found"):
        env.pick_device("cuda")
    assert env.pick_device("auto").type == env.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        (None, (13, 0), "built without CUDA"),
        ("13.0", (12, 4), r"driver knows CUDA 12\.4.*built for CUDA 13\.0.*cu12x build"),
        ("13.2", (13, 0), "no card is visible"),
    ],
)
def test_why_no_gpu(monkeypatch, built, driver, words):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(env, "driver_cuda", lambda: driver)
    import re

    assert re.search(words, env.why_no_gpu())


def test_amp_on_a_cpu_needs_native_bf16(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(env, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert env.amp_dtype(cpu)[0] == torch.bfloat16
    monkeypatch.setattr(env, "cpu_flags", lambda: {"avx2"})
    assert env.amp_dtype(cpu)[0] is None


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_amp_on_a_gpu_follows_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert env.amp_dtype(torch.device("cuda"))[0] == dtype


def test_what_triton_lacks_is_named(monkeypatch):
    monkeypatch.setattr(env, "c_compiler", lambda: None)
    monkeypatch.setattr(env, "python_headers", lambda: False)
    monkeypatch.setattr(env, "version_of", lambda name: None)
    assert env.missing_for_triton() == (
        "triton and a C compiler (gcc) and Python's headers (python3-dev)"
    )
    assert not env.compile_line(torch.device("cuda"))[0]


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


def test_the_kernels_are_for_a_gpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(env, "INTERPRETED", False)
    for name in ("auto", "torch"):
        assert env.pick_kernels(name, cpu)[0] == "torch"
    assert "fastgan's Triton kernels need an NVIDIA GPU" in env.pick_kernels("auto", cpu)[1]
    with pytest.raises(UsageError, match="--kernels triton: the kernels need an NVIDIA GPU"):
        env.pick_kernels("triton", cpu)
    monkeypatch.setattr(env, "INTERPRETED", True)  # the tests' way to run them on a CPU
    impl, line = env.pick_kernels("triton", cpu)
    assert impl == "triton" and "in its interpreter" in line
    assert env.pick_kernels("auto", cpu)[0] == "torch"


@pytest.mark.parametrize(
    ("capability", "lack", "words"),
    [
        ((9, 0), "", ""),
        ((7, 5), "", "need a card of sm_80 or newer"),
        ((9, 0), "a C compiler (gcc)", r"need a C compiler \(gcc\)"),
    ],
)
def test_the_kernels_on_a_gpu_say_what_they_lack(monkeypatch, capability, lack, words):
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(env, "missing_for_triton", lambda: lack)
    impl, line = env.pick_kernels("auto", cuda)
    assert env.pick_kernels("torch", cuda)[0] == "torch"
    if not words:
        assert impl == env.pick_kernels("triton", cuda)[0] == "triton"
        return
    assert impl == "torch"
    with pytest.raises(UsageError, match=f"--kernels triton: the kernels {words}"):
        env.pick_kernels("triton", cuda)


def test_a_copy_of_a_tree_knows_its_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv("FASTGAN_COMMIT", "c" * 40)

    def no_git(*_):
        raise FileNotFoundError("git")

    with monkeypatch.context() as patch:
        patch.setattr(env, "_git", no_git)
        assert env.commit() == ("c" * 40, True)
    assert env.commit()[0] != "c" * 40  # in a checkout git knows better

"""How a run computes, on machines that are not this one."""

import re

import pytest
import torch

from fastgan import env, modes
from fastgan.config import TrainConfig
from fastgan.errors import UsageError


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_device_cuda_without_a_gpu_says_why(no_gpu, monkeypatch):
    monkeypatch.setattr(modes, "driver_cuda", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UsageError, match="--device cuda needs a GPU.*no NVIDIA driver found"):
        modes.pick_device("cuda")
    assert modes.pick_device("auto").type == modes.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("built", "driver", "words"),
    [
        (None, (13, 0), "built without CUDA"),
        ("13.0", (12, 4), r"driver knows CUDA 12\.4.*built for CUDA 13\.0.*cu12x build"),
        ("13.2", (13, 0), "no card is visible"),
    ],
)
def test_why_no_gpu(no_gpu, monkeypatch, built, driver, words):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(modes, "driver_cuda", lambda: driver)
    assert re.search(words, modes.why_no_gpu())


def card(monkeypatch, major, minor):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90", "sm_100"], True),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),  # the same major, from the minor on
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90a"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # compiled by the driver
    ],
)
def test_a_card_that_torch_has_no_code_for_is_refused(monkeypatch, capsys, capability, archs, fits):
    card(monkeypatch, *capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert (modes.pick_device("auto").type == "cuda") == fits
    if fits:
        assert modes.pick_device("cuda").type == "cuda"
    else:
        line = modes.pick_modes(TrainConfig()).lines["device"]
        assert "no code for it" in line and "--device auto takes the CPU" in capsys.readouterr().err
        with pytest.raises(UsageError, match=r"--device cuda .* no code for it \(only for sm_"):
            modes.pick_device("cuda")


def test_amp_on_a_cpu_needs_native_bf16(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(modes, "cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert modes.pick_precision(True, "auto", cpu)[0] == torch.bfloat16
    monkeypatch.setattr(modes, "cpu_flags", lambda: {"avx2"})
    assert modes.pick_precision(True, "auto", cpu)[0] is None
    # asked for by name: slow is better than not what was said
    for name, dtype in modes.LOW.items():
        low, line = modes.pick_precision(True, name, cpu)
        assert low == dtype and "slow" in line
    assert modes.pick_precision(False, "auto", cpu) == (None, "float32")
    assert modes.pick_precision(False, "fp16", cpu) == (None, "float32")
    assert "--amp-dtype fp16 does nothing without --amp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "name", "dtype"),
    [
        ((9, 0), "auto", torch.bfloat16),
        ((9, 0), "fp16", torch.float16),
        ((7, 5), "auto", torch.float16),
        ((7, 5), "bf16", None),
    ],
)
def test_amp_on_a_gpu_follows_the_card_and_the_flag(monkeypatch, capability, name, dtype):
    card(monkeypatch, *capability)
    cuda = torch.device("cuda")
    if dtype is None:
        with pytest.raises(UsageError, match="--amp-dtype bf16 needs a card of sm_80 or newer"):
            modes.pick_precision(True, name, cuda)
    else:
        assert modes.pick_precision(True, name, cuda)[0] == dtype


def test_what_triton_lacks_is_named(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(env, "c_compiler", lambda: None)
    monkeypatch.setattr(env, "python_headers", lambda: False)
    monkeypatch.setattr(env, "version_of", lambda name: None)
    assert env.missing_for_triton() == (
        "triton and a C compiler (gcc) and Python's headers (python3-dev)"
    )
    assert not modes.pick_compile(torch.device("cuda"))[0]


def test_the_compiler_is_the_one_that_triton_would_take(monkeypatch, tmp_path):
    """It takes CC as one name, and never `cc`."""
    for name in ("cc", "mycc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "a C compiler (gcc)" in env.missing_for_triton()
    monkeypatch.setenv("CC", "ccache mycc")
    assert "a C compiler (CC names ccache mycc)" in env.missing_for_triton()
    monkeypatch.setenv("CC", "mycc")
    assert "C compiler" not in env.missing_for_triton()
    monkeypatch.delenv("CC")
    (tmp_path / "clang").symlink_to(tmp_path / "mycc")
    assert env.c_compiler() == str(tmp_path / "clang")


def test_the_compiler_is_the_one_that_torch_would_take(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert modes.pick_compile(cpu) == (
        False,
        "off: torch.compile on a CPU needs a C++ compiler (CXX names /nowhere/g++)",
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs a C++ compiler (g++)" in modes.pick_compile(cpu)[1]


def test_a_graph_is_for_a_gpu_and_can_be_left_out():
    assert modes.pick_graph(True, torch.device("cpu"))[0] is False
    assert modes.pick_graph(True, torch.device("cuda"))[0] is True
    on, line = modes.pick_graph(False, torch.device("cuda"))
    assert not on and "--no-graph" in line


def test_every_mode_has_a_line(no_gpu):
    found = modes.pick_modes(TrainConfig(amp=True, compile=True))
    assert list(found.lines) == ["device", "kernels", "precision", "compile", "graph"]
    assert found.lines["device"].startswith("cpu; no GPU: ")
    assert not found.graph and found.impl == "torch"
    assert "off" in modes.pick_modes(TrainConfig()).lines["compile"]


def test_the_kernels_are_for_a_gpu(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(modes, "INTERPRETED", False)
    for name in ("auto", "torch"):
        assert modes.pick_kernels(name, cpu)[0] == "torch"
    assert "fastgan's Triton kernels need an NVIDIA GPU" in modes.pick_kernels("auto", cpu)[1]
    with pytest.raises(UsageError, match="--kernels triton: the kernels need an NVIDIA GPU"):
        modes.pick_kernels("triton", cpu)
    monkeypatch.setattr(modes, "INTERPRETED", True)  # the tests' way to run them on a CPU
    impl, line = modes.pick_kernels("triton", cpu)
    assert impl == "triton" and "in its interpreter" in line
    assert modes.pick_kernels("auto", cpu)[0] == "torch"


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
    card(monkeypatch, *capability)
    monkeypatch.setattr(modes, "missing_for_triton", lambda: lack)
    impl, line = modes.pick_kernels("auto", cuda)
    assert modes.pick_kernels("torch", cuda)[0] == "torch"
    if not words:
        assert impl == modes.pick_kernels("triton", cuda)[0] == "triton"
        return
    assert impl == "torch"
    with pytest.raises(UsageError, match=f"--kernels triton: the kernels {words}"):
        modes.pick_kernels("triton", cuda)

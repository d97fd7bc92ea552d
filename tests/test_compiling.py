"""torch.compile compiles once and whole, keeps what it compiled, and says where it cannot."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from equality import Case, batches, make_step
from fastgan.compiling import compiled, explained, keep_in, keep_kernels, no_recompiles
from fastgan.errors import RunError, UsageError
from fastgan.step import Step

CASE = Case(width=4, latent=6, batch=4)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_three_passes_are_compiled_and_nothing_again():
    step = make_step(CASE, compile=True)
    first, *rest = batches(CASE, 5)
    step(first)
    assert counters["stats"]["unique_graphs"] == 3  # G, D's objective, G's objective
    assert not counters["graph_break"]
    with no_recompiles(True):
        for batch in rest:
            step(batch)
    assert counters["stats"]["unique_graphs"] == 3


def test_a_recompilation_in_the_loop_is_an_error():
    double = compiled(lambda x: 2 * x)
    double(torch.ones(3))
    with (
        pytest.raises(RunError, match="would compile again.*without --compile"),
        no_recompiles(True),
    ):
        double(torch.ones(4))
    with no_recompiles(False):
        assert float(double(torch.ones(5))[0]) == 2


class Breaks(Step):
    """Planted: what a pass does hangs on a number that has to be read back."""

    def _make(self, latents):
        fake = super()._make(latents)
        return fake if fake.mean() > 0 else -fake


def test_a_graph_break_is_an_error_that_says_where():
    step = make_step(CASE, kind=Breaks, compile=True)
    wanted = "failed: Data-dep.*test_compiling.py.*_make; train without --compile"
    with pytest.raises(RunError, match=wanted), explained():
        step(next(batches(CASE, 1)))


@torch._dynamo.config.patch(recompile_limit=2)
def test_a_limit_of_compilations_is_an_error():
    double = compiled(lambda x: 2 * x)
    wanted = "limit of 2 compilations of one function is reached.*test_compiling.py.*--compile"
    with pytest.raises(RunError, match=wanted), explained():
        for size in range(2, 6):
            double(torch.ones(size))


COUNT = """
import sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from fastgan.compiling import compiled, keep_in
keep_in(Path(sys.argv[1]))
assert float(compiled(lambda x: 3 * x.exp())(torch.zeros(4))[0]) == 3
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_the_next_run(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    command = [sys.executable, "-c", COUNT, str(tmp_path / "compiled")]
    said = [subprocess.check_output(command, env=env, text=True).split() for _ in range(2)]
    assert said == [["0", "1"], ["1", "0"]]
    assert (tmp_path / "compiled").is_dir()


def test_where_compiled_code_is_kept(tmp_path, monkeypatch, capsys):
    kept, theirs = "TORCHINDUCTOR_CACHE_DIR", default_cache_dir()
    monkeypatch.setenv(kept, theirs)
    keep_in(tmp_path / "ab")
    assert os.environ[kept] == str(tmp_path / "ab") and not capsys.readouterr().err
    (tmp_path / "file").touch()
    for folder, why in (("a b", "a path with a space"), ("file/x", "cannot be written")):
        monkeypatch.setenv(kept, theirs)
        keep_in(tmp_path / folder)
        said = capsys.readouterr().err
        assert os.environ[kept] == theirs and why in said and theirs in said
    monkeypatch.setenv(kept, str(tmp_path / "elsewhere"))  # the user's own
    keep_in(tmp_path / "ab")
    assert os.environ[kept] == str(tmp_path / "elsewhere")
    for folder, why in (("c d", "a path with a space"), ("file/y", "cannot be written")):
        monkeypatch.setenv(kept, str(tmp_path / folder))
        with pytest.raises(UsageError, match=f"TORCHINDUCTOR_CACHE_DIR must name .*{why}"):
            keep_in(tmp_path / "ab")


BEGUN = """
from fastgan.compiling import compiled
from torch._inductor.async_compile import AsyncCompile
compiled(lambda x: x)
AsyncCompile.use_process_pool()  # as the first compilation does
"""


def test_the_end_does_not_wait_for_processes_that_have_just_begun():
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", BEGUN], env=env, timeout=60, capture_output=True)
    assert done.returncode == 0 and not done.stderr


def test_advice_that_the_start_has_settled_is_not_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with explained():
            warnings.warn("TensorFloat32 tensor cores for float32 matrix ...", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]


def test_kernels_are_kept_where_the_home_folder_cannot_be_written(tmp_path, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ and not capsys.readouterr().err
    monkeypatch.setenv("HOME", "/proc/nowhere")
    keep_kernels()
    assert triton.knobs.cache.dir == str(tmp_path / "code" / "triton")
    assert "/proc/nowhere/.triton cannot be written" in capsys.readouterr().err
    keep_kernels()  # it is set, by whomever
    assert not capsys.readouterr().err


def test_a_compilers_failure_says_its_reason_and_what_to_do():
    def broken(x):
        raise torch._dynamo.exc.BackendCompilerFailed(len, AttributeError("no 'call' in it"), None)

    wanted = "no 'call' in it.*--compile, or delete the code kept in"
    with pytest.raises(RunError, match=wanted), explained():
        broken(None)
    with pytest.raises(RunError, match="failed: TorchDynamoException"), explained():
        raise torch._dynamo.exc.TorchDynamoException()

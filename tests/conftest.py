"""One thread and one seed for each test, a cache folder of its own, cuDNN as it was, no `gpu` test
without a GPU, Triton's interpreter instead.
"""

import os
import signal

# These networks are too small to share among threads, and threads that wait for each other make a
# machine that is busy with something else ten times slower. Processes started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastgan_kernels is imported


def pytest_configure():
    # who is cut off by a time limit still says what failed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # a shell's background job and nohup ignore these, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_search(monkeypatch):
    """A run on a GPU has cuDNN search for the fastest algorithm, in its whole process from then on,
    and may find another each time.
    """
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded sets of a test session never meet the user's."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

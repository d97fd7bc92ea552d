"""Weights from a path: what torch.save and safetensors write is read, and whatever else a stranger
may put there ends in one line, without running and without filling the memory.
"""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from torch import nn

from fastgan import weights
from fastgan.errors import RunError, UsageError
from fastgan.weights import plain_name, read_weights

NAMES = {
    "a.weight": torch.randn(3, 4, dtype=torch.float32),
    "a.steps": torch.tensor(3),
    "b": torch.randn(5).to(torch.bfloat16),
    "c": torch.tensor([True, False]),
}


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        assert not got[name].requires_grad and type(got[name]) is torch.Tensor


def refused(path, rule, error=RunError):
    """That reading names the file and the rule, in one line."""
    with pytest.raises(error) as raised:
        read_weights(path)
    said = str(raised.value)
    assert str(path) in said and rule in said and "\n" not in said, said
    return said


def written(folder, form, name):
    """NAMES as safetensors, or in one of torch.save's two forms by this name."""
    path = folder / ("w.safetensors" if form == "safetensors" else name)
    if form == "safetensors":
        safetensors.torch.save_file(NAMES, path)
    else:
        torch.save(NAMES, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_what_was_written_is_read(tmp_path, form):
    path = written(tmp_path, form, "w.PTH")
    same(read_weights(path), NAMES)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_of_modules_parameters_and_ties(tmp_path, zipped):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    tied = nn.Linear(4, 4)
    saved = collections.OrderedDict(net.state_dict())  # with its _metadata
    saved._metadata = net.state_dict()._metadata
    saved["tied"] = saved["again"] = tied.weight  # a Parameter
    saved["channels_last"] = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    saved["view"] = torch.arange(100.0)[10:20]
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    same(read_weights(tmp_path / "w.pt"), {k: t.detach() for k, t in saved.items()})


def test_a_mapping_under_state_dict_and_wrappers_names(tmp_path):
    inner = {
        f"module.{k}" if i % 2 else f"_orig_mod.{k}": t for i, (k, t) in enumerate(NAMES.items())
    }
    saved = {"epoch": 3, "state_dict": inner, "optimizer": {"lr": 0.1, "steps": [1, None]}}
    torch.save(saved, tmp_path / "w.pth")
    same(read_weights(tmp_path / "w.pth"), NAMES)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("a._orig_mod.b.module.weight", "a.b.weight"),
        ("modules.a", "modules.a"),
        ("module", "module"),
        ("a", "a"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain
    assert plain_name(plain) == plain


def test_two_names_that_come_to_one(tmp_path):
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "two tensors that come to the name 'a'")


@pytest.mark.parametrize(
    ("saved", "rule"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, "holds more than tensors: 'epoch' is of type int"),
        ({1: torch.zeros(1)}, "a name must be text, got int"),
        ([torch.zeros(1)], "must hold a mapping of names to tensors, got list"),
        (torch.zeros(1), "must hold a mapping of names to tensors, got Tensor"),
        ({}, "holds no tensors"),
        ({"a": {"b": torch.zeros(1)}}, "'a' is of type dict"),
        ({"a": torch.zeros(1).expand(10**12)}, "is larger than its data"),
        (nn.Linear(1, 1), "asks for torch.nn.modules.linear.Linear"),
        ({"a": torch.zeros(2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.empty(10**9, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"a": Path("x")}, "asks for pathlib"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_mapping_of_tensors(tmp_path, saved, rule, zipped):
    torch.save(saved, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "w.pth", rule)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def archive(path, pickled, records=(), packing=zipfile.ZIP_STORED, names=()):
    """A zip such as torch.save writes, of any contents."""
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
        for number, record in enumerate(records):
            file.writestr(f"archive/data/{number}", record)
        for name in names:
            file.writestr(name, b"")
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["bare", "zip", "legacy", "zip of torch.save"])
def test_a_pickle_that_runs_code_does_not(tmp_path, form, protocol):
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    pickled = pickle.dumps({"a": Bomb(marker)}, protocol)
    if form == "bare":
        path.write_bytes(pickled)
    elif form == "zip":
        archive(path, pickled)
    else:
        zipped = form != "legacy"
        torch.save({"a": Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
    said = refused(path, "")
    assert not marker.exists()
    rules = ("asks for posix.mkdir", "uses STACK_GLOBAL", "of protocol 4", "no file of torch.save")
    assert any(rule in said for rule in rules), said
    with pytest.raises((FileExistsError, TypeError, AttributeError)):  # the bomb is a real one
        for _ in range(2):
            pickle.loads(pickled)
    assert marker.exists()


def test_a_deflated_file_is_not_unpacked(tmp_path):
    """torch.load itself takes 256 MiB for these 262 kB."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(64 << 20)}, buffer)
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    del buffer
    assert path.stat().st_size < 300_000
    began = time.perf_counter()
    refused(path, "is packed or encrypted")
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("pickled", "rule"),
    [
        (b"\x80\x02\x8c\x05posix\x8c\x05mkdir\x93.", "uses STACK_GLOBAL"),
        (b"\x80\x02(iposix\nmkdir\n.", "uses INST"),
        (b"\x80\x02\x82\x07.", "uses EXT1"),
        (b"\x80\x03}.", "is of protocol 3"),
        (b"\x80\x02}", "is damaged, or no file of torch.save"),
        (b"\x80\x02cposix\nmkdir\n.", "asks for posix.mkdir"),
        (b"\x80\x02ctorch.nn\nModule\n.", "asks for torch.nn.Module"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_pickle_of_weights_never_holds(tmp_path, pickled, rule, zipped):
    path = tmp_path / "w.pth"
    path.write_bytes(pickled)
    refused(archive(path, pickled) if zipped else path, rule)


def test_a_pickle_that_is_no_file_of_torch(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": [1.0]}, 2))
    refused(tmp_path / "w.pth", "is no file of torch.save")


def storage(numel, kind="Float", key="0"):
    """The opcodes of torch's persistent storage."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\n"
        + f"{kind}Storage\n".encode()
        + b"X\x01\x00\x00\x00"
        + key.encode()
        + b"X\x03\x00\x00\x00cpu"
        + numel_of(numel)
        + b"tQ"
    )


def numel_of(value):
    size = (value.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tensor(numel, length, stride=1):
    """`{"a": ...}`: a tensor of `length` over a storage that says it has `numel`."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel)
        + b"K\x00"
        + numel_of(length)
        + b"\x85"
        + numel_of(stride)
        + b"\x85"
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def test_the_opcodes_here_are_torchs(tmp_path):
    path = archive(tmp_path / "w.pth", tensor(2, 2), [struct.pack("<2f", 1, 2)])
    same(read_weights(path), {"a": torch.tensor([1.0, 2.0])})


def asks(name, length):
    """`{"a": NAME(length)}`."""
    module, _, name = name.rpartition(".")
    called = f"c{module}\n{name}\n".encode() + numel_of(length) + b"\x85R"
    return b"\x80\x02}X\x01\x00\x00\x00a" + called + b"s."


HUGE = 12 << 30
GREEDY = {
    "bytearray": asks("__builtin__.bytearray", 1 << 30),
    "tensor": asks("torch.Tensor", HUGE),
    "storage that lies": tensor(HUGE, HUGE),
    "tensor that lies": tensor(2, HUGE),
    "expanded": tensor(2, HUGE, stride=0),
    "many objects": b"\x80\x02](" + b"\x8f" * (16 << 20) + b"e.",
}


@pytest.mark.skipif(sys.platform != "linux", reason="measures by /proc")
def test_small_files_that_ask_for_all_memory(tmp_path):
    """In a process of its own, which may take 4 GiB of addresses beyond what torch took."""
    paths = []
    for name, pickled in GREEDY.items():
        paths += [tmp_path / f"{name}-zip.pth", tmp_path / f"{name}-legacy.pth"]
        archive(paths[-2], pickled, [struct.pack("<2f", 1, 2)])
        head = [pickle.dumps(v, 2) for v in (weights.LEGACY_MAGIC, 1001, {})]
        data = struct.pack("<q2f", 2, 1, 2)
        paths[-1].write_bytes(b"".join([*head, pickled, pickle.dumps(["0"], 2), data]))
    code = (
        "import resource, sys; from pathlib import Path; from fastgan import weights\n"
        "from fastgan.errors import RunError\n"
        "taken = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30),) * 2)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: print('read', weights.read_weights(path))\n"
        "    except RunError as error: print(peak() - before, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for line, path in zip(lines, paths, strict=True):
        grown_kib, _, said = line.partition(" ")
        assert said.startswith(f"weights {path}"), line
        assert int(grown_kib) < 500 << 10, line


def test_a_torchscript_archive_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is going away
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "is a TorchScript archive, which holds code")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 3, 8, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file(tmp_path, form, keep):
    path = written(tmp_path, form, "w.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(path, "")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_damage_anywhere_is_an_error_or_other_numbers(tmp_path, form):
    """Of a zip never other numbers: each member has a checksum."""
    path = written(tmp_path, form, "w.pth")
    whole = path.read_bytes()
    random = Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 4))):
            damaged[random.randrange(min(len(whole), 2000))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            got = read_weights(path)
        except RunError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            if form == "zip":
                same(got, NAMES)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 1 << 20) + b"{}",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 20) + b"[]".ljust(20),
        struct.pack("<Q", 60)
        + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(60),
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,0]}}'.ljust(60),
        struct.pack("<Q", 70)
        + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'[:70],
        struct.pack("<Q", 5000) + b"[" * 5000,
        b"\x80\x02.",
        b"",
    ],
)
def test_safetensors_headers_that_lie(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(header)
    refused(path, "its header is longer than the file" if len(header) < 20 else "is damaged")


def test_a_header_larger_than_any(tmp_path):
    path = tmp_path / "w.safetensors"
    size = weights.MAX_HEADER_BYTES + 1
    path.write_bytes(struct.pack("<Q", size) + b" " * size)
    refused(path, "a header of 16,777,217 bytes is more than weights have")


def test_sizes_beyond_the_limits(tmp_path, monkeypatch):
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(weights.MAX_BYTES + 1)  # takes no room
        refused(path, "8,589,934,593 bytes are more than weights have")
    torch.save(NAMES, tmp_path / "w.pth")
    monkeypatch.setattr(weights, "MAX_MEMBERS", 3)
    refused(tmp_path / "w.pth", "members, over 3")


def test_zips_that_are_not_torchs(tmp_path):
    pickled = pickle.dumps({}, 2)
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("picture.jpg", b"")
    refused(path, "it must hold one data.pkl")
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, pickled, names=["archive/data.pkl"])
    refused(path, "it must hold one data.pkl")
    refused(archive(path, pickled, names=["other/data.pkl"]), "it must hold one data.pkl")
    refused(archive(path, pickled, names=["archive/code/__torch__.py"]), "TorchScript")
    content = bytearray(archive(path, pickled).read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag of a password
    path.write_bytes(content)
    refused(path, "is packed or encrypted")


def test_members_that_overlap(tmp_path):
    """Many names for the same bytes: what they claim is more than there is."""
    path = archive(tmp_path / "w.pth", pickle.dumps({}, 2), [bytes(1000)])
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("archive/data/0")
        for number in range(1, 50):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
            file.filelist.append(info)
            file.NameToInfo[info.filename] = info
            file._didModify = True
    refused(path, "its members claim more bytes than it has")


def test_what_is_no_file(tmp_path):
    refused(tmp_path / "none.pth", "No such file", UsageError)
    (tmp_path / "folder.pth").mkdir()
    refused(tmp_path / "folder.pth", "not a regular file", UsageError)
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "not a regular file", UsageError)
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    refused(tmp_path / "zero.safetensors", "not a regular file", UsageError)
    refused(Path("/dev/zero"), "must be a .safetensors, .pth or .pt file", UsageError)
    refused(tmp_path / "w.ckpt", "must be a .safetensors, .pth or .pt file", UsageError)
    with pytest.raises(UsageError, match="cannot be read"):
        read_weights(Path("a\0b.pth"))


def test_a_file_that_shrinks_or_fails_as_it_is_read(tmp_path, monkeypatch):
    torch.save(NAMES, tmp_path / "w.pth")

    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(weights, "open_regular", lambda _: Failing(b"PK"))
    refused(tmp_path / "w.pth", "cannot be read: Input/output error")

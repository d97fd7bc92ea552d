"""Every test that tests/README.md names is there, and every hazard has one."""

import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE / "README.md").read_text("utf-8")


def named(text):
    return re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text)


def missing(text):
    for file, test in named(text):
        path = HERE / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text("utf-8")):
            yield f"{file}::{test}"


def test_every_test_that_is_named_is_there():
    assert not list(missing(TEXT))
    assert list(missing("`test_promises.py::test_none`")) == ["test_promises.py::test_none"]


def test_every_hazard_has_a_test():
    rows = re.findall(r"^\| (R\d+) \|.*\| (.+) \|$", TEXT, re.M)
    assert [name for name, _ in rows] == [f"R{i}" for i in range(1, 22)]
    assert all(any(test for _, test in named(tests)) for _, tests in rows)

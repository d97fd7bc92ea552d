"""What is known of the baselines already: results are kept beside the decoded sets, so that a
second evaluation on the same images measures what is new alone.

    CACHES/metrics/KEY.json           what it is of, and a table of results for each baseline
    CACHES/metrics/KEY-features.npz   Inception's features of the real images, where it was used

KEY is a digest of all that the numbers depend on: pixels, counts, seed, the form of the metrics.
The real set's projections of SWD are not kept: 300 to 500 MB, for 10 s of work.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..console import warn
from ..data.image_file import open_regular
from ..durable import beside, replace_file

VERSION = 1  # raise when a metric gives other numbers


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no result")


def _is_result(metric: str, value: Any) -> bool:
    """Whether a value has the form of the metric's results: a number, or numbers by name."""
    numbers = [value] if metric == "ms_ssim" else value.values() if isinstance(value, dict) else ""
    return bool(numbers) and all(type(number) in (int, float) for number in numbers)


class Known:
    """Results by baseline and metric. What cannot be read counts as unknown, and what cannot be
    written is warned of.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._about = {"version": VERSION, **about}
        text = json.dumps(self._about, sort_keys=True)
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(self.path.read_text("utf-8"), parse_constant=_refused)
            rows = content["rows"] if content["about"] == self._about else {}
            self._rows = {
                name: {key: value for key, value in row.items() if _is_result(key, value)}
                for name, row in rows.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass

    def of(self, row: str) -> dict[str, Any]:
        """The results of a baseline so far, by metric."""
        return dict(self._rows.get(row, {}))

    def add(self, row: str, results: Mapping[str, Any]) -> None:
        """Keep these, too."""
        self._rows.setdefault(row, {}).update(results)
        content = {"about": self._about, "rows": self._rows}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            warn(f"the baselines cannot be kept in {self.path}: {error.strerror or error}")

    def features(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Those of the real images, as `keep_features` was given them."""
        try:
            with (
                open_regular(self._features) as file,
                np.load(file, allow_pickle=False) as found,
            ):
                return found["pool"], found["logits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def keep_features(self, pool: np.ndarray, logits: np.ndarray) -> None:
        """12 kB an image."""
        try:
            self._features.parent.mkdir(parents=True, exist_ok=True)
            with beside(self._features, shared=True) as scratch:
                np.savez(scratch, pool=pool, logits=logits)
        except OSError as error:
            warn(f"features cannot be kept in {self._features}: {error.strerror or error}")

    @property
    def _features(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-features.npz")

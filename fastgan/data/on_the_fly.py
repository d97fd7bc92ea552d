"""A set that is decoded batch by batch while training, without a cache: `--loader dali`.

A file that cannot be decoded is found out only when it is its turn. The next sound one in the set's
order stands in for it from then on, so that the order of all others, and a resumed run, stay the
same.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from ..config import DataOptions
from ..console import warn
from ..errors import UsageError
from ..paths import absolute
from .cache import SKIPPED, is_cache
from .image_file import ImageFile, printable
from .pool import batches, open_pool
from .process import Decoded, joined
from .wanted import Wanted, want


class OnTheFly:
    """The images of a folder or a zip, framed, to train on. The machine's cores are for so many
    processes that do (`among`); `gpu` is the number of the card that this one may decode on.

    Raises:
        UsageError: `source` is something else, or none of its images is left to train on.
    """

    def __init__(
        self,
        source: str,
        options: DataOptions,
        flag: str = "--data",
        among: int = 1,
        gpu: int | None = None,
    ) -> None:
        if source.startswith("faces:") or is_cache(Path(absolute(source, flag))):
            raise UsageError(
                f"--loader dali needs a folder of images or a .zip; {flag} is {source}"
            )
        self._wanted: Wanted = want(source, options, flag)
        self._files = self._wanted.files[: self._wanted.count - self._wanted.held_out]
        self._flag = flag
        self.size, self.count, self.identity = options.size, len(self._files), self._wanted.identity
        self._stand_ins: dict[int, int] = {}  # row of a refused file: row of the one in its place
        self._refused: set[int] = set()
        self._list: Path | None = None
        self._listed: set[str] = set()
        self._before = ""  # the next line of the list
        self._pool = open_pool(options, self._files, again=True, among=among, gpu=gpu)

    def __str__(self) -> str:
        return f"{self.count:,} images of {self._wanted.source}, framed to {self.size} px"

    @property
    def decoder(self) -> str:
        return self._pool.name

    def list_refused_in(self, folder: Path) -> None:
        """Refused files are appended to skipped.jsonl in this folder, each once."""
        self._list = folder / SKIPPED
        with suppress(FileNotFoundError):
            text = self._list.read_text("utf-8")
            self._before = "\n" if text and not text.endswith("\n") else ""
            for line in text.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line cut off by a full disk
                    self._listed.add(json.loads(line)["name"])

    def fetch(self, numbers: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The pixels of batch after batch: int64 [B] -> uint8 [B, size, size, 3]."""
        asked: deque[tuple[list[int], int]] = deque()  # rows, and in how many requests

        def requests() -> Iterator[list[ImageFile]]:
            for batch in numbers:
                rows = [self._sound(row) for row in batch.tolist()]
                parts = list(batches(self._files[row] for row in rows))
                asked.append((rows, len(parts)))
                yield from parts

        answers = self._pool.run(requests())

        def pixels() -> Iterator[np.ndarray]:
            with closing(answers):
                for first in answers:
                    rows, count = asked.popleft()
                    rest = [next(answers) for _ in range(count - 1)]
                    yield self._complete(rows, joined([first, *rest]))

        return pixels()

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows: uint8 [n, size, size, 3]."""
        return next(self.fetch(iter([rows])))

    def interrupt(self) -> None:
        """From another thread: end what `fetch` waits for."""
        self._pool.interrupt()

    def close(self) -> None:
        """End the decoders."""
        self._pool.close()

    def _sound(self, row: int) -> int:
        """The row, or the one that stands in for it."""
        sound = row
        while sound in self._stand_ins:
            sound = self._stand_ins[sound]
        while row != sound:  # the next time the way is short
            self._stand_ins[row], row = sound, self._stand_ins[row]
        return sound

    def _complete(self, rows: list[int], decoded: Decoded) -> np.ndarray:
        squares = iter(decoded.squares)
        return np.stack(
            [
                next(squares) if reason is None else self._instead(row, reason)
                for row, reason in zip(rows, decoded.reasons, strict=True)
            ]
        )

    def _instead(self, row: int, reason: str | None) -> np.ndarray:
        """The square of the next sound file after a refused one."""
        while reason is not None:
            if row not in self._refused:  # else it was asked for before it was known
                self._refuse(row, reason)
            self._stand_ins.setdefault(row, self._sound((row + 1) % self.count))
            row = self._sound(row)
            decoded = self._pool.one(self._files[row])
            (reason,) = decoded.reasons
        return decoded.squares[0]

    def _refuse(self, row: int, reason: str) -> None:
        file = self._files[row]
        what = f"{printable(file.name)}: {reason}"
        if self._wanted.options.on_bad == "stop":
            raise UsageError(f"{self._flag}: {what} (--on-bad skip puts others in their place)")
        self._refused.add(row)
        if len(self._refused) == 1:
            where = f"; all such are listed in {self._list}" if self._list else ""
            warn(f"{what}: the next image stands in for it{where}", own=True)
        if self._list is not None and file.name not in self._listed:
            line = self._before + json.dumps({**file.row(), "reason": reason}) + "\n"
            try:
                with open(self._list, "ab", buffering=0) as lines:
                    lines.write(line.encode())
            except OSError as error:
                warn(f"{self._list} cannot be written ({error.strerror}), it lacks {what}")
                return
            self._listed.add(file.name)
            self._before = ""
        if 2 * len(self._refused) > self.count:
            raise UsageError(
                f"{self._flag}: {len(self._refused):,} of {self.count:,} images in "
                f"{self._wanted.source} are refused, more than half: {what}"
            )

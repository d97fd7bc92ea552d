"""Which images of a source are taken, and which of those are held out: by hashes of their names.

Every choice depends on the one name alone (that of `limit` on the others too), so that it is the
same on every machine and for a folder and its zip, and adding files changes no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from .image_file import name_bytes


def take(names: Sequence[str], limit: int | None, keep: float) -> list[int]:
    """The places of the names that are taken, in their order.

    A name is kept with probability `keep`; of those the `limit` with the smallest hashes are taken:
    a smaller share or limit takes a part of what a larger one takes.
    """
    if limit is None and keep == 1:
        return list(range(len(names)))
    chances = _chances(names, "keep")
    kept = [at for at, chance in enumerate(chances) if chance < keep]
    if limit is not None and len(kept) > limit:
        kept = sorted(sorted(kept, key=lambda at: chances[at])[:limit])
    return kept


def hold_out(names: Sequence[str], share: float) -> list[bool]:
    """For each name whether it is set aside, with probability `share`."""
    if not share:
        return [False] * len(names)
    return [chance < share for chance in _chances(names, "holdout")]


def _chances(names: Iterable[str], purpose: str) -> list[float]:
    """For each name a number in [0, 1): 64 bits of BLAKE2b, personalized with `purpose`."""
    person = purpose.encode()
    digests = (
        hashlib.blake2b(name_bytes(name), digest_size=8, person=person).digest() for name in names
    )
    return [int.from_bytes(digest, "big") / 2**64 for digest in digests]

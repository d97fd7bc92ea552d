"""Choices by the hashes of names: fair, independent, and the same whatever else is there."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.data.subset import hold_out, take

NAMES = [f"{i // 1000:05d}/{i:05d}.png" for i in range(10_000)]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_shares_are_fair_and_independent(share):
    kept = np.zeros(len(NAMES), bool)
    kept[take(NAMES, None, share)] = True
    apart = np.array(hold_out(NAMES, share))
    spread = 5 * np.sqrt(share * (1 - share) / len(NAMES))  # of a binomial, 5 sigma
    assert abs(kept.mean() - share) < spread and abs(apart.mean() - share) < spread
    assert abs((kept & apart).mean() - share**2) < spread
    first = kept[: len(NAMES) // 2].mean()  # not by place
    assert abs(first - share) < 2 * spread


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1), unique=True, max_size=40), st.floats(0.01, 1), st.floats(0, 0.99)
)
def test_adding_names_changes_no_other_choice(names, keep, holdout):
    more = sorted({*names, *NAMES[:50]})
    kept = {more[at] for at in take(more, None, keep)}
    assert kept & {*names} == {names[at] for at in take(names, None, keep)}
    apart = dict(zip(more, hold_out(more, holdout), strict=True))
    assert [apart[name] for name in names] == hold_out(names, holdout)


def test_smaller_choices_are_parts_of_larger_ones():
    chosen = [
        set(take(NAMES, limit, keep)) for keep in (0.1, 0.4, 1.0) for limit in (10, 700, None)
    ]
    for smaller, larger in [(0, 1), (1, 2), (3, 4), (4, 5), (2, 5), (5, 8), (0, 3), (6, 7)]:
        assert chosen[smaller] <= chosen[larger]
    assert [len(chosen[at]) for at in (0, 1, 6, 7, 8)] == [10, 700, 10, 700, 10_000]
    assert take(NAMES, 20_000, 1.0) == list(range(10_000))
    assert take(NAMES, 500, 0.5) == sorted(take(NAMES, 500, 0.5))


def test_the_hash_is_what_it_was():
    """Documented, so that a set can be told apart by anyone: BLAKE2b, 8 bytes, personalized."""
    assert take(NAMES[:40], 4, 1.0) == [1, 6, 30, 34]
    assert [i for i, apart in enumerate(hold_out(NAMES[:40], 0.1)) if apart] == [21, 26, 39]

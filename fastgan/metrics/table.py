"""An evaluation as a table on the screen: one row a set, aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

LONGEST = 44  # characters of a name
INCEPTION = ("fid", "kid", "is", "precision", "recall", "density", "coverage")
DIGITS = {"fid": 2, "kid": 4, "is": 2}

Column = tuple[str, Callable[[dict[str, Any]], str]]


def tables(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The lines of a table, and of a second one where Inception was asked.

    Args:
        rows: names, and results by metric as `rows.Judge` gives them.
    """
    lines: list[str] = []
    for columns in (_columns(rows), _inception_columns(rows)):
        if columns:
            lines += [""] if lines else []
            lines += _aligned(rows, columns)
    return lines


def _columns(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Column]:
    found = {metric for _, results in rows for metric in results}
    columns: list[Column] = []
    for metric, of_form in (("swd", ""), ("swd_mmagic", " (mmagic's form)")):
        levels: dict[str, float] = next((r[metric] for _, r in rows if metric in r), {})
        for level in levels:
            title = f"SWD{of_form}" if level == "mean" else f"{level} px{of_form}"
            columns.append((title, _number(metric, level, 2)))
    if "ms_ssim" in found:
        columns.append(("MS-SSIM", _number("ms_ssim", None, 3)))
    if "c2st" in found:
        columns.append(("C2ST", lambda row: _percent(row["c2st"]) if "c2st" in row else "-"))
    if "nearest" in found:
        columns.append(("nearest", _number("nearest", "ratio", 2)))
    return columns


def _inception_columns(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Column]:
    found = {name for _, results in rows for name in results.get("inception", {})}
    return [
        (name.upper() if len(name) < 4 else name, _number("inception", name, DIGITS.get(name, 3)))
        for name in INCEPTION
        if name in found
    ]


def _number(metric: str, key: str | None, digits: int) -> Callable[[dict[str, Any]], str]:
    def shown(row: dict[str, Any]) -> str:
        value = row.get(metric)
        if key is not None:
            value = value.get(key) if value is not None else None
        return "-" if value is None else f"{value:,.{digits}f}"

    return shown


def _percent(told: dict[str, float]) -> str:
    accuracy, low, high = (100 * told[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f}% ({low:.1f} to {high:.1f})"


def _aligned(rows: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[Column]) -> list[str]:
    cells = [["", *(title for title, _ in columns)]]
    cells += [[short(name), *(shown(results) for _, shown in columns)] for name, results in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def short(name: str) -> str:
    """A name of LONGEST characters at most: the end tells checkpoints apart."""
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"

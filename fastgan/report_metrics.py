"""The evaluations of a run for its report: tables, and bars of what has a meaning beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .run_files import number

TEXT = 300  # characters of a value in a table


@dataclass(frozen=True)
class Measure:
    """A number that an evaluation may have of each set of images.

    Attributes:
        at: its keys in a row of the record.
        full: what fills a bar; None: the largest.
    """

    title: str
    at: tuple[str, ...]
    form: str
    hint: str
    full: float | None = None


MEASURES = (
    Measure(
        "SWD", ("swd", "mean"), "{:,.2f}", "× 1000; lower is nearer, real images are the floor"
    ),
    Measure(
        "SWD (mmagic's form)",
        ("swd_mmagic", "mean"),
        "{:,.2f}",
        "× 1000, of another pyramid: lower is nearer, and does not compare with SWD",
    ),
    Measure("MS-SSIM", ("ms_ssim",), "{:.3f}", "higher is less diverse; to be near real images", 1),
    Measure("C2ST", ("c2st", "accuracy"), "{:.1%}", "50% cannot be told from real images", 1),
    Measure(
        "Nearest", ("nearest", "ratio"), "{:.2f}", "far below 1 are copies of training images", 1
    ),
    Measure("FID", ("inception", "fid"), "{:,.2f}", "lower is nearer"),
    Measure("KID", ("inception", "kid"), "{:,.4f}", "lower is nearer"),
    Measure(
        "IS", ("inception", "is"), "{:,.2f}", "made for ImageNet's classes: little about faces"
    ),
    Measure("Precision", ("inception", "precision"), "{:.3f}", "higher is better images", 1),
    Measure("Recall", ("inception", "recall"), "{:.3f}", "higher is more of the variety", 1),
    Measure("Density", ("inception", "density"), "{:.3f}", "near 1, as real images"),
    Measure("Coverage", ("inception", "coverage"), "{:.3f}", "higher is more of the variety", 1),
)


def value_at(values: Any, keys: Sequence[str]) -> float | None:
    """The number at these keys of a row; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return number(values)


def evaluation(record: dict[str, Any], run: str) -> dict[str, Any]:
    """A line of metrics.jsonl for the page: tables, and bars of its measures."""
    rows = record["rows"]
    found = [m for m in MEASURES if any(value_at(row, m.at) is not None for row in rows)]
    pixels = [
        column
        for m in found
        if m.at[0] != "inception"
        for column in (m, *(_levels(m, rows) if m.at[0] in ("swd", "swd_mmagic") else ()))
    ]
    tables = []
    for columns in (pixels, [m for m in found if m.at[0] == "inception"]):
        body = [
            (_name(row, run), row.get("role"), [_cell(m, row) for m in columns]) for row in rows
        ]
        tables += [([m.title for m in columns], body)] if columns and body else []
    bars = [(m, _bars(m, rows, run)) for m in found]
    return {"about": _about(record), "tables": tables, "bars": bars}


def _levels(measure: Measure, rows: Sequence[dict[str, Any]]) -> list[Measure]:
    """The levels of a distance's pyramid, the finest first."""
    metric = measure.at[0]
    held = [row[metric] for row in rows if isinstance(row.get(metric), dict)]
    levels = dict.fromkeys(key for values in held for key in values if key.isdecimal())
    form = measure.title.removeprefix("SWD")
    return [Measure(f"SWD {key} px{form}", (metric, key), measure.form, "") for key in levels]


def _name(row: dict[str, Any], run: str) -> str:
    name = in_table(row.get("set", "?"))
    return f"this run, {name.removeprefix(f'{run} ')}" if name.startswith(f"{run} ") else name


def _cell(measure: Measure, row: dict[str, Any]) -> str:
    value = value_at(row, measure.at)
    if value is None:
        return "–"
    shown = measure.form.format(value)
    if measure.title == "C2ST":
        ends = [value_at(row, ("c2st", end)) for end in ("low", "high")]
        if None not in ends:
            shown += f" ({ends[0]:.1%} to {ends[1]:.1%})"
    return shown


def _bars(
    measure: Measure, rows: Sequence[dict[str, Any]], run: str
) -> list[tuple[str, Any, str, float]]:
    """Name, role, number and length in percent."""
    found = [(row, value) for row in rows if (value := value_at(row, measure.at)) is not None]
    full = measure.full or max(max(value for _, value in found), 1e-12)
    return [
        (
            _name(row, run),
            row.get("role"),
            measure.form.format(value),
            100 * min(max(value / full, 0), 1),
        )
        for row, value in found
    ]


def _about(record: dict[str, Any]) -> str:
    """What was compared with what, in a line."""
    weights = {True: ", averaged weights", False: ", weights as trained"}
    ema = record.get("ema")
    what = f"{record.get('checkpoint') or record.get('what') or 'unknown images'}"
    what += weights[ema] if isinstance(ema, bool) else ""
    data = record.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    parts = [in_table(what)]
    if (count := number(record.get("count"))) is not None:
        parts.append(f"{count:,.0f} images of each set")
    parts.append(f"real images of {in_table(source or 'unknown data')}")
    if (seed := number(record.get("seed"))) is not None:
        parts.append(f"seed {seed:.0f}")
    model: dict[str, Any] = next((row for row in record["rows"] if row.get("role") == "model"), {})
    kinds = {"real": "real", "held_out": "held-out real", "fake": "generated"}
    shares = [(kind, value_at(model, ("d_accuracy", key))) for key, kind in kinds.items()]
    if told := [f"{share:.0%} of {kind}" for kind, share in shares if share is not None]:
        parts.append(f"its D tells rightly {', '.join(told)} images")
    parts.append(in_table(record.get("date") or "no date"))
    return " · ".join(parts)


def in_table(value: Any, key: str = "") -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if key.endswith("_bytes") and (count := number(value)) is not None:
        return f"{count / 2**30:,.1f} GiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= TEXT else f"{text[:TEXT]}..."

"""The figures in README.md and kernels/README.md, and for each card under benchmarks/results all
tables (README.md) and the plots, from its records.

python tools/report_benchmarks.py            write them
python tools/report_benchmarks.py --check    exit 1 where they do not say what the records say
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NO_STEPS = "No GPU has measured fastgan yet: the figures will stand here with their records.\n"
NO_KERNELS = (
    "Batch norm, gather and Adam have no records of their own yet; the convolutions' microseconds\n"
    "are in benchmarks/LOG.md and benchmarks/results.\n"
)
KERNELS = Path("kernels") / "README.md"
MARKED = re.compile(rf"(?s)(?!.*{BEGIN}.*{BEGIN})(?!.*{END}.*{END}).*\n{BEGIN}\n.*{END}\n.*")
OURS, MAIN_CASE = "fastgan", "64 px, batch 128"
LENGTH_KIMG = 3000  # of a run whose time stands beside the rates
Record = dict[str, Any]
# What must be the same for figures of two records to stand in one table.
SAME = ("gpu", "driver", "cuda", "torch", "triton", "commit", "clean")
HIDDEN = (
    "test",
    "low_ms",
    "high_ms",
    "tried_ms",
)  # columns that the records alone have


class Damaged(Exception):
    """A record that is none, with its file."""


def read(path: Path) -> Record:
    """A record, with all that every one has."""
    try:
        record = json.loads(path.read_text("utf-8"))
        origin(record)
        record["rows"][0]["test"]
        return record
    except (ValueError, TypeError, LookupError) as error:
        raise Damaged(f"{path} is no record: {type(error).__name__} {error}") from None


def records(results: Path, name: str) -> list[tuple[Path, Record]]:
    """The records NAME.json of all cards."""
    return [(path, read(path)) for path in sorted(results.glob(f"*/{name}.json"))]


def origin(record: Record) -> str:
    """Where a record was made."""
    machine = record["environment"]
    commit = machine["commit"][:10] if machine["commit"] else "unknown"
    tree = commit + ("" if machine["clean"] else ", changed")
    return (
        f"torch {machine['torch']}, Triton {machine['triton']}, CUDA {machine['cuda']}, driver "
        f"{machine['driver']}, commit {tree}, {record['date']}; a copy {record['copy_gbps']:,.0f} "
        f"GB/s, a bf16 matrix product {record['matmul_tflops']:,.0f} TFLOP/s."
    )


def kernels(results: Path) -> str:
    """A table a card: ours in milliseconds and as a share of a copy, then each rival's time as a
    multiple of ours.
    """
    parts = []
    for _, record in records(results, "kernels"):
        lines = [
            f"### {record['environment']['gpu']}\n",
            f"{origin(record)}\n",
            "| operator | case | dtype | ours, ms | of a copy | others, x ours |",
            "|---|---|---|---:|---:|---|",
        ]
        cases: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in record["rows"]:
            cases.setdefault((row["op"], row["case"], row["dtype"]), {})[row["variant"]] = row
        for (op, case, dtype), variants in cases.items():
            if "triton" not in variants:
                continue
            ours = variants.pop("triton")
            others = [f"{name} {row['ms'] / ours['ms']:.2f}" for name, row in variants.items()]
            lines.append(
                f"| {op} | {case} | {dtype} | {ours['ms']:.4f} | {ours['share_of_copy']:.0%} | "
                f"{', '.join(others)} |"
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or NO_KERNELS


def steps(results: Path) -> str:
    """A table a card: the loop and the step, the strongest that is not fastgan, the reference."""
    parts = []
    for path, record in records(results, "step"):
        gpu = record["environment"]["gpu"]
        of_case = [r for r in record["rows"] if r["case"] == MAIN_CASE]
        rows = [r for r in of_case if r["ms"] is not None]
        rivals = [r for r in of_case if not r["variant"].startswith(OURS)]
        without = [r for r in rivals if r["ms"] is None]
        measured = [r for r in rivals if r["ms"] is not None]
        strongest = max(measured, key=lambda r: r["img_per_s"], default=None)
        shown = [
            r
            for r in rows
            if r["variant"] == OURS or r is strongest or r["variant"].startswith("reference")
        ]
        lines = [
            f"### {gpu}, {MAIN_CASE}\n",
            f"| | img/s | {LENGTH_KIMG:,} kimg at that rate | x reference | x strongest | of the "
            "roofline |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for _, train in records(results, "train"):
            if same(train, record):
                lines += [
                    f"| `{row['variant']}` | {row['img_per_s']:,.0f} | {length(row)} | | | |"
                    for row in train["rows"]
                    if row["case"] == MAIN_CASE
                ]
        for row in sorted(shown, key=lambda r: -r["img_per_s"]):
            name = "fastgan, the step alone" if row["variant"] == OURS else row["variant"]
            if row is strongest:
                name += " (the strongest measured)" if without else " (the strongest)"
            against = (f"{row[k]:.2f}" if row[k] else "" for k in ("x_reference", "x_strongest"))
            lines.append(
                f"| {name} | {rate(row)} | {length(row)} | {' | '.join(against)} | "
                f"{percent(row['share_of_roofline'])} |"
            )
        lines += [f"\nWithout a figure: {row['variant']}; {row['reason']}." for row in without]
        for _, runs in records(results, "training"):
            if same(runs, record):
                lines += ["", *trained(runs["rows"])]
        folder = f"benchmarks/results/{path.parent.name}"
        lines.append(f"\n{origin(record)} All sizes, batches and contenders: [{folder}]({folder}).")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or NO_STEPS


def same(one: Record, other: Record) -> bool:
    """Whether figures of both may stand in one table."""
    return all(one["environment"][key] == other["environment"][key] for key in SAME)


def rate(row: dict[str, Any]) -> str:
    """Images a second, and between which they lay (tenth and ninetieth percentile) where these are
    more than a twentieth apart.
    """
    text = f"{row['img_per_s']:,.0f}"
    if "low_ms" not in row or row["high_ms"] - row["low_ms"] < 0.05 * row["ms"]:
        return text
    slow, fast = (row["img_per_s"] * row["ms"] / row[key] for key in ("high_ms", "low_ms"))
    return f"{text} ({slow:,.0f} to {fast:,.0f})"


def length(row: dict[str, Any]) -> str:
    """How long a run of LENGTH_KIMG takes at a row's rate."""
    minutes, seconds = divmod(round(LENGTH_KIMG * 1000 / row["img_per_s"]), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def trained(rows: list[dict[str, Any]]) -> list[str]:
    """Whole runs and what their pictures are worth, beside the real ones."""
    lines = [
        f"Of {rows[0]['images']:,} pictures and as many real ones the sliced Wasserstein distance "
        "(x 1000, less is nearer), how alike pairs of a set are, and how often a small network "
        "tells them from real ones. Each generator is one run at one moment.\n",
        "| pictures | whole run | SWD | MS-SSIM | C2ST |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        run = ""  # one that shared the card with others has no time of its own
        if row["seconds"]:
            whole_rate = 1000 * row["kimg"] / row["seconds"]
            run = f"{row['seconds']:.0f} s: {whole_rate:,.0f} img/s"
        told = f"{row['c2st']:.1%} ({row['c2st_low']:.1%} to {row['c2st_high']:.1%})"
        lines.append(
            f"| {row['variant']} | {run} | {row['swd_mean']:.1f} | {row['ms_ssim']:.3f} | {told} |"
        )
    return lines


def whole(results: Path) -> str:
    """The figures of README.md."""
    return steps(results) + data_path(results)


def data_path(results: Path) -> str:
    """A table a card of the ways from files to squares; what the feeds leave of the step's speed,
    the memory and the first batch beneath it, where records of the same origin have them.
    """
    parts = []
    for path, record in records(results, "data"):
        machine = record["environment"]
        lines = [
            f"### {machine['gpu']}, from files to a cache ({machine['cpu']}, {machine['cores']} "
            "cores)\n",
            "| files | | img/s | of them a core | at the steady rate | `fastgan prepare` is |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in record["rows"]:
            even = row["steady_img_per_s"]
            lines.append(
                f"| {row['case']} | {row['variant']} | {row['img_per_s']:,.0f} | "
                f"{row['img_per_s_core']:,.0f} | {f'{even:,.0f}' if even else ''} | "
                f"{row['fastgan_x']:.2f} x |"
            )
        beside = {
            name: other["rows"]
            for name in ("feeds", "data_memory", "first_batch")
            for of, other in records(results, name)
            if of.parent == path.parent and same(other, record)
        }
        lines += ["", *_feeds(beside.get("feeds", [])), *_beside(beside)]
        lines.append(f"{origin(record)}")
        parts.append("\n".join(lines) + "\n")
    return "".join(f"\n{part}" for part in parts)


def _feeds(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {rows[0]['case']} | img/s | of the step alone |", "|---|---:|---:|"]
    for row in rows:
        share = percent(row["share_of_step"])
        lines.append(f"| {row['variant']} | {row['img_per_s']:,.0f} | {share} |")
    return [*lines, ""]


def _beside(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Memory and first batch, a sentence each."""
    lines = []
    if rows := found.get("data_memory"):
        sums = [f"{row['peak_mb']:,.0f} MB at {row['images']:,} images" for row in rows]
        lines.append(f"`prepare` and its processes take {', '.join(sums)}.")
    for row in found.get("first_batch", []):
        lines.append(
            f"{row['variant']}: {row['first_batch_ms'] / 1000:.2f} s to the first batch of "
            f"{row['case']}, {row['process_ms'] / 1000:.1f} s from the start of the process."
        )
    return lines


def percent(share: float | None) -> str:
    return f"{share:.0%}" if share is not None else ""


def card(folder: Path) -> str:
    """Every record of one card as tables."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        rows = record["rows"]
        parts.append(f"## {path.stem}\n\n{origin(record)} {record.get('note', '')}".rstrip() + "\n")
        if path.stem in PLOTS:
            parts.append(f"![{path.stem}]({path.stem}.png)\n")
        columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in HIDDEN]
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]
        parts.append("\n".join(lines) + "\n")
    return f"# {folder.name}\n\n" + "\n".join(parts)


def cell(value: Any) -> str:
    """A number with four digits, a text on one line, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def written(text: str, figures: str) -> str:
    """`text` with the figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures}{END}{after}"


def draw_step(record: Record) -> Any:
    """Bars of img/s for each case, with the roofline of 16 bits."""
    from matplotlib.figure import Figure

    cases: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["ms"] is not None:
            cases.setdefault(row["case"], []).append(row)
    shares = [len(rows) for rows in cases.values()]
    if not cases:
        return Figure()
    figure = Figure(figsize=(9, 1.2 + 0.28 * sum(shares) + 0.6 * len(cases)), layout="constrained")
    figure.suptitle(f"{record['environment']['gpu']}: images a second, whole steps")
    axes = figure.subplots(len(cases), 1, height_ratios=shares, squeeze=False)[:, 0]
    for axis, (case, rows) in zip(axes, cases.items(), strict=True):
        rows = rows[::-1]
        rates = [row["img_per_s"] for row in rows]
        colors = ["tab:green" if r["variant"].startswith(OURS) else "tab:gray" for r in rows]
        bars = axis.barh([r["variant"] for r in rows], rates, color=colors)
        axis.bar_label(bars, [f" {rate:,.0f}" for rate in rates], fontsize=8)
        floors = [r["img_per_s"] / r["share_of_roofline"] for r in rows if r["share_of_roofline"]]
        for floor in floors[:1]:
            axis.axvline(floor, color="black", linestyle="--", linewidth=1)
            label = f"roofline {floor:,.0f}"
            axis.annotate(label, (floor, 0), ha="right", fontsize=8, rotation=90)
        axis.set_title(case, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0, 1.12 * max([*rates, *floors[:1]]))
    return figure


def draw_growth(record: Record) -> Any:
    """img/s and memory along batch, size and number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    figure.suptitle(f"{record['environment']['gpu']}: how a step grows")
    axes = figure.subplots(2, 3, sharey="row")
    for (above, below), along in zip(axes.T, ("batch", "size", "images"), strict=True):
        rows = [r for r in record["rows"] if r["along"] == along and r["ms"] is not None]
        for axis, key in ((above, "img_per_s"), (below, "memory_mb")):
            axis.plot([r[along] for r in rows], [r[key] for r in rows], marker="o")
            axis.set(xscale="log", yscale="log", xlabel=along, ylabel=key)
            axis.grid(alpha=0.3)
    return figure


PLOTS: dict[str, Callable[[Record], Any]] = {"step": draw_step, "growth": draw_growth}


def plots(results: Path) -> dict[Path, tuple[str, Callable[[], Any]]]:
    """For each picture the digest of what it is drawn from, its record and its code, and how."""
    found = {}
    for name, draw in PLOTS.items():
        for path, record in records(results, name):
            source = path.read_bytes() + inspect.getsource(draw).encode()
            digest = hashlib.sha256(source).hexdigest()
            found[path.with_suffix(".png")] = (digest, lambda d=draw, r=record: d(r))
    return found


def drawn_from(path: Path) -> str | None:
    """The digest that a picture keeps."""
    from PIL import Image

    try:
        return Image.open(path).info.get("Description")
    except OSError:  # there is none, or it is damaged
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of both READMEs")
    args = parser.parse_args()
    results = args.root / "benchmarks" / "results"
    if not results.is_dir():
        parser.error(f"--root: no such folder: {results}")
    wanted: dict[Path, str] = {}
    pictures: dict[Path, tuple[str, Any]] = {}  # drawn before anything is written
    try:
        readmes = {args.root / "README.md": whole, args.root / KERNELS: kernels}
        for path, figures in readmes.items():
            if not path.is_file() or not MARKED.fullmatch(path.read_text("utf-8")):
                parser.error(f"--root: must hold a file with the lines {BEGIN}, then {END}: {path}")
            wanted[path] = written(path.read_text("utf-8"), figures(results))
        folders = [folder for folder in results.iterdir() if folder.is_dir()]
        wanted |= {folder / "README.md": card(folder) for folder in folders}
        for path, (digest, draw) in plots(results).items():
            if drawn_from(path) != digest:
                pictures[path] = digest, None if args.check else draw()
    except Damaged as damage:
        parser.error(str(damage))
    except (KeyError, TypeError, ValueError) as error:
        parser.error(f"a row of a record under {results} is damaged: {error!r}")
    wrong = []
    for path, text in wanted.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            wrong.append(path)
            if not args.check:
                path.write_text(text, "utf-8")
    for path, (digest, picture) in pictures.items():
        wrong.append(path)
        if picture is not None:
            picture.savefig(path, dpi=110, metadata={"Description": digest})
    for path in wrong:
        print(f"{path}: {'not what the records say; run this tool' if args.check else 'written'}")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

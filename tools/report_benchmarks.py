"""The figures in README.md and kernels/README.md and the plots, from the records under
benchmarks/results.

python tools/report_benchmarks.py            write them
python tools/report_benchmarks.py --check    exit 1 where they do not say what the records say
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NO_STEPS = "No GPU has measured fastgan yet: the figures will stand here with their records.\n"
NO_KERNELS = (
    "No GPU has measured these kernels yet: the figures will stand here with their records.\n"
)
OURS, MAIN_CASE = "fastgan", "64 px, batch 128"
Record = dict[str, Any]


def records(results: Path, name: str) -> list[tuple[Path, Record]]:
    """The records NAME.json of all cards."""
    paths = sorted(results.glob(f"*/{name}.json"))
    return [(path, json.loads(path.read_text("utf-8"))) for path in paths]


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
        rows = [r for r in record["rows"] if r["case"] == MAIN_CASE and r["ms"] is not None]
        others = [r for r in rows if not r["variant"].startswith(OURS)]
        strongest = max(others, key=lambda r: r["img_per_s"], default=None)
        shown = [
            r
            for r in rows
            if r["variant"] == OURS or r is strongest or r["variant"].startswith("reference")
        ]
        lines = [
            f"### {gpu}, {MAIN_CASE}\n",
            "| | img/s | x reference | x strongest | of the roofline |",
            "|---|---:|---:|---:|---:|",
        ]
        for _, train in records(results, "train"):
            if train["environment"]["gpu"] == gpu:
                lines += [
                    f"| `{row['variant']}` | {row['img_per_s']:,.0f} | | | |"
                    for row in train["rows"]
                    if row["case"] == MAIN_CASE
                ]
        for row in sorted(shown, key=lambda r: -r["img_per_s"]):
            name = "fastgan, the step alone" if row["variant"] == OURS else row["variant"]
            name += " (the strongest)" if row is strongest else ""
            against = (f"{row[k]:.2f}" if row[k] else "" for k in ("x_reference", "x_strongest"))
            lines.append(
                f"| {name} | {row['img_per_s']:,.0f} | {' | '.join(against)} | "
                f"{row['share_of_roofline']:.0%} |"
            )
        folder = f"benchmarks/results/{path.parent.name}"
        lines.append(f"\n{origin(record)} [All contenders, sizes and batches]({folder}/step.png)")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or NO_STEPS


def written(text: str, figures: str) -> str:
    """`text` with the figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures}{END}{after}"


def plots(results: Path) -> dict[Path, tuple[str, Record]]:
    """For each picture the digest of the record that it is drawn from, and that record."""
    return {
        path.with_suffix(".png"): (hashlib.sha256(path.read_bytes()).hexdigest(), record)
        for path, record in records(results, "step")
    }


def draw(path: Path, digest: str, record: Record) -> None:
    """Bars of img/s for each case, with the roofline; the picture keeps the record's digest."""
    from matplotlib.figure import Figure

    cases: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if row["ms"] is not None:
            cases.setdefault(row["case"], []).append(row)
    height = 1.2 + sum(0.28 * len(rows) + 0.6 for rows in cases.values())
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(f"{record['environment']['gpu']}: images a second, whole steps")
    shares = [len(rows) for rows in cases.values()]
    axes = figure.subplots(len(cases), 1, height_ratios=shares, squeeze=False)[:, 0]
    for axis, (case, rows) in zip(axes, cases.items(), strict=True):
        rows = rows[::-1]
        colors = ["tab:green" if r["variant"].startswith(OURS) else "tab:gray" for r in rows]
        bars = axis.barh([r["variant"] for r in rows], [r["img_per_s"] for r in rows], color=colors)
        axis.bar_label(bars, [f" {r['img_per_s']:,.0f}" for r in rows], fontsize=8)
        floor = rows[0]["img_per_s"] / rows[0]["share_of_roofline"]
        axis.axvline(floor, color="black", linestyle="--", linewidth=1)
        axis.annotate(f"roofline {floor:,.0f}", (floor, 0), ha="right", fontsize=8, rotation=90)
        axis.set_title(case, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0, 1.12 * floor)
    figure.savefig(path, dpi=110, metadata={"Description": digest})


def drawn_from(path: Path) -> str | None:
    """The digest that a picture keeps."""
    from PIL import Image

    return Image.open(path).info.get("Description") if path.is_file() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of both READMEs")
    parser.add_argument("--results", type=Path, help="default: ROOT/benchmarks/results")
    args = parser.parse_args()
    results = args.results or args.root / "benchmarks" / "results"
    if not results.is_dir():
        parser.error(f"--results: no such folder: {results}")
    texts = {args.root / "README.md": steps, args.root / "kernels" / "README.md": kernels}
    for path in texts:
        if not path.is_file() or not {BEGIN, END} <= set(path.read_text("utf-8").splitlines()):
            parser.error(f"--root: must hold a file with the lines {BEGIN} and {END}: {path}")
    wrong = []
    for path, figures in texts.items():
        text = path.read_text("utf-8")
        new = written(text, figures(results))
        if new != text:
            wrong.append(path)
            if not args.check:
                path.write_text(new, "utf-8")
    for path, (digest, record) in plots(results).items():
        if drawn_from(path) != digest:
            wrong.append(path)
            if not args.check:
                draw(path, digest, record)
    for path in wrong:
        print(f"{path}: {'not what the records say; run this tool' if args.check else 'written'}")
    return int(args.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""The figures in kernels/README.md, written from the records under benchmarks/results.

python tools/kernel_tables.py            write them
python tools/kernel_tables.py --check    exit 1 where they do not say what the records say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NONE = "No GPU has measured these kernels yet: the figures will stand here with their records.\n"


def table(record: dict[str, Any]) -> str:
    """One card's rows: ours in milliseconds and as a share of a copy, then each rival's time as a
    multiple of ours.
    """
    machine, rows = record["environment"], record["rows"]
    commit = machine["commit"][:10] if machine["commit"] else "unknown"
    tree = commit + ("" if machine["clean"] else ", changed")
    lines = [
        f"### {machine['gpu']}\n",
        f"torch {machine['torch']}, Triton {machine['triton']}, CUDA {machine['cuda']}, driver "
        f"{machine['driver']}, commit {tree}, {record['date']}; a copy: "
        f"{record['copy_gbps']:,.0f} GB/s.\n",
        "| operator | case | dtype | ours, ms | of a copy | others, x ours |",
        "|---|---|---|---:|---:|---|",
    ]
    cases: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"]), {})[row["variant"]] = row
    for (op, case, dtype), variants in cases.items():
        if "triton" not in variants:
            continue
        ours = variants["triton"]
        others = [
            f"{name} {row['ms'] / ours['ms']:.2f}"
            for name, row in variants.items()
            if name != "triton"
        ]
        lines.append(
            f"| {op} | {case} | {dtype} | {ours['ms']:.4f} | {ours['share_of_copy']:.0%} | "
            f"{', '.join(others)} |"
        )
    return "\n".join(lines) + "\n"


def figures(results: Path) -> str:
    records = [json.loads(p.read_text("utf-8")) for p in sorted(results.glob("*/kernels.json"))]
    return "\n".join(table(record) for record in records) or NONE


def written(text: str, results: Path) -> str:
    """`text` with the figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures(results)}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.results.is_dir():
        parser.error(f"--results: no such folder: {args.results}")
    if not args.readme.is_file() or not {BEGIN, END} <= set(args.readme.read_text().splitlines()):
        parser.error(f"--readme: must be a file with the lines {BEGIN} and {END}: {args.readme}")
    text = args.readme.read_text("utf-8")
    new = written(text, args.results)
    if args.check:
        if new != text:
            print(f"{args.readme}: its figures are not those of {args.results}; run {__file__}")
        return int(new != text)
    args.readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

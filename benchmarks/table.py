"""Writes the tables of `benchmarks/README.md` from the files in `results/`: `python -m benchmarks.table`.

A test compares the page with the files, so a new result and its table are committed together. All rows of a file are
listed, or, of long files, those that have a goal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.result_file import FOLDER, RESULTS

PAGE: Final = FOLDER / "README.md"
KERNELS: Final = frozenset(
    {
        "cpu_kernels",
        "cpu_ops",
        "cpu_steps",
        "gpu_attention",
        "gpu_attention_flashinfer",
        "gpu_moe",
        "gpu_ops",
        "gpu_sampling",
    }
)
LONG: Final = KERNELS | {"fuzz_http", "ipc_overhead", "soak"}
"""Files of which the page shows only rows with a goal."""
FIGURES: Final = ("work (in/out/requests)", "metric", "value", "goal", "peers", "limit", "file")
RUNS: Final = ("file", "device", "date", "commit", "rows")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of a folder by their names without `.json`: of whole systems, then kernels; GPUs first."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}

    def place(name: str) -> tuple[bool, bool, bool, str]:
        return name in KERNELS, name in LONG, not files[name]["device"].startswith("NVIDIA"), name

    return {name: files[name] for name in sorted(files, key=place)}


def figures(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of figures."""
    rows = []
    for name, result in results.items():
        for row in result["rows"]:
            if name in LONG and row["goal"] is None:
                continue
            peers = row["peer"] if isinstance(row["peer"], dict) else {}
            rows.append(
                (
                    row["work"],
                    row["metric"],
                    f"{number(row['value'])} {'' if row['unit'] == '1' else row['unit']}".strip(),
                    "" if row["goal"] is None else number(row["goal"]),
                    ", ".join(f"{peer} {number(value)}" for peer, value in peers.items()),
                    "" if row["limit"] is None else number(row["limit"]),
                    f"`{name}`",
                )
            )
    return table(FIGURES, rows)


def runs(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of files: on what each was measured, when, and by which commit."""
    return table(
        RUNS,
        [
            (
                f"[`{name}`](results/{name}.json)",
                result["device"],
                result["date"][:10],
                re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", result["commit"]),
                str(len(result["rows"])),
            )
            for name, result in results.items()
        ],
    )


def number(value: float) -> str:
    """Four digits, or all of those before the point; of very large numbers four and a power of ten."""
    if abs(value) >= 1e12:
        return f"{value / 1e12:.4g}e12"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.4g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *others = (f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (head, *rows))
    return "\n".join([first, f"|{'---|' * len(head)}", *others])


def page_with(page: str, tables: Mapping[str, str]) -> str:
    """The text of a page with what stands between the marks of each table replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    for name, text in tables.items():
        begin, end = f"<!-- {name}: written by python -m benchmarks.table -->", f"<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"The page needs the lines '{begin}' and '{end}', once and in this order.")
        page = page[: page.index(begin) + len(begin)] + f"\n\n{text}\n\n" + page[page.index(end) :]
    return page


def new_page(page: Path, folder: Path = RESULTS) -> str:
    """The page as the result files say it should be."""
    results = read_results(folder)
    return page_with(page.read_text(encoding="utf-8"), {"figures": figures(results), "runs": runs(results)})


def main() -> None:
    """Write the page."""
    PAGE.write_text(new_page(PAGE), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Recorded figures: JSON with the environment, written after every case, and tables of it in Markdown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvae._files import write_bytes, write_json

Figures = dict[str, Any]
Rows = list[list[str]]  # the first is the head
_VARIES = ("date", "command")  # what may differ between two runs into one file


class Results:
    """The environment, and the figures of each case, in memory and, unless `path` is None, in a JSON file.

    What the file holds of this commit and machine stays.
    """

    def __init__(self, path: Path | None, environment: Figures) -> None:
        self.path = path
        self.cases: dict[str, Figures] = {}
        self.content: Figures = {"environment": environment, "cases": self.cases}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
            if all(earlier["environment"].get(key) == v for key, v in environment.items() if key not in _VARIES):
                self.cases |= earlier["cases"]

    def has(self, case: str) -> bool:
        """Whether the case is recorded and nothing in it failed."""
        return case in self.cases and not self.cases[case].get("failed")

    def record(self, case: str, figures: Figures) -> None:
        """Keep the figures. What "failed" among them has the case tried again by a later run."""
        self.cases[case] = figures
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)

    def write_markdown(self) -> str:
        """Environment, times and ratios, memory, best and worst, and what failed; also in a file beside the JSON."""
        lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in self.content["environment"].items())]
        lines += ["", "## Median time, and how many times as long each baseline takes: median (quartiles)", ""]
        lines += [*_table(ratios(self.cases)), "", "## Peak memory of one call, MiB", "", *_table(memory(self.cases))]
        lines += ["", "## Summary", "", *(f"- {line}" for line in [*extremes(self.cases), *failures(self.cases)]), ""]
        if self.path is not None and self.path.exists():
            write_bytes(self.path.with_suffix(".md"), "\n".join(lines).encode())
        return "\n".join(lines)


def _table(rows: Rows) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _ratios(cases: dict[str, Figures]) -> Iterator[tuple[str, str, dict[str, Figures]]]:
    """Case, provider of ours, ratios by baseline."""
    for case, figures in cases.items():
        yield from ((case, ours, found) for ours, found in figures.get("ratio", {}).items())


def ratios(cases: dict[str, Figures]) -> Rows:
    """The time of each of ours, and how many times as long each baseline took."""
    baselines = list(dict.fromkeys(name for _, _, found in _ratios(cases) for name in found))
    rows = [["case", "provider", "time", *baselines]]
    for case, ours, found in _ratios(cases):
        cells = ["{median:.2f}x ({low:.2f}-{high:.2f})".format(**found[b]) if b in found else "-" for b in baselines]
        us = cases[case]["us"][ours]["median"]
        rows.append([case, ours, f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us", *cells])
    return rows


def memory(cases: dict[str, Figures]) -> Rows:
    peaks = {case: figures.get("peak_mib", {}) for case, figures in cases.items()}
    names = list(dict.fromkeys(name for found in peaks.values() for name in found))
    cell = {case: [f"{found[n]:.2f}" if n in found else "-" for n in names] for case, found in peaks.items() if found}
    return [["case", *names], *([case, *row] for case, row in cell.items())]


def extremes(cases: dict[str, Figures]) -> list[str]:
    """For each of ours and each baseline, the best case and the worst."""
    found: dict[str, list[tuple[float, str]]] = {}
    for case, ours, by_baseline in _ratios(cases):
        for baseline, ratio in by_baseline.items():
            found.setdefault(f"{ours} against {baseline}", []).append((ratio["median"], case))
    line = "{}: best {:.2f}x ({}), worst {:.2f}x ({})"
    return [line.format(pair, *max(medians), *min(medians)) for pair, medians in found.items()]


def failures(cases: dict[str, Figures]) -> list[str]:
    return [f"{case}: {name}: {e}" for case, figures in cases.items() for name, e in figures.get("failed", {}).items()]

"""What a run says: ratios best and worst alike, memory, and both in files that can be kept."""

from pathlib import Path
from typing import Any

from fastvae._files import dump_json, null_non_finite

from .comparison import OURS, Comparison
from .measure import Ratio
from .peers import OURS_IN_PLACE
from .results import Figures, markdown_row, write_atomically

Rows = list[list[str]]  # the first is the head


def ratio_rows(comparisons: list[Comparison]) -> Rows:
    """The time of each of ours, and how many times as long each peer took, with quartiles."""
    peers = list(dict.fromkeys(peer for c in comparisons for peer in c.ratios()))
    rows = [["case", "who", "time", *peers]]
    for c in comparisons:
        for ours in (OURS, OURS_IN_PLACE):
            if ratios := c.ratios(ours):
                cells = [ratio_cell(ratios[peer]) if peer in ratios else "-" for peer in peers]
                rows.append([c.name, ours, duration(c.timings.median(ours)), *cells])
    return rows


def memory_rows(comparisons: list[Comparison]) -> Rows:
    """MiB that one call allocates at its peak."""
    names = list(dict.fromkeys(name for c in comparisons for name in c.peak_mib))
    cells = [[f"{c.peak_mib[name]:.2f}" if name in c.peak_mib else "-" for name in names] for c in comparisons]
    return [["case", *names], *([c.name, *row] for c, row in zip(comparisons, cells, strict=True))]


def extremes(comparisons: list[Comparison]) -> list[str]:
    """For each of ours and each peer, the best case and the worst."""
    lines = []
    for ours in (OURS, OURS_IN_PLACE):
        found = [(peer, ratio.median, c.name) for c in comparisons for peer, ratio in c.ratios(ours).items()]
        for peer in dict.fromkeys(peer for peer, _, _ in found):
            medians = [(median, name) for other, median, name in found if other == peer]
            (best, at_best), (worst, at_worst) = max(medians), min(medians)
            lines.append(f"{ours} against {peer}: best {best:.2f}x ({at_best}), worst {worst:.2f}x ({at_worst})")
    return lines


def failures(comparisons: list[Comparison]) -> list[str]:
    return [
        f"{provider} is not in {c.name}: {error}" for c in comparisons for provider, error in sorted(c.failed.items())
    ]


def aligned(rows: Rows) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def figures(comparison: Comparison) -> Figures:
    """All of a comparison that JSON can hold; units in the keys."""
    found: Figures = {} if comparison.moved_bytes is None else {"needed_mb": comparison.moved_bytes / 1e6}
    for name in comparison.timings.seconds:
        found[f"{name}_us"] = comparison.timings.median(name) * 1e6
    for ours in (OURS, OURS_IN_PLACE):
        found |= {f"{peer}/{ours}": ratio._asdict() for peer, ratio in comparison.ratios(ours).items()}
    found |= {f"{name}_peak_mib": mib for name, mib in comparison.peak_mib.items()}
    if comparison.failed:
        found["failed"] = failures([comparison])
    return found


def record(stem: Path, environment: dict[str, Any], comparisons: list[Comparison]) -> list[Path]:
    """Write STEM.json, which holds every figure, and STEM.md, which is for reading; return both."""
    content = {"environment": environment, "cases": {c.name: figures(c) for c in comparisons}}
    lines = [f"# {stem.name}", "", *(f"- {key}: {value}" for key, value in environment.items())]
    for title, rows in (
        ("Time, and that of each peer over it: median of paired rounds (quartiles)", ratio_rows(comparisons)),
        ("Peak memory of one call, MiB", memory_rows(comparisons)),
    ):
        lines += ["", f"## {title}", "", *markdown(rows)]
    lines += ["", "## Best and worst", "", *(f"- {line}" for line in extremes(comparisons) + failures(comparisons))]
    written = {f"{stem}.json": dump_json(null_non_finite(content), indent=1), f"{stem}.md": "\n".join(lines)}
    for path, text in written.items():
        write_atomically(Path(path), text + "\n")
    return [Path(path) for path in written]


def markdown(rows: Rows) -> list[str]:
    head, *body = rows
    return [markdown_row(row) for row in (head, ["---"] * len(head), *body)]


def ratio_cell(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"

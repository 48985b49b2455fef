"""Pictures of a run: ratio by size, memory by size, and on a GPU the bandwidth reached against that of a copy."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .comparison import OURS, Comparison
from .peers import OURS_IN_PLACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COPY = "copy"
Series = dict[str, list[tuple[float, float]]]  # points (x, y) by the name of a line
Draw = Callable[["Axes", list[Comparison]], None]


def save_plots(folder: Path, comparisons: list[Comparison]) -> list[Path]:
    """Write the PNG files and return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib, which is not installed. Run: pip install "fastvae-triton[train]"'
        ) from error

    kinds = _by_kind(comparisons)
    pictures: dict[str, Draw] = {"ratio_by_size": _draw_ratios, "memory_by_size": _draw_memory}
    if any(COPY in c.timings.seconds for c in comparisons):
        pictures["roofline"] = _draw_roofline
    columns = min(3, len(kinds))
    written = []
    for name, draw in pictures.items() if kinds else ():
        figure = Figure(figsize=(5 * columns, 3.6 * -(-len(kinds) // columns)), layout="constrained")
        for place, (kind, found) in enumerate(kinds.items(), start=1):
            axes = figure.add_subplot(-(-len(kinds) // columns), columns, place)
            axes.set_title(kind, fontsize="medium")
            draw(axes, found)
            axes.set_xscale("log")
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(LogFormatter(minor_thresholds=(1, 0.5)))  # 0.5, not a power of ten
            axes.legend(fontsize="x-small")
        path = folder / f"{name}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _by_kind(comparisons: list[Comparison]) -> dict[str, list[Comparison]]:
    """Those of several sizes, if there are any: one point shows nothing by size."""
    kinds: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.case is not None and OURS in comparison.timings.seconds:
            kinds.setdefault(comparison.case.kind, []).append(comparison)
    return {kind: found for kind, found in kinds.items() if len(found) > 1} or kinds


def ratio_series(comparisons: list[Comparison]) -> Series:
    """Time of each peer over fastvae's, and of fastvae's own over itself in place, by elements."""
    series: Series = {}
    for c in comparisons:
        for peer, ratio in c.ratios().items():
            series.setdefault(peer, []).append((_elements(c), ratio.median))
        if OURS_IN_PLACE in c.timings.seconds:
            in_place = c.timings.ratio(OURS_IN_PLACE, OURS).median
            series.setdefault(OURS_IN_PLACE, []).append((_elements(c), in_place))
    return {name: sorted(points) for name, points in series.items()}


def memory_series(comparisons: list[Comparison]) -> Series:
    """MiB at the peak of a call of each provider, by elements."""
    series: Series = {}
    for c in comparisons:
        for name, mib in c.peak_mib.items():
            series.setdefault(name, []).append((_elements(c), mib))
    return {name: sorted(points) for name, points in series.items()}


def bandwidth_series(comparisons: list[Comparison]) -> Series:
    """Bytes that have to be moved over the time of each provider, by those bytes: a copy of as many is the roof."""
    series: Series = {}
    for c in comparisons:
        for name in c.timings.seconds:
            if c.moved_bytes:
                point = (float(c.moved_bytes), c.moved_bytes / c.timings.median(name) / 1e9)
                series.setdefault(name, []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def _elements(comparison: Comparison) -> float:
    assert comparison.case is not None
    return float(comparison.case.elements)


def _draw(axes: "Axes", series: Series, x: str, y: str) -> None:
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _draw_ratios(axes: "Axes", comparisons: list[Comparison]) -> None:
    _draw(axes, ratio_series(comparisons), "elements", f"time over that of {OURS}")
    axes.axhline(1.0, color="black", linewidth=0.8)


def _draw_memory(axes: "Axes", comparisons: list[Comparison]) -> None:
    _draw(axes, memory_series(comparisons), "elements", "peak of one call (MiB)")


def _draw_roofline(axes: "Axes", comparisons: list[Comparison]) -> None:
    _draw(axes, bandwidth_series(comparisons), "bytes to be moved", "GB/s")

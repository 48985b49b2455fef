"""The tables of docs/benchmarks.md, of the loss and of the whole training step, from recorded figures.

`python -m benchmarks.readme benchmarks/results/cpu-*.json` prints it.
"""

import sys
from pathlib import Path
from typing import Any

from fastvae._files import read_json_object

from .peers import COMPILED, OURS, OURS_IN_PLACE
from .report import Rows, duration, markdown

PEERS = ("eager", COMPILED)


def rows(cases: dict[str, dict[str, Any]]) -> Rows:
    """Time of each, and how many times as fast as each peer ours is, of what a training step does."""
    found = [["", *PEERS, *(f"{name} (over {', over '.join(PEERS)})" for name in (OURS, OURS_IN_PLACE))]]
    for case, figures in cases.items():
        if case.startswith("step ") or (case.startswith("whole ") and case.endswith("forward+backward")):
            theirs = [_time(figures, peer) for peer in PEERS]
            found.append([_words(case), *theirs, *(_ours(figures, name) for name in (OURS, OURS_IN_PLACE))])
    return found


def table(recorded: Path) -> list[str]:
    """Lines of Markdown: where and when, then the figures."""
    content = read_json_object(recorded)
    environment = content["environment"]
    keys = ("processor", "allocator", "clock")
    where = ", ".join([f"torch {environment['torch']}", *(environment[key] for key in keys if key in environment)])
    return [f"`{environment['command']}`, {environment['date']}, {where}:", "", *markdown(rows(content["cases"]))]


def _words(case: str) -> str:
    return case.replace("whole ", "loss ").replace(" forward+backward", "")


def _time(figures: dict[str, Any], name: str) -> str:
    return duration(figures[f"{name}_us"] * 1e-6) if f"{name}_us" in figures else "-"


def _ours(figures: dict[str, Any], name: str) -> str:
    ratios = (figures.get(f"{peer}/{name}") for peer in PEERS)
    times = [f"{ratio['median']:.2f}x" if ratio else "-" for ratio in ratios]
    return f"{_time(figures, name)} ({', '.join(times)})" if f"{name}_us" in figures else "-"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print("\n".join([*table(Path(argument)), ""]))

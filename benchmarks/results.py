"""Figures of a run on one GPU, one day, one commit: kept after every measurement, so that a run can be resumed."""

import re
from pathlib import Path
from typing import Any

from fastvae._files import dump_json, null_non_finite, read_json_object, write_bytes

Figures = dict[str, Any]


def write_atomically(path: Path, text: str) -> None:
    """The old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


class Results:
    """`<gpu>-<date>.json`: the environment, and figures by part and case.

    Args:
        folder: Where the file stands.
        environment: Stamp of this machine and checkout; its "gpu", "date" and "commit" decide which file is resumed.
        fresh: Measure again what the file holds already.
    """

    def __init__(self, folder: Path, environment: Figures, *, fresh: bool = False) -> None:
        gpu = re.sub(r"[^a-z0-9]+", "-", str(environment.get("gpu", "cpu")).lower()).strip("-")
        self.path = folder / f"{gpu}-{environment['date']}.json"
        self.content: dict[str, Any] = {"environment": environment, "parts": {}}
        if self.path.exists():
            earlier = read_json_object(self.path)
            commit = earlier["environment"]["commit"]
            if commit != environment["commit"]:  # other code: its figures stay, under another name
                self.path.replace(self.path.with_name(f"{self.path.stem}-{commit}.json"))
            elif not fresh:
                self.content["parts"] = earlier["parts"]

    def has(self, part: str, case: str) -> bool:
        """Whether the case is recorded and nothing in it failed."""
        return "failed" not in self.content["parts"].get(part, {}).get(case, {"failed": "not measured"})

    def record(self, part: str, case: str, figures: Figures) -> None:
        """Keep the figures; "failed" among them says what went wrong, and has the case tried again by a later run."""
        self.content["parts"].setdefault(part, {})[case] = figures
        write_atomically(self.path, dump_json(null_non_finite(self.content), indent=1))

    def write_markdown(self) -> Path:
        """A table of each part beside the file; returns its path."""
        lines = [f"# {self.path.stem}", ""]
        lines += [f"- {key}: {value}" for key, value in self.content["environment"].items()]
        for part, cases in self.content["parts"].items():
            columns = list(dict.fromkeys(key for figures in cases.values() for key in figures))
            lines += [
                "",
                f"## {part}",
                "",
                markdown_row(["case", *columns]),
                markdown_row(["---"] * (1 + len(columns))),
            ]
            lines += [
                markdown_row([case, *(_cell(figures.get(c)) for c in columns)]) for case, figures in cases.items()
            ]
        path = self.path.with_suffix(".md")
        write_atomically(path, "\n".join(lines) + "\n")
        return path


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The subcommands: options, what runs them, and the help that teaches them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvae.training import TrainConfig

from . import bench, doctor, evaluate, pictures, report, train


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        options: Dataclass of its options, which all have a docstring.
        run: Takes the options, returns the exit status.
        help: One line, paragraphs and examples, which are shown unwrapped.
        groups: Names of options by the title that `--help` lists them under.
    """

    options: type
    run: Callable[[Any], int]
    help: str
    groups: Mapping[str, str] = field(default_factory=dict)


COMMANDS = {
    "train": Command(TrainConfig, train.run, train.HELP, train.GROUPS),
    "sample": Command(pictures.Sample, pictures.sample, pictures.SAMPLE_HELP),
    "reconstruct": Command(pictures.Reconstruct, pictures.reconstruct, pictures.RECONSTRUCT_HELP),
    "interpolate": Command(pictures.Interpolate, pictures.interpolate, pictures.INTERPOLATE_HELP),
    "evaluate": Command(evaluate.Evaluate, evaluate.run, evaluate.HELP),
    "report": Command(report.Report, report.run, report.HELP),
    "bench": Command(bench.Bench, bench.run, bench.HELP),
    "doctor": Command(doctor.Doctor, doctor.run, doctor.HELP),
}

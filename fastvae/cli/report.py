"""`fastvae report`: a run as one page."""

from dataclasses import dataclass

from fastvae.evaluation.elbo import baseline_nats, evaluate
from fastvae.training.config import read_run_config
from fastvae.training.run_folder import METRICS_FILE, read_metrics, wrap_io_errors

from .inputs import ModelOptions, load_images, load_objective

HELP = """Draw the pictures and report.html of a run anew: of one that was stopped, say, or that is still training.

The page holds curves, reconstructions over time, samples, interpolations, latent traversals and a map of the latent
space. It needs no other file and no network.

Examples:
  fastvae report --model runs/first
"""


@dataclass(frozen=True, kw_only=True)
class Report(ModelOptions):
    """Options of `fastvae report`."""


def run(options: Report) -> int:
    """Write the page and say where it is."""
    from fastvae.evaluation.report import summarize

    read_run_config(options.model)  # a folder without one is no run
    objective = load_objective(options.model, options.device)
    validation, train, _ = load_images(options.model, objective.model, None)
    scores = evaluate(objective, validation)
    baseline = baseline_nats(train, validation, objective.likelihood)
    records = read_metrics(options.model / METRICS_FILE)
    with wrap_io_errors(options.model):
        report, *_ = summarize(options.model, objective, validation, scores, records=records, baseline=baseline)
    print(report)
    return 0

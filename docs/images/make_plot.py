"""Draw loss_time.png from recorded figures: `python docs/images/make_plot.py` in the root of a checkout."""

import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RECORDED = HERE.parent.parent / "benchmarks" / "results" / "cpu-caching-malloc.json"
PROVIDERS = {"eager": "#b8bcc2", "torch.compile": "#7d838c", "fastvae": "#3f78c9", "fastvae in place": "#173f7a"}


def main() -> None:
    """Bars of the time of each provider over that of eager PyTorch, for every size and dtype of the loss."""
    content = json.loads(RECORDED.read_text())
    cases = {
        name.removeprefix("whole ").removesuffix(" forward+backward"): figures
        for name, figures in content["cases"].items()
        if name.startswith("whole ") and name.endswith(" forward+backward")
    }
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for i, (provider, color) in enumerate(PROVIDERS.items()):
        places = [place + 0.2 * (i - 1.5) for place in range(len(cases))]
        relative = [figures[f"{provider}_us"] / figures["eager_us"] for figures in cases.values()]
        axes.bar(places, relative, width=0.19, color=color, label=provider)
    axes.set_xticks(range(len(cases)), [name.replace(" ", "\n", 1) for name in cases], fontsize="small")
    axes.set_ylabel("time / eager's time")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(HERE / "loss_time.png", dpi=110)


if __name__ == "__main__":
    main()

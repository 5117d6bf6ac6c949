"""Picture of a training run's losses."""

from __future__ import annotations

from pathlib import Path

import torch

from tools.nano.train import STATE_FILE

CURVE_FILE = "curve.png"


def draw_curve(folder: Path) -> Path:
    """Draw every loss of the run in ``folder`` over its steps to ``curve.png`` there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve: list[dict[str, float]] = torch.load(folder / STATE_FILE, weights_only=True)["curve"]
    names = list(dict.fromkeys(name for line in curve for name in line if name != "step"))
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in names:
        points = [(line["step"], line[name]) for line in curve if name in line]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title="Training losses")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / CURVE_FILE, dpi=110)
    pyplot.close(figure)
    return folder / CURVE_FILE

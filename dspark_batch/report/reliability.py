"""The reliability plot: predicted against observed survival of draft prefixes. Needs the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark_batch.errors import ConfigError, Problem

Bin = tuple[float, float, int]
"""Mean predicted chance, observed frequency, number of predictions."""


def save_reliability_plot(estimators: Mapping[str, Sequence[Sequence[Bin]]], path: Path) -> None:
    """A panel for each estimator, a line for each draft position, the file's kind by its ending.

    estimators: name -> positions -> bins by rising chance. The area of a dot is its share of the predictions.

    Raises:
        ConfigError: matplotlib is not installed, or it does not know the ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            [Problem("--plot", "needs matplotlib; install dspark-batch[report]", "command line")]
        ) from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ConfigError([Problem("--plot", f"must end in one of {', '.join(sorted(known))}, got {path.name!r}")])
    figure = Figure(figsize=(4.2 * max(1, len(estimators)), 4.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(estimators)), squeeze=False, sharey=True)[0]
    for panel, (name, positions) in zip(axes, estimators.items(), strict=False):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for number, bins in enumerate(positions):
            total = sum(count for _, _, count in bins)
            color = f"C{number % 10}"
            x, y = [chance for chance, _, _ in bins], [frequency for _, frequency, _ in bins]
            panel.plot(x, y, color=color, linewidth=0.8, label=f"position {number + 1}")
            panel.scatter(x, y, s=[200 * count / total for _, _, count in bins], color=color, alpha=0.6)
        panel.set_title(name)
        panel.set_xlabel("predicted survival")
        panel.legend(fontsize="small")
    axes[0].set_ylabel("observed")
    figure.savefig(path)

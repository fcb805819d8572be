"""The pictures in a run's folder. Where one cannot be drawn, a line says so and the run goes on."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlr_snet_scale import MeasuredScale
from utils import first_line, rank, write_atomically


def write_picture(path: Path, draw: Callable[[Any], Any], dpi: int = 120) -> None:
    """Write the figure that `draw` makes of matplotlib's class Figure. Rank 0 writes."""
    if rank():
        return
    try:
        from matplotlib import style
        from matplotlib.figure import Figure  # without pyplot, no display is needed

        image = io.BytesIO()
        with style.context("default", after_reset=True):  # a user's matplotlibrc may ask for LaTeX
            draw(Figure).savefig(image, format="png", dpi=dpi)
        write_atomically(path, image.getvalue())
    except Exception as error:
        tqdm.write(f"warning: {path.name} could not be drawn ({first_line(error)})", file=sys.stderr)


def draw_run(path: Path, rows: list[dict[str, float]]) -> None:
    """run.png: training and test loss, accuracy or perplexity, those of averaged weights, and LR over the epochs.

    rows are those of metrics.csv.
    """
    def draw(make_figure: Any) -> Any:
        epochs = [row["epoch"] for row in rows]
        figure = make_figure(figsize=(12, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        metric = ("acc", "accuracy (%)") if "test_acc" in rows[0] else ("ppl", "perplexity")
        columns = (("loss", "loss (nats)"), metric)
        for panel, (column, label) in zip(panels, columns, strict=False):
            curves = {f"train_{column}": ("-", "train"), f"train_clean_{column}": (":", "train, true labels"),
                      f"test_{column}": ("--", "test"),
                      f"test_{column}_average": ("k-", "test, averaged weights")}
            for name, (style, title) in curves.items():
                if name in rows[0]:
                    panel.plot(epochs, [row[name] for row in rows], style, label=title)
            panel.set(xlabel="epoch", ylabel=label)
            panel.legend(fontsize="small")
        panels[2].plot(epochs, [row["lr"] for row in rows], "k-")
        panels[2].set(xlabel="epoch", ylabel="learning rate (mean of the epoch)")
        panels[2].set_ylim(0, 1.05 * panels[2].get_ylim()[1])  # keeps a constant rate off the frame
        for panel in panels:
            panel.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(path.parent.name.encode(errors="replace").decode(), parse_math=False)
        return figure

    write_picture(path, draw)


def draw_scale(path: Path, measured: MeasuredScale) -> None:
    """lr_scale.png: the loss against the rate of the range test, and the losses of the cosine trials."""

    def draw(make_figure: Any) -> Any:
        range_test, *cosines = measured.trials
        kind = "guessed scale" if measured.refusal else "measured scale"
        start = sum(range_test.losses[:20]) / 20
        figure = make_figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2 if cosines else 1, squeeze=False)
        left, right = panels[0, 0], panels[0, -1]
        left.plot(range_test.rates, range_test.losses, color="0.6", linewidth=1, label="training loss")
        left.axvline(measured.scale, color="k", linestyle="--", label=f"{kind} {measured.scale:.3g}")
        left.set(xscale="log", ylim=(0, 1.6 * start), xlabel="learning rate", ylabel="training loss (nats)",
                 title="LR range test")
        for trial in cosines:
            right.plot(range(1, len(trial.losses) + 1), trial.losses, label=f"peak {trial.rates[0]:.3g}")
        if cosines:
            right.set(ylim=(0, 1.6 * start), xlabel="step", ylabel="training loss (nats)", title="Cosine trials")
        for panel in panels.flat:
            panel.legend(fontsize="small")
        return figure

    write_picture(path, draw)

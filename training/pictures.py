"""Pictures: the set-up of matplotlib, and what lies in a run's folder.

Where a run's picture cannot be drawn, a line says so and the run goes on.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mlr_snet_scale import MeasuredScale
from training.log import warn
from utils import first_line, rank, write_atomically

METRICS = {"acc": "accuracy (%)", "r2": "explained (%)", "ppl": "perplexity"}  # of a task -> its label


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure for a file, without a display, and its panels (rows, columns), each so many inches wide and high."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a user's matplotlibrc may ask for LaTeX
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path, dpi: int = 90) -> None:
    """Write a PNG of 256 colours, which takes a third of the space."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_atomically(path, small.getvalue())


def write_picture(path: Path, draw: Callable[..., Any], *content: Any) -> None:
    """Write the figure that `draw` makes of the path and the content. Rank 0 writes."""
    if rank():
        return
    try:
        save(draw(path, *content), path, dpi=120)
    except Exception as error:
        warn(f"{path.name} could not be drawn ({first_line(error)})")


def draw_curve(panel: Any, rows: list[dict[str, float]], name: str, style: str, **options: Any) -> None:
    """A line through the column's values over the epochs that have one, or a dot where there is one epoch."""
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    panel.plot(*zip(*points, strict=True), style, marker="o" if len(points) == 1 else None, **options)


def draw_run(path: Path, rows: list[dict[str, float]]) -> Any:
    """For run.png: training and test loss, accuracy or perplexity, those of averaged weights, and LR over the epochs.

    rows are those of metrics.csv.
    """
    figure, (panels,) = subplots(1, 3, 4, 3.4)
    metric = next((name, label) for name, label in METRICS.items() if f"test_{name}" in rows[-1])
    loss_unit = "mean squared error" if metric[0] == "r2" else "nats"
    columns = (("loss", f"loss ({loss_unit})"), metric)
    for panel, (column, label) in zip(panels, columns, strict=False):
        curves = {f"train_{column}": ("-", "train"), f"train_clean_{column}": (":", "train, true labels"),
                  f"test_{column}": ("--", "test"),
                  f"test_{column}_average": ("k-", "test, averaged weights")}
        for name, (style, title) in curves.items():
            if name in rows[-1]:
                draw_curve(panel, rows, name, style, label=title)
        panel.set(xlabel="epoch", ylabel=label)
        if column == "r2":
            panel.set_ylim(0, 100)  # an untrained network can explain −1000 %
        panel.legend(fontsize="small")
    draw_curve(panels[2], rows, "lr", "k-")
    panels[2].set(xlabel="epoch", ylabel="learning rate (mean of the epoch)")
    panels[2].set_ylim(0, 1.05 * panels[2].get_ylim()[1])  # keeps a constant rate off the frame
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(path.parent.name.encode(errors="replace").decode(), parse_math=False)
    return figure


def draw_scale(path: Path, measured: MeasuredScale) -> Any:
    """For lr_scale.png: the loss against the rate of the range test, and the losses of the cosine trials."""
    range_test, *cosines = measured.trials
    kind = "guessed" if measured.refusal else "measured"
    label = f"{kind} peak {measured.scale:.3g} (γ {2 * measured.scale:.3g})"
    start = sum(range_test.losses[:20]) / 20
    figure, panels = subplots(1, 2 if cosines else 1, 4.5, 3.6)
    left, right = panels[0, 0], panels[0, -1]
    left.plot(range_test.rates, range_test.losses, color="0.6", linewidth=1, label="training loss")
    left.axvline(measured.scale, color="k", linestyle="--", label=label)
    left.set(xscale="log", ylim=(0, 1.6 * start), xlabel="learning rate", ylabel="training loss",
             title="LR range test")
    for trial in cosines:
        right.plot(range(1, len(trial.losses) + 1), trial.losses, label=f"peak {trial.rates[0]:.3g}")
    if cosines:
        right.set(ylim=(0, 1.6 * start), xlabel="step", ylabel="training loss", title="Cosine trials")
    for panel in panels.flat:
        panel.legend(fontsize="small")
    return figure

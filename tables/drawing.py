"""The pictures of the tables."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import Record, by_group, leading, ranking, unit_of

from training.pictures import save, subplots

# Okabe and Ito's colours, which the colour-blind can tell apart, and wine instead of their yellow.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#882255"]
GREY = "#BBBBBB"


def coloured(records: list[Record], highlight: Sequence[str], most: int = len(COLOURS)) -> list[str]:
    """The labels to draw in colour, in the records' order: of the methods in `highlight`, or at most `most` by default.

    By default MLR-SNet comes first, then what ends best.
    """
    methods = dict.fromkeys(record["method"] for record in records)
    ours = [record["method"] for record in records if record["is_ours"]]
    chosen = highlight or leading(ranking(records), ours, most)
    return [method for method in methods if method in chosen]


def style_of(label: str, chosen: Sequence[str], is_ours: bool) -> dict[str, Any]:
    """Colour and line of a label; grey and thin where it is not chosen."""
    if label not in chosen:
        return {"color": GREY, "linewidth": 0.9, "zorder": 1}
    place = chosen.index(label)
    line = ["-", "--", ":"][place // len(COLOURS) % 3]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": line, "linewidth": 2.4 if is_ours else 1.3,
            "zorder": 2}


def draw(path: Path, records: list[Record], highlight: Sequence[str] = ()) -> None:
    """A row of panels for every group: training loss, test metric with a band of one standard deviation over the seeds
    (of the averaged weights as well, where there are any), and LR, against epochs.
    """
    records = [record for record in records if "runs" in record]
    groups = by_group(records)
    is_averaged = any("average_mean" in record for record in records)
    figure, panels = subplots(max(1, len(groups)), 4 if is_averaged else 3, width=4.6, height=3.8)
    chosen = coloured(records, highlight)
    for row, members in zip(panels, groups.values(), strict=False):  # no group where every run diverged
        metric, unit = members[0]["metric"], unit_of(members)
        is_regression = metric == "test_r2"
        loss_unit = "mean squared error" if is_regression else "nats"
        shown = {"train_loss": f"training loss ({loss_unit})", metric: unit}
        if is_averaged:
            shown[f"{metric}_average"] = f"{unit}, averaged weights"
        shown["lr"] = "learning rate (mean of the epoch)"
        for panel, (column, label) in zip(row, shown.items(), strict=True):
            for record in members:
                style = style_of(record["method"], chosen, record["is_ours"])
                _draw_curve(panel, record, column, style, has_band=column.startswith(metric))
            panel.set(xlabel="epoch", ylabel=label)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if column == "lr" or (is_regression and column == "train_loss"):
                panel.set_yscale("log")
            elif is_regression:  # a diverging run explains less than nothing
                panel.set_ylim(0, 100)
            elif metric == "test_ppl" and column.startswith(metric):
                _logarithmic(panel)
        row[0].set_title(members[0]["title"], loc="left")
        _legend(row[-1], [record["method"] for record in members if record["method"] not in chosen])
    save(figure, path)


def _draw_curve(panel: Any, record: Record, column: str, style: dict[str, Any], has_band: bool) -> None:
    """The mean of a column over the seeds."""
    runs = record["runs"]
    epochs, means, low, high = [], [], [], []
    for rows in zip(*runs, strict=False):
        if column not in rows[0]:  # an epoch without a test
            continue
        values = [row[column] for row in rows]
        epochs.append(rows[0]["epoch"])
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        means.append(mean)
        low.append(mean - deviation)
        high.append(mean + deviation)
    is_grey = style["color"] == GREY
    panel.plot(epochs, means, label=None if is_grey else record["method"], **style)
    if has_band and not is_grey and len(runs) > 1:
        panel.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _legend(panel: Any, others: list[str]) -> None:
    """The coloured lines one by one, beside the panel; the grey ones together."""
    if others:
        text = textwrap.fill(f"others: {', '.join(others)}", 36)
        panel.plot([], [], color=GREY, linewidth=0.9, label=text)
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))


def _logarithmic(panel: Any) -> None:
    """A scale for perplexities, with whole numbers beside it."""
    panel.set_yscale("log")
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter("{x:.0f}")

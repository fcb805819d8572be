"""What a table says: results and costs, as CSV files, a page and pictures, all computed from the run folders."""

import csv
import io
import math
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import Cell, in_words
from PIL import Image
from race import Race
from specs import Table

from utils import COSTS, write_atomically

Record = dict[str, Any]  # of a method on a line, over its seeds; lacks the results where no seed finished

RESULT_COLUMNS = ["group", "method", "metric", "seeds", "finished", "last_mean", "last_std", "best_mean", "best_std",
                  "average_mean", "average_std", "target", "reached", "steps_to_target"]
TRAIN_COLUMNS = [  # on all training labels and, where some are wrong, on the true ones
    "train_acc_mean", "train_acc_std", "train_clean_acc_mean", "train_clean_acc_std",
]
COST_COLUMNS = ["group", "method", "seconds", "seconds_to_target", *COSTS, "relative_seconds",
                *[f"relative_{name}" for name in COSTS]]

# ---------------------------------------------------------------------------------------------- results


def summarise(race: Race, target: float | None) -> list[Record]:
    """One record for every line and method. Without a target, it is the mean last result of fixed (text: sgd+val)."""
    lines: dict[tuple[str, str], list[Cell]] = {}
    for cell in race.cells:
        lines.setdefault((cell.group, cell.method), []).append(cell)
    records = []
    for (group, method), cells in lines.items():
        record: Record = {
            "group": group, "title": cells[0].title, "method": method, "label": method, "seeds": len(cells),
            "problem": cells[0].problem, "problem_title": in_words(dict(cells[0].arguments)),
            "epochs": cells[0].num_epochs, "is_whole": cells[0].is_whole,
        }
        done = [cell for cell in cells if len(race.rows(cell)) == cell.num_epochs]  # a diverged run ends before
        record["finished"] = len(done)
        if done:
            record |= _results(race, done)
        records.append(record)
    for record in records:
        baseline = _baseline(records, record["group"])
        if baseline and "runs" in record:
            for name in ("seconds", *COSTS):
                record[f"relative_{name}"] = record[name] / baseline[name] if baseline[name] else None
            record |= _reach(record, baseline["last_mean"] if target is None else target)
    return records


def _results(race: Race, done: list[Cell]) -> Record:
    """Metric and costs over the seeds that finished."""
    runs = [race.rows(cell) for cell in done]
    metric = "test_acc" if "test_acc" in runs[0][0] else "test_ppl"
    best = max if metric == "test_acc" else min
    values_of = {
        "last": [rows[-1][metric] for rows in runs],
        "best": [best(row[metric] for row in rows) for rows in runs],
    }
    if f"{metric}_average" in runs[0][0]:
        values_of["average"] = [rows[-1][f"{metric}_average"] for rows in runs]
    if "train_clean_acc" in runs[0][0]:
        for name in ("train_acc", "train_clean_acc"):
            values_of[name] = [rows[-1][name] for rows in runs]
    results: Record = {"metric": metric, "runs": runs}
    for name, values in values_of.items():
        results[f"{name}_mean"] = statistics.mean(values)
        results[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    results["seconds"] = statistics.mean(sum(row["seconds"] for row in rows) for rows in runs)
    costs = [race.cost(cell) for cell in done]
    for name in COSTS:
        results[name] = statistics.mean(cost[name] for cost in costs)
    results["steps_per_epoch"] = costs[0]["steps_per_epoch"]
    return results


def _baseline(records: list[Record], group: str) -> Record | None:
    """The record of the group that the costs are relative to."""
    for name in ("fixed", "sgd+val"):
        for record in records:
            if record["group"] == group and record["method"] == name and "runs" in record:
                return record
    return None


def _reach(record: Record, target: float) -> Record:
    """Steps and seconds until the target is met, the mean over the runs that met it."""
    steps, seconds = [], []
    for rows in record["runs"]:
        spent = 0.0
        for epoch, row in enumerate(rows, 1):
            spent += row["seconds"]
            result = row[record["metric"]]
            is_reached = result >= target if record["metric"] == "test_acc" else result <= target
            if is_reached:
                steps.append(epoch * record["steps_per_epoch"])
                seconds.append(spent)
                break
    reach: Record = {"target": target, "reached": len(steps)}
    if steps:
        reach |= {"steps_to_target": statistics.mean(steps), "seconds_to_target": statistics.mean(seconds)}
    return reach


def by_problem(records: list[Record]) -> list[Record]:
    """The whole runs, grouped by problem instead of by line: all lengths of a run in one picture."""
    whole = [record for record in records if record["is_whole"]]
    lengths = Counter((record["problem"], record["method"]) for record in whole)
    methods = list(dict.fromkeys(record["method"] for record in records))
    regrouped = []
    for record in sorted(whole, key=lambda record: methods.index(record["method"])):
        label = record["method"]
        if lengths[record["problem"], record["method"]] > 1:
            label += f" of {record['epochs']}"
        regrouped.append(record | {"group": record["problem"], "title": record["problem_title"], "label": label})
    return regrouped


# ---------------------------------------------------------------------------------------------- files


def result_columns(records: list[Record]) -> list[str]:
    """The columns of table.csv: those of the training labels only where label noise makes some of them wrong."""
    has_noise = any("train_clean_acc_mean" in record for record in records)
    return RESULT_COLUMNS + TRAIN_COLUMNS if has_noise else RESULT_COLUMNS


def write_csv(path: Path, columns: Sequence[str], records: list[Record]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue().encode())


def write_markdown(path: Path, table: Table, race: Race, records: list[Record], command: str) -> None:
    """The table as a page, with the published numbers and its provenance."""
    lines = [f"# {table.title}", ""]
    for group in dict.fromkeys(record["group"] for record in records):
        members = [record for record in records if record["group"] == group]
        lines += [f"## {members[0]['title']}", "", *_section(members, table.published.get(group, {})), ""]
    lines += [
        "Mean ± standard deviation over the seeds. Time, forward and backward passes and peak memory are relative to "
        "fixed (text: sgd+val); the passes leave evaluation out. Published numbers are the paper's at the last epoch, "
        "in its own setting; ~ marks those read off its plots.", "",
        provenance_of(race, command), "",
    ]
    write_atomically(path, "\n".join(lines).encode())


def provenance_of(race: Race, command: str) -> str:
    """Command, seeds, commits, hardware and versions in a line."""
    facts = [race.record(cell, "args.json") for cell in race.cells]
    hardware = set()
    for fact in facts:
        processor = fact["hardware"]["gpu"] or fact["hardware"]["cpu"]
        hardware.add(f"{processor}, {fact['hardware']['threads']} thread(s) a run")
    return (
        f"Command: `{command}`; seeds 0 to {max(cell.seed for cell in race.cells)}; "
        f"commit {', '.join(sorted({fact['commit'] for fact in facts}))}; {'; '.join(sorted(hardware))}; "
        f"torch {', '.join(sorted({fact['versions']['torch'] for fact in facts}))}."
    )


def _section(members: list[Record], published: dict[str, str]) -> list[str]:
    """The rows of one line of the table, under their header."""
    finished = [record for record in members if "runs" in record]
    unit = _unit(members)
    target = next((f"{record['target']:.2f}" for record in finished if "target" in record), "target")
    is_averaged = any("average_mean" in record for record in members)
    has_noise = any("train_clean_acc_mean" in record for record in members)
    is_published = any(record["method"] in published for record in members)
    columns = ["method", f"{unit}, last epoch"]
    if is_averaged:
        columns.append("its averaged weights")
    columns.append("best epoch (picked on test data)")
    if has_noise:
        columns += ["training accuracy (%), last epoch", "on the true labels"]
    if is_published:
        columns.append("published")
    columns += [f"steps to {target}", f"seconds to {target}", "time", "forward", "backward", "memory"]
    rows = [columns]
    for record in members:
        row = [record["method"] + _note(record, record["finished"], "diverged"), _spread(record, "last")]
        if is_averaged:
            row.append(_spread(record, "average"))
        row.append(_spread(record, "best"))
        if has_noise:
            row += [_spread(record, "train_acc"), _spread(record, "train_clean_acc")]
        if is_published:
            row.append(published.get(record["method"], "–"))
        for name in ("steps_to_target", "seconds_to_target"):
            row.append(f"{record[name]:.0f}" + _note(record, record["reached"]) if name in record else "–")
        for name in ("seconds", *COSTS):
            value = record.get(f"relative_{name}")
            row.append("–" if value is None else f"{value:.2f}")
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def _unit(members: list[Record]) -> str:
    is_text = any(record.get("metric") == "test_ppl" for record in members)
    return "test perplexity" if is_text else "test accuracy (%)"


def _note(record: Record, number: int, failed: str = "") -> str:
    """How many of the seeds, where it is not all: those counted or, with a word for them, those that are missing."""
    if number == record["seeds"]:
        return ""
    if failed:
        return f" ({record['seeds'] - number} of {record['seeds']} {failed})"
    return f" ({number} of {record['seeds']})"


def _spread(record: Record, name: str) -> str:
    """Mean ± standard deviation."""
    if f"{name}_mean" not in record:
        return "–"
    mean, deviation = record[f"{name}_mean"], record[f"{name}_std"]
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


# ---------------------------------------------------------------------------------------------- pictures

# Okabe and Ito's colours, which the colour-blind can tell apart, and wine instead of their yellow.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#882255"]
GREY = "#BBBBBB"


def coloured(records: list[Record], highlight: Sequence[str], most: int = len(COLOURS)) -> list[str]:
    """The labels to draw in colour, in the records' order: of the methods in `highlight`, or at most `most` by default.

    By default MLR-SNet comes first, then what ends best: by the sum of its places over the groups.
    """
    labels = list(dict.fromkeys(record["label"] for record in records))
    if highlight:
        return list(dict.fromkeys(record["label"] for record in records if record["method"] in highlight))
    places: Counter[str] = Counter()
    for group in {record["group"] for record in records}:
        members = [record for record in records if record["group"] == group]
        members.sort(key=_badness)
        for place, record in enumerate(members):
            places[record["label"]] += place
    ranked = sorted(labels, key=lambda label: (not label.startswith("MLR-SNet"), places[label]))
    return [label for label in labels if label in ranked[:most]]


def _badness(record: Record) -> float:
    """Smaller is better: of the averaged weights where there are any, else of the last epoch."""
    if "runs" not in record:
        return math.inf
    value = record["average_mean"] if "average_mean" in record else record["last_mean"]
    return -value if record["metric"] == "test_acc" else value


def style_of(label: str, chosen: list[str]) -> dict[str, Any]:
    """Colour and line of a label; grey and thin where it is not chosen."""
    if label not in chosen:
        return {"color": GREY, "linewidth": 0.9, "zorder": 1}
    place = chosen.index(label)
    width = 2.4 if label.startswith("MLR-SNet") else 1.3
    line = ["-", "--", ":"][place // len(COLOURS) % 3]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": line, "linewidth": width, "zorder": 2}


def _legend(panel: Any, others: list[str]) -> None:
    """The coloured lines one by one, beside the panel; the grey ones together."""
    if others:
        text = textwrap.fill(f"others: {', '.join(others)}", 36)
        panel.plot([], [], color=GREY, linewidth=0.9, label=text)
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))


def draw(path: Path, records: list[Record], highlight: Sequence[str] = ()) -> None:
    """A row of panels for every group: training loss, test metric with a band of one standard deviation over the seeds
    (of the averaged weights as well, where there are any), and LR, against epochs.
    """
    pyplot = pyplot_for_files()
    records = [record for record in records if "runs" in record]
    groups = list(dict.fromkeys(record["group"] for record in records))
    is_averaged = any("average_mean" in record for record in records)
    columns = 4 if is_averaged else 3
    figure, panels = pyplot.subplots(
        max(1, len(groups)), columns, figsize=(4.6 * columns, 3.8 * max(1, len(groups))), layout="constrained",
        squeeze=False,
    )
    chosen = coloured(records, highlight)
    for row, group in zip(panels, groups, strict=False):  # no group where every run diverged
        members = [record for record in records if record["group"] == group]
        metric, unit = members[0]["metric"], _unit(members)
        shown = {"train_loss": "training loss (nats)", metric: unit}
        if is_averaged:
            shown[f"{metric}_average"] = f"{unit}, averaged weights"
        shown["lr"] = "learning rate (mean of the epoch)"
        for panel, (column, label) in zip(row, shown.items(), strict=True):
            for record in members:
                style = style_of(record["label"], chosen)
                _draw_curve(panel, record, column, style, has_band=column.startswith(metric))
            panel.set(xlabel="epoch", ylabel=label)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if column == "lr":
                panel.set_yscale("log")
            elif metric == "test_ppl" and column.startswith(metric):
                _logarithmic(panel)
        row[0].set_title(members[0]["title"], loc="left")
        _legend(row[-1], [record["label"] for record in members if record["label"] not in chosen])
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    """A PNG of 256 colours, which takes a third of the space."""
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    Image.open(image).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_curve(panel: Any, record: Record, column: str, style: dict[str, Any], has_band: bool) -> None:
    """The mean of a column over the seeds."""
    runs = record["runs"]
    length = min(len(run) for run in runs)
    epochs, means, low, high = range(1, length + 1), [], [], []
    for epoch in range(length):
        values = [run[epoch][column] for run in runs]
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        means.append(mean)
        low.append(mean - deviation)
        high.append(mean + deviation)
    is_grey = style["color"] == GREY
    panel.plot(epochs, means, label=None if is_grey else record["label"], **style)
    if has_band and not is_grey and len(runs) > 1:
        panel.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)


def draw_t_val(path: Path, records: list[Record], highlight: Sequence[str] = ()) -> None:
    """The last test metric of the averaged weights against T_val, for both meta points, beside the other methods'."""
    pyplot = pyplot_for_files()
    records = [record for record in records if "average_mean" in record]
    groups = list(dict.fromkeys(record["group"] for record in records))
    width = max(1, min(3, len(groups)))
    height = max(1, math.ceil(len(groups) / width))
    figure, panels = pyplot.subplots(
        height, width, figsize=(4.6 * width + 1, 3.6 * height), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(groups):]:
        panel.remove()
    levels = [record for record in records if _t_val_of(record) is None]
    chosen = coloured(levels, highlight, len(COLOURS) - 2)  # the curves of the two meta points take two colours
    for panel, group in zip(panels.flat, groups, strict=False):
        members = [record for record in records if record["group"] == group]
        for record in levels:
            if record["group"] == group:
                is_grey = record["label"] not in chosen
                style = style_of(record["label"], ["lookahead", "average", *chosen])
                if not is_grey:
                    style["linestyle"] = ":"
                panel.axhline(record["average_mean"], label=None if is_grey else record["label"], **style)
        for point, colour in (("lookahead", COLOURS[0]), ("average", COLOURS[1])):
            _draw_meta_point(panel, members, point, colour)
        panel.set(xscale="log", xlabel="T_val (steps)", ylabel=f"{_unit(members)}, averaged weights")
        panel.set_title(textwrap.fill(members[0]["title"], 40), fontsize="medium")
        if members[0]["metric"] == "test_ppl":
            _logarithmic(panel)
        panel.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    others = list(dict.fromkeys(record["label"] for record in levels if record["label"] not in chosen))
    _legend(panels[0, -1], others)
    _save(figure, path)
    pyplot.close(figure)


def _t_val_of(record: Record) -> tuple[str, int] | None:
    """The meta point and T_val of a method that differs from others in these alone."""
    match = re.fullmatch(r"MLR-SNet \(learning, (\w+), T_val (\d+)\)", record["method"])
    return (match[1], int(match[2])) if match else None


def _draw_meta_point(panel: Any, members: list[Record], point: str, colour: str) -> None:
    """The curve of one meta point over its values of T_val."""
    t_vals, means, deviations = [], [], []
    for record in members:
        place = _t_val_of(record)
        if place and place[0] == point:
            t_vals.append(place[1])
            means.append(record["average_mean"])
            deviations.append(record["average_std"] or 0.0)
    if t_vals:
        label = f"MLR-SNet (learning, {point})"
        panel.errorbar(t_vals, means, deviations, color=colour, marker="o", capsize=3, label=label, zorder=3)


def pyplot_for_files() -> Any:
    """matplotlib's pyplot, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _logarithmic(panel: Any) -> None:
    """A scale for perplexities, with whole numbers beside it."""
    panel.set_yscale("log")
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter("{x:.0f}")

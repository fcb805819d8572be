"""What a table says: figures, costs, a page and a picture, all computed from the run folders."""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from race import Cell, Race

from utils import COSTS, write_atomically


def summarise(race: Race, target: float | None) -> list[dict[str, Any]]:
    """One record for every line and method, computed from the run folders."""
    lines: dict[tuple[str, str], list[Cell]] = {}
    for cell in race.cells:
        lines.setdefault((cell.group, cell.method), []).append(cell)
    records = []
    for (group, method), cells in lines.items():
        done = [cell for cell in cells if len(race.rows(cell)) == cell.num_epochs]  # a run that diverged ends before
        arguments = dict(cells[0].arguments)
        record: dict[str, Any] = {
            "group": group, "method": method, "seeds": len(cells), "finished": len(done),
            "problem": f"{arguments['network']} {arguments['dataset']}",
            "epochs": cells[0].num_epochs, "is_whole": cells[0].is_whole,
        }
        runs = [race.rows(cell) for cell in done]
        if runs:
            metric = "test_acc" if "test_acc" in runs[0][0] else "test_ppl"
            best = max if metric == "test_acc" else min
            record["metric"] = metric
            values_of = {
                "last": [rows[-1][metric] for rows in runs],
                "best": [best(row[metric] for row in rows) for rows in runs],
            }
            if f"{metric}_average" in runs[0][0]:
                values_of["average"] = [rows[-1][f"{metric}_average"] for rows in runs]
            for name, values in values_of.items():
                record[f"{name}_mean"] = statistics.mean(values)
                record[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            record["seconds"] = statistics.mean(sum(row["seconds"] for row in rows) for rows in runs)
            costs = [race.cost(cell) for cell in done]
            record |= {name: statistics.mean(cost[name] for cost in costs) for name in COSTS}
            record["steps_per_epoch"] = costs[0]["steps_per_epoch"]
            record["runs"] = runs
        records.append(record)
    for record in records:
        same = [other for other in records if other["group"] == record["group"] and "runs" in other]
        basis = next((other for name in ("fixed", "sgd+val") for other in same if other["method"] == name), None)
        if basis and "runs" in record:
            for name in ("seconds", *COSTS):
                record[f"relative_{name}"] = record[name] / basis[name] if basis[name] else None
            _reach(record, basis["last_mean"] if target is None else target)
    return records


def _reach(record: dict[str, Any], target: float) -> None:
    """Steps and seconds until the target is met, the mean over the runs that met it."""
    sign = 1 if record["metric"] == "test_acc" else -1
    steps, seconds = [], []
    for rows in record["runs"]:
        number = next((n for n, row in enumerate(rows, 1) if sign * (row[record["metric"]] - target) >= 0), None)
        if number is not None:
            steps.append(number * record["steps_per_epoch"])
            seconds.append(sum(row["seconds"] for row in rows[:number]))
    record |= {"target": target, "reached": len(steps)}
    if steps:
        record |= {"steps_to_target": statistics.mean(steps), "seconds_to_target": statistics.mean(seconds)}


RESULT_COLUMNS = ("group", "method", "metric", "seeds", "finished", "last_mean", "last_std", "best_mean", "best_std",
                  "average_mean", "average_std",
                  "target", "reached", "steps_to_target")
COST_COLUMNS = ("group", "method", "seconds", "seconds_to_target", *COSTS,
                *(f"relative_{name}" for name in ("seconds", *COSTS)))


def write_csv(path: Path, columns: Sequence[str], records: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue().encode())


def _spread(record: dict[str, Any], name: str) -> str:
    if f"{name}_mean" not in record:
        return "–"
    deviation = record[f"{name}_std"]
    return f"{record[f'{name}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _times(record: dict[str, Any], name: str) -> str:
    value = record.get(f"relative_{name}")
    return "–" if value is None else f"{value:.2f}"


def write_markdown(
    path: Path,
    title: str,
    published: dict[tuple[str, str], str],
    race: Race,
    records: list[dict[str, Any]],
    command: str,
) -> None:
    """The table as a page, with the published figures by line and method, and its provenance."""
    records_of = {record["group"]: [r for r in records if r["group"] == record["group"]] for record in records}
    lines = [f"# {title}", ""]
    for group, members in records_of.items():
        metric = next((r["metric"] for r in members if "metric" in r), "test_acc")
        unit = "test accuracy (%)" if metric == "test_acc" else "test perplexity"
        target = next((r["target"] for r in members if "target" in r), None)
        goal = "target" if target is None else f"{target:.2f}"
        averaged = any("average_mean" in record for record in members)
        is_published = any((group, record["method"]) in published for record in members)
        columns = [
            "method", f"{unit}, last epoch", *["its averaged weights"] * averaged,
            "best epoch (picked on test data)", *["published"] * is_published,
            f"steps to {goal}", f"seconds to {goal}", "time", "forward", "backward", "memory",
        ]
        lines += [f"## {group}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for record in members:
            diverged = record["seeds"] - record["finished"]
            note = f" ({diverged} of {record['seeds']} diverged)" if diverged else ""
            reached = record.get("reached", 0)
            of = f" ({reached} of {record['seeds']})" if 0 < reached < record["seeds"] else ""
            steps = f"{record['steps_to_target']:.0f}{of}" if reached else "–"
            seconds = f"{record['seconds_to_target']:.0f}{of}" if reached else "–"
            figures = [_spread(record, name) for name in ("last", *["average"] * averaged, "best")]
            if is_published:
                figures.append(published.get((group, record["method"]), "–"))
            figures += [steps, seconds, *(_times(record, name) for name in ("seconds", *COSTS))]
            lines.append("| " + " | ".join([record["method"] + note, *figures]) + " |")
        lines.append("")
    facts = [race.record(cell, "args.json") for cell in race.cells]
    hardware = sorted({f"{f['hardware']['gpu'] or f['hardware']['cpu']}, {f['hardware']['threads']} thread(s) a run"
                       for f in facts})
    lines += [
        "Mean ± standard deviation over the seeds. Time, forward and backward passes and peak memory are relative to "
        "fixed (text: sgd+val), evaluation left out of the passes. Published figures are the paper's at the last "
        "epoch, in its own setting; ~ marks those read off its plots.", "",
        f"Command: `{command}`; seeds 0 to {max(cell.seed for cell in race.cells)}; "
        f"commit {', '.join(sorted({f['commit'] for f in facts}))}; {'; '.join(hardware)}; "
        f"torch {', '.join(sorted({f['versions']['torch'] for f in facts}))}.", "",
    ]
    write_atomically(path, "\n".join(lines).encode())


def by_problem(records: list[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The whole runs of these methods with a line for every problem, not for every length of a run."""
    whole = [record for record in records if record["is_whole"] and record["method"] in methods]
    lengths = Counter((record["problem"], record["method"]) for record in whole)
    return [
        record | {
            "group": record["problem"],
            "method": record["method"] + f" of {record['epochs']}" * (lengths[record["problem"], record["method"]] > 1),
        }
        for record in sorted(whole, key=lambda record: methods.index(record["method"]))
    ]


COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]  # Okabe and Ito's
LINES = ["-", "--", ":"]


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Training loss, test metric with a band over the seeds (where there are averaged weights, theirs as well), and LR
    against epochs; a row for every line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(record["group"] for record in records))
    columns = 3 + any("average_mean" in record for record in records)
    height, shade = (5, 0.06) if len({record["method"] for record in records}) > 10 else (3.6, 0.12)
    figure, panels = pyplot.subplots(
        len(groups), columns, figsize=(4.6 * columns, height * len(groups)), layout="constrained", squeeze=False
    )
    for row, group in zip(panels, groups, strict=True):
        members = [record for record in records if record["group"] == group and "runs" in record]
        metric = members[0]["metric"] if members else "test_acc"
        is_accuracy = metric == "test_acc"
        unit = "test accuracy (%)" if is_accuracy else "test perplexity"
        shown = {"train_loss": "training loss (nats)", metric: unit, f"{metric}_average": f"{unit}, averaged weights"}
        shown = dict(list(shown.items())[: columns - 1]) | {"lr": "learning rate (mean of the epoch)"}
        for panel, (column, label) in zip(row, shown.items(), strict=True):
            for place, record in enumerate(members):
                style = {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place // len(COLOURS) % len(LINES)]}
                length = min(len(run) for run in record["runs"])
                values = [[run[epoch][column] for run in record["runs"]] for epoch in range(length)]
                middle, epochs = [statistics.mean(value) for value in values], range(1, length + 1)
                width = 2.4 if record["method"].startswith(("ours", "average", "lookahead")) else 1.3
                panel.plot(epochs, middle, label=record["method"], linewidth=width, **style)
                if column.startswith(metric) and len(record["runs"]) > 1:
                    deviation = [statistics.stdev(value) for value in values]
                    low = [m - d for m, d in zip(middle, deviation, strict=True)]
                    high = [m + d for m, d in zip(middle, deviation, strict=True)]
                    panel.fill_between(epochs, low, high, color=style["color"], alpha=shade, linewidth=0)
            panel.set(xlabel="epoch", ylabel=label)
            panel.xaxis.get_major_locator().set_params(integer=True)
            if column == "lr":
                panel.set_yscale("log")
            if column.startswith(metric) and not is_accuracy:
                _logarithmic(panel)
        row[0].set_title(group, loc="left")
        if members:
            row[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _logarithmic(panel: Any) -> None:
    """A scale for perplexities, with whole numbers beside it."""
    panel.set_yscale("log")
    for formatted in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        formatted("{x:.0f}")


def draw_t_val(path: Path, records: list[dict[str, Any]]) -> None:
    """The last test metric of the averaged weights against T_val, for both meta points, beside the others' levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(record["group"] for record in records))
    width = min(3, len(groups))
    rows = math.ceil(len(groups) / width)
    figure, panels = pyplot.subplots(
        rows, width, figsize=(4.6 * width + 1, 3.6 * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(groups):]:
        panel.remove()
    for panel, group in zip(panels.flat, groups, strict=False):
        members = [record for record in records if record["group"] == group and "average_mean" in record]
        points: dict[str, list[tuple[int, float, float]]] = {}
        level = 2
        for record in members:
            kind, _, t_val = record["method"].partition(" ")
            if kind in ("lookahead", "average") and t_val.isdigit():
                points.setdefault(kind, []).append((int(t_val), record["average_mean"], record["average_std"] or 0.0))
            else:
                style = {"color": COLOURS[level % len(COLOURS)], "linestyle": (":", "--")[level // len(COLOURS) % 2]}
                panel.axhline(record["average_mean"], label=record["method"], **style)
                level += 1
        for (kind, values), color in zip(points.items(), COLOURS, strict=False):
            places, middle, deviation = zip(*values, strict=True)
            panel.errorbar(places, middle, deviation, color=color, marker="o", capsize=3, label=f"ours ({kind})")
        metric = "test accuracy (%)" if any(r["metric"] == "test_acc" for r in members) else "test perplexity"
        panel.set(xscale="log", xlabel="T_val (steps)", ylabel=f"{metric}, averaged weights", title=group)
        if metric == "test perplexity":
            _logarithmic(panel)
        panel.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    panels[0, -1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

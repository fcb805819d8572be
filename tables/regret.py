"""Regret: how far a method ends behind the best cosine of a grid of peak rates, on many problems, without tuning.

    images  regret = accuracy of the best cosine − accuracy, in points
    text    regret = 100 · (perplexity / perplexity of the best cosine − 1), in %

Both are means over the seeds at the last epoch. The best cosine is picked by its live weights on the test data, as a
user with the time for a grid would pick it, so a method that beats the grid has a negative regret. A method of which a
seed diverged has an infinite regret on that problem.
"""

import contextlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from race import Race
from report import COLOURS, Record, provenance_of, pyplot_for_files, style_of, write_csv
from specs import GRID_METHODS

from utils import write_atomically

CLOSE = 1.0  # point or %
REGRET_COLUMNS = ["group", "method", "weights", "unit", "result", "regret", "relative_steps"]
WEIGHTS = {"live": "last_mean", "averaged": "average_mean"}  # where a record of report.py has their result
MEASURED = "cosine (measured)"  # its runs show the measured rate


def zero_marks(records: list[Record]) -> dict[str, Record]:
    """The record of the best cosine of every group. A group where no peak finished has none."""
    best: dict[str, Record] = {}
    for record in records:
        if record["method"] in GRID_METHODS and _has_finished(record):
            group = record["group"]
            if group not in best or _difference(record["last_mean"], best[group]) < 0:
                best[group] = record
    return best


def _has_finished(record: Record) -> bool:
    return record["finished"] == record["seeds"]


def _difference(result: float, reference: Record) -> float:
    """The regret of a result against the live weights of a record."""
    zero = reference["last_mean"]
    return zero - result if reference["metric"] == "test_acc" else 100 * (result / zero - 1)


def regrets_of(records: list[Record]) -> list[Record]:
    """The regret of every method on every group that has a zero mark, live and, where there are any, averaged."""
    marks = zero_marks(records)
    regrets = []
    for record in records:
        if record["group"] not in marks or record["method"] in GRID_METHODS:
            continue
        mark = marks[record["group"]]
        regret = {"group": record["group"], "method": record["method"]}
        regret["unit"] = "points" if mark["metric"] == "test_acc" else "%"
        for weights, column in WEIGHTS.items():
            if column not in mark:
                continue
            if _has_finished(record):
                result = record[column]
                steps = record["forward_passes"] / (record["epochs"] * record["steps_per_epoch"])
                found = {"result": result, "regret": _difference(result, mark), "relative_steps": steps}
            else:
                found = {"result": None, "regret": math.inf, "relative_steps": None}
            regrets.append(regret | {"weights": weights} | found)
    return regrets


def summaries_of(regrets: list[Record]) -> list[Record]:
    """Every method with either weights over all problems, the best first: fewest failures, then smallest mean."""
    members: dict[tuple[str, str], list[Record]] = {}
    for regret in regrets:
        members.setdefault((regret["method"], regret["weights"]), []).append(regret)
    summaries = []
    for (method, weights), group in members.items():
        values = [regret["regret"] for regret in group]
        finite = [value for value in values if math.isfinite(value)]
        steps = [regret["relative_steps"] for regret in group if regret["relative_steps"] is not None]
        summary: Record = {
            "method": method, "weights": weights, "values": values, "median": statistics.median(values),
            "close": len([value for value in values if value <= CLOSE]) / len(values),
            "diverged": len(values) - len(finite), "finite_mean": statistics.mean(finite) if finite else math.inf,
            "relative_steps": statistics.mean(steps) if steps else None,
        }
        for unit in ("points", "%"):
            of_unit = [regret["regret"] for regret in group if regret["unit"] == unit]
            if of_unit:
                summary |= {f"mean {unit}": statistics.mean(of_unit), f"worst {unit}": max(of_unit)}
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary["diverged"], summary["finite_mean"]))


# ---------------------------------------------------------------------------------------------- files


def write_regret(out: Path, race: Race, records: list[Record], highlight: Sequence[str], command: str) -> None:
    """regret.csv, regret.md and regret.png."""
    regrets = regrets_of(records)
    summaries = summaries_of(regrets)
    write_csv(out / "regret.csv", REGRET_COLUMNS, regrets)
    write_atomically(out / "regret.md", _page(race, records, summaries, command).encode())
    draw_profile(out / "regret.png", summaries, highlight)


def _page(race: Race, records: list[Record], summaries: list[Record], command: str) -> str:
    rows = [["method", "weights", "images: mean (points)", "worst", "text: mean (%)", "worst", "all: median",
             "within 1", "diverged", "steps"]]
    for summary in summaries:
        row = [summary["method"], summary["weights"]]
        row += [_number(summary.get(name)) for name in ("mean points", "worst points", "mean %", "worst %", "median")]
        row += [f"{100 * summary['close']:.0f} %", str(summary["diverged"]), _number(summary["relative_steps"])]
        rows.append(row)
    lines = [
        "# Regret without tuning", "", "Behind the best of a grid of cosines, picked on the test data: points of "
        "accuracy, per cent of perplexity. Steps are forward passes per step of the run, so that 1.10 means a tenth "
        "more than training alone.", "", *_markdown(rows), "", "## The best cosine of every problem", "",
        *_markdown(_marks(race, records)), "", provenance_of(race, command), "",
    ]
    return "\n".join(lines)


def _marks(race: Race, records: list[Record]) -> list[list[str]]:
    """The rows of the table of zero marks, under their header."""
    marks = zero_marks(records)
    rows = [["problem", "best cosine from", "its result", "measured rate", "measured / best"]]
    for group in dict.fromkeys(record["group"] for record in records):
        members = [record for record in records if record["group"] == group]
        if group not in marks:
            rows.append([members[0]["title"], "none finished", "–", "–", "–"])
            continue
        peak = GRID_METHODS[marks[group]["method"]]
        peaks = [GRID_METHODS[record["method"]] for record in members if record["method"] in GRID_METHODS]
        note = " (the end of the grid)" if peak in (min(peaks), max(peaks)) else ""
        unit = " %" if marks[group]["metric"] == "test_acc" else ""
        measured = measured_lr(race, group)
        rows.append([
            members[0]["title"], f"{peak:g}{note}", f"{marks[group]['last_mean']:.2f}{unit}",
            "–" if measured is None else f"{measured:.3g}", "–" if measured is None else f"{measured / peak:.2f}",
        ])
    return rows


def measured_lr(race: Race, group: str) -> float | None:
    """The measured rate of a problem, the geometric mean over the seeds, where its runs have measured one."""
    rates = []
    for cell in race.cells:
        if cell.group == group and cell.method == MEASURED:
            with contextlib.suppress(FileNotFoundError):
                rates.append(race.record(cell, "lr_scale.json")["scale"])
    return statistics.geometric_mean(rates) if rates else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


# ---------------------------------------------------------------------------------------------- picture


def profiled(summaries: list[Record], highlight: Sequence[str]) -> list[Record]:
    """What the picture shows: each method with its better weights, at most eight, MLR-SNet's first, then the best."""
    better: dict[str, Record] = {}
    for summary in summaries:  # the best first
        better.setdefault(summary["method"], summary)
    if highlight:
        return [summary for summary in better.values() if summary["method"] in highlight]
    ranked = sorted(better.values(), key=lambda summary: not summary["method"].startswith("MLR-SNet"))
    return ranked[: len(COLOURS)]


def draw_profile(path: Path, summaries: list[Record], highlight: Sequence[str] = ()) -> None:
    """regret.png, a performance profile: the share of the problems on which a method's regret is at most x."""
    pyplot = pyplot_for_files()
    figure, panel = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    shown = profiled(summaries, highlight)
    labels = [f"{summary['method']}, {summary['weights']} weights" for summary in shown]
    finite = [value for summary in shown for value in summary["values"] if math.isfinite(value)]
    low, high = min([-1.0, *finite]), 10.0
    for label, summary in zip(labels, shown, strict=True):
        values = sorted(value for value in summary["values"] if value <= high)
        shares = [100 * number / len(summary["values"]) for number in range(len(values) + 1)]
        panel.step([low, *values, high], [*shares, shares[-1]], where="post", label=label, **style_of(label, labels))
    panel.set(
        xlim=(low, high), ylim=(0, 102), xlabel="regret (points of accuracy, or % of perplexity)",
        ylabel="share of the problems (%)",
    )
    panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    panel.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

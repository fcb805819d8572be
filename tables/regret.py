"""Regret: how far a method ends behind the best cosine of a grid of peak rates, on many problems, without tuning.

    images  regret = accuracy of the best cosine − accuracy, in points; for regression, of explained variance
    text    regret = 100 · (perplexity / perplexity of the best cosine − 1), in %

At the last epoch, seed against the same seed of the cosine. The best cosine is picked by its live weights on the test
data, as a user with the time for a grid would pick it, so a method that beats the grid has a negative regret. A method
of which a seed diverged has an infinite regret on that problem.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import COLOURS, style_of
from methods import GRID
from records import LOW_IS_GOOD, STEPS, Record, by_group, leading, spread
from runs import Run
from scipy import stats
from writing import MOST_ROWS, markdown, write_csv

from training.pictures import save, subplots

CLOSE = 1.0  # point or %
FEW = 6  # problems that a page shows one by one
KINDS = {"points": "images", "%": "text"}  # of problems, by the unit of their regret
REGRET_COLUMNS = ["group", "method", "weights", "unit", "result", "regret", "relative_steps"]
PEAK_COLUMNS = ["group", "best_peak", "is_end_of_grid", "result", "measured", "measured_over_best"]
WEIGHTS = {"live": "last_mean", "averaged": "average_mean"}  # where a record has their result


def regret_of(folder: Path, runs: list[Run], records: list[Record], highlight: Sequence[str]) -> list[str]:
    """Write regret.csv, peaks.csv and regret.png; the lines of the page that show them."""
    regrets, peaks = regrets_of(records), peaks_of(runs, records)
    summaries = summaries_of(regrets)
    write_csv(folder / "regret.csv", REGRET_COLUMNS, regrets)
    write_csv(folder / "peaks.csv", PEAK_COLUMNS, peaks)
    draw_profile(folder / "regret.png", summaries, highlight)
    near = [peak["measured_over_best"] for peak in peaks if peak["measured_over_best"] is not None]
    shares = [len([ratio for ratio in near if 1 / factor <= ratio <= factor]) for factor in (2, 3)]
    measured = (
        f"The measured rate is within a factor of 2 of the grid's best peak on {shares[0]} of {len(near)} problems, "
        f"and within 3 on {shares[1]} ([peaks.csv](peaks.csv))."
    )
    num_ends = len([peak for peak in peaks if peak.get("is_end_of_grid")])
    ends = ""
    if num_ends:
        ends = f" On {num_ends} problems the best peak is an end of its grid: a wider grid may hold a better peak."
    unmarked = [peak["group"] for peak in peaks if "best_peak" not in peak]
    left_out = f" Left out, since every cosine of the grid diverged there: {', '.join(unmarked)}." if unmarked else ""
    return [
        f"Regret over {len(peaks) - len(unmarked)} problems, of the live weights:{left_out}", "",
        *markdown(_rows(summaries, highlight)),
        *_each_problem(records, [summary["method"] for summary in shown(summaries, highlight, MOST_ROWS)]),
        "Regret is the distance behind the best of a grid of cosines: in points of accuracy (regression: of explained "
        "variance), or in per cent of the cosine's perplexity. The best is picked on test data by its live weights, "
        "which averaged weights are compared with, too. The worst problem is that by the mean over its seeds. Brackets "
        f"hold the 95 % interval of a mean by Student's t over the problems, or over a single one's seeds. {STEPS} "
        "[regret.csv](regret.csv) has every regret, with live and with averaged weights, and [table.csv](table.csv) "
        f"every result.{ends}", "",
        *([measured, ""] if near else []), "![Share of the problems against the regret](regret.png)", "",
    ]


def zero_marks(records: list[Record]) -> dict[str, Record]:
    """The record of the best cosine of every group, of equal ones that from the lowest peak. A group where no peak
    finished has none.
    """
    marks = {}
    for group, members in by_group(records).items():
        grid = [record for record in members if record["method"] in GRID and _has_finished(record)]
        if grid:
            grid.sort(key=lambda record: GRID[record["method"]])
            best = min if grid[0]["metric"] in LOW_IS_GOOD else max
            marks[group] = best(grid, key=lambda record: record["last_mean"])
    return marks


def _has_finished(record: Record) -> bool:
    return record["finished"] == record["seeds"]


def _difference(result: float, zero: float, metric: str) -> float:
    """The regret of a result against that of a cosine."""
    return 100 * (result / zero - 1) if metric in LOW_IS_GOOD else zero - result


def regrets_of(records: list[Record]) -> list[Record]:
    """The regret of every method on every group that has a zero mark, live and, where there are any, averaged."""
    marks = zero_marks(records)
    regrets = []
    for record in records:
        mark = marks.get(record["group"])
        if mark is None or record["method"] in GRID:
            continue
        is_done = _has_finished(record)
        for weights, column in WEIGHTS.items():
            if column in mark:
                by_seed = _by_seed(record, mark, weights) if is_done else [math.inf]
                regrets.append({
                    "group": record["group"], "method": record["method"], "is_ours": record["is_ours"],
                    "weights": weights, "unit": "%" if mark["metric"] in LOW_IS_GOOD else "points",
                    "result": record[column] if is_done else None, "regret": statistics.mean(by_seed),
                    "by_seed": by_seed, "relative_steps": record.get("relative_steps") if is_done else None,
                })
    return regrets


def _by_seed(record: Record, mark: Record, weights: str) -> list[float]:
    """The regret of every seed against the same one of the cosine, which has all seeds."""
    metric = record["metric"]
    name = metric if weights == "live" else f"{metric}_average"
    zeros = {seed: rows[-1][metric] for seed, rows in zip(mark["names"], mark["runs"], strict=True)}
    return [
        _difference(rows[-1][name], zeros[seed], metric)
        for seed, rows in zip(record["names"], record["runs"], strict=True)
    ]


def interval(problems: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % interval of the mean regret by Student's t over the problems' means, which vary by seed, too; of a
    single problem over its seeds.

    Each of the problems holds the regrets of its seeds.
    """
    values = [statistics.fmean(seeds) for seeds in problems] if len(problems) > 1 else problems[0]
    mean = statistics.fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return mean, mean
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


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
            "method": method, "weights": weights, "is_ours": group[0]["is_ours"], "values": values,
            "close": len([value for value in values if value <= CLOSE]) / len(values),
            "diverged": len(values) - len(finite), "finite_mean": statistics.mean(finite) if finite else math.inf,
            "relative_steps": statistics.mean(steps) if steps else None,
        }
        for unit in KINDS:
            of_unit = [regret for regret in group if regret["unit"] == unit]
            if of_unit:
                of_problems = [regret["regret"] for regret in of_unit]
                summary |= {f"mean {unit}": statistics.mean(of_problems), f"worst {unit}": max(of_problems),
                            f"interval {unit}": interval([regret["by_seed"] for regret in of_unit])}
        summaries.append(summary)
    return sorted(summaries, key=lambda summary: (summary["diverged"], summary["finite_mean"]))


def shown(summaries: list[Record], highlight: Sequence[str], most: int) -> list[Record]:
    """Each method with its live weights, at most so many, the best first: those in `highlight`, else MLR-SNet's, and
    the best others.
    """
    live = {summary["method"]: summary for summary in summaries if summary["weights"] == "live"}
    first = highlight or [method for method, summary in live.items() if summary["is_ours"]]
    return [live[method] for method in leading(list(live), first, most)]


def _rows(summaries: list[Record], highlight: Sequence[str]) -> list[list[str]]:
    averaged = {summary["method"]: summary for summary in summaries if summary["weights"] == "averaged"}
    units = [unit for unit in KINDS if any(f"mean {unit}" in summary for summary in summaries)]
    header = ["method"]
    for unit in units:
        header += [f"{KINDS[unit]}: mean ({unit})", "worst", "averaged weights"]
    rows = [[*header, "within 1", "diverged", "steps"]]
    for summary in shown(summaries, highlight, MOST_ROWS):
        row = [summary["method"]]
        for unit in units:
            row += [_with_interval(summary, unit), _number(summary[f"worst {unit}"]),
                    _number(averaged.get(summary["method"], {}).get(f"mean {unit}"))]
        row += [f"{100 * summary['close']:.0f} %", str(summary["diverged"]), _number(summary["relative_steps"])]
        rows.append(row)
    return rows


def _with_interval(summary: Record, unit: str) -> str:
    """The mean regret, and its interval where there is more than one value."""
    mean, (low, high) = _number(summary[f"mean {unit}"]), map(_number, summary[f"interval {unit}"])
    return mean if low == high else f"{mean} [{low}, {high}]"


def _each_problem(records: list[Record], methods: Sequence[str]) -> list[str]:
    """The results of these methods and of the best cosine on every problem, where there are few problems."""
    marks = zero_marks(records)
    if len(marks) > FEW:
        return []
    rows = [["live / averaged weights", *marks]]
    rows.append(["best cosine", *(f"{spread(mark, 'last')} ({GRID[mark['method']]:g})" for mark in marks.values())])
    for method in methods:
        row = [method]
        for group in marks:
            found = [record for record in records if (record["group"], record["method"]) == (group, method)]
            row.append(" / ".join(spread(found[0], name) for name in ("last", "average")) if found else "–")
        rows.append(row)
    return ["Result after the last epoch, accuracy in % or perplexity, and the peak of the best cosine:", "",
            *markdown(rows)]


def peaks_of(runs: list[Run], records: list[Record]) -> list[Record]:
    """The best peak of the grid on every problem, and the measured rate beside it."""
    marks = zero_marks(records)
    peaks = []
    for group, members in by_group(records).items():
        measured = measured_lr(runs, members)
        peak: Record = {"group": group, "measured": measured, "measured_over_best": None}
        if group in marks:
            best = GRID[marks[group]["method"]]
            grid = [GRID[record["method"]] for record in members if record["method"] in GRID]
            peak |= {"best_peak": best, "is_end_of_grid": best in (min(grid), max(grid)),
                     "result": marks[group]["last_mean"],
                     "measured_over_best": measured and measured / best}
        peaks.append(peak)
    return peaks


def measured_lr(runs: list[Run], members: list[Record]) -> float | None:
    """The rate measured for the optimizer of the problem's grid, the geometric mean over its runs; None without."""
    names = {name for record in members for name in record["names"].values()}
    mine = [(run, [run.arguments.get(name) for name in ("optimizer", "momentum")]) for run in runs if run.name in names]
    of_grid = [optimizer for run, optimizer in mine if run.method in GRID]
    rates = [run.lr_scale["scale"] for run, optimizer in mine if run.lr_scale and optimizer in of_grid]
    return statistics.geometric_mean(rates) if rates else None


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def draw_profile(path: Path, summaries: list[Record], highlight: Sequence[str] = ()) -> None:
    """A performance profile: the share of the problems on which a method's regret is at most x."""
    figure, ((panel,),) = subplots(1, 1, width=9, height=5.2)
    lines = shown(summaries, highlight, len(COLOURS))
    labels = [summary["method"] for summary in lines]
    finite = [value for summary in lines for value in summary["values"] if math.isfinite(value)]
    low, high = min([-1.0, *finite]), 10.0
    for label, summary in zip(labels, lines, strict=True):
        values = sorted(value for value in summary["values"] if value <= high)
        shares = [100 * number / len(summary["values"]) for number in range(len(values) + 1)]
        style = style_of(label, labels, summary["is_ours"])
        panel.step([low, *values, high], [*shares, shares[-1]], where="post", label=label, **style)
    panel.set(
        xlim=(low, high), ylim=(0, 102), xlabel="regret (points of accuracy, or % of perplexity)",
        ylabel="share of the problems (%)",
    )
    panel.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    panel.legend(fontsize="small", loc="lower right")
    save(figure, path)

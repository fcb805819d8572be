"""What a table says: a record for every line and method, computed from the runs."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from runs import Run
from words import in_words, joined

from training.pictures import METRICS
from utils import COSTS

Record = dict[str, Any]  # of a method on a line, over its seeds; lacks the results where no seed finished

UNITS = {f"test_{name}": label for name, label in METRICS.items()}
LOW_IS_GOOD = ("test_ppl",)
COST_TITLES = {"relative_seconds": "time", "relative_forward_passes": "forward",
               "relative_backward_passes": "backward", "relative_peak_memory_mib": "memory"}
COLUMNS = ["group", "method", "metric", "seeds", "finished", "last_mean", "last_std", "best_mean", "best_std",
           "average_mean", "average_std", "train_acc_mean", "train_acc_std", "train_clean_acc_mean",
           "train_clean_acc_std", "target", "reached", "steps_to_target", "seconds_to_target", "seconds", *COSTS,
           *COST_TITLES]

STEPS = "The column steps counts forward passes per training step: 1.10 means a tenth more than training itself."


def summarise(runs: Sequence[Run], target: float | None) -> list[Record]:
    """One record for every line and method. Without a target, it is the mean last result of fixed (text: sgd+val)."""
    members: dict[str, dict[str, list[Run]]] = {}  # group -> method -> runs
    details = {}
    for run in runs:
        for detail in run.lines:
            group = joined(run.problem, detail)
            details[group] = detail
            members.setdefault(group, {}).setdefault(run.method, []).append(run)
    records = []
    for group, by_method in members.items():
        methods = [method for method in dict.fromkeys(run.method for run in runs) if method in by_method]
        finished = [_record(group, details[group], method, by_method[method]) for method in methods]
        done = {record["method"]: record for record in finished if "runs" in record}
        baseline = done.get("fixed") or done.get("sgd+val") or {}
        records += [_compared(record, baseline, target) for record in finished]
    return records


def _record(group: str, detail: str, method: str, runs: list[Run]) -> Record:
    first = runs[0]
    epochs, words = first.lines[detail], in_words(first.arguments)
    done = [run for run in runs if len(run.rows) >= epochs]  # a diverged run ends before
    record: Record = {
        "group": group, "detail": detail, "title": joined(words, detail), "method": method,
        "seeds": len(runs), "finished": len(done), "problem": first.problem,
        "is_ours": first.is_ours, "names": {run.seed: run.name for run in runs},
    }
    return record | _results(done, epochs) if done else record


def _results(done: list[Run], epochs: int) -> Record:
    """Metric and costs over the seeds that finished."""
    runs = [run.rows[:epochs] for run in done]
    metric, *_ = (name for name in UNITS if name in runs[0][-1])
    best = min if metric in LOW_IS_GOOD else max
    values_of = {
        "last": [rows[-1][metric] for rows in runs],
        "best": [best(row[metric] for row in rows if metric in row) for rows in runs],
    }
    if f"{metric}_average" in runs[0][-1]:
        values_of["average"] = [rows[-1][f"{metric}_average"] for rows in runs]
    if "train_clean_acc" in runs[0][-1]:
        for name in ("train_acc", "train_clean_acc"):
            values_of[name] = [rows[-1][name] for rows in runs]
    results: Record = {"metric": metric, "runs": runs}
    for name, values in values_of.items():
        results[f"{name}_mean"] = statistics.mean(values)
        results[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    results["seconds"] = statistics.mean(sum(row["seconds"] for row in rows) for rows in runs)
    if all("forward_passes" in run.cost for run in done):
        results["steps_per_epoch"] = done[0].cost["steps_per_epoch"]
        for name in COSTS:  # the passes of the epochs that count
            shares = [epochs / len(run.rows) if name.endswith("_passes") else 1.0 for run in done]
            results[name] = statistics.mean(run.cost[name] * share for run, share in zip(done, shares, strict=True))
        num_passes = epochs * results["steps_per_epoch"] * done[0].arguments.get("accumulate", 1)
        results["relative_steps"] = results["forward_passes"] / num_passes  # measuring and learning included
    return results


def _compared(record: Record, baseline: Record, target: float | None) -> Record:
    """With its way to the target, by default the result of the baseline, and its costs relative to that one's."""
    target = baseline.get("last_mean") if target is None else target
    if "runs" not in record or target is None:
        return record
    relative = {f"relative_{name}": record[name] / baseline[name] for name in ("seconds", *COSTS)
                if record.get(name) is not None and baseline.get(name)}
    return record | relative | _reach(record, target)


def _reach(record: Record, target: float) -> Record:
    """Steps and seconds until the target is met, the mean over the runs that met it."""
    metric, sign = record["metric"], 1 if record["metric"] in LOW_IS_GOOD else -1
    epochs, seconds = [], []
    for rows in record["runs"]:
        met = [epoch for epoch, row in enumerate(rows, 1) if metric in row and sign * row[metric] <= sign * target]
        if met:
            epochs.append(met[0])
            seconds.append(sum(row["seconds"] for row in rows[: met[0]]))
    reach: Record = {"target": target, "reached": len(epochs)}
    if epochs and "steps_per_epoch" in record:
        reach["steps_to_target"] = statistics.mean(epochs) * record["steps_per_epoch"]
        reach["seconds_to_target"] = statistics.mean(seconds)
    return reach


def spread(record: Record, name: str) -> str:
    """Mean ± standard deviation."""
    if f"{name}_mean" not in record:
        return "–"
    mean, deviation = record[f"{name}_mean"], record[f"{name}_std"]
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def by_group(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups = dict.fromkeys(record["group"] for record in records)
    return {group: [record for record in records if record["group"] == group] for group in groups}


def ranking(records: list[Record]) -> list[str]:
    """The methods, the best first: by the mean of their places over the groups."""
    places: dict[str, list[int]] = {record["method"]: [] for record in records}
    for members in by_group(records).values():
        for place, record in enumerate(sorted(members, key=_badness)):
            places[record["method"]].append(place)
    return sorted(places, key=lambda method: statistics.mean(places[method]))


def _badness(record: Record) -> tuple[int, float]:
    """Smaller is better: first the seeds that diverged, then the averaged weights where there are any, else the last
    epoch.
    """
    value: float = record["average_mean"] if "average_mean" in record else record.get("last_mean", math.inf)
    return record["seeds"] - record["finished"], value if record.get("metric") in LOW_IS_GOOD else -value


def leading(ranked: Sequence[str], first: Sequence[str], most: int) -> list[str]:
    """At most so many of those that are ranked from the best on: those in `first`, then the best others."""
    chosen = sorted(ranked, key=lambda name: name not in first)[:most]
    return [name for name in ranked if name in chosen]


def unit_of(records: list[Record]) -> str:
    metrics = {record["metric"] for record in records if "metric" in record}
    return "test " + " or ".join(unit for name, unit in UNITS.items() if name in metrics)

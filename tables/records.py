"""What a table says: a record for every line and method, computed from the runs."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from runs import Run
from words import in_words, joined

from utils import COSTS

Record = dict[str, Any]  # of a method on a line, over its seeds; lacks the results where no seed finished

COLUMNS = ["group", "method", "metric", "seeds", "finished", "last_mean", "last_std", "best_mean", "best_std",
           "average_mean", "average_std", "train_acc_mean", "train_acc_std", "train_clean_acc_mean",
           "train_clean_acc_std", "target", "reached", "steps_to_target", "seconds_to_target", "seconds", *COSTS,
           "relative_seconds", *[f"relative_{name}" for name in COSTS]]


def summarise(runs: Sequence[Run], target: float | None) -> list[Record]:
    """One record for every line and method. Without a target, it is the mean last result of fixed (text: sgd+val)."""
    members: dict[tuple[str, str], list[Run]] = {}
    details: dict[str, str] = {}
    for run in runs:
        for detail in run.lines:
            group = joined(run.problem, detail)
            details[group] = detail
            members.setdefault((group, run.method), []).append(run)
    methods = list(dict.fromkeys(run.method for run in runs))
    order = list(details)
    records = []
    for group, method in sorted(members, key=lambda key: (order.index(key[0]), methods.index(key[1]))):
        records.append(_record(group, details[group], method, members[group, method]))
    for record in records:
        baseline = _baseline(records, record["group"])
        if baseline and "runs" in record:
            for name in ("seconds", *COSTS):
                if record.get(name) is not None and baseline.get(name):
                    record[f"relative_{name}"] = record[name] / baseline[name]
            record |= _reach(record, baseline["last_mean"] if target is None else target)
    return records


def _record(group: str, detail: str, method: str, runs: list[Run]) -> Record:
    first = runs[0]
    epochs = first.lines[detail]
    words = in_words(first.arguments)
    done = [run for run in runs if len(run.rows) >= epochs]  # a diverged run ends before
    record: Record = {
        "group": group, "detail": detail, "title": joined(words, detail), "method": method, "label": method,
        "seeds": len(runs), "finished": len(done), "problem": first.problem, "problem_title": words,
        "epochs": epochs, "is_whole": epochs == first.arguments["num-epoch"], "is_ours": first.is_ours,
        "names": {run.seed: run.name for run in runs},
    }
    return record | _results(done, epochs) if done else record


def _results(done: list[Run], epochs: int) -> Record:
    """Metric and costs over the seeds that finished."""
    runs = [run.rows[:epochs] for run in done]
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
    if all(run.cost for run in done):
        for name in COSTS:
            shares = [epochs / len(run.rows) if name.endswith("_passes") else 1.0 for run in done]
            results[name] = statistics.mean(
                run.cost[name] * share for run, share in zip(done, shares, strict=True)
            )
        results["steps_per_epoch"] = done[0].cost["steps_per_epoch"]
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
                steps.append(epoch * record.get("steps_per_epoch", 0))
                seconds.append(spent)
                break
    reach: Record = {"target": target, "reached": len(steps)}
    if steps and "steps_per_epoch" in record:
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


def badness(record: Record) -> float:
    """Smaller is better: of the averaged weights where there are any, else of the last epoch."""
    if "runs" not in record:
        return float("inf")
    value = record["average_mean"] if "average_mean" in record else record["last_mean"]
    return -value if record["metric"] == "test_acc" else value


def places_of(records: list[Record]) -> Counter[str]:
    """Every label's places among the best, summed over the groups; the smallest is the best."""
    places: Counter[str] = Counter()
    for group in dict.fromkeys(record["group"] for record in records):
        members = sorted([record for record in records if record["group"] == group], key=badness)
        for place, record in enumerate(members):
            places[record["label"]] += place
    return places

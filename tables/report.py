"""What a result's folder shows: table.csv, pictures and its page, all computed from runs.jsonl and metrics.csv."""

import importlib
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from drawing import draw
from methods import GRID
from records import COLUMNS, COST_TITLES, STEPS, Record, leading, ranking, spread, summarise, unit_of
from regret import regret_of
from runs import Run, read
from specs import TABLES, Table
from writing import MOST_ROWS, markdown, read_toml, write_csv, write_page

NO_TABLE = Table("", "", [], {})  # of runs that were made one by one; readings.toml has their title and question
Published = dict[str, dict[str, str]]  # problem -> method -> the paper's number


def render(folder: Path) -> None:
    """Write all that the folder of a result shows."""
    header, runs = read(folder)
    if "study" in header:
        importlib.import_module(f"studies.{header['study']}").render(folder)
        return
    table, highlight = TABLES.get(header["table"], NO_TABLE), header["highlight"]
    records = summarise(runs, header["target"])
    preset = (re.findall(r"--preset[ =](\w+)", header["command"]) or ["desk"])[-1]
    write_csv(folder / "table.csv", [name for name in COLUMNS if _any_has(records, name)], records)
    if table.has_regret:
        body = regret_of(folder, runs, records, highlight)
    else:
        published = read_toml("published.toml").get(header["table"], {}) if preset == "paper" else {}
        body = _tables(records, published, highlight)
        draw(folder / "table.png", records, highlight)
        body += ["![Training loss, test result and learning rate against epochs](table.png)", ""]
    if preset == "smoke":
        body += ["**A smoke: it shows that the table runs, and says nothing of its methods.**", ""]
    body += [f"{_seeds(runs)}{_guesses(runs)}", ""]
    write_page(folder, table.title, table.question, header["command"], body, [vars(run) for run in runs])


def _seeds(runs: Sequence[Run]) -> str:
    """The seeds of all methods, and those that only some have; the cosines of a grid go without saying."""
    methods: dict[int, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        methods.setdefault(run.seed, [])
        if run.method not in [*methods[run.seed], *GRID]:
            methods[run.seed].append(run.method)
    seeds: dict[tuple[str, ...], list[str]] = {}
    for seed, names in methods.items():
        seeds.setdefault(tuple(names), []).append(str(seed))
    (_, of_all), *of_some = seeds.items()
    more = [f"; {', '.join(some)} of {', '.join(names)}, too" for names, some in of_some]
    return f"Seeds: {', '.join(of_all)}{''.join(more)}."


def _guesses(runs: Sequence[Run]) -> str:
    """How many of the rates that the runs measured are guesses."""
    refusals = [run.lr_scale["refusal"] for run in runs if run.lr_scale]
    guesses = [refusal for refusal in refusals if refusal]
    if not guesses:
        return ""
    return f" {len(guesses)} of {len(refusals)} measured rates are guesses, since the loss fell clearly at no rate."


def _any_has(records: list[Record], name: str) -> bool:
    return any(record.get(name) is not None for record in records)


def _tables(records: list[Record], published: Published, highlight: Sequence[str]) -> list[str]:
    """One line of a table with all its columns; several side by side."""
    ranked = ranking(records)
    ours = {record["method"] for record in records if record["is_ours"]}
    methods = leading(ranked, highlight or [method for method in ranked if method in ours][:1], MOST_ROWS)
    groups = list(dict.fromkeys(record["group"] for record in records))
    notes, beside = [], []
    if len(groups) == 1:
        members = [record for method in methods for record in records if record["method"] == method]
        lines = [f"{members[0]['title']}:", "", *markdown(_one_line(members, published.get(groups[0], {})))]
        notes.append("Best epochs are picked on test data.")
        if _any_has(records, "relative_seconds"):
            notes.append("Time, passes and memory are relative to fixed (text: sgd+val). "
                         "Only the passes leave evaluation out.")
    else:
        lines = []
        for name, weights in {"last": "after the last epoch", "average": "of the averaged weights"}.items():
            if _any_has(records, f"{name}_mean"):
                heading = f"{unit_of(records).capitalize()} {weights}:"
                lines += [heading, "", *markdown(_side_by_side(records, methods, name, published))]
        beside.append("all best epochs and costs")
        if _any_has(records, "relative_steps"):
            notes.append(STEPS)
    if _any_has(records, "last_std"):
        notes.append("A ± is the standard deviation over the seeds.")
    if any(published.get(group) for group in groups):
        notes.append("Published numbers are the paper's at the last epoch; ~ marks those read off plots.")
    if more := len(ranked) - len(methods):
        beside.append("one more method" if more == 1 else f"{more} more methods")
    notes.append(f"[table.csv](table.csv) has {' and '.join(beside) or 'all numbers'}.")
    return [*lines, " ".join(notes), ""]


def _side_by_side(records: list[Record], methods: list[str], name: str, published: Published) -> list[list[str]]:
    """Rows of one result of every method on every line, and what it cost on average."""
    groups = {record["group"]: record for record in records}
    same_problem = len({record["problem"] for record in records}) == 1
    rows = [["method", *(record["detail" if same_problem else "title"] for record in groups.values()), "steps"]]
    for method in methods:
        row = [method]
        for group in groups:
            found = [record for record in records if (record["group"], record["method"]) == (group, method)]
            number = published.get(group, {}).get(method) if name == "last" else None
            text = spread(found[0], name) + _diverged(found[0]) if found else "–"
            row.append(f"{text} (paper: {number})" if number else text)
        costs = [record["relative_steps"] for record in records
                 if record["method"] == method and "relative_steps" in record]
        rows.append([*row, f"{statistics.mean(costs):.2f}" if costs else "–"])
    return rows


def _one_line(members: list[Record], published: dict[str, str]) -> list[list[str]]:
    """Rows of all results of every method on the only line."""
    spreads = {"last": f"{unit_of(members)}, last epoch", "average": "averaged weights", "best": "best epoch",
               "train_acc": "training accuracy (%)", "train_clean_acc": "on the true labels"}
    columns = {"method": [record["method"] + _diverged(record) for record in members]}
    for name, title in spreads.items():
        if _any_has(members, f"{name}_mean"):
            columns[title] = [spread(record, name) for record in members]
    if published:
        columns["published"] = [published.get(record["method"], "–") for record in members]
    target = next((record["target"] for record in members if "steps_to_target" in record), None)
    if target is not None:
        columns[f"steps to {target:.2f}"] = [_steps(record) for record in members]
    for name, title in COST_TITLES.items():
        if _any_has(members, name):
            columns[title] = [f"{record[name]:.2f}" if record.get(name) is not None else "–" for record in members]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def _steps(record: Record) -> str:
    """Steps to the target, and how many of the seeds reached it where not all did."""
    if "steps_to_target" not in record:
        return "–"
    some = "" if record["reached"] == record["seeds"] else f" ({record['reached']} of {record['seeds']})"
    return f"{record['steps_to_target']:.0f}{some}"


def _diverged(record: Record) -> str:
    missing = record["seeds"] - record["finished"]
    return f" ({missing} of {record['seeds']} diverged)" if missing else ""

"""The runs of a result: runs.jsonl and metrics.csv, from which all its other files are computed.

The first line of runs.jsonl describes the result as a whole, every other line a run. What most runs have in common in
their arguments, versions and hardware stands in the first line under "usual", and only what differs in a run's own;
false is an argument that the run lacks. metrics.csv has a row for every epoch of every run, whose number stands in the
column "run".
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cells import Cell
from words import problem_of
from writing import read_csv, read_jsonl, write_csv, write_jsonl

Row = dict[str, float]  # of metrics.csv
SHARED = ("arguments", "versions", "hardware")  # of a run, mostly those of the others
NOT_ARGUMENTS = ("out", "resume", "script")  # of a run for whoever repeats it


@dataclass
class Run:
    """One run, as a result keeps it."""

    run: int
    name: str  # of the folder that it ran in
    method: str
    lines: dict[str, int]  # the detail of each line that it serves -> the epochs that count there
    status: str  # done or diverged
    seed: int
    script: str
    command: str
    arguments: dict[str, Any]  # of the script, without dashes
    commit: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    cost: dict[str, float]  # empty where it is not known
    lr_scale: dict[str, Any] | None = None  # where the run measured it
    rows: list[Row] = field(default_factory=list)

    @property
    def problem(self) -> str:
        return problem_of(self.arguments)

    @property
    def is_ours(self) -> bool:
        return self.script == "meta-train" or self.arguments["schedule"] == "mlr-snet"


def rows_of(folder: Path) -> list[Row]:
    """metrics.csv of a run's folder so far."""
    if not (folder / "metrics.csv").exists():
        return []
    return [
        {name: float(value) for name, value in row.items() if value != "" or not name.startswith(("test_", "valid_"))}
        for row in read_csv(folder / "metrics.csv")  # an epoch without a test has no value for these
    ]


def collect(cells: Iterable[Cell], folder: Path) -> list[Run]:
    """The runs of a table's cells from their folders, in which each has ended. ValueError for damaged files."""
    return [_collected(number, cell, folder / cell.name) for number, cell in enumerate(cells)]


def _collected(number: int, cell: Cell, place: Path) -> Run:
    script = cell.method.script
    try:
        facts, cost = _json(place / "args.json"), _json(place / "cost.json")
        lr_scale = {name: value for name, value in _json(place / "lr_scale.json").items() if name != "trials"}
        return Run(
            number, cell.name, cell.method.name, cell.lines, _json(place / "status.json")["status"], cell.seed, script,
            shlex.join(["python", f"{script}/{script}.py", *cell.flags]), _set(facts["arguments"]), facts["commit"],
            facts["versions"], facts["hardware"], cost, lr_scale or None, rows_of(place),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{place}: damaged files of a run ({reason}); move it away to make it again") from None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _set(namespace: dict[str, Any]) -> dict[str, Any]:
    """The arguments of args.json that are set, by the names of their flags."""
    named = {name.replace("_", "-"): value for name, value in namespace.items()}
    return {
        name: value for name, value in named.items()
        if name not in NOT_ARGUMENTS and value is not None and value is not False
    }


def write(folder: Path, header: dict[str, Any], runs: list[Run]) -> None:
    """runs.jsonl and metrics.csv."""
    usual = {name: _usual([getattr(run, name) for run in runs]) for name in SHARED}
    contents, rows = [header | {"usual": usual}], []
    for run in runs:
        content = asdict(run)
        rows += [{"run": run.run} | row for row in content.pop("rows")]
        for name in SHARED:
            content[name] = _difference(content[name], usual[name]) or None
        contents.append({name: value for name, value in content.items() if value is not None})
    write_jsonl(folder / "runs.jsonl", contents)
    write_csv(folder / "metrics.csv", list(dict.fromkeys(name for row in rows for name in row)), rows)


def _usual(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The values that more than half of the facts have."""
    usual = {}
    for name in dict.fromkeys(name for each in facts for name in each):
        [(text, number)] = Counter(json.dumps(each[name]) for each in facts if name in each).most_common(1)
        if 2 * number > len(facts):
            usual[name] = json.loads(text)
    return usual


def _difference(facts: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """What the facts add to the usual ones, and false for each of these that they lack."""
    own = {name: value for name, value in facts.items() if name not in usual or usual[name] != value}
    return own | {name: False for name in usual if name not in facts}


def read(folder: Path) -> tuple[dict[str, Any], list[Run]]:
    """The header and the runs."""
    header, *lines = read_jsonl(folder / "runs.jsonl")
    if "study" in header:
        return header, []
    usual, runs = header.pop("usual"), []
    for line in lines:
        for name in SHARED:
            facts = usual[name] | line.get(name, {})
            line[name] = {key: value for key, value in facts.items() if value is not False}
        runs.append(Run(**line))
    by_number = {run.run: run for run in runs}
    for row in read_csv(folder / "metrics.csv"):
        number = int(row.pop("run"))
        by_number[number].rows.append({name: float(value) for name, value in row.items() if value})
    return header, runs

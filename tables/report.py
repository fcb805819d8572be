"""What a result's folder shows: table.csv, pictures and its page, all computed from runs.jsonl and metrics.csv."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from drawing import draw, draw_t_val, unit_of
from readings import READINGS
from records import COLUMNS, Record, by_problem, places_of, summarise
from regret import regret_of
from runs import read
from specs import TABLES, Table
from writing import MOST_ROWS, markdown, provenance_of, write_csv, write_page

from utils import COSTS, write_atomically

TABLES_FOLDER = Path(__file__).resolve().parent
INDEX = "<!-- one line per result, written by tables.py --render -->\n"
NO_TABLE = Table("", "", [], {})  # for runs that were made one by one; readings.py has their title and question


def render(folder: Path) -> None:
    """Write all that the folder of a result shows."""
    header, runs = read(folder)
    if "study" in header:
        importlib.import_module(f"studies.{header['study']}").render(folder)
        return
    table, highlight = TABLES.get(header["table"], NO_TABLE), header["highlight"]
    records = summarise(runs, header["target"])
    columns = [name for name in COLUMNS if any(record.get(name) is not None for record in records)]
    write_csv(folder / "table.csv", columns, records)
    if table.has_regret:
        body = regret_of(folder, runs, records, highlight)
    else:
        curves = [record for record in records if record["method"] not in table.only_in_t_val]
        body = _tables(curves, table, highlight)
        if table.only_in_t_val:
            draw_t_val(folder / "t_val.png", records, highlight)
            body += ["![Result of the averaged weights against T_val, for both meta points](t_val.png)", ""]
            curves = by_problem(curves)
        draw(folder / "table.png", curves, highlight)
        body += ["![Training loss, test result and learning rate against epochs](table.png)", ""]
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    provenance = f"Seeds: {seeds}. {provenance_of([vars(run) for run in runs])}"
    write_page(folder, table.title, table.question, header["command"], body, provenance)


def write_index() -> None:
    """The line of every committed result in README.md: its title, and the first sentence of its reading."""
    page = TABLES_FOLDER / "README.md"
    above, _, _ = page.read_text().partition(INDEX)
    lines = []
    for name, reading in READINGS.items():
        result = Path("results") / name / "README.md"
        title = (TABLES_FOLDER / result).read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({result}): {reading.text.split('. ')[0].rstrip('.')}.")
    write_atomically(page, "\n".join([f"{above}{INDEX}", *lines, ""]).encode())


def _tables(records: list[Record], table: Table, highlight: Sequence[str]) -> list[str]:
    """One line of a table with all its columns; several side by side."""
    methods = _leading(records, highlight)
    left_out = len({record["method"] for record in records}) - len(methods)
    groups = list(dict.fromkeys(record["group"] for record in records))
    lines = []
    if len(groups) == 1:
        members = [record for method in methods for record in records if record["method"] == method]
        lines += [f"{members[0]['title']}:", "", *markdown(_one_line(members, table)), ""]
    else:
        for name, weights in {"last": "after the last epoch", "average": "of the averaged weights"}.items():
            if any(f"{name}_mean" in record for record in records):
                heading = f"{unit_of(records).capitalize()} {weights}:"
                lines += [heading, "", *markdown(_side_by_side(records, methods, name, table)), ""]
    notes = []
    if any(record["seeds"] > 1 for record in records):
        notes.append("A ± is the standard deviation over the seeds.")
    if len(groups) == 1:
        notes.append("Best epochs are picked on test data.")
    if any("relative_seconds" in record for record in records) and len(groups) == 1:
        notes.append("Time, passes and peak memory are relative to fixed (text: sgd+val), and leave evaluation out.")
    if any(table.published.get(group) for group in groups):
        notes.append("Published numbers are the paper's at the last epoch; ~ marks those read off plots.")
    others = f"{left_out} more methods and " if left_out else ""
    notes.append(f"[table.csv](table.csv) has {others}all best epochs and costs.")
    return [*lines, " ".join(notes), ""]


def _leading(records: list[Record], highlight: Sequence[str]) -> list[str]:
    """The methods on the page, the best first: those in `highlight`, else the best MLR-SNet, and the best others."""
    places = places_of(records)
    ranked = sorted(dict.fromkeys(record["method"] for record in records), key=lambda method: places[method])
    ours = {record["method"] for record in records if record["is_ours"]}
    first = list(highlight) or [method for method in ranked if method in ours][:1]
    shown = sorted(ranked, key=lambda method: method not in first)[:MOST_ROWS]
    return [method for method in ranked if method in shown]


def _side_by_side(records: list[Record], methods: list[str], name: str, table: Table) -> list[list[str]]:
    """Rows of one result of every method on every line."""
    groups = {record["group"]: record for record in records}
    same_problem = len({record["problem"] for record in records}) == 1
    rows = [["method", *[record["detail"] if same_problem else group for group, record in groups.items()]]]
    for method in methods:
        row = [method]
        for group in groups:
            found = [record for record in records if (record["group"], record["method"]) == (group, method)]
            published = table.published.get(group, {}).get(method)
            text = spread(found[0], name) + _diverged(found[0]) if found else "–"
            row.append(f"{text} (paper: {published})" if published and name == "last" else text)
        rows.append(row)
    return rows


def _one_line(members: list[Record], table: Table) -> list[list[str]]:
    """Rows of all results of every method on the only line."""
    def shows(name: str) -> bool:
        return any(record.get(name) is not None for record in members)

    published = table.published.get(members[0]["group"], {})
    target = next((f"{record['target']:.2f}" for record in members if "target" in record), "")
    spreads = {"last": f"{unit_of(members)}, last epoch", "average": "averaged weights", "best": "best epoch",
               "train_acc": "training accuracy (%)", "train_clean_acc": "on the true labels"}
    spreads = {name: title for name, title in spreads.items() if shows(f"{name}_mean")}
    costs = dict(zip(("seconds", *COSTS), ("time", "forward", "backward", "memory"), strict=True))
    costs = {name: title for name, title in costs.items() if shows(f"relative_{name}")}
    columns = ["method", *spreads.values(), *(["published"] if published else [])]
    columns += [*([f"steps to {target}"] if shows("steps_to_target") else []), *costs.values()]
    rows = [columns]
    for record in members:
        row = [record["method"] + _diverged(record), *[spread(record, name) for name in spreads]]
        if published:
            row.append(published.get(record["method"], "–"))
        if shows("steps_to_target"):
            row.append(_steps(record))
        for name in costs:
            value = record.get(f"relative_{name}")
            row.append("–" if value is None else f"{value:.2f}")
        rows.append(row)
    return rows


def spread(record: Record, name: str) -> str:
    """Mean ± standard deviation."""
    if f"{name}_mean" not in record:
        return "–"
    mean, deviation = record[f"{name}_mean"], record[f"{name}_std"]
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def _steps(record: Record) -> str:
    """Steps to the target, and how many of the seeds reached it where not all did."""
    if "steps_to_target" not in record:
        return "–"
    some = "" if record["reached"] == record["seeds"] else f" ({record['reached']} of {record['seeds']})"
    return f"{record['steps_to_target']:.0f}{some}"


def _diverged(record: Record) -> str:
    missing = record["seeds"] - record["finished"]
    return f" ({missing} of {record['seeds']} diverged)" if missing else ""

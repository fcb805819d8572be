"""The files of a result: tables as CSV and Markdown, lines of JSON, and the page that says what it shows."""

import argparse
import csv
import io
import json
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.folder import provenance
from utils import write_atomically

MOST_ROWS = 12  # of a table on a page
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"  # the committed ones
INDEX = "<!-- one line per result, written by tables.py --render -->\n"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """The columns of every row; those that a row lacks stay empty. Floats have eight digits.

    Python adds them more exactly from 3.12 on, so the last digits of a sum depend on its version.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()})
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, contents: Iterable[Any]) -> None:
    """A line of JSON for each."""
    lines = [json.dumps(content, separators=(",", ":")) for content in contents]
    write_atomically(path, "\n".join([*lines, ""]).encode())


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def study_header(study: str, args: argparse.Namespace, argv: list[str] | None) -> dict[str, Any]:
    """The first line of a study's runs.jsonl: its provenance, and the command that repeats it."""
    words = sys.argv[1:] if argv is None else argv
    return {"study": study, **provenance(args), "command": shlex.join(["python", f"tables/studies/{study}.py", *words])}


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def read_toml(name: str) -> dict[str, Any]:
    """readings.toml, what a person read in each result, or published.toml, the paper's numbers."""
    return tomllib.loads((FOLDER / name).read_text("utf-8"))


def write_page(
    folder: Path, title: str, question: str, command: str, body: list[str], facts: Sequence[Mapping[str, Any]]
) -> None:
    """README.md of a result: question, reading and numbers, the command, and where the runs were made.

    Each of the facts has a run's "commit", "hardware" and "versions".
    """
    reading = {"title": title, "question": question, "reading": "", "note": ""}
    if folder.resolve().parent == RESULTS:  # not a new run of the same table, of which it may not be true
        reading |= read_toml("readings.toml").get(folder.name, {})
    lines = [f"# {reading['title']}", "", f"*{reading['question']}*", ""]
    lines += [reading["reading"], ""] if reading["reading"] else []
    lines += [*body, "```sh", command, "```", ""]
    machines = {
        f"{fact['hardware']['gpu'] or fact['hardware']['cpu']}, {fact['hardware']['threads']} thread(s) a run"
        for fact in facts
    }
    commits, versions = {fact["commit"] for fact in facts}, {fact["versions"]["torch"] for fact in facts}
    lines += [
        f"Commit {', '.join(sorted(commits))}; {'; '.join(sorted(machines))}; torch {', '.join(sorted(versions))}. "
        f"`tables.py --render` makes this page from the runs and metrics beside it. {reading['note']}".rstrip(), "",
    ]
    write_atomically(folder / "README.md", "\n".join(lines).encode(errors="backslashreplace"))


def index_lines() -> list[str]:
    """A line for every committed result: its title, and the first sentence of its reading."""
    lines = []
    for name, reading in read_toml("readings.toml").items():
        page = Path("results") / name / "README.md"
        title = (FOLDER / page).read_text("utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({page}): {reading['reading'].split('. ')[0].rstrip('.')}.")
    return lines


def write_index() -> None:
    """These lines, at the end of tables/README.md."""
    above, _, _ = (FOLDER / "README.md").read_text("utf-8").partition(INDEX)
    write_atomically(FOLDER / "README.md", "\n".join([f"{above}{INDEX}", *index_lines(), ""]).encode())

"""The files of a result: CSV tables, Markdown tables, and the page that says what it shows."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from readings import READINGS, Reading

from utils import write_atomically

MOST_ROWS = 12  # of a table on a page


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """The columns of every row; those that a row lacks stay empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_jsonl(path: Path, contents: Iterable[Any]) -> None:
    """A line of JSON for each."""
    lines = [json.dumps(content, separators=(",", ":")) for content in contents]
    write_atomically(path, "\n".join([*lines, ""]).encode())


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, whose first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def write_page(folder: Path, title: str, question: str, command: str, body: list[str], provenance: str) -> None:
    """README.md of a result: its question, its reading where there is one, its numbers and where they come from."""
    reading = READINGS.get(folder.name, Reading(""))
    paragraphs = [f"# {reading.title or title}", f"*{reading.question or question}*", reading.text]
    lines = [line for paragraph in paragraphs if paragraph for line in (paragraph, "")]
    lines += [*body, "```sh", command, "```", "", f"{provenance} {reading.note}".strip(), ""]
    write_atomically(folder / "README.md", "\n".join(lines).encode())


def provenance_of(facts: Sequence[Mapping[str, Any]]) -> str:
    """Commits, hardware and versions of some runs in a line. Each has "commit", "hardware" and "versions"."""
    hardware = set()
    for fact in facts:
        processor = fact["hardware"]["gpu"] or fact["hardware"]["cpu"]
        hardware.add(f"{processor}, {fact['hardware']['threads']} thread(s) a run")
    return (
        f"Commit {', '.join(sorted({fact['commit'] for fact in facts}))}; {'; '.join(sorted(hardware))}; "
        f"torch {', '.join(sorted({fact['versions']['torch'] for fact in facts}))}. Made from "
        "[runs.jsonl](runs.jsonl) and [metrics.csv](metrics.csv)."
    )

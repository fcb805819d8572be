"""Compare every number in README.md and tables/README.md with the committed results.

A section, the text between two headings, links the results it speaks of: folders in tables/results, or a
provenance.json. Each of its numbers must equal one of theirs, rounded to the digits shown, and each "mean ± deviation"
must be a pair in one row. A whole number without % is a count and must equal one exactly. Write the difference of two
results as the two results.

Results are the tables, costs and benchmarks in a linked folder, the settings in its runs' args.json, and of every
metrics.csv the first rate, the last row and the best epoch, with their means over seeds. Numbers of a run under runs/
count once the section links that run's folder.

What cannot be a result is skipped by the rules in NOT_RESULTS or as one of the phrases in ALLOWED. Numbers above the
marker `<!-- results -->`, where a page has one, are not checked, nor are numbers in words. A lone number passes as
soon as any of the section's results has its value; only a "mean ± deviation" is tied to one row.
"""

import argparse
import bisect
import csv
import functools
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "tables" / "README.md"]
MARKER = "<!-- results -->"

NOT_RESULTS = {
    "code block": r"^```.*?^```[^\n]*$",
    "comment": r"<!--.*?-->",
    "inline code": r"`[^`\n]+`",
    "link target": r"(?<=\])\([^)\s]+\)",
    "URL": r"https?://[^\s)>]+",
    "list number": r"^\s*\d+\. ",
    "name such as ResNet-18 or bf16": r"\b[^\W\d]\w*?-?\d\w*(?:-\d\w*)*",
    "version": r"\b\d+\.\d+\.\d+\S*",
    "arXiv id": r"\b\d{4}\.\d{5}\b",
    "year": r"(?<![\d.,])(?:19|20)\d\d(?![\d,.]*\d)",
    "image size": r"\b\d+×\d+\b",
    "divisor of a schedule": r"÷\d+",
}
ALLOWED = {
    "Python 3.11": "a requirement",
    "PyTorch 2.6": "a requirement",
    "about 80 updates": "what --t-val auto aims at",
    "92.36 % and is best at 94.37 %": "the authors' log",
    "182 kills, 38 of them": "counted by tests/test_faults.py --slow",
    "236 bad inputs": "counted by tests/test_faults.py",
    "32 seeds": "what convergence.py runs by default",
    "150 training steps": "the budget of measure_lr_scale",
}

NUMBER = re.compile(r"(?<![\w.,])(?:(?<!\w)[−-])?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+−-]?\d+)?(?!\w|[.,]\d)")  # not in a hash
SPREAD = re.compile(rf"({NUMBER.pattern}) ± ({NUMBER.pattern})")
LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")
HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)


@dataclass
class Results:
    values: list[float] = field(default_factory=list)
    spreads: list[tuple[float, float]] = field(default_factory=list)  # (mean, standard deviation)

    def add(self, other: "Results") -> None:
        self.values += other.values
        self.spreads += other.spreads

    def have(self, shown: str, is_count: bool) -> bool:
        """Whether a result rounds to the number as it is shown; a count must equal one. `values` must be sorted."""
        value, half = parse(shown)
        if is_count:
            half = 0.0
        place = bisect.bisect_left(self.values, value - half)
        return place < len(self.values) and self.values[place] <= value + half

    def have_spread(self, mean: str, deviation: str) -> bool:
        (middle, half_middle), (width, half_width) = parse(mean), parse(deviation)
        return any(abs(m - middle) <= half_middle and abs(d - width) <= half_width for m, d in self.spreads)


def parse(shown: str) -> tuple[float, float]:
    """A number and half a unit of its last digit, with a little room for binary rounding."""
    plain = shown.replace(",", "").replace("−", "-")
    digits, _, exponent = plain.partition("e")
    decimals = len(digits.partition(".")[2])
    half = 0.5 * 10.0 ** (int(exponent or 0) - decimals)
    return float(plain), half * (1 + 1e-6)


def blank(pattern: str, text: str) -> str:
    """The text with spaces for what matches, so that lines and columns stay where they are."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match.group()), text, flags=re.MULTILINE | re.DOTALL)


def without_what_is_no_result(text: str) -> str:
    for phrase in ALLOWED:
        text = blank(re.escape(phrase).replace(r"\ ", r"\s+"), text)
    for pattern in NOT_RESULTS.values():
        text = blank(pattern, text)
    return text


def read_csv(path: Path) -> list[dict[str, float]]:
    """The finite numbers of every row."""
    with path.open(newline="") as file:
        return [
            {column: float(cell) for column, cell in row.items() if NUMBER.fullmatch(cell or "")}
            for row in csv.DictReader(file)
        ]


def of_table(path: Path) -> Results:
    """Every cell but the standard deviations, and the pairs of columns NAME_mean and NAME_std."""
    results = Results()
    for row in read_csv(path):
        for column, mean in row.items():
            if not column.endswith("_std"):
                results.values.append(mean)
            deviation = row.get(f"{column.removesuffix('_mean')}_std")
            if column.endswith("_mean") and deviation is not None:
                results.spreads.append((mean, deviation))
    return results


def of_markdown(path: Path) -> Results:
    text = without_what_is_no_result(path.read_text())
    if path.with_suffix(".csv").exists():  # it has the means and deviations unrounded; rounding twice is a mistake
        text = blank(r"^\|[^\n]* ± [^\n]*", text)
    results = Results()
    results.spreads = [(parse(mean)[0], parse(deviation)[0]) for mean, deviation in SPREAD.findall(text)]
    results.values += [mean for mean, _ in results.spreads]
    results.values += [parse(shown)[0] for shown in NUMBER.findall(blank(SPREAD.pattern, text))]
    return results


def numbers_in(content: Any) -> Iterator[float]:
    """The numbers under the names of a JSON object; lists hold single measurements."""
    if isinstance(content, dict):
        for item in content.values():
            yield from numbers_in(item)
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


def of_json(path: Path) -> Results:
    content = json.loads(path.read_text())
    if isinstance(content, list):  # a provenance.json holds one object per set of nets
        return Results([number for item in content for number in numbers_in(item)])
    return Results(list(numbers_in(content)))


def of_runs(runs: list[Path]) -> Results:
    """The first rate, the last row and the best epoch of every run, and their means over runs NAME-SEED."""
    results, seeds = Results(), defaultdict(list)
    for run in runs:
        rows = read_csv(run / "metrics.csv")
        numbers = {column: value for column, value in rows[-1].items() if column != "seconds"}
        for column in rows[-1]:
            values = [row[column] for row in rows if column in row]
            if column == "lr":
                numbers["first lr"] = values[0]
            if column.startswith("test_acc"):
                numbers[f"best {column}"] = max(values)
            if column.startswith("test_ppl"):
                numbers[f"best {column}"] = min(values)
        results.values += numbers.values()
        seeds[run.name.rpartition("-")[0]].append(numbers)
    for name, group in seeds.items():
        if not name or len(group) < 2:
            continue
        for column in group[0]:
            values = [numbers.get(column, math.nan) for numbers in group]  # a run that diverged has none
            results.spreads.append((statistics.mean(values), statistics.stdev(values)))
    results.spreads = [spread for spread in results.spreads if not math.isnan(spread[0])]
    results.values += [mean for mean, _ in results.spreads]
    return results


@functools.cache
def of_folder(folder: Path) -> Results:
    results = Results()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".csv" and path.name != "metrics.csv":
            results.add(of_table(path))
        if path.suffix == ".json":
            results.add(of_json(path))
        if path.suffix == ".md" and path.name != "README.md":  # a README is written by hand
            results.add(of_markdown(path))
    results.add(of_runs([path.parent for path in [*folder.glob("metrics.csv"), *folder.glob("*/metrics.csv")]]))
    for path in folder.rglob("metrics.csv"):
        results.values += [row["lr"] for row in read_csv(path)[:1] if "lr" in row]  # where a schedule begins
    for path in folder.rglob("args.json"):
        results.values += numbers_in(json.loads(path.read_text())["arguments"])
    return results


def linked_results(section: str, folder: Path) -> tuple[Results, list[str]]:
    """What the section's links lead to, and the links that lead nowhere; `folder` is the page's."""
    results, broken, sources = Results(), [], {}
    for link in LINK.findall(section):
        path = Path(os.path.normpath(folder / link))
        is_result = "/tables/results/" in path.as_posix()
        if not is_result and path.name != "provenance.json":
            continue
        if not path.exists():
            broken.append(link)
        elif path.name == "provenance.json":
            sources[path] = of_json(path)
        else:
            of_what = path if path.is_dir() else path.parent
            sources[of_what] = of_folder(of_what)
    for source in sources.values():
        results.add(source)
    results.values.sort()
    return results, broken


def problems(page: Path) -> tuple[list[str], int]:
    """A line for every number that agrees with no result, and how many numbers were compared."""
    text = page.read_text()
    code_free = blank(NOT_RESULTS["code block"], text)  # where a comment may begin like a heading
    above, marker, _ = code_free.partition(MARKER)
    begin = len(above) if marker else 0
    starts = [begin, *(match.start() for match in HEADING.finditer(code_free, begin))]
    lines, compared = [], 0
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        section = code_free[start:end]
        results, broken = linked_results(section, page.parent)
        prose = without_what_is_no_result(section)
        wrong = [(section.find(link), f"{link} does not exist") for link in broken]
        missing = "no linked result has this value" if results.values else "the section links no results"
        for match in SPREAD.finditer(prose):
            compared += 2
            if not results.have_spread(*match.groups()):
                wrong.append((match.start(), f"{match.group()}: {missing.replace('value', 'mean and deviation')}"))
        lone = blank(SPREAD.pattern, prose)
        for match in NUMBER.finditer(lone):
            compared += 1
            is_count = match.group().replace(",", "").isdigit() and not lone[match.end():].lstrip().startswith("%")
            if not results.have(match.group(), is_count):
                wrong.append((match.start(), f"{match.group()}: {missing}"))
        for place, message in sorted(wrong):
            lines.append(f"{page}:{text.count(chr(10), 0, start + place) + 1}: {message}")
    return lines, compared


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="(default: README.md and tables/README.md)")
    args = parser.parse_args(argv)
    count, lines = 0, []
    for page in args.pages or PAGES:
        if not page.is_file():
            parser.error(f"{page}: no such page; name a Markdown file, or none for README.md and tables/README.md")
        found, compared = problems(page.absolute())
        lines += found
        count += compared
    if lines:
        print("\n".join(lines))
        print("Correct the number, link its results in the section, or add the phrase to ALLOWED in check_numbers.py.")
        return 1
    print(f"{count} numbers agree with the committed results")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rerun a table of the paper, or race the schedules on your own data: equal terms, several seeds."""

import argparse
import contextlib
import io
import runpy
import shlex
import sys
import tempfile
import webbrowser
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
sys.path[:0] = [str(ROOT), str(SCRIPT.parent)]

from cells import Cell, cells_of
from cluster import build_executor
from methods import CONSTANT, METHODS
from page import is_available, write_html
from race import Race
from records import summarise
from report import render
from runs import collect, write
from specs import TABLES
from writing import read_jsonl, write_index

from data import TEXTS
from training.command_line import Parser, folder, number, show_safely, user_errors
from training.folder import FolderLock, read_record

NOT_FOR_SET = {  # flags that a table gives to its runs itself
    "seed": "use --seeds N", "out": "use --out", "resume": "leave it out; a table resumes its runs by itself",
    "help": "leave it out",
}
NUMBERS = {  # flags that a table reads itself, to name its lines
    "num-epoch": number(int, 1), "limit-train": number(int, 1), "momentum": number(float, 0),
    "label-noise": number(float, 0),
}
EXAMPLES = """\
  python tables/tables.py --table cifar10-resnet --preset smoke --seeds 1 --only fixed cosine"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, EXAMPLES)
    add = parser.add_argument_group("table").add_argument
    add("--list", action="store_true", help="say what the tables are and exit")
    add("--table", choices=TABLES, metavar="NAME", help=f"one of {', '.join(TABLES)}")
    add("--preset", choices=["paper", "desk", "smoke"], default="desk", metavar="NAME",
        help="paper (the paper's setting), desk (two cores and hours) or smoke (minutes, without a download) "
        "(default: desk)")
    add("--seeds", type=number(int, 1), default=3, metavar="N", help="seeds 0 to N - 1 of every run (default: 3)")
    add("--more-seeds", type=more_seeds, nargs="+", action="extend", default=[], metavar="METHOD=N",
        help="methods with more seeds than the others")
    add("--only", nargs="+", action="extend", choices=METHODS, metavar="METHOD", default=[],
        help=f"methods to run and to show: some of {', '.join(METHODS)} (default: the table's)")
    add("--set", type=override, nargs="+", action="extend", default=[], metavar="FLAG=VALUE", dest="overrides",
        help="arguments of the runs that override the preset's, such as data-root=DIR or num-epoch=10; "
        "image-root=DIR text-root=DIR give images and text their own")

    add = parser.add_argument_group("run").add_argument
    add("--jobs", type=number(int, 1), metavar="N",
        help="runs side by side on this machine, sharing its cores (default: 1)")
    add("--slurm", action="store_true", help="submit the runs as jobs to a Slurm cluster (needs the package submitit)")
    add("--slurm-option", type=assignment, nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        dest="slurm_options", help="options of the jobs, such as partition=NAME gpus_per_node=1 cpus_per_task=4 "
        "timeout_min=60 (default: 240 minutes and 1 CPU); cluster=local runs them on this machine")
    add("--help", "-h", action="help", help="show this and exit")

    add = parser.add_argument_group("report").add_argument
    add("--target", type=number(float, 0), metavar="RESULT",
        help="test accuracy (%%) or perplexity to reach (default: where fixed ends, or sgd+val for text)")
    add("--highlight", nargs="+", action="extend", choices=METHODS, metavar="METHOD", default=[],
        help="methods that the pictures show in colour (default: MLR-SNet and the best others, eight in all)")
    add("--out", type=folder, default=SCRIPT.parent / "result", metavar="DIR",
        help="folder of the tables (default: result beside this script)")
    add("--open", action="store_true", help="show the table's page in the browser (needs the package bokeh)")
    add("--render", nargs="+", action="extend", type=folder, metavar="DIR",
        help="write the page and pictures of finished results again, from their runs.jsonl and metrics.csv, and exit")
    args = parser.parse_args(argv)
    if args.render and vars(args) != vars(parser.parse_args(["--render", *map(str, args.render)])):
        parser.error("--render takes everything else from the results; leave the other flags out")
    if not (args.list or args.render):
        try:
            check(args)
        except ValueError as error:
            parser.error(str(error))
    args.slurm_options, args.more_seeds = dict(args.slurm_options), dict(args.more_seeds)
    args.overrides = dict(args.overrides)
    return args


def assignment(text: str) -> tuple[str, str]:
    """An argparse type: NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=VALUE")
    return name, value


def more_seeds(text: str) -> tuple[str, int]:
    """An argparse type: METHOD=N."""
    name, value = assignment(text)
    return name, number(int, 1)(value)


def override(text: str) -> tuple[str, str]:
    """An argparse type: FLAG=VALUE of a script."""
    name, value = assignment(text)
    flag = {"optim": "optimizer"}.get(name, name.replace("_", "-"))
    if flag in NOT_FOR_SET:
        raise argparse.ArgumentTypeError(f"{flag}: {NOT_FOR_SET[flag]}")
    if flag == "optimizer" and value not in ("sgd", "adam", "adamw"):
        raise argparse.ArgumentTypeError(f"optimizer: {value!r}: choose sgd, adam or adamw")
    try:
        NUMBERS.get(flag, str)(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{flag}: {error}") from None
    return flag, value


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that do not go together."""
    if not args.table:
        raise ValueError(f"--table: choose from {', '.join(TABLES)}")
    table = TABLES[args.table]
    own = [*table.methods, *table.text_methods]
    if args.preset not in table.preset_names:
        raise ValueError(f"--preset {args.preset}: {args.table} has only {' and '.join(table.preset_names)}")
    if args.slurm_options and not args.slurm:
        raise ValueError("--slurm-option belongs to --slurm; leave it out")
    if args.slurm and args.jobs:
        raise ValueError("--jobs is for one machine; leave it out with --slurm")
    if args.open and not is_available():
        raise ValueError("--open: the page of a table needs the package bokeh; pip install bokeh")
    pairs = {"--set": args.overrides, "--more-seeds": args.more_seeds, "--slurm-option": args.slurm_options}
    for flag, words in pairs.items():
        for name, count in Counter(name for name, _ in words).items():
            if count > 1:
                raise ValueError(f"{flag} {name}: duplicate; give it once")
    for name, seeds in args.more_seeds:
        if seeds <= args.seeds:
            raise ValueError(f"--more-seeds {name}={seeds}: give more than the {args.seeds} of --seeds")
    for flag, names, allowed in (
        ("--only", args.only, own if table.text_methods else METHODS),
        ("--highlight", args.highlight, args.only or own),
        ("--more-seeds", dict(args.more_seeds), args.only or own),
    ):
        for name in names:
            if name not in allowed:
                raise ValueError(f"{flag} {name}: {args.table} does not run it; leave it out")
    overrides = dict(args.overrides)
    are_texts = {overrides.get("dataset", line["dataset"]) in TEXTS for line in table.lines(args.preset)}
    for flag, is_text in (("image-root", False), ("text-root", True)):
        if flag in overrides and ("data-root" in overrides or is_text not in are_texts):
            raise ValueError(f"--set {flag}: leave it out beside data-root, and where a table has no such lines")
    for flag in overrides:
        values = {line.get(flag) for line in table.lines(args.preset)}
        if None not in values and len(values) > 1:
            raise ValueError(f"--set {flag}: the lines of {args.table} differ in it; leave it out")
        for name in args.only or table.methods:
            sets_lr = METHODS[name].script == "meta-train" or name == CONSTANT  # there it is Adam's on the net
            if flag in METHODS[name].flags or (flag == "lr" and sets_lr):
                raise ValueError(f"--set {flag}: the method {name!r} sets it; leave it out, or choose others by --only")


def check_cells(cells: list[Cell]) -> None:
    """ValueError where two lines have become one, where one ends without a test, and with a script's own line where it
    refuses the arguments of a cell.
    """
    places = [(cell.problem, line, cell.method.name, cell.seed) for cell in cells for line in cell.lines]
    if len(set(places)) < len(places):
        raise ValueError("--set makes two lines of the table one; leave out what they differ in")
    scripts = {cell.method.script for cell in cells}
    parsers = {name: runpy.run_path(str(ROOT / name / f"{name}.py"))["parse_args"] for name in scripts}
    with tempfile.TemporaryDirectory() as empty:
        for cell in cells:
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors):
                    parsers[cell.method.script]([*cell.flags, "--out", f"{empty}/run"])
            except SystemExit:
                reason = errors.getvalue().strip().rpartition("error: ")[2]
                raise ValueError(f"{cell.method.name} on {cell.problem}: {reason}") from None
            every = int(cell.arguments.get("test-every", 1))
            untested = [length for length in cell.lines.values() if length % every and length < cell.num_epochs]
            if untested:
                raise ValueError(f"test-every {every}: a line ends after {untested[0]} epochs, without a test there")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(f"{name:20} {table.title}" for name, table in TABLES.items()))
        return 0
    status = 0
    with user_errors():
        if args.render:
            render_all(args.render)
        else:
            words = sys.argv[1:] if argv is None else argv
            status = run_table(args, shlex.join(["python", "tables/tables.py", *words]))
    return status


def render_all(results: list[Path]) -> None:
    """Write the pages of these results, and the index. ValueError for a folder without a result or a damaged one."""
    for result in results:
        if not (result / "runs.jsonl").exists():
            raise ValueError(f"{result}: has no runs.jsonl; give the folder of a result")
        try:
            render(result.absolute())
        except (LookupError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(f"{result}: a damaged result ({type(error).__name__}: {error})") from None
    write_index()


def run_table(args: argparse.Namespace, command: str) -> int:
    """Run what is not done of a table, and report."""
    table, out = TABLES[args.table], args.out.absolute() / f"{args.table}-{args.preset}"
    cells = cells_of(table, args.preset, args.seeds, args.only, args.overrides, args.more_seeds)
    check_cells(cells)
    with FolderLock(out):
        (out / "runs").mkdir(exist_ok=True)
        _tell_replaced(out, cells)
        _tell_moved(out, cells)
        print(f"runs in {out}: {len(cells)}", file=sys.stderr)
        race = Race(cells, out / "runs")
        if args.slurm:
            executor = build_executor(out / "jobs", args.slurm_options)
            race.run_on(executor, max(1, int(args.slurm_options.get("cpus_per_task", 1))))
        else:
            race.run_here(args.jobs or 1)
        if race.stopped:
            print("stopped; the same command resumes")
            return 130
        header = {"table": args.table, "command": command, "target": args.target, "highlight": args.highlight}
        runs = collect(cells, out / "runs")
        write(out, header, runs)
        render(out)
        if is_available():
            write_html(out / "table.html", table.title, summarise(runs, args.target), args.highlight)
    print((out / "README.md").read_text("utf-8"))
    if args.open:
        webbrowser.open((out / "table.html").as_uri())
    return 0


def _tell_replaced(out: Path, cells: list[Cell]) -> None:
    """Say so where the folder holds a result with other runs, whose page this one replaces."""
    try:
        header, *runs = read_jsonl(out / "runs.jsonl")
        is_replaced = bool({run["name"] for run in runs} - {cell.name for cell in cells})
    except (OSError, ValueError, KeyError, TypeError):  # no result, or a damaged one
        return
    if is_replaced:
        print(f"replacing the page of {header['command']} (its runs stay, so that it is quickly written again; --out "
              "keeps both)", file=sys.stderr)


def _tell_moved(out: Path, cells: list[Cell]) -> None:
    """Say so where runs of the table had their data in another folder: these may be other data."""
    moved: dict[str, str] = {}
    for cell in cells:
        with contextlib.suppress(ValueError):  # not begun
            before = str(read_record(out / "runs" / cell.name, "arguments", "data_root"))
            now = str(Path(cell.arguments.get("data-root", before)).absolute())
            if now != before:
                moved[before] = now
    for before, now in moved.items():
        print(f"warning: runs in {out} read {before}, and {now} is given now; if these data differ, give another --out",
              file=sys.stderr)


if __name__ == "__main__":
    show_safely()
    sys.exit(main())

"""Rerun a table of the paper, or the same race on your own data: every schedule on equal terms, several seeds each."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parents[1]), str(SCRIPT.parent)]

from race import KNOWS_ITS_LENGTH, METHODS, Cell, Race  # noqa: E402
from report import (  # noqa: E402
    COST_COLUMNS,
    RESULT_COLUMNS,
    by_problem,
    draw,
    draw_t_val,
    summarise,
    write_csv,
    write_markdown,
)

from data import TEXTS  # noqa: E402
from utils import number, user_errors  # noqa: E402

OWN_DIRECTION = (  # make no use of momentum
    "l4mom", "l4adam", *(name for name, flags in METHODS.items() if "--optimizer" in flags),
)
STAGE = ["ours (train)", "fixed", "multistep", "exponential", "cosine", "cosine 0.5", "sgdr", "onecycle", "adam", "hd",
         "hd-adam", "rtho", "l4mom", "l4adam", "schedule-free", "schedule-free-adamw", "prodigy"]
LANGUAGE = ["ours (train)", "sgd+val", "adam+val", "hd", "rtho", "l4adam", "ours (transfer)"]
TRANSFER = ["ours (transfer)", "fixed", "multistep", "exponential", "cosine", "sgdr", "adam"]

POINTS = [f"{point} {t_val}" for point in ("lookahead", "average") for t_val in (3, 10, 30, 100)]
OURS = [*POINTS, "ours (transfer) average"]
HORIZON = [*OURS, "average 10 gamma 1.34", "fixed", "fixed 0.4", "cosine 0.5", "onecycle", "schedule-free", "prodigy"]
HORIZON_TEXT = [*OURS, "average 10 gamma 17", "fixed", "fixed 5", "cosine", "onecycle", "schedule-free", "prodigy"]
STOP_ANYWHERE = [name for name in dict.fromkeys(HORIZON + HORIZON_TEXT) if name not in POINTS or name.endswith(" 10")]
FEWER = {"limit-train": "2000", "limit-test": "1000"}  # for a network that takes longer
CLIPPED_SGD = ("fixed", "cosine", "onecycle", "schedule-free", "hd", "rtho")  # of a text: their first rate is 20

Arguments = dict[str, str]  # of a script: flag without dashes -> value


@dataclass(frozen=True)
class Table:
    """Groups of runs; each preset gives the arguments that all share, and `groups` those of one line."""

    title: str
    methods: list[str]
    presets: dict[str, Arguments]
    groups: dict[str, dict[str, Arguments]]  # preset -> line -> its arguments
    published: dict[tuple[str, str], str] = field(default_factory=dict)  # (line, method) -> figure
    text_methods: list[str] = field(default_factory=list)  # of the lines with text, in a table that has both


IMAGE_PRESETS: dict[str, Arguments] = {
    "paper": {"num-epoch": "200"},
    "desk": {"num-epoch": "30", "limit-train": "10000", "limit-test": "5000"},
    "smoke": {"num-epoch": "2", "limit-train": "256", "limit-test": "100", "batch-size": "64"},
}
MOMENTUM = {name: {**shared, "momentum": "0.9"} for name, shared in IMAGE_PRESETS.items()}  # as the paper's meta-test
TEXT_PRESETS: dict[str, Arguments] = {
    "paper": {"num-epoch": "150"},
    "desk": {"num-epoch": "8", "embed-size": "128", "dropout": "0.2"},
    "smoke": {"num-epoch": "2", "embed-size": "16", "limit-train": "6000", "limit-test": "700", "batch-size": "4"},
}


Pair = tuple[str, str]  # network and data set


def _pair(network: str, dataset: str, **own: str) -> Arguments:
    return {"network": network, "dataset": dataset, **own}


def _lines(**presets: list[Pair]) -> dict[str, dict[str, Arguments]]:
    """A line for every pair of a preset."""
    return {preset: {" ".join(pair): _pair(*pair) for pair in pairs} for preset, pairs in presets.items()}


def _line(paper: Pair, desk: Pair, smoke: Pair) -> dict[str, dict[str, Arguments]]:
    return _lines(paper=[paper], desk=[desk], smoke=[smoke])


def _horizons(**presets: list[tuple[Arguments, list[str]]]) -> dict[str, dict[str, Arguments]]:
    """A line for every problem of a preset and every number of epochs that it is given."""
    return {
        preset: {
            f"{_problem(problem)}, {epochs} epochs": {**problem, "num-epoch": epochs}
            for problem, lengths in problems for epochs in lengths
        }
        for preset, problems in presets.items()
    }


def _problem(arguments: Arguments) -> str:
    return f"{arguments['network']} {arguments['dataset']}"


def _varied(preset: dict[str, tuple[Arguments, dict[str, list[str]]]]) -> dict[str, dict[str, Arguments]]:
    """One line for every combination of the values that vary."""
    lines: dict[str, dict[str, Arguments]] = {}
    for name, (base, varied) in preset.items():
        combinations: list[Arguments] = [{}]
        for flag, values in varied.items():
            combinations = [{**one, flag: value} for one in combinations for value in values]
        lines[name] = {
            ", ".join(f"{flag} {value}" for flag, value in one.items()): {**base, **one} for one in combinations
        }
    return lines


RESNET, WIDERESNET = "resnet cifar10", "wideresnet cifar100"
UNSEEN = ["shufflenetv2", "mobilenetv2", "nasnet"]

# Published figures: test accuracy (%) or perplexity at the last epoch; ~ marks those that are read off plots.
TABLES: dict[str, Table] = {
    "cifar10-resnet": Table(
        "Meta-train stage on CIFAR-10", STAGE, IMAGE_PRESETS,
        _line(("resnet", "cifar10"), ("resnet8", "cifar10"), ("resnet8", "digits")),
        {(RESNET, method): figure for method, figure in {
            "ours (train)": "~94.5 (a logged run: 92.36, best 94.37)", "multistep": "~93.7",
            "sgdr": "~90.8 (best ~93.8)", "exponential": "~90.7", "rtho": "~90.6", "adam": "~89.4",
            "hd": "~88.8", "l4mom": "~88.8", "fixed": "~88.3",
        }.items()},
    ),
    "cifar100-wideresnet": Table(
        "Meta-train stage on CIFAR-100", STAGE, IMAGE_PRESETS,
        _line(("wideresnet", "cifar100"), ("resnet20", "cifar100"), ("resnet20", "digits")),
        {(WIDERESNET, method): figure for method, figure in {
            "ours (train)": "~79.6 (a logged run: 79.87, best 80.20)", "multistep": "~76.8", "exponential": "~72.2",
            "hd": "~70.3", "sgdr": "~68.6 (best ~76.7)", "fixed": "~68.5", "adam": "~67.8", "rtho": "~66.7",
            "l4mom": "~63.3",
        }.items()},
    ),
    "ptb-lstm2": Table(
        "Language modelling, two layers", LANGUAGE, TEXT_PRESETS,
        _line(("lstm2", "ptb"), ("lstm2", "ptb"), ("lstm2", "pydoc")),
        {("lstm2 ptb", method): figure for method, figure in {
            "ours (train)": "~70.6", "adam+val": "~71.1", "sgd+val": "~74.3", "rtho": "~77.0", "hd": "~77.2",
            "l4adam": "~83.5", "ours (transfer)": "~71.5",
        }.items()},
    ),
    "ptb-lstm3": Table(
        "Language modelling, three layers", LANGUAGE, TEXT_PRESETS,
        _line(("lstm3", "ptb"), ("lstm3", "ptb"), ("lstm3", "pydoc")),
        {("lstm3 ptb", method): figure for method, figure in {
            "ours (train)": "~72.5", "adam+val": "~74.8", "sgd+val": "~76.0", "rtho": "~78.9", "hd": "~78.9",
            "l4adam": "~93",
        }.items()},
    ),
    "networks": Table(
        "The shipped schedules on other networks", [*TRANSFER, "ours (transfer) gamma 0.067"],
        MOMENTUM | {"desk": {**MOMENTUM["desk"], "num-epoch": "15", "limit-train": "5000", "limit-test": "2000"}},
        _lines(
            paper=[(name, "cifar10") for name in UNSEEN],
            desk=[(name, "cifar10") for name in ("shufflenetv2", "mobilenetv2", "resnet8")],  # NASNet takes days
            smoke=[(name, "digits") for name in UNSEEN],
        ),
        {(f"{network} cifar10", method): f"~{figure}" for network, figures in {
            "shufflenetv2": {"ours (transfer)": 91.4, "exponential": 89.5, "multistep": 88.8, "adam": 87.8,
                             "fixed": 87.0, "sgdr": 73.2},
            "mobilenetv2": {"exponential": 93.4, "multistep": 92.3, "ours (transfer)": 91.2, "fixed": 90.5,
                            "adam": 89.7, "sgdr": 76.0},
            "nasnet": {"ours (transfer)": 95.0, "exponential": 94.8, "multistep": 94.7, "adam": 90.5,
                       "fixed": 87.2, "sgdr": 84.5},
        }.items() for method, figure in figures.items()},
    ),
    "datasets": Table(
        "The shipped schedules on other data", TRANSFER, {name: {} for name in IMAGE_PRESETS},
        {
            preset: {
                " ".join(pair): {**_pair(*pair), **(TEXT_PRESETS if pair[1] in TEXTS else MOMENTUM)[preset]}
                for pair in pairs
            }
            for preset, pairs in {
                "paper": [("resnet", "svhn"), ("resnet", "tinyimagenet"), ("lstm2", "ptb")],
                "desk": [("resnet8", "svhn"), ("resnet8", "tinyimagenet"), ("lstm2", "ptb")],
                "smoke": [("resnet8", "digits"), ("lstm2", "pydoc")],
            }.items()
        },
        {(line, method): f"~{figure}" for line, figures in {
            "resnet svhn": {"ours (transfer)": "95.3 (others 93.0–96.1)"},
            "resnet tinyimagenet": {"ours (transfer)": "58", "multistep": "59", "exponential": "58.5", "fixed": "51",
                                    "adam": "41.7", "sgdr": "40"},
            "lstm2 ptb": {"ours (transfer)": "71.5", "adam+val": "71.2", "sgd+val": "74.3"},
        }.items() for method, figure in figures.items()},
        ["ours (transfer)", "sgd+val", "adam+val"],
    ),
    "imagenet": Table(
        "The shipped schedules on ImageNet", TRANSFER, {**MOMENTUM, "paper": {"momentum": "0.9", "num-epoch": "90"}},
        _line(("resnet50-imagenet", "imagenet"), ("resnet50-imagenet", "imagenet"), ("resnet8", "digits")),
        {("resnet50-imagenet imagenet", method): f"~{figure}" for method, figure in {
            "ours (transfer)": "74.9", "exponential": "76.1", "multistep": "75.9", "fixed": "66.5", "adam": "66.6",
            "sgdr": "56.2 (best ~75.8)",
        }.items()},
    ),
    "epochs": Table(
        "The shipped schedules stretched to other horizons", ["ours (transfer)", "cosine", "fixed"], IMAGE_PRESETS,
        _varied({
            "paper": (_pair("resnet", "cifar10"), {"num-epoch": ["50", "100", "200", "400"]}),
            "desk": (_pair("resnet8", "cifar10"), {"num-epoch": ["10", "30", "60"]}),
            "smoke": (_pair("resnet8", "digits"), {"num-epoch": ["1", "2"]}),
        }),
    ),
    "t-val": Table(
        "Sensitivity to T_val and to Adam's rate on MLR-SNet", ["ours (train)"], IMAGE_PRESETS,
        _varied({
            "paper": (_pair("resnet", "cifar10"), {"t-val": ["100", "300", "1000"], "lr": ["3e-4", "1e-3", "3e-3"]}),
            "desk": (_pair("resnet8", "cifar10"), {"t-val": ["3", "10", "30", "100"], "lr": ["1e-3", "3e-3"]}),
            "smoke": (_pair("resnet8", "digits"), {"t-val": ["1", "2"], "lr": ["1e-3"]}),
        }),
    ),
    "horizon": Table(
        "Where the meta gradient is taken, how often, and for how long a run", HORIZON,
        {
            "paper": {"average": ""},
            "desk": {"limit-train": "5000", "limit-test": "2000", "image-size": "16", "average": ""},
            "smoke": {**IMAGE_PRESETS["smoke"], "average": ""},
        },
        _horizons(
            paper=[(_pair("resnet", "cifar10"), ["50", "100", "200"]),
                   (_pair("wideresnet", "cifar100"), ["50", "100", "200"])],
            desk=[(_pair("resnet8", "cifar10"), ["10", "30", "60"]),
                  (_pair("resnet20", "cifar10", **FEWER), ["10", "30", "60"])],
            smoke=[(_pair("resnet8", "digits"), ["2", "3"])],
        ),
    ),
    "horizon-text": Table(
        "The same race on text", HORIZON_TEXT,
        {
            "paper": {"average": ""},
            "desk": {"tokens": "char", "embed-size": "64", "dropout": "0.1", "limit-train": "50000",
                     "limit-test": "20000", "average": ""},
            "smoke": {**TEXT_PRESETS["smoke"], "average": ""},
        },
        _horizons(
            paper=[(_pair("lstm2", "ptb"), ["40", "80", "150"]), (_pair("lstm3", "ptb"), ["40", "80", "150"])],
            desk=[(_pair("lstm2", "ptb"), ["10", "30", "60"])],
            smoke=[(_pair("lstm2", "pydoc"), ["2", "3"])],
        ),
    ),
    "own": Table(
        "Your own class folders", STAGE, IMAGE_PRESETS,
        _line(("resnet", "folder"), ("resnet8", "folder"), ("resnet8", "folder")),
    ),
}


def cells_of(table: Table, preset: str, seeds: int, methods: Sequence[str], changes: Arguments) -> list[Cell]:
    """The runs of a table; without `methods`, all of its. `changes` are arguments that stand over the preset's."""
    lines = {line: {**table.presets[preset], **own, **changes} for line, own in table.groups[preset].items()}
    meta_trains = any(METHODS[name][0] == "meta-train" for name in table.methods)
    cells = []
    for seed in range(seeds):
        for line, shared in lines.items():
            is_text = shared["dataset"] in TEXTS
            usual = table.text_methods if is_text and table.text_methods else table.methods
            longest = max(int(other["num-epoch"]) for other in lines.values() if _problem(other) == _problem(shared))
            for method in methods or usual:
                if table.text_methods and method not in usual:
                    continue
                arguments = dict(shared)
                if method == "ours (train)":
                    arguments.setdefault("t-val", "300" if preset == "paper" else "auto")
                if not is_text and meta_trains:  # all train on what meta-training leaves
                    arguments["num-meta"] = "100" if preset == "smoke" else "1000"
                if is_text and method in CLIPPED_SGD:
                    arguments["lr"] = "20"
                if method in OWN_DIRECTION:
                    arguments.pop("momentum", None)
                if method not in KNOWS_ITS_LENGTH:  # its run on the longest line serves the shorter ones as well
                    arguments["num-epoch"] = str(longest)
                title = line.replace(_problem(table.groups[preset][line]), _problem(shared))
                cells.append(Cell(title, method, seed, tuple(arguments.items()), int(shared["num-epoch"])))
    return cells


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="name the tables and stop")
    add("--table", choices=TABLES, help="the table to run")
    add("--preset", choices=["paper", "desk", "smoke"], default="desk",
        help="the paper's setting, one for two cores and hours, or one for minutes without a download (default: desk)")
    add("--seeds", type=number(int, 1), default=3, help="seeds 0, 1, … of every run (default: 3)")
    add("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)} (default: the table's)")
    add("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="changes",
        help="arguments of the runs that stand over the preset's, such as data-root=DIR or num-epoch=10")
    add("--target", type=float, help="test accuracy (%%) or perplexity to reach (default: where fixed ends)")
    add("--jobs", type=number(int, 1), default=1, help="runs side by side, sharing the cores (default: 1)")
    add("--out", type=Path, default=SCRIPT.parent / "result", help="folder of the tables (default: result beside this)")
    args = parser.parse_args(argv)
    if not args.list and not args.table:
        parser.error(f"--table: choose from {', '.join(TABLES)}")
    if any("=" not in change for change in args.changes):
        parser.error("--set takes FLAG=VALUE, such as num-epoch=10")
    args.changes = dict(change.removeprefix("--").split("=", 1) for change in args.changes)
    for flag in args.changes if args.table else []:
        values = [own.get(flag) for own in TABLES[args.table].groups[args.preset].values()]
        if None not in values and len(set(values)) > 1:
            parser.error(f"--set {flag}: the lines of {args.table} differ in it; leave it out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(f"{name:20} {table.title}" for name, table in TABLES.items()))
        return 0
    table = TABLES[args.table]
    cells = cells_of(table, args.preset, args.seeds, args.only or [], args.changes)
    folder = args.out.absolute() / f"{args.table}-{args.preset}"
    race = Race(cells, folder / "runs", args.jobs)
    with user_errors():
        race.folder.mkdir(parents=True, exist_ok=True)
        race.run()
    if race.stopped:
        print("stopped; the same command goes on from here")
        return 130
    records = summarise(race, args.target)
    write_csv(folder / "table.csv", RESULT_COLUMNS, records)
    write_csv(folder / "cost.csv", COST_COLUMNS, records)
    command = shlex.join(["python", "tables/tables.py", *(argv if argv is not None else sys.argv[1:])])
    write_markdown(folder / "table.md", table.title, table.published, race, records, command)
    if args.table.startswith("horizon"):
        draw_t_val(folder / "t_val.png", records)
        records = by_problem(records, STOP_ANYWHERE)
    draw(folder / "table.png", records)
    print((folder / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

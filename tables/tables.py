"""Rerun a table of the paper, or the same race on your own data: every schedule on equal terms, several seeds each."""

import argparse
import csv
import hashlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from data import TEXTS  # noqa: E402
from utils import COSTS, number, user_errors, write_atomically  # noqa: E402

# ---------------------------------------------------------------------------------------------- what is raced

ADAM = ("--optimizer", "adam")
METHODS: dict[str, tuple[str, ...]] = {  # the arguments of meta-test; "ours (train)" is meta-train's own network
    "ours (train)": (),
    "ours (transfer)": ("--schedule", "mlr-snet"),
    "fixed": ("--schedule", "fixed"),
    "multistep": ("--schedule", "multistep"),
    "exponential": ("--schedule", "exponential"),
    "cosine": ("--schedule", "cosine"),
    "sgdr": ("--schedule", "sgdr"),
    "onecycle": ("--schedule", "onecycle"),
    "adam": ("--schedule", "fixed", *ADAM),
    "sgd+val": ("--schedule", "val"),
    "adam+val": ("--schedule", "val", *ADAM),
    "hd": ("--schedule", "hd"),
    "hd-adam": ("--schedule", "hd", *ADAM),
    "rtho": ("--schedule", "rtho"),
    "l4mom": ("--schedule", "l4mom"),
    "l4adam": ("--schedule", "l4adam"),
    "schedule-free": ("--schedule", "schedule-free"),
    "schedule-free-adamw": ("--schedule", "schedule-free", "--optimizer", "adamw"),
    "prodigy": ("--schedule", "prodigy", *ADAM),
}
OWN_DIRECTION = (  # make no use of momentum
    "l4mom", "l4adam", *(name for name, flags in METHODS.items() if "--optimizer" in flags),
)
STAGE = [name for name in METHODS if name not in ("ours (transfer)", "sgd+val", "adam+val")]
LANGUAGE = ["ours (train)", "sgd+val", "adam+val", "hd", "rtho", "l4adam", "ours (transfer)"]
TRANSFER = ["ours (transfer)", "fixed", "multistep", "exponential", "cosine", "sgdr", "adam"]

Arguments = dict[str, str]  # of a script: flag without dashes -> value


@dataclass(frozen=True)
class Cell:
    """One run: a method on one line of the table with one seed."""

    group: str
    method: str
    seed: int
    arguments: tuple[tuple[str, str], ...]

    @property
    def command(self) -> list[str]:
        script = "meta-train" if self.method == "ours (train)" else "meta-test"
        flags = [word for flag, value in self.arguments for word in (f"--{flag}", value)]
        return [str(ROOT / script / f"{script}.py"), *flags, *METHODS[self.method], "--seed", str(self.seed)]

    @property
    def name(self) -> str:
        key = hashlib.sha256(json.dumps([self.method, self.arguments]).encode()).hexdigest()[:8]
        return "_".join([*f"{self.group} {self.method}".replace("(", "").replace(")", "").split(), key, str(self.seed)])


@dataclass(frozen=True)
class Table:
    """Groups of runs; each preset gives the arguments that all share, and `groups` those of one line."""

    title: str
    methods: list[str]
    presets: dict[str, Arguments]
    groups: dict[str, dict[str, Arguments]]  # preset -> line -> its arguments
    published: dict[tuple[str, str], str] = field(default_factory=dict)  # (line, method) -> figure


IMAGE_PRESETS: dict[str, Arguments] = {
    "paper": {"num-epoch": "200"},
    "desk": {"num-epoch": "30", "limit-train": "10000", "limit-test": "5000"},
    "smoke": {"num-epoch": "2", "limit-train": "256", "limit-test": "100", "batch-size": "64"},
}
TEXT_PRESETS: dict[str, Arguments] = {
    "paper": {"num-epoch": "150"},
    "desk": {"num-epoch": "8", "embed-size": "128", "dropout": "0.2"},
    "smoke": {"num-epoch": "2", "embed-size": "16", "limit-train": "6000", "limit-test": "700", "batch-size": "4"},
}


def _line(paper: tuple[str, str], desk: tuple[str, str], smoke: tuple[str, str]) -> dict[str, dict[str, Arguments]]:
    """One line, its network and data set under each preset."""
    choice = {"paper": paper, "desk": desk, "smoke": smoke}
    return {preset: {" ".join(names): _pair(*names)} for preset, names in choice.items()}


def _pair(network: str, dataset: str) -> Arguments:
    return {"network": network, "dataset": dataset}


def _lines(preset_networks: dict[str, list[tuple[str, str]]]) -> dict[str, dict[str, Arguments]]:
    return {preset: {" ".join(pair): _pair(*pair) for pair in pairs} for preset, pairs in preset_networks.items()}


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
        "The shipped schedules on other networks", TRANSFER,
        {name: {**shared, "momentum": "0.9"} for name, shared in IMAGE_PRESETS.items()},
        _lines({preset: [(name, data) for name in UNSEEN]
                for preset, data in (("paper", "cifar10"), ("desk", "cifar10"), ("smoke", "digits"))}),
        {(f"{network} cifar10", method): f"~{figure}" for network, figures in {
            "shufflenetv2": {"ours (transfer)": 91.4, "exponential": 89.5, "multistep": 88.8, "adam": 87.8,
                             "fixed": 87.0, "sgdr": 73.2},
            "mobilenetv2": {"exponential": 93.4, "multistep": 92.3, "ours (transfer)": 91.2, "fixed": 90.5,
                            "adam": 89.7, "sgdr": 76.0},
            "nasnet": {"ours (transfer)": 95.0, "exponential": 94.8, "multistep": 94.7, "adam": 90.5,
                       "fixed": 87.2, "sgdr": 84.5},
        }.items() for method, figure in figures.items()},
    ),
    "svhn": Table(
        "The shipped schedules on SVHN", TRANSFER,
        {name: {**shared, "momentum": "0.9"} for name, shared in IMAGE_PRESETS.items()},
        _line(("resnet", "svhn"), ("resnet8", "svhn"), ("resnet8", "digits")),
        {("resnet svhn", "ours (transfer)"): "~95.3 (others 93.0–96.1)"},
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
    "own": Table(
        "Your own class folders", STAGE, IMAGE_PRESETS,
        _line(("resnet", "folder"), ("resnet8", "folder"), ("resnet8", "folder")),
    ),
}


def cells_of(table: Table, preset: str, seeds: int, methods: Sequence[str], changes: Arguments) -> list[Cell]:
    """The runs of a table; `changes` are arguments that stand over the preset's."""
    cells = []
    for seed in range(seeds):
        for group, own in table.groups[preset].items():
            for method in methods:
                arguments = {**table.presets[preset], **own, **changes}
                is_text = arguments["dataset"] in TEXTS
                if method == "ours (train)":
                    arguments.setdefault("t-val", "300" if preset == "paper" else "auto")
                if not is_text and "ours (train)" in table.methods:  # all train on what meta-training leaves
                    arguments["num-meta"] = "100" if preset == "smoke" else "1000"
                if is_text and method in ("hd", "rtho"):
                    arguments["lr"] = "20"  # the usual first rate of SGD with clipped gradients
                if method in OWN_DIRECTION:
                    arguments.pop("momentum", None)
                cells.append(Cell(group, method, seed, tuple(arguments.items())))
    return cells


# ---------------------------------------------------------------------------------------------- running


class Race:
    """Runs cells side by side, each in its own folder; what is done stays done, what was stopped goes on."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.cells, self.folder, self.jobs = cells, folder, jobs
        self.threads = max(1, (os.cpu_count() or 1) // jobs)  # processes that fight for the cores are far slower
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False

    def run(self) -> None:
        """Run what is not done. ValueError with the script's own line where a cell cannot run."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._stop)
        epochs = {cell: int(dict(cell.arguments)["num-epoch"]) for cell in self.cells}
        bar = tqdm(total=sum(epochs.values()), unit="epoch", disable=None)
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self._run, cell) for cell in self.cells]
            while not all(future.done() for future in waiting):
                bar.update(sum(len(self.rows(cell)) for cell in self.cells) - bar.n)
                time.sleep(0.5)
        bar.close()
        for future in waiting:
            future.result()

    def _run(self, cell: Cell) -> None:
        out = self.folder / cell.name
        if self.stopped or (out / "status.json").exists():
            return
        command = [sys.executable, *cell.command]
        if (out / "args.json").exists():
            command = [*command[:2], "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        process = subprocess.Popen(
            [*command, "--out", str(out)], env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches the cells through _stop alone
        )
        self.processes.append(process)
        errors = (process.communicate()[1].strip().splitlines() or [""])[-1]
        if process.returncode == 0 or errors.startswith("diverged"):
            status = {"status": "diverged" if errors.startswith("diverged") else "done", "message": errors}
            write_atomically(out / "status.json", json.dumps(status).encode())
        elif not self.stopped:
            self._stop()
            raise ValueError(f"{cell.name}: {errors or f'exit status {process.returncode}'}")

    def _stop(self, number: int = 0, frame: Any = None) -> None:
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # it writes a checkpoint

    def rows(self, cell: Cell) -> list[dict[str, float]]:
        """metrics.csv of a cell so far."""
        try:
            lines = csv.DictReader(io.StringIO((self.folder / cell.name / "metrics.csv").read_text()))
            return [{name: float(value) for name, value in line.items()} for line in lines]
        except OSError:
            return []

    def record(self, cell: Cell, name: str) -> dict[str, Any]:
        """A JSON file of a cell's folder."""
        return json.loads((self.folder / cell.name / name).read_text())


# ---------------------------------------------------------------------------------------------- what a table says


def summarise(race: Race, target: float | None) -> list[dict[str, Any]]:
    """One record for every line and method, computed from the run folders."""
    lines: dict[tuple[str, str], list[Cell]] = {}
    for cell in race.cells:
        lines.setdefault((cell.group, cell.method), []).append(cell)
    records = []
    for (group, method), cells in lines.items():
        done = [cell for cell in cells if race.record(cell, "status.json")["status"] == "done"]
        record: dict[str, Any] = {"group": group, "method": method, "seeds": len(cells), "finished": len(done)}
        runs = [race.rows(cell) for cell in done]
        if runs:
            metric = "test_acc" if "test_acc" in runs[0][0] else "test_ppl"
            best = max if metric == "test_acc" else min
            record["metric"] = metric
            for name, values in (
                ("last", [rows[-1][metric] for rows in runs]),
                ("best", [best(row[metric] for row in rows) for rows in runs]),
            ):
                record[f"{name}_mean"] = statistics.mean(values)
                record[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            record["seconds"] = statistics.mean(sum(row["seconds"] for row in rows) for rows in runs)
            costs = [race.record(cell, "cost.json") for cell in done]
            record |= {name: statistics.mean(cost[name] for cost in costs) for name in COSTS}
            record["steps_per_epoch"] = costs[0]["steps_per_epoch"]
            record["runs"] = runs
        records.append(record)
    for record in records:
        same = [other for other in records if other["group"] == record["group"] and "runs" in other]
        basis = next((other for name in ("fixed", "sgd+val") for other in same if other["method"] == name), None)
        if basis and "runs" in record:
            for name in ("seconds", *COSTS):
                record[f"relative_{name}"] = record[name] / basis[name] if basis[name] else None
            _reach(record, basis["last_mean"] if target is None else target)
    return records


def _reach(record: dict[str, Any], target: float) -> None:
    """Steps and seconds until the target is met, the mean over the runs that met it."""
    sign = 1 if record["metric"] == "test_acc" else -1
    steps, seconds = [], []
    for rows in record["runs"]:
        number = next((n for n, row in enumerate(rows, 1) if sign * (row[record["metric"]] - target) >= 0), None)
        if number is not None:
            steps.append(number * record["steps_per_epoch"])
            seconds.append(sum(row["seconds"] for row in rows[:number]))
    record |= {"target": target, "reached": len(steps)}
    if steps:
        record |= {"steps_to_target": statistics.mean(steps), "seconds_to_target": statistics.mean(seconds)}


RESULT_COLUMNS = ("group", "method", "metric", "seeds", "finished", "last_mean", "last_std", "best_mean", "best_std",
                  "target", "reached", "steps_to_target")
COST_COLUMNS = ("group", "method", "seconds", "seconds_to_target", *COSTS,
                *(f"relative_{name}" for name in ("seconds", *COSTS)))


def write_csv(path: Path, columns: Sequence[str], records: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue().encode())


def _spread(record: dict[str, Any], name: str) -> str:
    if f"{name}_mean" not in record:
        return "–"
    deviation = record[f"{name}_std"]
    return f"{record[f'{name}_mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _times(record: dict[str, Any], name: str) -> str:
    value = record.get(f"relative_{name}")
    return "–" if value is None else f"{value:.2f}"


def write_markdown(path: Path, table: Table, race: Race, records: list[dict[str, Any]], command: str) -> None:
    """The table as a page, with its provenance."""
    records_of = {record["group"]: [r for r in records if r["group"] == record["group"]] for record in records}
    lines = [f"# {table.title}", ""]
    for group, members in records_of.items():
        metric = next((r["metric"] for r in members if "metric" in r), "test_acc")
        unit = "test accuracy (%)" if metric == "test_acc" else "test perplexity"
        target = next((r["target"] for r in members if "target" in r), None)
        goal = "target" if target is None else f"{target:.2f}"
        lines += [
            f"## {group}", "",
            f"| method | {unit}, last epoch | best epoch (picked on test data) | published | steps to {goal} "
            f"| seconds to {goal} | time | forward | backward | memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for record in members:
            diverged = record["seeds"] - record["finished"]
            note = f" ({diverged} of {record['seeds']} diverged)" if diverged else ""
            reached = record.get("reached", 0)
            of = f" ({reached} of {record['seeds']})" if 0 < reached < record["seeds"] else ""
            steps = f"{record['steps_to_target']:.0f}{of}" if reached else "–"
            seconds = f"{record['seconds_to_target']:.0f}{of}" if reached else "–"
            published = table.published.get((group, record["method"]), "–")
            lines.append("| " + " | ".join([
                record["method"] + note, _spread(record, "last"), _spread(record, "best"), published, steps, seconds,
                *(_times(record, name) for name in ("seconds", *COSTS)),
            ]) + " |")
        lines.append("")
    facts = [race.record(cell, "args.json") for cell in race.cells]
    hardware = sorted({f"{f['hardware']['gpu'] or f['hardware']['cpu']}, {f['hardware']['threads']} thread(s) a run"
                       for f in facts})
    lines += [
        "Mean ± standard deviation over the seeds. Time, forward and backward passes and peak memory are relative to "
        "fixed (text: sgd+val), evaluation left out of the passes. Published figures are the paper's at the last "
        "epoch, in its own setting; ~ marks those read off its plots.", "",
        f"Command: `{command}`; seeds 0 to {max(cell.seed for cell in race.cells)}; "
        f"commit {', '.join(sorted({f['commit'] for f in facts}))}; {'; '.join(hardware)}; "
        f"torch {', '.join(sorted({f['versions']['torch'] for f in facts}))}.", "",
    ]
    write_atomically(path, "\n".join(lines).encode())


COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]  # Okabe and Ito's


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Training loss, test metric with a band over the seeds, and LR against epochs; a row for every line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(record["group"] for record in records))
    figure, panels = pyplot.subplots(
        len(groups), 3, figsize=(14, 3.6 * len(groups)), layout="constrained", squeeze=False
    )
    for row, group in zip(panels, groups, strict=True):
        members = [record for record in records if record["group"] == group and "runs" in record]
        for place, record in enumerate(members):
            style = {"color": COLOURS[place % len(COLOURS)], "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3]}
            for panel, column in zip(row, ("train_loss", record["metric"], "lr"), strict=True):
                length = min(len(run) for run in record["runs"])
                curves = [[line[column] for line in run[:length]] for run in record["runs"]]
                middle = [statistics.mean(values) for values in zip(*curves, strict=True)]
                epochs = range(1, length + 1)
                panel.plot(epochs, middle, label=record["method"], linewidth=1.4, **style)
                if column == record["metric"] and len(curves) > 1:
                    deviation = [statistics.stdev(values) for values in zip(*curves, strict=True)]
                    low = [m - d for m, d in zip(middle, deviation, strict=True)]
                    high = [m + d for m, d in zip(middle, deviation, strict=True)]
                    panel.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
        metric = members[0]["metric"] if members else "test_acc"
        labels = ("training loss (nats)", "test accuracy (%)" if metric == "test_acc" else "test perplexity",
                  "learning rate (mean of the epoch)")
        for panel, label in zip(row, labels, strict=True):
            panel.set(xlabel="epoch", ylabel=label)
            panel.xaxis.get_major_locator().set_params(integer=True)
        row[2].set_yscale("log")
        if metric == "test_ppl":
            row[1].set_yscale("log")
        row[0].set_title(group, loc="left")
        if members:
            row[2].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- command line


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
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print("\n".join(f"{name:20} {table.title}" for name, table in TABLES.items()))
        return 0
    table = TABLES[args.table]
    changes = dict(change.removeprefix("--").split("=", 1) for change in args.changes)
    cells = cells_of(table, args.preset, args.seeds, args.only or table.methods, changes)
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
    command = " ".join(["python tables/tables.py", *(argv if argv is not None else sys.argv[1:])])
    write_markdown(folder / "table.md", table, race, records, command)
    draw(folder / "table.png", records)
    print((folder / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

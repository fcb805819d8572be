"""What a table runs: a cell for every line, method and seed, and the command and folder of its run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from specs import (
    CLIPPED_SGD,
    CONSTANT,
    DATASET_TITLES,
    GRIDS,
    KNOWS_ITS_LENGTH,
    METHODS,
    NETWORK_TITLES,
    OLDER_NAMES,
    OWN_DIRECTION,
    WITHOUT_MOMENTUM,
    Table,
)

from data import TEXTS
from mlr_snet_scale import usual_lr
from utils import ROOT, build_optimizer

Arguments = dict[str, str]  # of a script: flag without dashes -> value, "" for a flag without one


def parse(text: str) -> Arguments:
    """The arguments in "FLAG=VALUE FLAG=VALUE"."""
    return dict(word.split("=", 1) for word in text.split())


def problem_of(arguments: Arguments) -> str:
    """What the methods of a line are compared on: network and data set, as flag values."""
    return f"{arguments['network']} {arguments['dataset']}"


def in_words(arguments: Arguments) -> str:
    """The problem for a reader, such as "ResNet-8 on CIFAR-10 images (class folder)"."""
    network, dataset = arguments["network"], arguments["dataset"]
    title = DATASET_TITLES.get(dataset, dataset)
    if dataset in ("folder", "text"):
        name = Path(arguments.get("data-root", "")).name or "your"
        content, kind = ("text", "text folder") if dataset == "text" else ("images", "class folder")
        title = f"{DATASET_TITLES.get(name, name)} {content} ({kind})"
    return f"{NETWORK_TITLES.get(network, network)} on {title}"


@dataclass(frozen=True)
class Cell:
    """A method on one line of the table with one seed: a run, or the first epochs of a run that longer lines share."""

    group: str
    method: str
    seed: int
    arguments: tuple[tuple[str, str], ...]  # of the run, in this order
    num_epochs: int  # that count here

    @property
    def is_whole(self) -> bool:
        """Whether all epochs of the run count here."""
        return self.num_epochs == int(dict(self.arguments)["num-epoch"])

    @property
    def problem(self) -> str:
        return problem_of(dict(self.arguments))

    @property
    def title(self) -> str:
        """The line for a reader: the problem in words, and what else the line's name says."""
        words = in_words(dict(self.arguments))
        rest = self.group.replace(self.problem, "").removeprefix(", ")
        return f"{words}, {rest}" if rest else words

    @property
    def script(self) -> str:
        """meta-train or meta-test."""
        return METHODS[self.method].split()[0]

    @property
    def flags(self) -> list[str]:
        """The script's arguments, without --out. The method's own come after the line's and override them."""
        flags = []
        for flag, value in self.arguments:
            flags.append(f"--{flag}")
            if value:
                flags.append(value)
        return [*flags, *METHODS[self.method].split()[1:], "--seed", str(self.seed)]

    @property
    def command(self) -> list[str]:
        return [str(ROOT / self.script / f"{self.script}.py"), *self.flags]

    @property
    def name(self) -> str:
        """The folder of the run."""
        key = hashlib.sha256(json.dumps([METHODS[self.method].split(), self.arguments]).encode()).hexdigest()[:8]
        method = OLDER_NAMES.get(self.method, self.method).replace("(", "").replace(")", "")
        return "_".join([*self.problem.split(), *method.split(), key, str(self.seed)])


def cells_of(table: Table, preset: str, seeds: int, methods: Sequence[str], overrides: Arguments) -> list[Cell]:
    """The cells of a table; `methods` replace the table's own where there are any."""
    lines = {}
    longest: dict[frozenset[tuple[str, str]], int] = {}  # a line without its length -> the most epochs
    for line, own in table.lines[preset].items():
        arguments = _with_data_root(parse(table.presets[preset]) | parse(own) | overrides)
        lines[line] = arguments
        key = _all_but_length(arguments)
        longest[key] = max(longest.get(key, 0), int(arguments["num-epoch"]))
    cells = []
    for seed in range(seeds):
        for line, shared in lines.items():
            group = line.replace(problem_of(parse(table.lines[preset][line])), problem_of(shared))
            fitting = _methods_of(table, shared, methods)
            grid = grid_of(shared, preset) if table.has_regret else []
            for method in dict.fromkeys([*fitting, *grid]):
                arguments = _arguments_of(table, preset, shared, method)
                if method not in KNOWS_ITS_LENGTH:  # its run on the longest line also serves the shorter ones
                    arguments["num-epoch"] = str(longest[_all_but_length(shared)])
                cells.append(Cell(group, method, seed, tuple(arguments.items()), int(shared["num-epoch"])))
    return cells


def _with_data_root(arguments: Arguments) -> Arguments:
    """Without image-root and text-root, which stand for the data-root of the image and of the text lines."""
    arguments = dict(arguments)
    roots = {"image-root": arguments.pop("image-root", ""), "text-root": arguments.pop("text-root", "")}
    root = roots["text-root" if arguments["dataset"] in TEXTS else "image-root"]
    if root:
        arguments["data-root"] = root
    return arguments


def grid_of(arguments: Arguments, preset: str) -> list[str]:
    """The cosines whose best is the zero mark of a line with regrets; for a smoke, the middle one."""
    optimizer = arguments.get("optimizer", "sgd").removesuffix("w")
    if float(arguments.get("momentum", 0)):
        optimizer = "momentum"
    peaks = GRIDS["text" if arguments["dataset"] in TEXTS else "images", optimizer]
    if preset == "smoke":
        peaks = [peaks[len(peaks) // 2]]
    return [f"cosine {peak}" for peak in peaks]


def _all_but_length(arguments: Arguments) -> frozenset[tuple[str, str]]:
    """What lines must have in common for one run to serve them all."""
    return frozenset((flag, value) for flag, value in arguments.items() if flag != "num-epoch")


def _methods_of(table: Table, shared: Arguments, methods: Sequence[str]) -> Sequence[str]:
    """The methods of one line: in a table of images and text, each line has its own."""
    if not table.text_methods:
        return methods or table.methods
    fitting = table.text_methods if shared["dataset"] in TEXTS else table.methods
    if not methods:
        return fitting
    return [method for method in methods if method in fitting]


def _arguments_of(table: Table, preset: str, shared: Arguments, method: str) -> Arguments:
    """A method's arguments on one line."""
    arguments = dict(shared)
    is_text = arguments["dataset"] in TEXTS
    if method == "MLR-SNet (learning)":
        arguments.setdefault("t-val", "300" if preset == "paper" else "auto")
    if not is_text and any(METHODS[name].startswith("meta-train") for name in table.methods):
        # Meta-training holds images out. Every method of the table trains on what is left.
        arguments.setdefault("num-meta", "100" if preset == "smoke" else "1000")
    if is_text and method in CLIPPED_SGD and arguments.get("optimizer", "sgd") == "sgd":
        arguments.setdefault("lr", "20")
    if method in CONSTANT:
        arguments["lr"] = _constant_lr(arguments)
    if method in OWN_DIRECTION:
        arguments.pop("optimizer", None)
    if method in WITHOUT_MOMENTUM:
        arguments.pop("momentum", None)
    return arguments


def _constant_lr(arguments: Arguments) -> str:
    """The rate that is best on the average calibration problem of the line's optimizer."""
    weights = [torch.zeros(1, requires_grad=True)]
    momentum = float(arguments.get("momentum", 0))
    optimizer = build_optimizer(arguments.get("optimizer", "sgd"), weights, 1.0, momentum, weight_decay=0.0)
    return f"{usual_lr(optimizer):.3g}"

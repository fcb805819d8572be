"""What a table runs: a cell for every method, line and seed, and the command and folder of its run."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from methods import CONSTANT, GRIDS, METHODS, Method
from specs import Arguments, Table
from words import detail_of, problem_of

from baselines import SCHEDULES
from data import TEXTS
from mlr_snet_scale import usual_lr
from utils import ROOT, build_optimizer


@dataclass(frozen=True)
class Cell:
    """A run of a table: a method with one seed, on one line or on lines that differ in their length only."""

    method: Method
    seed: int
    arguments: Arguments  # of the script
    lines: dict[str, int]  # the detail of each line that it serves -> the epochs that count there

    @property
    def num_epochs(self) -> int:
        return int(self.arguments["num-epoch"])

    @property
    def problem(self) -> str:
        return problem_of(self.arguments)

    @property
    def flags(self) -> list[str]:
        """The script's arguments, without --out."""
        flags = []
        for flag, value in self.arguments.items():
            flags.append(f"--{flag}")
            if value:
                flags.append(value)
        return [*flags, "--seed", str(self.seed)]

    @property
    def command(self) -> list[str]:
        script = self.method.script
        return [str(ROOT / script / f"{script}.py"), *self.flags]

    @property
    def name(self) -> str:
        """The folder of the run. The order of the arguments does not matter."""
        content = json.dumps([self.method.script, sorted(self.arguments.items())])
        key = hashlib.sha256(content.encode()).hexdigest()[:8]
        words = re.sub("[(),]", "", self.method.name).split()
        return "_".join([*self.problem.split(), *words, key, str(self.seed)])


def cells_of(
    table: Table, preset: str, seeds: int, methods: Sequence[str], overrides: Arguments,
    more_seeds: Mapping[str, int] | None = None,
) -> list[Cell]:
    """The cells of a table; `methods` replace the table's own where there are any. Each has so many seeds, or what
    `more_seeds` gives it; the grid, to which all are compared seed by seed, has the most.
    """
    seeds_of = dict(more_seeds or {})
    most = max([seeds, *seeds_of.values()])
    lines = [_with_data_root(line | overrides) for line in table.lines(preset)]
    longest: dict[frozenset[tuple[str, str]], int] = {}  # a line without its length -> the most epochs
    for line in lines:
        key = _all_but_length(line)
        longest[key] = max(longest.get(key, 0), int(line["num-epoch"]))
    cells: dict[str, Cell] = {}
    for seed in range(most):
        for line in lines:
            grid = grid_of(line, preset) if table.has_regret else []
            for name in dict.fromkeys([*_methods_of(table, line, methods), *grid]):
                if seed >= (most if name in grid else seeds_of.get(name, seeds)):
                    continue
                arguments = _arguments_of([*table.methods, *methods], preset, line, METHODS[name])
                # A run on the longest line serves the shorter ones, too, unless an average or a measured rate is of
                # its length.
                if not (METHODS[name].knows_length or "average" in arguments or "measured" in arguments.values()):
                    arguments["num-epoch"] = str(longest[_all_but_length(line)])
                cell = Cell(METHODS[name], seed, arguments, {})
                served = cells.setdefault(cell.name, cell).lines
                served[detail_of(line, table.named_by)] = int(line["num-epoch"])
    return list(cells.values())


def _with_data_root(line: Arguments) -> Arguments:
    """Without image-root and text-root, which stand for the data-root of the image and of the text lines."""
    line = dict(line)
    roots = {"image-root": line.pop("image-root", ""), "text-root": line.pop("text-root", "")}
    root = roots["text-root" if line["dataset"] in TEXTS else "image-root"]
    return line | {"data-root": root} if root else line


def grid_of(line: Arguments, preset: str) -> list[str]:
    """The cosines whose best is the zero mark of a line with regrets; for a smoke, the middle one."""
    optimizer = line.get("optimizer", "sgd").removesuffix("w")
    if float(line.get("momentum", 0)):
        optimizer = "momentum"
    peaks = GRIDS["text" if line["dataset"] in TEXTS else "images", optimizer]
    if preset == "smoke":
        peaks = [peaks[len(peaks) // 2]]
    return [f"cosine {peak}" for peak in peaks]


def _all_but_length(line: Arguments) -> frozenset[tuple[str, str]]:
    """What lines must have in common for one run to serve them all."""
    return frozenset((flag, value) for flag, value in line.items() if flag != "num-epoch")


def _methods_of(table: Table, line: Arguments, methods: Sequence[str]) -> Sequence[str]:
    """The methods of one line: in a table of images and text, each line has its own."""
    if not table.text_methods:
        return methods or table.methods
    fitting = table.text_methods if line["dataset"] in TEXTS else table.methods
    return [method for method in methods if method in fitting] if methods else fitting


def _arguments_of(names: Sequence[str], preset: str, line: Arguments, method: Method) -> Arguments:
    """A method's arguments on one line, beside the methods of these names."""
    arguments = dict(line)
    is_text = line["dataset"] in TEXTS
    if method.script == "meta-train":
        arguments.setdefault("t-val", "300" if preset == "paper" else "auto")
    else:
        arguments.pop("t-val", None)
    if not is_text and any(METHODS[name].script == "meta-train" for name in names):
        # Meta-training holds images out. Every method of the table trains on what is left.
        arguments.setdefault("num-meta", "1000")
    optimizer = method.flags.get("optimizer", line.get("optimizer", "sgd"))
    if is_text and optimizer == "sgd" and method.has_initial_lr:
        arguments.setdefault("lr", f"{SCHEDULES[method.schedule].text_lr:g}")
    if method.name == CONSTANT:
        arguments["lr"] = _constant_lr(line)
    if method.has_own_direction:
        arguments.pop("optimizer", None)
    if not method.has_momentum:
        arguments.pop("momentum", None)
    arguments |= method.flags
    return arguments


def _constant_lr(line: Arguments) -> str:
    """A fixed rate of the line's optimizer that suits small image problems."""
    weights = [torch.zeros(1, requires_grad=True)]
    momentum = float(line.get("momentum", 0))
    optimizer = build_optimizer(line.get("optimizer", "sgd"), weights, 1.0, momentum, weight_decay=0.0)
    return f"{usual_lr(optimizer):.3g}"

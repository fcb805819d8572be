"""A run of meta-train or meta-test: flags, task and network, training, metrics, log, checkpoint, picture."""

import argparse
import csv
import io
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from averaging import Average, auto_decay, evaluating
from baselines import twice_differentiable
from command_line import Parser, end_with_launcher, folder, is_out_of_memory, number, number_or
from data import DATASETS, IMAGES, PUBLISHED_CORRUPTED, STREAMED, TEXTS, build_task
from data.corruption import CORRUPTIONS, NOISE_KINDS
from data.files import ImageFileError
from data.images import ImageTask
from data.meta_stream import MetaStream
from data.text import TextTask
from distributed import (
    all_gather,
    data_parallel,
    gather_hidden,
    init_distributed,
    is_lost_rank,
    rank,
    shard_hidden,
    world_size,
)
from measuring import Measurement
from mlr_snet import SHIPPED, Schedule, Step, train
from models import IMAGE_NETWORKS, LANGUAGE_MODELS, NETWORKS, build_network
from utils import (
    COSTS,
    ROOT,
    FolderLock,
    autocast,
    checksum,
    choose_algorithms,
    first_line,
    peak_memory_mib,
    pick_device,
    plain,
    provenance,
    save,
    write_atomically,
)

FORMAT = 2  # of checkpoint.pth
FETCH_EVERY = 50  # steps between the moments in which an accelerator's numbers come to the host

# The flags whose defaults depend on the modality; a flag of the other modality alone is refused.
IMAGE_DEFAULTS = {"num_epoch": 200, "batch_size": 128, "wd": 5e-4, "num_meta": 0, "image_size": None, "workers": None,
                  "skip_bad_images": False, "corruption": None, "severity": None, "label_noise": None,
                  "noise_kind": None}
IMAGENET_DEFAULTS = {"num_epoch": 90}
TEXT_DEFAULTS = {"num_epoch": 150, "batch_size": 32, "wd": 5e-6, "seq_len": 35, "tokens": "word", "embed_size": 512,
                 "dropout": 0.5}

# What build_task takes from the flags of one modality
IMAGE_OPTIONS = ("seed", "num_meta", "image_size", "workers", "skip_bad_images", "corruption", "severity",
                 "label_noise", "noise_kind")
TEXT_OPTIONS = ("seq_len", "tokens")


# ---------------------------------------------------------------------------------------------- flags


def add_task_arguments(parser: argparse.ArgumentParser, network: str) -> None:
    """The flags of what is trained, which meta-train and meta-test share; `network` is the default."""
    positive = number(int, 1, 2**31 - 1)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10", metavar="NAME",
        help=f"images: {', '.join(IMAGES)}; text: {', '.join(TEXTS)}; digits and pydoc need no download "
        "(default: cifar10)")
    add("--data-root", type=Path, default=ROOT / "data" / "downloads", metavar="DIR",
        help="the data, or where to download it (default: data/downloads)")
    add("--limit-train", type=positive, metavar="N", help="use N class-balanced images, or the first N tokens")
    add("--limit-test", type=positive, metavar="N", help="the same for testing")
    add("--num-meta", type=number(int, 0, 2**31 - 1), metavar="N",
        help="images to steer MLR-SNet or validate (default: meta-train 1000, meta-test 0)")
    add("--image-size", type=positive, metavar="N",
        help="resize to N×N pixels (default: folder 32, tinyimagenet 64, imagenet 224)")
    add("--workers", type=number(int, 0, 1000), metavar="N",
        help="processes that read tinyimagenet or imagenet (default: cores, up to 8)")
    add("--skip-bad-images", action="store_true", default=None, help="leave out unreadable files, and report them")
    add("--corruption", metavar="NAME",
        help=f"damage the training images: {', '.join(CORRUPTIONS)}; of "
        "cifar10-c and cifar100-c the file")
    add("--severity", type=number(int, 0, 5), metavar="N", help="of --corruption, 0 (none) to 5 (default: 3)")
    add("--label-noise", type=number(float, 0, 1), metavar="RATE",
        help="give this share of the training images a wrong label (default: 0)")
    add("--noise-kind", choices=NOISE_KINDS, metavar="KIND",
        help="uniform: any other class; flip: one other for each class; flip2: one of two (default: uniform)")
    add("--tokens", choices=["word", "char"], metavar="UNIT", help="unit of the text: word or char (default: word)")
    add("--seq-len", "--seq_len", type=positive, metavar="N", help="tokens per sequence (default: 35)")

    add = parser.add_argument_group("network and optimizer").add_argument
    add("--network", choices=NETWORKS, default=network, metavar="NAME",
        help=f"images: {', '.join(IMAGE_NETWORKS)}; text: {', '.join(LANGUAGE_MODELS)} (default: {network})")
    add("--embed-size", "--embed_size", type=positive, metavar="N",
        help="width of a language model's embedding and hidden layers (default: 512)")
    add("--dropout", type=number(float, 0, 1), metavar="RATE", help="of a language model (default: 0.5)")
    add("--init", type=Path, metavar="FILE", help="start from a run's network.pth (default: random weights)")
    add("--optimizer", "--optim", choices=["sgd", "adam", "adamw"], default="sgd", metavar="NAME",
        help="sgd, adam or adamw (default: sgd)")
    add("--momentum", type=number(float, 0, 1), default=0.0, metavar="RHO", help="of SGD (default: 0)")
    add("--wd", type=number(float, 0), metavar="WD", help="weight decay (default: images 5e-4, text 5e-6)")
    add("--average", action="store_true", help="also evaluate and save a running average of the weights")
    add("--average-decay", type=number_or(number(float, 0, 0.9999999), "auto"), metavar="RATE",
        help="of the average per step, or auto: about an epoch's (default: auto)")


def add_gamma(add: Callable[..., Any]) -> None:
    """--gamma, for the group of flags whose add_argument is given."""
    add("--gamma", type=number_or(number(float, 0, above=True), "auto", "paper", "measured"), default="auto",
        metavar="GAMMA",
        help="LR scale, the largest rate MLR-SNet can give: a number, paper (the paper's formula) or measured (twice "
        "the peak that short training finds); auto is paper for SGD without momentum, else measured (default: auto)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the run and its device, which meta-train and meta-test share."""
    positive = number(int, 1, 2**31 - 1)
    add = parser.add_argument_group("run").add_argument
    add("--num-epoch", "--max_epoch", dest="num_epoch", type=positive, metavar="N",
        help="epochs (default: images 200, imagenet 90, text 150)")
    add("--batch-size", "--batch_size", type=positive, metavar="N",
        help="per step, over all ranks (default: images 128, text 32)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="of weights, data order and meta set (default: 0)")
    add("--out", type=folder, metavar="DIR",
        help="the run's folder (default: result/NETWORK_DATASET beside the script)")
    add("--resume", action="store_true", help="continue the run in --out with its own arguments")
    add("--help", "-h", action="help", help="show this and exit")

    add = parser.add_argument_group("device").add_argument
    add("--device", default="auto", metavar="NAME",
        help="cpu, cuda or another; auto is cuda where there is one (default: auto)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", metavar="TYPE",
        help="of the forward pass, fp32 or bf16 (default: fp32)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--deterministic", action="store_true", help="use only algorithms that torch calls deterministic")


def parse_run_arguments(
    parser: Parser, script: Path, argv: list[str] | None, **defaults: Any
) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, with --out and the defaults settled, and the names of those that the command line gives.

    --resume takes the run's own arguments and refuses others. `defaults` are the script's own for flags of the images.
    """
    args = parser.parse_args(argv)
    unset = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(marked).items() if value is not unset}
    args.script = script.stem
    args.out = (args.out or script.parent / "result" / f"{args.network}_{args.dataset}").absolute()
    try:
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out} is a file; give a folder")
        if args.resume:
            args = _resumed(parser, args, given)
        else:
            refuse_used(args.out)
        _settle(args, defaults)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, given


def refuse_used(out: Path) -> None:
    """ValueError where the folder holds a run."""
    if any((out / name).exists() for name in ("args.json", "checkpoint.pth", "metrics.csv")):
        raise ValueError(f"--out {out} holds another run; continue it with --resume or give another --out")


def _resumed(parser: Parser, args: argparse.Namespace, given: set[str]) -> argparse.Namespace:
    """The arguments of the run in --out. ValueError where args.json cannot give them, or differs from those given."""
    record = args.out / "args.json"
    if not record.exists():
        if (args.out / "checkpoint.pth").exists():
            raise ValueError(f"{record} is missing beside checkpoint.pth; restore it or start a new run elsewhere")
        raise ValueError(f"--resume: no run in {args.out}; leave --resume out to start one")
    stored = _stored_arguments(args.out)
    script = stored.get("script", args.script)
    if script != args.script:
        raise ValueError(f"--out {args.out} holds a run of {script}.py; resume it with that script")
    if stored.keys() != vars(args).keys():
        different = ", ".join(sorted(stored.keys() ^ vars(args).keys()))
        raise ValueError(f"{record} is of another version of this software (missing or unknown: {different}); "
                         "start a new run in another --out")
    parser.exit_on_error = False
    try:  # the stored arguments pass the same checks as a command line
        resumed = parser.parse_args(_command_line(parser, stored))
    except argparse.ArgumentError as error:
        raise ValueError(f"{record} is damaged: {error}") from None
    for name in given - {"resume", "out"}:
        if plain(getattr(args, name)) != plain(getattr(resumed, name)):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume continues with the run's own {flag} {stored[name]}; leave {flag} out")
    resumed.out, resumed.resume, resumed.script = args.out, True, args.script
    return resumed


def _stored_arguments(folder: Path) -> dict[str, Any]:
    """The arguments in a run's args.json. ValueError where there are none."""
    record = folder / "args.json"
    try:
        arguments = json.loads(record.read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} holds no run's arguments ({type(error).__name__})") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{record} holds no run's arguments (not a table)")
    return arguments


def _command_line(parser: Parser, arguments: dict[str, Any]) -> list[str]:
    """The words that give the parser these arguments."""
    words = []
    for action in parser._actions:  # argparse has no public list of its flags
        value = arguments.get(action.dest)
        flag = action.option_strings[0]
        if action.dest in ("help", "out", "resume") or value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words


def _settle(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Give the flags that were left out the defaults of the modality. ValueError for those that do not fit."""
    is_text = args.dataset in TEXTS
    fitting = LANGUAGE_MODELS if is_text else IMAGE_NETWORKS
    if args.network not in fitting:
        kind = "text" if is_text else "images"
        raise ValueError(
            f"--network {args.network} is not for {kind}; for {args.dataset} choose from {', '.join(fitting)}"
        )
    if args.momentum and args.optimizer != "sgd":
        raise ValueError(f"--momentum belongs to --optimizer sgd; leave it out with {args.optimizer}")
    if not _averages(args) and args.average_decay not in (None, "auto"):
        raise ValueError("--average-decay belongs to --average or --meta-point average; leave it out")
    args.average_decay = args.average_decay or "auto"
    own, other = (TEXT_DEFAULTS, IMAGE_DEFAULTS) if is_text else (IMAGE_DEFAULTS | defaults, TEXT_DEFAULTS)
    if args.dataset == "imagenet":
        own = own | IMAGENET_DEFAULTS
    if args.dataset in PUBLISHED_CORRUPTED:
        own = own | {"num_meta": min(defaults.get("num_meta", 0), PUBLISHED_CORRUPTED[args.dataset])}
    if args.workers is not None and args.dataset not in STREAMED:
        raise ValueError(f"--workers is for {' and '.join(STREAMED)}; {args.dataset} lies in memory, leave it out")
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not apply to --dataset {args.dataset}; leave it out")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _averages(args: argparse.Namespace) -> bool:
    """Whether the run keeps a running average of the weights."""
    return args.average or getattr(args, "meta_point", "lookahead") == "average"


def net_files(nets: list[str | Path]) -> str | list[Path]:
    """What load_schedules takes: a shipped name, files, or of one meta-train run its snapshots at 1/200, 1/2 and 1."""
    if len(nets) == 1 and str(nets[0]) in SHIPPED:
        return str(nets[0])
    paths = [Path(net) for net in nets]
    if len(paths) > 1 or not paths[0].is_dir():
        return paths
    num_epochs = _stored_arguments(paths[0]).get("num_epoch")
    if not isinstance(num_epochs, int):
        raise ValueError(f"{paths[0] / 'args.json'} names no number of epochs; give .pth files")
    epochs = [max(1, round(num_epochs / 200)), max(1, num_epochs // 2), num_epochs]
    return [paths[0] / f"mlr_snet_{epoch}.pth" for epoch in epochs]


# ---------------------------------------------------------------------------------------------- task and network


def build(args: argparse.Namespace) -> tuple[ImageTask | TextTask, nn.Module]:
    """The task, and the network on its device. ValueError for what is not available.

    Every rank draws the network, and after it MLR-SNet, from the same random stream.
    """
    device = pick_device(args.device)
    end_with_launcher()
    device = init_distributed(device)
    choose_algorithms(args.deterministic)
    names = TEXT_OPTIONS if args.dataset in TEXTS else IMAGE_OPTIONS
    task = build_task(
        args.dataset, args.data_root, batch_size=args.batch_size, limit_train=args.limit_train,
        limit_test=args.limit_test, device=device, autocast=autocast(device, args.precision),
        **{name: getattr(args, name) for name in names},
    )
    if isinstance(task, TextTask):
        sizes = {"embed_size": args.embed_size, "dropout": args.dropout, "seq_len": args.seq_len}
    else:
        sizes = {"image_size": task.image_size}
    torch.manual_seed(args.seed)
    network = build_network(args.network, task.num_classes, **sizes).to(device).to(memory_format=torch.channels_last)
    if args.init and not (args.out / "checkpoint.pth").exists():
        try:
            network.load_state_dict(torch.load(args.init, map_location="cpu", weights_only=True))
        except Exception as error:  # a foreign file fails in many ways; each ends in this one line
            raise ValueError(f"--init {args.init}: no weights of this network ({type(error).__name__})") from error
    if args.compile:
        network.compile()
    return task, network


def build_average(args: argparse.Namespace, network: nn.Module, steps_per_epoch: int) -> Average | None:
    """The running average of the weights, where the run asks for one."""
    if not _averages(args):
        return None
    return Average(network, auto_decay(steps_per_epoch) if args.average_decay == "auto" else args.average_decay)


# ---------------------------------------------------------------------------------------------- metrics and cost


class Metrics:
    """The rows of metrics.csv, one per epoch, and the totals of the present epoch."""

    EMPTY = {"loss": 0.0, "accuracy": 0.0, "lr": 0.0, "size": 0, "seconds": 0.0}

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.totals = dict(self.EMPTY)
        self.clock = time.perf_counter()

    def add(self, size: int, lr: float, loss: float, accuracy: float, clean_accuracy: float | None = None) -> None:
        """Count a step with `size` targets."""
        values = {"loss": loss, "accuracy": accuracy, "lr": lr}
        if clean_accuracy is not None:
            values["clean_accuracy"] = clean_accuracy
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * size
        self.totals["size"] += size

    def means(self) -> dict[str, float]:
        """Loss, LR and accuracies (%) of the present epoch, averaged over its targets."""
        size = self.totals["size"]
        return {name: total / size for name, total in self.totals.items() if name not in ("size", "seconds")}

    def start_clock(self) -> None:
        """Time counts from here."""
        self.clock = time.perf_counter()

    def count_seconds(self) -> None:
        """Add the time since the last call to the present epoch."""
        now = time.perf_counter()
        self.totals["seconds"] += now - self.clock
        self.clock = now

    def end_epoch(self, row: dict[str, float]) -> dict[str, float]:
        """Append the row with the epoch's seconds; the totals start at zero again."""
        self.count_seconds()
        row = {**row, "seconds": round(self.totals["seconds"], 3)}
        self.rows.append(row)
        self.totals = dict(self.EMPTY)
        return row

    def write(self, path: Path) -> None:
        """metrics.csv."""
        text = io.StringIO()
        table = csv.DictWriter(text, list(self.rows[0]))
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(path, text.getvalue().encode())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "totals": self.totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.totals = state["rows"], state["totals"]


class Cost:
    """What training takes, evaluation apart: passes through the network, and the peak of the memory in MiB."""

    def __init__(self, network: nn.Module, is_compiled: bool):
        self.counts: dict[str, float] = dict.fromkeys(COSTS, 0)
        self.counting = True
        if not is_compiled:  # every count would compile the network again
            network.register_forward_hook(lambda *_: self._count("forward_passes"))
            next(network.parameters()).register_hook(lambda _: self._count("backward_passes"))

    def _count(self, name: str) -> None:
        if self.counting:
            self.counts[name] += 1

    def add_steps(self, num_steps: int) -> None:
        """Count the training steps that measured the LR scale."""
        self.counts["measuring_steps"] = num_steps
        for name in ("forward_passes", "backward_passes"):
            self.counts[name] += num_steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block nothing counts."""
        self.counting = False
        yield
        self.counting = True
        self.counts["peak_memory_mib"] = max(self.counts["peak_memory_mib"], peak_memory_mib())

    def write(self, path: Path, steps_per_epoch: int) -> None:
        """cost.json."""
        write_atomically(path, json.dumps({"steps_per_epoch": steps_per_epoch, **self.counts}, indent=1).encode())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = dict(state)


# ---------------------------------------------------------------------------------------------- log and picture


class Log:
    """What a run shows on rank 0: a progress bar, a line per epoch, TensorBoard events."""

    def __init__(self, folder: Path, num_steps: int, done: int):
        self.excepthook = threading.excepthook
        threading.excepthook = lambda _: None  # TensorBoard's thread raises its error again in this one
        self.writer = SummaryWriter(str(folder), purge_step=done + 1) if rank() == 0 else None
        self.bar = tqdm(total=num_steps, initial=done, disable=True if rank() else None, leave=False)

    def step(self, number: int, loss: float, accuracy: float, lr: float) -> None:
        if self.writer:
            self.writer.add_scalar("step/loss", loss, number)
            self.writer.add_scalar("step/lr", lr, number)
            self.bar.update()
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.4f}", acc=f"{accuracy:.1f}")

    def epoch(self, row: dict[str, float]) -> None:
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(f"epoch/{name}", value, int(row["epoch"]))
            self.bar.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def close(self) -> None:
        self.bar.close()
        try:
            if self.writer:
                self.writer.close()
        finally:
            threading.excepthook = self.excepthook


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """run.png: training and test loss, accuracy or perplexity, those of averaged weights, and LR over the epochs."""
    if rank():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    epochs = [row["epoch"] for row in rows]
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    metric = ("acc", "accuracy (%)") if "test_acc" in rows[0] else ("ppl", "perplexity")
    columns = (("loss", "loss (nats)"), metric)
    for panel, (column, label) in zip(panels, columns, strict=False):
        curves = {f"train_{column}": ("-", "train"), f"train_clean_{column}": (":", "train, true labels"),
                  f"test_{column}": ("--", "test"),
                  f"test_{column}_average": ("k-", "test, averaged weights")}
        for name, (style, title) in curves.items():
            if name in rows[0]:
                panel.plot(epochs, [row[name] for row in rows], style, label=title)
        panel.set(xlabel="epoch", ylabel=label)
        panel.legend(fontsize="small")
    panels[2].plot(epochs, [row["lr"] for row in rows], "k-")
    panels[2].set(xlabel="epoch", ylabel="learning rate (mean of the epoch)")
    panels[2].set_ylim(0, 1.05 * panels[2].get_ylim()[1])  # keeps a constant rate off the frame
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(path.parent.name)
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())


# ---------------------------------------------------------------------------------------------- checkpoint


class Checkpoint:
    """checkpoint.pth: all that continuing the run bit for bit needs. `parts` are the things with a state_dict.

    Its arguments, a fingerprint of its data and a checksum of its content stand in the file, too.
    """

    def __init__(self, args: argparse.Namespace, fingerprint: str, parts: dict[str, Any]):
        self.path, self.parts, self.seed = args.out / "checkpoint.pth", parts, args.seed
        self.data_root, self.fingerprint = args.data_root, fingerprint
        self.arguments = {name: plain(value) for name, value in vars(args).items() if name not in ("out", "resume")}

    def save(self, step: int, hidden: Any) -> None:
        """Write the state after `step` steps; `hidden` is the hidden state that the next step takes."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        state = {
            "format": FORMAT,
            "arguments": self.arguments,
            "data": self.fingerprint,
            "step": step,
            "hidden": gather_hidden(hidden),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": all_gather((torch.get_rng_state(), cuda)),
        }
        if rank() == 0:
            save(self.path, {**state, "checksum": checksum(state)})

    def load(self) -> tuple[int, Any]:
        """Restore the parts and this rank's random generators; returns the step and the hidden state.

        Raises ValueError, which names what is wrong, for a damaged checkpoint and for one of another run.
        """
        state = self._read()
        for name in self.arguments.keys() | state["arguments"].keys():
            theirs, ours = state["arguments"].get(name), self.arguments.get(name)
            if theirs != ours:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{self.path} belongs to another run: its {flag} is {theirs}, not {ours}")
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"the data in {self.data_root} are not those that the run began with: their fingerprint is "
                f"{self.fingerprint}, in {self.path} it is {state['data']}; restore them or start a new run"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except Exception as error:  # parts fail in many ways; each ends in this one line
            raise ValueError(f"{self.path}: not a checkpoint of this run ({first_line(error)})") from error
        if rank() < len(state["rng"]):
            rng, cuda_rng = state["rng"][rank()]
            torch.set_rng_state(rng)
            if cuda_rng is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda_rng)
        else:  # there are more ranks than before
            torch.manual_seed(self.seed + rank())
        return state["step"], shard_hidden(state["hidden"])

    def _read(self) -> dict[str, Any]:
        """The file's content. ValueError where it is damaged or of another version."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways; each ends in this one line
            raise ValueError(f"{self.path} is damaged: not a readable checkpoint ({type(error).__name__})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{self.path} is of another version of this software; start a new run in another --out")
        if state.pop("checksum", None) != checksum(state):
            raise ValueError(f"{self.path} is damaged: its content does not match its checksum; restore a copy of it")
        return state


# ---------------------------------------------------------------------------------------------- the run


class StopSignal:
    """Inside its block, SIGINT and SIGTERM ask the run to stop after the step; a second one ends the process."""

    def __init__(self) -> None:
        self.number = 0

    def seen(self) -> int:
        """The signal that any rank has received, or 0."""
        return max(all_gather(self.number))

    def _receive(self, number: int, frame: Any) -> None:
        self.number = number
        if world_size() == 1:  # torchrun passes on the signals that the terminal sends to the ranks as well
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> "StopSignal":
        self.handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for which, handler in self.handlers.items():
            signal.signal(which, handler)


class RanksDiffer(Exception):
    """The ranks have come to different weights or rates."""


class Trainer:
    """One run: trains, logs and writes the run's folder; under --resume from its checkpoint on.

    after_epoch is called with the number of every epoch that has ended, before its checkpoint. Raises ValueError for a
    folder that another process uses, and for a checkpoint that is damaged or of something else.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        task: ImageTask | TextTask,
        network: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        meta_stream: MetaStream,
        average: Average | None = None,
        measurement: Measurement | None = None,
        after_epoch: Callable[[int], None] = lambda epoch: None,
    ):
        self.args, self.task, self.network = args, task, network
        self.optimizer, self.schedule, self.average, self.after_epoch = optimizer, schedule, average, after_epoch
        self.num_steps = args.num_epoch * task.steps_per_epoch
        self.step, self.hidden, self.last_lr = 0, None, 0.0
        self.saved_step: int | None = None
        on_cpu = next(network.parameters()).device.type == "cpu"
        self.fetch_every = 1 if on_cpu else FETCH_EVERY
        self.metrics, self.cost, self.measurement = Metrics(), Cost(network, args.compile), measurement
        parts = {
            "network": network, "optimizer": optimizer, "schedule": schedule, "meta_stream": meta_stream,
            "metrics": self.metrics, "cost": self.cost,
        }
        if average:
            parts["average"] = average
        if measurement:
            parts["measurement"] = measurement
        self.checkpoint = Checkpoint(args, task.fingerprint(), parts)
        self.lock = FolderLock(args.out)
        if rank() == 0:
            self.lock.acquire()
        with ExitStack() as undo:
            undo.callback(self.lock.release)
            self._restore()
            undo.pop_all()  # the run keeps its lock

    def _restore(self) -> None:
        """Continue from the checkpoint, where there is one. ValueError where results would be overwritten."""
        out, path = self.args.out, self.checkpoint.path
        if self.args.resume and path.exists():
            self.step, self.hidden = self.checkpoint.load()
            self.saved_step = self.step
            return
        results = [*out.glob("metrics.csv"), *out.glob("*.pth")]
        if self.args.resume and results:
            raise ValueError(f"{path} is missing beside {results[0].name}; restore it or start a new run elsewhere")
        if not self.args.resume:
            refuse_used(out)  # again, since another run may have come and gone
        if rank():
            torch.manual_seed(self.args.seed + rank())  # for dropout: all that must agree is drawn by now

    def run(self) -> int:
        """Train to the end; returns the exit status: 0, 1 where it failed or diverged, 128 + a signal that ended it."""
        try:
            double_backward = twice_differentiable(self.network) if self.schedule.second_order else nullcontext()
            with StopSignal() as stop, double_backward:
                return self._run(stop)
        except Exception as error:
            failure = self._failure(error)
            if not failure:
                raise
            if rank() == 0 or not isinstance(error, (FloatingPointError, RanksDiffer)):  # these two hit all ranks alike
                tqdm.write(f"{failure}; {self._last_checkpoint()}", file=sys.stderr)
            return 2 if isinstance(error, ImageFileError) else 1
        finally:
            self.lock.release()

    def _run(self, stop: StopSignal) -> int:
        if self.step == self.num_steps:
            self._say(f"{self.args.out}: the run is complete")
        if self.saved_step is None:
            write_atomically(self.args.out / "args.json", json.dumps(provenance(self.args), indent=1).encode())
            if self.measurement:
                self.measurement.write(self.args.out)
                self.cost.add_steps(self.measurement.result.num_steps)
                self.metrics.totals["seconds"] += self.measurement.seconds  # of the first epoch
            self._save_checkpoint()
        else:
            self._compare_ranks()
        self.log = Log(self.args.out, self.num_steps, self.step)
        try:
            stop_signal = self._train(stop)
        finally:
            self.log.close()
        if stop_signal:
            self._say(f"stopped at step {self.step}; continue with --resume --out {self.args.out}")
            return 128 + stop_signal
        self._write_metrics()
        draw(self.metrics.rows, self.args.out / "run.png")
        self._save_networks()
        return 0

    def _failure(self, error: Exception) -> str:
        """What has gone wrong, in one line; nothing for an error of the program itself."""
        if isinstance(error, FloatingPointError):
            return f"diverged: {error}"
        if isinstance(error, (OSError, RanksDiffer, ImageFileError)):
            return f"error: {' '.join(str(error).split())}"
        if is_out_of_memory(error):
            return f"error: step {self.step + 1} does not fit in memory ({first_line(error)}); lower --batch-size"
        if isinstance(error, RuntimeError) and is_lost_rank(error):
            return "another rank has ended; continue with --resume"
        return ""

    def _train(self, stop: StopSignal) -> int:
        """Take all steps; returns the signal that stopped them, or 0."""
        self.metrics.start_clock()
        waiting: list[Step] = []  # steps whose numbers are still on the device
        for step in self._steps():
            self.step, self.hidden = step.number, step.hidden
            waiting.append(step)
            ends_epoch = step.number % self.task.steps_per_epoch == 0
            if len(waiting) < self.fetch_every and not ends_epoch:
                continue
            self._fetch(waiting)
            waiting.clear()
            if ends_epoch:
                self._end_epoch(step.number // self.task.steps_per_epoch)
            if stop_signal := stop.seen():
                self.metrics.count_seconds()
                self._save_checkpoint()
                return stop_signal
        return 0

    def _steps(self) -> Iterator[Step]:
        steps = train(
            data_parallel(self.network), self.task, self.optimizer, self.schedule, self.args.num_epoch, self.step,
            self.hidden,
        )
        try:
            yield from self.average.following(steps) if self.average else steps
        except (OverflowError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "without overflow" not in str(error):
                raise
            lr = float(self.schedule.get_last_lr()[0])
            message = f"the LR is beyond single precision at step {self.step + 1} (last set: {lr:g})"
            raise FloatingPointError(message) from None

    def _fetch(self, steps: list[Step]) -> None:
        """Bring the numbers of the steps to the host and log them. FloatingPointError at the first not finite."""
        for step in steps:
            loss, lr = float(step.loss), float(step.lr)
            accuracies = step.accuracy.flatten().tolist()  # under label noise the second is on the true labels
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step.number}, after LR {self.last_lr}")
            if not math.isfinite(lr):
                raise FloatingPointError(f"the LR is {lr} at step {step.number}, at loss {loss}")
            self.last_lr = lr
            self.metrics.add(step.size, lr, loss, *accuracies)
            self.log.step(step.number, loss, accuracies[0], lr)

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, log, and write metrics and checkpoint."""
        means = self.metrics.means()
        lr = means.pop("lr")
        with self.cost.paused():
            results = self._evaluate(means)
        for name, value in results.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after step {self.step}, the last one of epoch {epoch}")
        self._check_finite()
        self.log.epoch(self.metrics.end_epoch({"epoch": epoch, "lr": lr, **results}))
        self.after_epoch(epoch)
        self._write_metrics()
        self._save_checkpoint()

    def _evaluate(self, means: dict[str, float]) -> dict[str, float]:
        """The columns of the epoch with these means of the training loss and accuracies (%)."""
        with evaluating(self.optimizer, self.network, self.task):
            row = self.task.train_metrics(**means) | self.task.evaluate(self.network)
            if self.average and self.args.average:
                name = "test_ppl" if self.task.perplexity else "test_acc"
                with self.average.swapped_in(self.task):
                    row[f"{name}_average"] = self.task.evaluate(self.network)[name]
        return row

    def _save_checkpoint(self) -> None:
        self._check_finite()
        self._compare_ranks()
        self.checkpoint.save(self.step, self.hidden)
        self.saved_step = self.step

    def _check_finite(self) -> None:
        """FloatingPointError where weights, or nets that learn, are not finite: a checkpoint has to be good."""
        for weights in (dict(self.network.named_parameters()), *self.schedule.state_dict().get("nets", [])):
            for name, tensor in weights.items():
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after step {self.step}, after LR {self.last_lr}")

    def _compare_ranks(self) -> None:
        """RanksDiffer unless all ranks hold the same weights, schedule and rates."""
        if world_size() == 1:
            return
        mine = {
            "weights": checksum(*self.network.parameters()),
            "schedule": checksum(self.schedule.state_dict()),
            "rates": checksum(*self.schedule.get_last_lr()),
        }
        everyone = all_gather(mine)
        different = [name for name in mine if len({theirs[name] for theirs in everyone}) > 1]
        if different:
            raise RanksDiffer(f"the ranks differ in {' and '.join(different)} at step {self.step}; please report this")

    def _write_metrics(self) -> None:
        self.metrics.write(self.args.out / "metrics.csv")
        self.cost.write(self.args.out / "cost.json", self.task.steps_per_epoch)

    def _save_networks(self) -> None:
        with evaluating(self.optimizer, self.network, self.task):
            save(self.args.out / "network.pth", self.network.state_dict())
            if self.average and self.args.average:
                with self.average.swapped_in(self.task):
                    save(self.args.out / "network_average.pth", self.network.state_dict())

    def _last_checkpoint(self) -> str:
        step = "none" if self.saved_step is None else f"the checkpoint of step {self.saved_step}"
        return f"last good checkpoint: {step}"

    def _say(self, text: str, file: Any = None) -> None:
        if rank() == 0:
            tqdm.write(text, file=file)

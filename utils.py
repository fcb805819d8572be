"""Rates of an optimizer, device and precision, run folders, checkpoints, and the pieces that both scripts share."""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from distributed import join, lost_a_rank, num_ranks, of_all_ranks, rank, share_of_carry, whole_carry

ROOT = Path(__file__).resolve().parent
FETCH_EVERY = 50  # steps between the moments in which an accelerator's figures come to the host
NO_TOTALS = {"loss": 0.0, "accuracy": 0.0, "lr": 0.0, "size": 0, "seconds": 0.0}  # of an epoch that begins
COSTS = ("forward_passes", "backward_passes", "peak_memory_mib")  # of training, evaluation apart

# ---------------------------------------------------------------------------------------------- learning rates


def on_host(value: Tensor) -> float | Tensor:
    """A 0-d tensor as a number, unless that would make the host wait for an accelerator."""
    value = value.detach()
    return float(value) if value.device.type == "cpu" else value


def lr_ratios(optimizer: Optimizer) -> list[float]:
    """Each parameter group's initial rate over the largest one. ValueError when all are zero."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    if max(rates) <= 0:
        raise ValueError("the optimizer's rates are all zero: give at least one group a positive lr")
    return [rate / max(rates) for rate in rates]


def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Give the group with the largest initial rate `lr`, and the others their share of it.

    A rate on an accelerator stays there where the optimizer is fused; other kinds take numbers alone.
    """
    for group, ratio in zip(optimizer.param_groups, lr_ratios(optimizer), strict=True):
        group["lr"] = (lr if group.get("fused") else float(lr)) * ratio


def build_optimizer(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """sgd, adam or adamw; momentum is SGD's. On CUDA it is fused, so that the rate can stay on the device."""
    parameters = list(parameters)
    fused = {"fused": True} if parameters[0].is_cuda else {}
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, **fused)
    return {"adam": Adam, "adamw": AdamW}[name](parameters, lr=lr, weight_decay=weight_decay, **fused)


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """What happens inside to the tensors is undone on leaving, to the bit; yields the copies, each by its tensor."""
    before = {tensor: tensor.detach().clone() for tensor in tensors}
    try:
        yield before
    finally:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)


class MetaStream:
    """The losses of a task's meta batches one after another, with what is carried from one to the next."""

    def __init__(self, task: Any):
        self.task, self.index = task, 0
        self.carry: Any = None
        self.batches: Iterator[Any] | None = None

    def next_loss(self, network: torch.nn.Module) -> Tensor:
        """The loss of the next batch; under several ranks, of this one's share."""
        if self.batches is None:
            self.batches = self.task.meta_batches(self.index)
        loss, _, self.carry = self.task.loss(network, next(self.batches), self.carry)
        self.index += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "carry": whole_carry(self.carry)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index, self.carry, self.batches = state["index"], share_of_carry(state["carry"]), None


# ---------------------------------------------------------------------------------------------- device and precision


def pick_device(name: str, deterministic: bool = False) -> torch.device:
    """auto (CUDA where there is one, else the CPU) or a device that torch names; under torchrun, this rank's.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch that was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not to be had here ({reason}); use --device cpu or auto") from None
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS sums in any order
        torch.use_deterministic_algorithms(True)
    return join(torch.device(name))


def autocast(device: torch.device, precision: str) -> Callable[[], Any]:
    """A maker of the context in which the network runs forward: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------------------------------------- command line


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` in [low, high], or (low, high] with `above`."""

    def parse(text: str) -> Any:
        limits = f"{'above' if above else 'at least'} {low:g}" + (f", at most {high:g}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    return parse


def number_or_auto(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: what `parse` takes, or the word auto."""
    return lambda text: text if text == "auto" else parse(text)


def plain(value: Any) -> Any:
    """The value as JSON keeps it."""
    if isinstance(value, Path):
        return str(value.absolute())
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around a script's wiring: what the user asked for and cannot have is one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a reader, or a run killed here, never meets half of it. Rank 0 alone writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path: Path, content: Any) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read_text(path: str | Path) -> str:
    """The file's text, or nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def peak_memory_mib() -> float:
    """The most memory that this process has held: on the GPU where it uses one, else resident; 0 if none can tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """The record that makes a run repeatable: command, arguments, versions, commit, hardware."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = next(iter(re.findall(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))), platform.processor())
    return {
        "arguments": {key: plain(value) for key, value in vars(args).items()},
        "command": sys.argv,
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
                     "ranks": num_ranks()},
    }


# ---------------------------------------------------------------------------------------------- a run


class Log:
    """What a run shows as it goes: a bar, a line an epoch, TensorBoard events. Only rank 0's does."""

    def __init__(self, folder: Path, num_steps: int, done: int):
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
        if self.writer:
            self.writer.close()


class Run:
    """Follows the steps of a loop: bars, logs and metrics, a checkpoint an epoch, a clean stop on a signal.

    parts are the things with a state_dict. With args.resume they are brought back from the folder's checkpoint, and
    `step` and `carry` say where the loop has to continue. Raises ValueError for a checkpoint of something else.
    """

    def __init__(self, args: argparse.Namespace, parts: dict[str, Any], steps_per_epoch: int):
        self.args, self.parts, self.steps_per_epoch = args, parts, steps_per_epoch
        self.step = 0
        self.carry: Any = None
        self.rows: list[dict[str, float]] = []
        self.totals = dict(NO_TOTALS)
        self.stop_signal = 0
        self.last_lr = 0.0
        on_cpu = next(parts["network"].parameters()).device.type == "cpu"
        self.fetch_every = 1 if on_cpu else FETCH_EVERY
        self.cost: dict[str, float] = {"steps_per_epoch": steps_per_epoch, **dict.fromkeys(COSTS, 0)}
        self.counting = True
        self.checkpoint = args.out / "checkpoint.pth"
        self.lock = FolderLock(args.out)
        if rank() == 0:
            self.lock.acquire()
        if not args.resume:
            write_atomically(args.out / "args.json", json.dumps(provenance(args), indent=1).encode())
        elif self.checkpoint.exists():
            self._load()
        if not args.compile:  # a compiled network would be compiled again for every count
            parts["network"].register_forward_hook(lambda *_: self._count("forward_passes"))
            next(parts["network"].parameters()).register_hook(lambda _: self._count("backward_passes"))

    def follow(
        self,
        steps: Iterator[Any],
        metrics: Callable[[float, float], dict[str, float]],
        at_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> int:
        """Take every step; return the exit status: 0, 1 where it diverged, 128 + the signal that stopped it.

        metrics maps the epoch's mean training loss and accuracy to a row's columns; at_epoch is called with the
        number of the epoch that has ended, before its checkpoint.
        """
        if self.step == self.args.num_epoch * self.steps_per_epoch:
            self._say(f"{self.args.out}: the run is complete")
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        self.log = Log(self.args.out, self.args.num_epoch * self.steps_per_epoch, self.step)
        self.clock = time.perf_counter()
        taken: list[Any] = []  # steps whose figures are still on the device
        try:
            for step in steps:
                self.step, self.carry = step.number, step.carry
                taken.append(step)
                if len(taken) < self.fetch_every and step.number % self.steps_per_epoch:
                    continue
                self._fetch(taken)
                taken.clear()
                if step.number % self.steps_per_epoch == 0:
                    row = self._end_epoch(step.number // self.steps_per_epoch, metrics)
                    self.log.epoch(row)
                    at_epoch(int(row["epoch"]))
                    self._write_metrics()
                    self.save()
                if stop_signal := max(of_all_ranks(self.stop_signal)):
                    self._lap()
                    self.save()
                    self._say(f"stopped at step {self.step}; continue with --resume --out {self.args.out}")
                    return 128 + stop_signal
        except FloatingPointError as error:
            self._say(f"diverged: {error}; {self._last_checkpoint()}", sys.stderr)
            return 1
        except RuntimeError as error:
            if not lost_a_rank(error):
                raise
            print(f"another rank has ended; {self._last_checkpoint()}; continue with --resume", file=sys.stderr)
            return 1
        finally:
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.lock.release()
        self._write_metrics()
        self._draw()
        return 0

    def save(self) -> None:
        """Write the checkpoint: all that continuing needs, to the bit."""
        state = {name: getattr(self, name) for name in ("step", "rows", "totals", "cost")}
        state["carry"] = whole_carry(self.carry)
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        state["rng"] = of_all_ranks(
            (torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)
        )
        save(self.checkpoint, state)

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except Exception as error:  # a damaged file fails in many ways; each ends in this one line
            raise ValueError(f"{self.checkpoint}: not a checkpoint of this run ({type(error).__name__})") from error
        for name in ("step", "rows", "totals", "cost"):
            setattr(self, name, state[name])
        self.carry = share_of_carry(state["carry"])
        if rank() < len(state["rng"]):
            rng, cuda_rng = state["rng"][rank()]
            torch.set_rng_state(rng)
            if cuda_rng is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda_rng)

    def _fetch(self, steps: list[Any]) -> None:
        """Bring the figures of the steps to the host and log them. FloatingPointError at the first not finite."""
        for step in steps:
            loss, accuracy, lr = float(step.loss), float(step.accuracy), float(step.lr)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step.number}, after LR {self.last_lr}")
            if not math.isfinite(lr):
                raise FloatingPointError(f"the LR is {lr} at step {step.number}, at loss {loss}")
            self.last_lr = lr
            for name, value in (("loss", loss), ("accuracy", accuracy), ("lr", lr)):
                self.totals[name] += value * step.size
            self.totals["size"] += step.size
            self.log.step(step.number, loss, accuracy, lr)

    def _last_checkpoint(self) -> str:
        last = f"the checkpoint of step {self.rows[-1]['epoch'] * self.steps_per_epoch}" if self.rows else "none"
        return f"last good checkpoint: {last}"

    def _say(self, text: str, file: Any = None) -> None:
        if rank() == 0:
            tqdm.write(text, file=file)

    def _count(self, what: str) -> None:
        self.cost[what] += self.counting

    def _lap(self) -> None:
        now = time.perf_counter()
        self.totals["seconds"] += now - self.clock
        self.clock = now

    def _end_epoch(self, epoch: int, metrics: Callable[[float, float], dict[str, float]]) -> dict[str, float]:
        """The epoch's row of metrics.csv; the totals begin anew."""
        loss, accuracy, lr = (self.totals[name] / self.totals["size"] for name in ("loss", "accuracy", "lr"))
        self.counting = False  # evaluation is no cost of a schedule
        row = {"epoch": epoch, "lr": lr, **metrics(loss, accuracy)}
        self.counting = True
        self.cost["peak_memory_mib"] = max(self.cost["peak_memory_mib"], peak_memory_mib())
        self._lap()
        row["seconds"] = round(self.totals["seconds"], 3)
        self.rows.append(row)
        self.totals = dict(NO_TOTALS)
        return row

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    def _write_metrics(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, list(self.rows[0]))
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(self.args.out / "metrics.csv", text.getvalue().encode())
        write_atomically(self.args.out / "cost.json", json.dumps(self.cost, indent=1).encode())

    def _draw(self) -> None:
        """run.png: training and test loss, accuracy or perplexity, the averaged weights' too, and LR against epochs."""
        if rank():
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        epochs = [row["epoch"] for row in self.rows]
        figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        metric = ("acc", "accuracy (%)") if "test_acc" in self.rows[0] else ("ppl", "perplexity")
        columns = (("loss", "loss (nats)"), metric)
        for panel, (column, label) in zip(panels, columns, strict=False):
            curves = {f"train_{column}": ("-", "train"), f"test_{column}": ("--", "test"),
                      f"test_{column}_average": ("k-", "test, averaged weights")}
            for name, (style, title) in curves.items():
                if name in self.rows[0]:
                    panel.plot(epochs, [row[name] for row in self.rows], style, label=title)
            panel.set(xlabel="epoch", ylabel=label)
            panel.legend(fontsize="small")
        panels[2].plot(epochs, [row["lr"] for row in self.rows], "k-")
        panels[2].set(xlabel="epoch", ylabel="learning rate (mean of the epoch)")
        panels[2].set_ylim(0, 1.05 * panels[2].get_ylim()[1])  # a rate that stands still stays off the frame
        for panel in panels:
            panel.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(self.args.out.name)
        figure.savefig(self.args.out / "run.png", dpi=120)
        pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- a lock


class FolderLock:
    """Keeps a folder to one process; the operating system releases it when that process ends, even by kill -9.

    A context manager. The lock file `.lock` stays in the folder: only the lock on it counts, not that it exists.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.file: Any = None

    def acquire(self) -> None:
        """Lock the folder, which is made where there is none. ValueError that names the process which holds it."""
        try:
            import fcntl
        except ImportError:  # Windows
            print(f"{self.folder}: this system has no fcntl, so a second run here is not noticed", file=sys.stderr)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / ".lock", "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid, host, command = (file.read().split("\n", 2) + ["", "", ""])[:3]
            file.close()
            where = "" if host in ("", socket.gethostname()) else f" on {host}"
            raise ValueError(
                f"{self.folder} is in use by process {pid}{where} ({command.strip()}); "
                "wait for it or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n{socket.gethostname()}\n{shlex.join(sys.argv)}\n")
        file.flush()
        self.file = file

    def release(self) -> None:
        """Let the folder go; nothing happens where it is not held."""
        if self.file:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_UN)  # closing is not enough where a forked worker has the file open
            self.file.close()
            self.file = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

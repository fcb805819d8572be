"""What lies in a run's folder: metrics, cost, checkpoint, lock, and the provenance of the run."""

import argparse
import csv
import io
import json
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.log import warn
from utils import (
    COSTS,
    ROOT,
    TEMPORARIES,
    peak_memory_mib,
    pick_device,
    plain,
    read_text,
    world_size,
    write_atomically,
)


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
        table = csv.DictWriter(text, max(self.rows, key=len).keys())
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(path, text.getvalue().encode())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "totals": self.totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.totals = state["rows"], state["totals"]


class Cost:
    """The cost of a run: passes through the network, without tests, and peak memory in MiB, with tests.

    images_per_pass is the number of images in a training pass. A pass in eval mode, as for the paper's γ, counts in
    proportion to its images; for text (None) it counts as one. Passes of a compiled network are not counted.
    """

    def __init__(self, network: nn.Module, is_compiled: bool, images_per_pass: float | None = None):
        self.counts: dict[str, float] = dict.fromkeys(COSTS, 0)
        self.counting = True
        if is_compiled:  # every count would compile the network again
            self.counts = {name: 0 for name in COSTS if not name.endswith("_passes")}
            return

        def count(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            number = 1.0
            if images_per_pass is not None and not module.training:
                number = len(inputs[0]) / images_per_pass
            self._count("forward_passes", number)

        network.register_forward_hook(count)
        next(network.parameters()).register_hook(lambda _: self._count("backward_passes", 1))

    def _count(self, name: str, number: float) -> None:
        if self.counting:
            self.counts[name] += number

    def add_steps(self, num_steps: int, passes_per_step: int) -> None:
        """Count the training steps that measured the LR scale."""
        self.counts["measuring_steps"] = num_steps
        for name in self.counts:
            if name.endswith("_passes"):
                self.counts[name] += num_steps * passes_per_step

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


def contents(folder: Path) -> list[str]:
    """The names of what lies in the folder, apart from the lock and from what killed runs left half-written."""
    if not folder.exists():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != ".lock" and not fnmatch(name, TEMPORARIES)]


class FolderLock:
    """Keeps a folder to one process. The operating system releases the lock with the process, even by kill -9.

    The file `.lock` stays in the folder: what counts is the lock on it, not that it exists.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: Any = None

    def acquire(self) -> None:
        """Lock the folder, and create it where it is missing.

        ValueError that names the process that holds it; OSError where .lock is not ours.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        with ExitStack() as undo:
            file = undo.enter_context(self._open())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, command = file.read().decode(errors="replace").strip().partition(" ")
                raise ValueError(
                    f"{self.folder} is in use by process {pid} ({command}); wait for it to end or give another --out"
                ) from None
            except OSError as error:  # some network file systems have no locks
                warn(f"{self.folder} cannot be locked ({error.strerror}); keep other runs out of it")
                return
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            if not is_file or not re.fullmatch(rb"\d*|\d+ .*", file.read(), re.DOTALL):
                raise OSError(f"{file.name} is not a lock of this software; give another --out")
            try:
                file.seek(0)
                file.truncate()
                file.write(os.fsencode(f"{os.getpid()} {' '.join(sys.argv)}\n"))
            except OSError as error:
                raise OSError(f"{file.name}: could not be written ({error.strerror}); make room") from None
            undo.pop_all()
        self.file = file

    def _open(self) -> Any:
        """The file .lock, new where there is none. OSError for a link: its target is not ours."""
        path = self.folder / ".lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            return open(path, "r+b", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))
        except OSError as error:
            raise OSError(f"{path}: could not be opened ({error.strerror}); give another --out") from None

    def release(self) -> None:
        """Free the folder, where it is locked."""
        if self.file:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_UN)  # to close it is not enough: a forked worker has it open, too
            self.file.close()
            self.file = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """The record that makes a run repeatable: command, arguments, versions, commit, and the hardware that it uses."""
    return {
        "arguments": {key: plain(value) for key, value in vars(args).items()},
        "command": sys.argv,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": _hardware(pick_device(getattr(args, "device", "cpu"))),
    }


def _commit() -> str:
    if not (ROOT / ".git").exists():  # git would name the commit of a repository around this copy
        return "unknown"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _hardware(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = next(iter(re.findall(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "ranks": world_size()}


def read_record(folder: Path, *names: str) -> Any:
    """What the run's args.json holds under these names, one inside the other. ValueError where it holds nothing."""
    record = folder / "args.json"
    try:
        return reduce(getitem, names, json.loads(record.read_text()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{record} holds no run's {names[-1]} ({type(error).__name__})") from None


def restore_surroundings(folder: Path, device: torch.device) -> None:
    """For the run that goes on in the folder: set its number of CPU threads, and say in a line what else has changed.

    ValueError where the run's args.json is damaged.
    """
    before = {"commit": read_record(folder, "commit"), **read_record(folder, "versions")}
    before |= read_record(folder, "hardware")
    torch.set_num_threads(read_record(folder, "hardware", "threads"))
    now = _hardware(device) | {"torch": torch.__version__, "commit": _commit()}
    names = ("commit", "torch", "gpu", "ranks") if now["gpu"] else ("commit", "torch", "gpu", "ranks", "cpu")
    changed = [f"{name} {now[name]} instead of {before.get(name)}" for name in names if now[name] != before.get(name)]
    if changed:
        warn(f"resumed with {', '.join(changed)}; results may differ from those of an unbroken run")

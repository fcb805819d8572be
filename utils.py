"""Device and precision, the optimizer, memory, files, and the provenance of a run."""

import argparse
import contextlib
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from distributed import rank, world_size

ROOT = Path(__file__).resolve().parent
COSTS = ("forward_passes", "backward_passes", "peak_memory_mib")  # of training, evaluation apart; in cost.json


def build_optimizer(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """sgd, adam or adamw; momentum is SGD's. On CUDA it is fused, so that the rate can stay on the device."""
    parameters = list(parameters)
    fused = {"fused": True} if parameters[0].is_cuda else {}
    if name == "sgd":
        return SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, **fused)
    return {"adam": Adam, "adamw": AdamW}[name](parameters, lr=lr, weight_decay=weight_decay, **fused)


# ---------------------------------------------------------------------------------------------- device and precision


def pick_device(name: str) -> torch.device:
    """auto (CUDA where there is one, else the CPU) or a device that torch names.

    Raises ValueError for a device that is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch that was built without it
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not available ({reason}); use --device cpu or auto") from None
    if device.type == "meta":
        raise ValueError("--device meta: holds shapes without numbers; use --device cpu or auto")
    return device


def choose_algorithms(deterministic: bool) -> None:
    """For this process: only deterministic algorithms, or else the fastest convolutions that cuDNN can find."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS sums in any order
        torch.use_deterministic_algorithms(True)


def autocast(device: torch.device, precision: str) -> Callable[[], Any]:
    """A maker of the context in which the network runs forward: bf16 autocast, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


# ---------------------------------------------------------------------------------------------- memory


Module = TypeVar("Module", bound=nn.Module)


def check_memory(
    num_bytes: int, what: str, remedy: str = "lower --image-size or --batch-size, or use fewer images"
) -> None:
    """ValueError if `what` needs more bytes than there is memory, as far as the system tells."""
    available = _available_memory()
    if available is not None and num_bytes > available:
        raise ValueError(
            f"{what} need {num_bytes / 2**30:,.1f} GiB of memory, and {available / 2**30:,.1f} GiB are available; "
            f"{remedy}"
        )


def built_within_memory(build: Callable[[], Module], name: str) -> Module:
    """What `build` returns. ValueError, before anything is allocated, if its weights need more memory than there is.

    Some systems grant any amount, and kill the process that uses it.
    """
    with torch.device("meta"):  # shapes without numbers
        shapes = build()
    check_memory(sum(weight.nbytes for weight in shapes.parameters()), f"the weights of {name}", "lower its sizes")
    return build()


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a reader, or a run killed here, never meets half of it. Rank 0 alone writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error.strerror}); make room or give another --out") from None


def save(path: Path, content: Any) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def first_line(error: BaseException) -> str:
    """What the error says, without torch's stack; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_text(path: str | Path) -> str:
    """The file's text, or nothing where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def checksum(*values: Any) -> str:
    """SHA-256 of tensors, numbers and strings, and of dicts and sequences of them, as hex digits."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, (Mapping, list, tuple)):
            digest.update(f"{len(value)} items ".encode())
            for item in value.items() if isinstance(value, Mapping) else value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(values)
    return digest.hexdigest()


class FolderLock:
    """Keeps a folder to one process. The operating system releases the lock with the process, even by kill -9.

    The file `.lock` stays in the folder: what counts is the lock on it, not that it exists.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: Any = None

    def acquire(self) -> None:
        """Lock the folder, and create it where it is missing. ValueError that names the process that holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = open(self.folder / ".lock", "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid, _, command = file.read().decode().strip().partition(" ")
            file.close()
            raise ValueError(
                f"{self.folder} is in use by process {pid} ({command}); wait for it to end or give another --out"
            ) from None
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} {' '.join(sys.argv)}\n".encode())
        except OSError as error:
            file.close()
            raise OSError(f"{file.name}: could not be written ({error.strerror}); make room") from None
        self.file = file

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


# ---------------------------------------------------------------------------------------------- provenance


def peak_memory_mib() -> float:
    """The most memory that this process has held: on the GPU where it uses one, else resident; 0 where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def plain(value: Any) -> Any:
    """The value as JSON keeps it."""
    if isinstance(value, Path):
        return str(value.absolute())
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """The record that makes a run repeatable: command, arguments, versions, commit, and the hardware that it uses."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = pick_device(getattr(args, "device", "cpu"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = next(iter(re.findall(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))), platform.processor())
    return {
        "arguments": {key: plain(value) for key, value in vars(args).items()},
        "command": sys.argv,
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
                     "ranks": world_size()},
    }

"""Shared helpers: the ranks, the optimizer, device and precision, memory, and files."""

import atexit
import contextlib
import hashlib
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlr_snet_optim.ranks import all_reduce_mean

ROOT = Path(__file__).resolve().parent
COSTS = ("forward_passes", "backward_passes", "peak_memory_mib")  # in cost.json; the passes leave tests out

# ---------------------------------------------------------------------------------------------- torchrun's ranks

# Batches are global: every rank draws the same batch and keeps its shard. A rank's loss is its shard's sum, divided by
# the global number of targets and multiplied by the world size. So the mean over the ranks is the loss of the whole
# batch, and DistributedDataParallel's mean of the gradients is its gradient, even where shards differ in size. In a
# single process all of this does nothing.


def init_distributed(device: torch.device) -> torch.device:
    """Connect to the other ranks if torchrun started this process, and return this rank's device."""
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if device.type == "cuda":
        device = device if is_alone else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # whose generator checkpoints keep, and whose memory is counted
    if not is_alone and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(disconnect)
    return device


def disconnect() -> None:
    """Leave the ranks. Before torch 2.8, gloo's group waits for its threads with the GIL held, and a thread needs the
    GIL to free the tensors of its last collective: the pause lets it. Source: pytorch's pull request 154976.
    """
    time.sleep(0.1)
    dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(number: int) -> tuple[slice, bool]:
    """This rank's part of `number` items, and whether it is a duplicate.

    With fewer items than ranks, some ranks get an item that another rank has, too. Such a duplicate lets the rank take
    part in the step, and must not count.
    """
    this, ranks = rank(), world_size()
    if number < ranks:
        item = min(this, number - 1)
        return slice(item, item + 1), this >= number
    return slice(this * number // ranks, (this + 1) * number // ranks), False


def all_reduce_sum(*numbers: float) -> list[float]:
    """The sum of each number over the ranks."""
    if world_size() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.tolist()


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


class _Parallel(nn.Module):
    """The network as DistributedDataParallel takes it; called without inputs, the sum of its weights."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        if inputs:
            return self.network(*inputs)
        return sum(parameter.sum() for parameter in self.network.parameters())


def data_parallel(network: nn.Module) -> nn.Module:
    """The network as the loop calls it: backward() leaves the mean of the ranks' gradients in .grad."""
    if world_size() == 1:
        return network
    # NASNet's cells have parameters that they do not use.
    has_unused = getattr(network, "has_unused_parameters", False)
    parallel = DistributedDataParallel(_Parallel(network), find_unused_parameters=has_unused)
    if not has_unused:
        # DistributedDataParallel forms its buckets anew after the first backward pass, and from three ranks on they
        # affect the last bit. This is that pass, so that a resumed run sums as an unbroken one does.
        parallel().backward()
        network.zero_grad()
    return parallel


@contextmanager
def averaged_gradients(network: nn.Module) -> Iterator[None]:
    """Inside the block backward() leaves the mean of the ranks' gradients in .grad, without DistributedDataParallel."""
    with contextlib.ExitStack() as hooks:
        if world_size() > 1:
            for parameter in network.parameters():
                hooks.enter_context(parameter.register_hook(all_reduce_mean))
        yield


def broadcast_buffers(network: nn.Module) -> None:
    """Give every rank the buffers of rank 0, among them the BatchNorm statistics used in evaluation."""
    if world_size() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def average_buffers(network: nn.Module) -> None:
    """Replace the BatchNorm statistics by their mean over the ranks."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(all_reduce_mean(buffer))


Hidden = Sequence[Tensor] | None  # a language model's states, (layers, columns, width) each; None for images


def gather_hidden(hidden: Hidden) -> Hidden:
    """The hidden states of all ranks side by side, on the CPU."""
    if hidden is None or world_size() == 1:
        return hidden
    parts = all_gather([state.cpu() for state in hidden])
    return tuple(torch.cat(states, 1) for states in zip(*parts, strict=True))


def shard_hidden(hidden: Hidden) -> Hidden:
    """This rank's columns of the hidden states of all ranks, for any world size."""
    if hidden is None or world_size() == 1:
        return hidden
    return tuple(state[:, shard(state.shape[1])[0]].contiguous() for state in hidden)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# ---------------------------------------------------------------------------------------------- the optimizer


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


def peak_memory_mib() -> float:
    """The most memory that this process has held: on the GPU where it uses one, else resident; 0 where unknown."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------- files


TEMPORARIES = ".mlr-snet-*.tmp"  # the names of the files that become others once they are whole


def write_atomically(path: Path, content: bytes) -> None:
    """Write the whole file or nothing: a reader, or a run killed here, never meets half of it. Only rank 0 writes.

    Nothing is written through a link: what `path` names is replaced, and the temporary file is new.
    """
    if rank():
        return
    temporary = path.with_name(TEMPORARIES.replace("*", secrets.token_hex(8)))
    try:
        with open(temporary, "xb") as file:
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
        return Path(path).read_text("utf-8", errors="replace")
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


def plain(value: Any) -> Any:
    """The value as JSON keeps it."""
    if isinstance(value, Path):
        return str(value.absolute())
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

"""torchrun's ranks: shards, gathers and broadcasts. In a single process all of this does nothing.

Batches are global: every rank draws the same batch and keeps its shard. A rank's loss is its shard's sum, divided by
the global number of targets and multiplied by the world size. So the mean over the ranks is the loss of the whole
batch, and DistributedDataParallel's mean of the gradients is its gradient, even where shards differ in size.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlr_snet import all_reduce_mean


def init_distributed(device: torch.device) -> torch.device:
    """Connect to the other ranks if torchrun started this process, and return this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


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


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether the error means that another rank has ended. Under gloo, torch has no exception class for it."""
    words = ("gloo", "nccl", "connection", "timed out")
    return world_size() > 1 and any(word in str(error).lower() for word in words)


def data_parallel(network: nn.Module) -> nn.Module:
    """The network as the loop calls it: backward() leaves the mean of the ranks' gradients in .grad."""
    if world_size() == 1:
        return network
    # NASNet's cells have parameters that they do not use.
    return DistributedDataParallel(network, find_unused_parameters=getattr(network, "has_unused_parameters", False))


@contextmanager
def averaged_gradients(network: nn.Module) -> Iterator[None]:
    """Inside the block backward() leaves the mean of the ranks' gradients in .grad, without DistributedDataParallel."""
    handles = []
    if world_size() > 1:
        handles = [parameter.register_hook(all_reduce_mean) for parameter in network.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

"""Several processes, one run: torchrun's ranks, each with its share of every batch. Alone, all of this does nothing.

Batches are global: every rank draws the same one and keeps its share. A local loss is its share's sum over the global
number of targets, times the ranks, so that the mean over the ranks is the loss of the whole batch, and
DistributedDataParallel's mean of the gradients is the gradient of it, also where the shares are not equal.
"""

import atexit
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def join(device: torch.device) -> torch.device:
    """Meet the other ranks where torchrun started this process; the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(number: int) -> tuple[slice, bool]:
    """This rank's part of `number` items, and whether it is a spare: with fewer items than ranks, some get a double.

    A spare keeps the rank in step with the others and must not count.
    """
    me, ranks = rank(), num_ranks()
    if number < ranks:
        return slice(min(me, number - 1), min(me, number - 1) + 1), me >= number
    return slice(me * number // ranks, (me + 1) * number // ranks), False


def over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the ranks, the same to the bit on each; alone, the tensor itself."""
    if num_ranks() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / num_ranks()


def total_over_ranks(*numbers: float) -> list[float]:
    """The sum of each number over the ranks."""
    if num_ranks() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.tolist()


def of_all_ranks(value: Any) -> list[Any]:
    """The value of every rank, on each."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether the error says that another rank is gone: torch has no class of its own for it under gloo."""
    words = ("gloo", "nccl", "connection", "timed out")
    return num_ranks() > 1 and any(word in str(error).lower() for word in words)


def data_parallel(network: nn.Module) -> nn.Module:
    """The network as the loop calls it: backward() leaves the mean of the ranks' gradients in .grad."""
    if num_ranks() == 1:
        return network
    # NASNet's cells hold parameters that they do not use
    return DistributedDataParallel(network, find_unused_parameters=getattr(network, "has_unused_parameters", False))


def share_buffers(network: nn.Module) -> None:
    """Give every rank the first one's BatchNorm statistics, which it is evaluated with."""
    if num_ranks() > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def average_buffers(network: nn.Module) -> None:
    """Give every rank the mean of all BatchNorm statistics."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(over_ranks(buffer))


Carry = Sequence[Tensor] | None


def whole_carry(carry: Carry) -> Carry:
    """What all ranks carry from batch to batch, side by side: states (layers, columns, width), on the CPU."""
    if carry is None or num_ranks() == 1:
        return carry
    parts = of_all_ranks([state.cpu() for state in carry])
    return tuple(torch.cat(states, 1) for states in zip(*parts, strict=True))


def share_of_carry(carry: Carry) -> Carry:
    """This rank's columns of what whole_carry gave, under whatever number of ranks."""
    if carry is None or num_ranks() == 1:
        return carry
    return tuple(state[:, share(state.shape[1])[0]].contiguous() for state in carry)


def _device() -> torch.device:
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

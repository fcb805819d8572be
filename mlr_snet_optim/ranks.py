"""Numbers: their means over the ranks that train together, tensors as floats on the host, and counts."""

from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks(process_group: Any = None) -> int:
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(tensor: Tensor, process_group: Any = None) -> Tensor:
    """The mean over the ranks, bit-identical on each; the tensor itself in a single process."""
    if num_ranks(process_group) == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=process_group)
    return total / num_ranks(process_group)


def mean_over_ranks(number: float, device: torch.device, process_group: Any = None) -> float:
    """The mean of a number that each rank has found by itself, on a device where the ranks can reduce it."""
    if num_ranks(process_group) == 1:
        return number
    return float(all_reduce_mean(torch.tensor(number, dtype=torch.float64, device=device), process_group))


def on_host(value: Tensor) -> float | Tensor:
    """A 0-d tensor as a float, unless that would make the host wait for an accelerator."""
    value = value.detach()
    return float(value) if value.device.type == "cpu" else value


def check_count(name: str, value: Any, least: int = 1) -> int:
    """The value as an int. ValueError for what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r}: give a whole number of at least {least}")
    return int(value)

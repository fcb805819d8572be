"""The learning rates of an optimizer's parameter groups."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlr_snet_optim.ranks import on_host

Ratios = Sequence[float | None]  # each group's rate per unit of the schedule's; None for one that it does not drive


def lr_ratios(optimizer: Optimizer, groups: Sequence[int] | None = None) -> list[float | None]:
    """Each parameter group's present rate over the largest one of `groups` (default: all); None for the others.

    Raises ValueError where these are all zero, and for indices that are not of the optimizer's groups.
    """
    number = len(optimizer.param_groups)
    driven = range(number) if groups is None else groups
    if not driven or not all(isinstance(index, Integral) and 0 <= index < number for index in driven):
        raise ValueError(f"groups {groups}: give indices of the optimizer's {number} parameter groups")
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and not group["lr"].is_floating_point():
            raise ValueError(f"the learning rate is a tensor of {group['lr'].dtype}, which rounds it; give float32")
    rates = {index: float(optimizer.param_groups[index]["lr"]) for index in driven}
    largest = max(rates.values())
    if largest <= 0:
        raise ValueError("the optimizer's learning rates are all zero; give at least one group a positive lr")
    return [rates[index] / largest if index in rates else None for index in range(number)]


def driven_groups(ratios: Ratios) -> list[int]:
    """The indices of the groups that have a ratio."""
    return [index for index, ratio in enumerate(ratios) if ratio is not None]


def unshare_rates(optimizer: Optimizer) -> None:
    """Give each group its own rate tensor, where torch has shared one among several groups and the default."""
    default, seen = optimizer.defaults.get("lr"), set[int]()
    if isinstance(default, Tensor):
        optimizer.defaults["lr"] = default.clone()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))


@torch.no_grad()
def set_lr(optimizer: Optimizer, lr: float | Tensor, ratios: Ratios | None = None) -> None:
    """Give each parameter group its ratio of `lr` (default: lr_ratios); one of None keeps its rate.

    A rate that is a tensor is filled in place, so that compiled and captured steps see it without recompiling. A rate
    on an accelerator stays there for a fused optimizer; other optimizers take floats only.
    """
    ratios = lr_ratios(optimizer) if ratios is None else ratios
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if ratio is None:
            continue
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * ratio)
        elif isinstance(lr, Tensor) and group.get("fused"):
            group["lr"] = lr * ratio
        else:
            group["lr"] = float(lr) * ratio


def settled_ratios(
    optimizer: Optimizer, groups: Sequence[int] | None, ratios: Sequence[float | None], lr_set: Sequence[float | Tensor]
) -> list[float | None]:
    """`ratios` and those of the groups that were added since; `groups` as in lr_ratios.

    RuntimeError where a rate differs from `lr_set`, the rates set last (empty before the first step). Reads no rate
    from an accelerator unless a group is new.
    """
    present, settled = optimizer.param_groups, list(ratios)
    if len(present) < len(settled):
        raise RuntimeError(f"the optimizer has {len(present)} parameter groups, it had {len(settled)}")
    for group, lr, ratio in zip(present, lr_set, settled, strict=False):
        lr = on_host(lr) if isinstance(lr, Tensor) else lr
        if ratio is None or isinstance(lr, Tensor) or group["lr"] == lr or math.isnan(lr):
            continue
        raise RuntimeError(
            f"the learning rate is {float(group['lr']):g}, but this schedule had set {lr:g}; remove the other "
            "scheduler that changes it (or the handle of one attached earlier), or leave its group out of `groups`; "
            "where the optimizer went back to an earlier state, load the schedule's state_dict(), too"
        )
    if len(present) > len(settled):
        unshare_rates(optimizer)
    for group in present[len(settled) :]:
        full = [float(old["lr"]) / ratio for old, ratio in zip(present, settled, strict=False) if ratio]
        is_driven = groups is None and full and full[0] > 0
        is_default = float(group["lr"]) == optimizer.defaults.get("lr")  # so that it has named no rate
        settled.append((1.0 if is_default else float(group["lr"]) / full[0]) if is_driven else None)
    return settled


def copied_rates(optimizer: Optimizer) -> list[float | Tensor]:
    """The learning rate of each parameter group; a tensor is copied, as torch's schedulers do."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]

"""What an optimizer is about to do: its update per unit of learning rate, d_t in w_{t+1} = w_t − lr · d_t.

Holds for optimizers whose update is affine in the rate; to add one: its equation and a line in DIRECTIONS.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from utils import lr_ratios, on_host

Update = dict[nn.Parameter, Callable[[Tensor], Tensor]]  # for each parameter, d_t from its value w_t


def _sgd_direction(weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    direction = gradient.add(weight, alpha=group["weight_decay"])
    if group["momentum"]:
        velocity = state.get("momentum_buffer")
        if velocity is not None:
            direction = direction.mul(1 - group["dampening"]).add_(velocity, alpha=group["momentum"])
        if group["nesterov"]:
            decayed = gradient.add(weight, alpha=group["weight_decay"])
            direction = decayed.add_(direction, alpha=group["momentum"])
    return direction


def _adam_direction(weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    decoupled = group.get("decoupled_weight_decay", False)
    if not decoupled:
        gradient = gradient.add(weight, alpha=group["weight_decay"])
    beta1, beta2 = group["betas"]
    step = on_host(state["step"]) + 1 if state else 1.0
    first = gradient * (1 - beta1)
    second = gradient.square() * (1 - beta2)
    if state:
        first.add_(state["exp_avg"], alpha=beta1)
        second.add_(state["exp_avg_sq"], alpha=beta2)
    if group["amsgrad"] and state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    root = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    direction = first.div_(1 - beta1**step).div_(root)
    return direction.add_(weight, alpha=group["weight_decay"]) if decoupled else direction


def _adamw_direction(weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    return _adam_direction(weight, gradient, {**group, "decoupled_weight_decay": True}, state)


DIRECTIONS = {SGD: _sgd_direction, Adam: _adam_direction, AdamW: _adamw_direction}


def check_affine(optimizer: Optimizer) -> None:
    """Raise TypeError unless the optimizer's update is known to be affine in its learning rate."""
    if type(optimizer) not in DIRECTIONS:
        allowed = ", ".join(kind.__name__ for kind in DIRECTIONS)
        raise TypeError(f"{type(optimizer).__name__}: no update direction known; meta-training works with {allowed}")


def with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that the optimizer's next step moves."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in parameters if parameter.grad is not None]


def update_directions(optimizer: Optimizer) -> Update:
    """What the optimizer's next step would subtract per unit of learning rate, from the gradients that lie in .grad.

    For each parameter of with_gradient a function from its value before the step, so that a direction takes memory
    only while it is used. Changes neither the optimizer nor the parameters. Groups keep the ratios of their initial
    rates. Raises TypeError for an optimizer whose update is not known to be affine in the rate.
    """
    check_affine(optimizer)
    return {
        parameter: partial(_direction, optimizer, group, ratio, parameter)
        for group, ratio in zip(optimizer.param_groups, lr_ratios(optimizer), strict=True)
        for parameter in group["params"] if parameter.grad is not None
    }


@torch.no_grad()
def _direction(
    optimizer: Optimizer, group: dict[str, Any], ratio: float, parameter: nn.Parameter, weight: Tensor
) -> Tensor:
    """A new tensor of the parameter's shape: its direction where its value is `weight`."""
    gradient = parameter.grad
    assert gradient is not None
    if group["maximize"]:
        gradient = -gradient
    direction = DIRECTIONS[type(optimizer)](weight.detach(), gradient, group, optimizer.state.get(parameter, {}))
    return direction if ratio == 1 else direction.mul_(ratio)


@torch.no_grad()
def descend(update: Update, lr: float | Tensor) -> None:
    """w ← w − lr·d_t for every parameter of the update, in place."""
    for parameter, direction in update.items():
        if isinstance(lr, Tensor):
            parameter.addcmul_(direction(parameter), -lr.to(parameter))
        else:
            parameter.sub_(direction(parameter), alpha=lr)

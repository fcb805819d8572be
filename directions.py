"""What an optimizer is about to do: its update per unit of learning rate, d_t in w_{t+1} = w_t − lr · d_t.

Holds for optimizers whose update is affine in the rate; to add one: its equation and a line in DIRECTIONS.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from utils import lr_ratios, on_host

Update = Iterable[tuple[nn.Parameter, Tensor]]  # each parameter with its direction d_t


def _sgd_direction(parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    direction = gradient.add(parameter.detach(), alpha=group["weight_decay"])
    if group["momentum"]:
        velocity = state.get("momentum_buffer")
        if velocity is not None:
            direction = direction.mul(1 - group["dampening"]).add_(velocity, alpha=group["momentum"])
        if group["nesterov"]:
            decayed = gradient.add(parameter.detach(), alpha=group["weight_decay"])
            direction = decayed.add_(direction, alpha=group["momentum"])
    return direction


def _adam_direction(parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    decoupled = group.get("decoupled_weight_decay", False)
    if not decoupled:
        gradient = gradient.add(parameter.detach(), alpha=group["weight_decay"])
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
    return direction.add_(parameter.detach(), alpha=group["weight_decay"]) if decoupled else direction


def _adamw_direction(parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    return _adam_direction(parameter, gradient, {**group, "decoupled_weight_decay": True}, state)


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


@torch.no_grad()
def update_directions(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What the optimizer's next step would subtract per unit of learning rate, from the gradients that lie in .grad.

    One parameter of with_gradient after another, each direction made when it is asked for. Changes neither the
    optimizer nor the parameters. Groups keep the ratios of their initial rates.
    Raises TypeError for an optimizer whose update is not known to be affine in the rate.
    """
    check_affine(optimizer)
    for group, ratio in zip(optimizer.param_groups, lr_ratios(optimizer), strict=True):
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient = -parameter.grad if group["maximize"] else parameter.grad
            state = optimizer.state.get(parameter, {})
            direction = DIRECTIONS[type(optimizer)](parameter, gradient, group, state)
            yield parameter, direction if ratio == 1 else direction.mul_(ratio)

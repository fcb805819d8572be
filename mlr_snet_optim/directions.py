"""What an optimizer's next step subtracts per unit of learning rate: d_t."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mlr_snet_optim.ranks import on_host
from mlr_snet_optim.rates import Ratios, lr_ratios, set_lr
from mlr_snet_optim.restoring import preserved_optimizer

Options = dict[str, Any]  # of a parameter group
Moments = dict[str, Any]  # an optimizer's state of one parameter, before the step
Update = dict[nn.Parameter, Callable[[Tensor], Tensor]]  # for each parameter, d_t from its value w_t


def _sgd(gradient: Tensor, group: Options, state: Moments) -> Tensor:
    velocity = gradient
    if group["momentum"] and state.get("momentum_buffer") is not None:
        velocity = gradient.mul(1 - group["dampening"]).add_(state["momentum_buffer"], alpha=group["momentum"])
    return gradient.add(velocity, alpha=group["momentum"]) if group["nesterov"] else velocity


def _adam(gradient: Tensor, group: Options, state: Moments) -> Tensor:
    beta1, beta2 = group["betas"]
    step: float | Tensor = 1.0
    exp_avg, exp_avg_sq = gradient * (1 - beta1), gradient.square() * (1 - beta2)
    if state:
        step = on_host(state["step"]) + 1
        exp_avg.add_(state["exp_avg"], alpha=beta1)
        exp_avg_sq.add_(state["exp_avg_sq"], alpha=beta2)
        if group["amsgrad"]:
            exp_avg_sq = torch.maximum(exp_avg_sq, state["max_exp_avg_sq"])
    root = exp_avg_sq.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return exp_avg.div_(1 - beta1**step).div_(root)


# What an optimizer subtracts per unit of learning rate, weight decay aside. All others take trial steps.
DIRECTIONS: dict[type[Optimizer], Callable[[Tensor, Options, Moments], Tensor]] = {
    torch.optim.SGD: _sgd, torch.optim.Adam: _adam, torch.optim.AdamW: _adam,
}
NOT_AFFINE: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "evaluates the loss several times in a step",
    torch.optim.Rprop: "keeps step sizes of its own",
    torch.optim.ASGD: "keeps a learning rate of its own",
    torch.optim.Adafactor: "limits the learning rate by the step number",
    torch.optim.SparseAdam: "needs sparse gradients",
}
_NOT_AFFINE_ADVICE = "its update is not affine in the learning rate; use SGD, Adam, AdamW or another that is"


def check_affine(optimizer: Optimizer) -> None:
    """Raise TypeError for an optimizer whose update is known not to be affine in its learning rate."""
    reason = NOT_AFFINE.get(type(optimizer))
    if reason:
        raise TypeError(f"{type(optimizer).__name__} {reason}, so {_NOT_AFFINE_ADVICE}")


def update_directions(optimizer: Optimizer, ratios: Ratios | None = None) -> Update:
    """What the optimizer's next step would subtract per unit of learning rate, from the gradients in .grad.

    For each parameter with a gradient, a function from its value before the step, so that a direction takes memory
    only while it is used. Changes neither the optimizer nor the parameters. `ratios` are those of the parameter groups
    (default: lr_ratios); a group of None is left out. An optimizer without an entry in DIRECTIONS takes trial steps,
    which are undone bit for bit and do not run its hooks. Raises TypeError for an update that is not affine in the
    rate, for complex or sparse gradients, and for Adam with parameters of float16.
    """
    check_affine(optimizer)
    ratios = lr_ratios(optimizer) if ratios is None else ratios
    moved = {  # by parameter, its group and the group's ratio
        parameter: (group, ratio)
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True) if ratio is not None
        for parameter in group["params"] if parameter.grad is not None
    }
    for parameter in moved:
        if parameter.is_complex() or parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise TypeError("complex parameters and sparse gradients are not supported; use dense real ones")
        if DIRECTIONS.get(type(optimizer)) is _adam and parameter.dtype == torch.float16:
            raise TypeError("Adam's squares overflow in parameters of float16: use float32 or bfloat16")
    if moved and type(optimizer) not in DIRECTIONS:
        return _measured_directions(optimizer, list(moved), ratios)
    direction, states = partial(_direction, type(optimizer)), optimizer.state
    return {
        parameter: partial(direction, group, states.get(parameter, {}), ratio, parameter.grad)
        for parameter, (group, ratio) in moved.items()
    }


@torch.no_grad()
def _direction(
    kind: type[Optimizer], group: Options, state: Moments, ratio: float, gradient: Tensor, weight: Tensor
) -> Tensor:
    """A new tensor of the parameter's shape: its direction where its value is `weight`."""
    if group.get("maximize"):
        gradient = -gradient
    is_decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
    if not is_decoupled:
        gradient = gradient.add(weight.detach(), alpha=group["weight_decay"])
    direction = DIRECTIONS[kind](gradient, group, state)
    if is_decoupled:
        direction.add_(weight.detach(), alpha=group["weight_decay"])
    return direction if ratio == 1 else direction.mul_(ratio)


def _measured_directions(optimizer: Optimizer, parameters: list[nn.Parameter], ratios: Ratios) -> Update:
    """d_t = w_t − w_{t+1} at rate 1, after checking that rate 1/2 moves the weights half as far."""
    name = type(optimizer).__name__
    if any(parameter.element_size() < 4 for parameter in parameters):
        raise TypeError(f"{name} with parameters of 16 bits: they would round its step away; use SGD, Adam or AdamW")

    def moved(lr: float) -> list[Tensor]:
        with preserved_optimizer(optimizer) as weights, torch.no_grad():
            set_lr(optimizer, lr, ratios)
            try:
                bare_step(optimizer)
            except TypeError as error:
                raise TypeError(f"{name}: its step() could not be measured without arguments ({error})") from error
            return [weights[parameter] - parameter.detach() for parameter in parameters]

    whole, half = moved(1.0), moved(0.5)
    for parameter, one, other in zip(parameters, whole, half, strict=True):
        rounding = 16 * torch.finfo(parameter.dtype).eps * (parameter.norm() + one.norm())
        if (one - 2 * other).norm() > rounding:
            raise TypeError(
                f"{name}: half the learning rate does not move the weights half as far, so {_NOT_AFFINE_ADVICE}"
            )
    return {parameter: partial(_copy_of, direction) for parameter, direction in zip(parameters, whole, strict=True)}


def bare_step(optimizer: Optimizer) -> None:
    """optimizer.step() without hooks, its own or those of all optimizers; clears autocast's cache of cast weights."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    places = [getattr(optimizer, name) for name in names] + [_global_optimizer_pre_hooks, _global_optimizer_post_hooks]
    hooks = [dict(place) for place in places]
    for place in places:
        place.clear()
    try:
        type(optimizer).step(optimizer)  # not what a scheduler has put in its place
    finally:
        for place, kept in zip(places, hooks, strict=True):
            place.update(kept)
    torch.clear_autocast_cache()


def _copy_of(direction: Tensor, weight: Tensor) -> Tensor:
    return direction.clone()


@torch.no_grad()
def descend(update: Update, lr: float | Tensor) -> None:
    """w ← w − lr·d_t for every parameter of the update, in place."""
    negative = -lr
    for parameter, direction in update.items():
        if isinstance(negative, Tensor):
            parameter.addcmul_(direction(parameter), negative.to(parameter))
        else:
            parameter.add_(direction(parameter), alpha=negative)

"""The schedules that MLR-SNet is compared with. All are stepped like MLRSNetLR: step(loss) between backward() and
optimizer.step().

    closed forms of the time     fixed, multistep, exponential, cosine, sgdr, onecycle
    of the validation loss       val
    of gradients                 hd, rtho, l4mom, l4adam
    optimizers of their own      schedule-free, prodigy (packages schedulefree and prodigyopt)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mlr_snet import (
    all_reduce_mean,
    check_affine,
    lr_ratios,
    parameters_with_grad,
    preserved,
    set_lr,
    update_directions,
)
from utils import build_optimizer


class Fixed:
    """The initial rate throughout, and the base of the other schedules. epoch is fractional, from 0."""

    second_order = False  # whether step() differentiates the loss again, so that its graph has to be kept

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        lr_ratios(optimizer)
        self.optimizer, self.num_epochs, self.steps_per_epoch = optimizer, num_epochs, steps_per_epoch
        self.initial_lr = max(group["initial_lr"] for group in optimizer.param_groups)
        self.num_steps = 0

    def factor(self, epoch: float) -> float:
        """The rate at `epoch` as a multiple of the initial rate."""
        return 1.0

    def step(self, loss: float | Tensor) -> None:
        """Set the rate of the step about to be taken; a closed form does not look at the loss."""
        set_lr(self.optimizer, self.initial_lr * self.factor(self.num_steps / self.steps_per_epoch))
        self.num_steps += 1

    def get_last_lr(self) -> list[float]:
        """The rates of the parameter groups, as last set."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class Multistep(Fixed):
    """×0.2 at 30 %, 60 % and 80 % of the run's epochs."""

    def factor(self, epoch: float) -> float:
        return 0.2 ** sum(int(epoch) >= percent * self.num_epochs // 100 for percent in (30, 60, 80))


class Exponential(Fixed):
    """×0.95 after every epoch."""

    def factor(self, epoch: float) -> float:
        return 0.95 ** int(epoch)


class Cosine(Fixed):
    """Half a cosine from the initial rate to 0 over the run, step by step."""

    def factor(self, epoch: float) -> float:
        return (1 + math.cos(math.pi * epoch / self.num_epochs)) / 2


class SGDR(Fixed):
    """Cosine to 0 with warm restarts after 10, 30, 70, … epochs. Source: Loshchilov and Hutter, 2017."""

    def factor(self, epoch: float) -> float:
        period = 10.0
        while epoch >= period:
            epoch, period = epoch - period, 2 * period
        return (1 + math.cos(math.pi * epoch / period)) / 2


class OneCycle(Fixed):
    """Up from 1/25 of the rate for 30 % of the run, down to 1/250,000 of it. Source: Smith and Topin, 2018."""

    def factor(self, epoch: float) -> float:
        num_steps = self.num_epochs * self.steps_per_epoch
        peak = 0.3 * num_steps - 1  # as torch counts
        step = epoch * self.steps_per_epoch
        low, high, progress = (1 / 25, 1.0, step / peak) if step <= peak else (
            1 / 25e4, 1.0, 1 - (step - peak) / (num_steps - 1 - peak))
        return low + (high - low) * (1 - math.cos(math.pi * progress)) / 2


class Val(Fixed):
    """÷4 whenever an epoch has not lowered the validation loss. Source: PyTorch's word_language_model example.

    validate gives the validation loss of the network as it stands.
    """

    def __init__(
        self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, validate: Callable[[], float]
    ):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        self.validate, self.best, self.shrunk = validate, math.inf, 1.0

    def factor(self, epoch: float) -> float:
        if epoch.is_integer() and epoch > 0:
            loss = self.validate()
            if loss < self.best:
                self.best = loss
            else:
                self.shrunk /= 4
        return self.shrunk

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best, "shrunk": self.shrunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best, self.shrunk = state["best"], state["shrunk"]


# ---------------------------------------------------------------------------------------------- rates from gradients


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _positive(lr: float) -> float:
    return 0.0 if lr < 0 else lr  # a NaN stays one, so that the run ends as diverged


class Adaptive(Fixed):
    """The base of the schedules that change their rate, `lr`, step by step; `remembered` names their state."""

    remembered: tuple[str, ...] = ("num_steps", "lr")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        self.lr = self.initial_lr

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in self.remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.optimizer.param_groups[0]["params"][0].device
        for name, value in state.items():
            is_tensors = isinstance(value, (list, tuple))
            setattr(self, name, type(value)(tensor.to(device) for tensor in value) if is_tensors else value)


class HD(Adaptive):
    """Hypergradient descent: lr_t = lr_{t−1} + β⟨∇L(w_t), u_{t−1}⟩, u the direction last applied.

    beta is β; coupled weight decay counts as part of L. Source: Baydin et al., "Online Learning Rate Adaptation with
    Hypergradient Descent", 2018.
    """

    remembered = ("num_steps", "lr", "last")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, beta: float):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        check_affine(optimizer)
        self.beta, self.last = beta, list[Tensor]()

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:
        if self.last:
            self.lr = _positive(self.lr + self.beta * float(_dot(self._decayed_gradients(), self.last)))
        self.last = [direction(parameter) for parameter, direction in update_directions(self.optimizer).items()]
        set_lr(self.optimizer, self.lr)
        self.num_steps += 1

    def _decayed_gradients(self) -> list[Tensor]:
        """∇L with the coupled weight decay, for every parameter."""
        decoupled = isinstance(self.optimizer, AdamW)
        return [
            parameter.grad.add(parameter, alpha=0 if decoupled else group["weight_decay"])
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]


class RTHO(Adaptive):
    """Real-time forward-mode differentiation of the validation loss in the rate, for SGD with momentum ρ.

        Z₁ ← (H + λ)·Z₀ + ρ·Z₁,  Z₀ ← Z₀ − lr·Z₁ − d_t   (∂w/∂lr and ∂v/∂lr; H the Hessian, λ the weight decay)
        lr ← max(0, lr − β⟨∇L_val(w⁺), Z₀⟩)

    meta_loss returns the 0-d loss of the network on the next validation batch. Under gradient clipping the clip's
    factor counts as a constant. ValueError for another optimizer.
    Source: Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", 2017.
    """

    second_order = True
    remembered = ("num_steps", "lr", "along_weights", "along_velocity")

    def __init__(
        self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, beta: float, network: nn.Module,
        meta_loss: Callable[[], Tensor],
    ):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        groups = optimizer.param_groups
        if type(optimizer) is not SGD or any(group["nesterov"] or group["dampening"] for group in groups):
            raise ValueError("rtho works with SGD, with or without plain momentum; use --optimizer sgd")
        if any(ratio != 1 for ratio in lr_ratios(optimizer)):
            raise ValueError("rtho works with one rate for all parameters")
        self.beta, self.network, self.meta_loss = beta, network, meta_loss
        self.along_weights, self.along_velocity = list[Tensor](), list[Tensor]()  # Z₀, Z₁

    def step(self, loss: float | Tensor) -> None:
        assert isinstance(loss, Tensor)
        parameters = parameters_with_grad(self.optimizer)
        if not self.along_weights:
            self.along_weights = [torch.zeros_like(parameter) for parameter in parameters]
            self.along_velocity = [torch.zeros_like(parameter) for parameter in parameters]
        graph = torch.autograd.grad(loss, parameters, create_graph=True)
        products = torch.autograd.grad(graph, parameters, self.along_weights, materialize_grads=True)
        gradients, curved = ([all_reduce_mean(part) for part in many] for many in (graph, products))  # ∇L and H·Z₀
        if self.num_steps:
            with preserved(self.network.buffers()):
                value = self.meta_loss()
                slopes = torch.autograd.grad(value, parameters, materialize_grads=True)
            slope = all_reduce_mean(_dot(list(slopes), self.along_weights))
            self.lr = _positive(self.lr - self.beta * float(slope))
        with torch.no_grad():
            whole, taken = (nn.utils.get_total_norm(many) for many in (gradients, _gradients(parameters)))
            clip = taken / whole if whole > 0 else 1.0
            momentum, weight_decay = (self.optimizer.param_groups[0][name] for name in ("momentum", "weight_decay"))
            for index, (parameter, direction) in enumerate(update_directions(self.optimizer).items()):
                weights, velocity = self.along_weights[index], self.along_velocity[index]
                velocity.mul_(momentum).add_(curved[index] * clip).add_(weights, alpha=weight_decay)
                weights.sub_(velocity, alpha=self.lr).sub_(direction(parameter))
        set_lr(self.optimizer, self.lr)
        self.num_steps += 1


class L4(Adaptive):
    """lr = α(L − 0.9·L_min) / ⟨g̃, v⟩: the step that takes the linearised loss a part of the way to its minimum.

    g̃ is the mean of the gradients (0.9), v = g̃, or with adam g̃ / (√second moment + 1e-4), all bias-corrected. L4 puts v
    in the place of the gradient, so it needs plain SGD, whose weight decay is apart from L4's direction; ValueError for
    another optimizer. Source: Rolínek and Martius, "L4: Practical Loss-Based Stepsize Adaptation", 2018.
    """

    adam = False
    fraction = 0.15  # α
    remembered = ("num_steps", "lr", "lowest", "first", "second")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        if type(optimizer) is not SGD or any(group["momentum"] for group in optimizer.param_groups):
            raise ValueError("l4 brings its own direction; use --optimizer sgd --momentum 0")
        self.lowest = math.inf  # L_min
        self.first, self.second = list[Tensor](), list[Tensor]()  # moments

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:
        value, parameters = float(all_reduce_mean(torch.as_tensor(loss).detach())), parameters_with_grad(self.optimizer)
        gradients = _gradients(parameters)
        if not self.first:
            self.lowest = 0.75 * value
            self.first = [torch.zeros_like(parameter) for parameter in parameters]
            self.second = [torch.zeros_like(parameter) for parameter in parameters] if self.adam else []
        self.num_steps += 1
        for moment, gradient in zip(self.first, gradients, strict=True):
            moment.lerp_(gradient, 0.1)
        mean = [moment / (1 - 0.9**self.num_steps) for moment in self.first]
        directions = mean
        if self.adam:
            for moment, gradient in zip(self.second, gradients, strict=True):
                moment.lerp_(gradient.square(), 0.001)
            roots = [(moment / (1 - 0.999**self.num_steps)).sqrt() for moment in self.second]
            directions = [moment / (root + 1e-4) for moment, root in zip(mean, roots, strict=True)]
        self.lowest = min(self.lowest, value)
        self.lr = self.fraction * (value - 0.9 * self.lowest) / (float(_dot(mean, directions)) + 1e-12)
        self.lowest *= 1 + 1 / 1000
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.grad = direction.clone()
        set_lr(self.optimizer, self.lr)


class L4Adam(L4):
    """L4 with Adam's direction."""

    adam = True


# ---------------------------------------------------------------------------------------------- optimizers of their own


class Own(Fixed):
    """For an optimizer that sets its rate itself: nothing to do. get_last_lr gives the rate in effect."""

    def step(self, loss: float | Tensor) -> None:
        self.num_steps += 1

    def get_last_lr(self) -> list[float]:
        groups = self.optimizer.param_groups
        return [float(group.get("scheduled_lr", group["lr"]) * group.get("d", 1.0)) for group in groups]


def _package(name: str, schedule: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--schedule {schedule} needs the package {name}: pip install {name}") from None


def schedule_free(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Schedule-free SGD (interpolation 0.9 unless momentum is given) or AdamW. Source: Defazio et al., 2024."""
    if name == "adam":
        raise ValueError("--schedule schedule-free works with --optimizer sgd or adamw")
    package = _package("schedulefree", "schedule-free")
    if name == "sgd":
        optimizer = package.SGDScheduleFree(parameters, lr=lr, momentum=momentum or 0.9, weight_decay=weight_decay)
    else:
        optimizer = package.AdamWScheduleFree(parameters, lr=lr, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


def prodigy(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Prodigy, an Adam that finds its rate; lr multiplies it. Source: Mishchenko and Defazio, 2023."""
    if name == "sgd":
        raise ValueError("--schedule prodigy works with --optimizer adam (coupled weight decay) or adamw")
    package = _package("prodigyopt", "prodigy")
    return package.Prodigy(parameters, lr=lr, weight_decay=weight_decay, decouple=name == "adamw")


# ---------------------------------------------------------------------------------------------- the registry

SCHEDULES: dict[str, type[Fixed]] = {
    "fixed": Fixed,
    "multistep": Multistep,
    "exponential": Exponential,
    "cosine": Cosine,
    "sgdr": SGDR,
    "onecycle": OneCycle,
    "val": Val,
    "hd": HD,
    "rtho": RTHO,
    "l4mom": L4,
    "l4adam": L4Adam,
    "schedule-free": Own,
    "prodigy": Own,
}
VALIDATING = ("val", "rtho")  # need data held out of the training set
RATELESS = ("l4mom", "l4adam")  # have no initial rate


def default_lr(schedule: str, optimizer: str) -> float:
    """The usual initial rate of a baseline."""
    if schedule == "prodigy":
        return 1.0
    if schedule == "schedule-free":
        return {"sgd": 1.0}.get(optimizer, 0.0025)
    if optimizer != "sgd":
        return 1e-3
    return 20.0 if schedule == "val" else 0.1


def build_baseline(
    schedule: str, optimizer: str, network: nn.Module, task: Any, num_epochs: int, lr: float | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, beta: float | None = None,
    meta_loss: Callable[[], Tensor] | None = None,
) -> tuple[Optimizer, Fixed]:
    """The optimizer ("sgd", "adam" or "adamw") and its schedule. beta is the step of hd and rtho on the rate,
    meta_loss returns the 0-d loss of the network on the next validation batch, for rtho.

    ValueError for what does not go together and for a package that is not installed.
    """
    make = {"schedule-free": schedule_free, "prodigy": prodigy}.get(schedule, build_optimizer)
    lr = default_lr(schedule, optimizer) if lr is None else lr
    built = make(optimizer, network.parameters(), lr, momentum, weight_decay)
    options: dict[str, Any] = {}
    if schedule == "val":
        options["validate"] = lambda: task.validate(network)
    if schedule in ("hd", "rtho"):
        options["beta"] = beta or (1e-3 if optimizer == "sgd" else 1e-7)
    if schedule == "rtho":
        if meta_loss is None:
            raise ValueError("rtho needs meta_loss, the loss on the next validation batch")
        options |= {"network": network, "meta_loss": meta_loss}
    return built, SCHEDULES[schedule](built, num_epochs, task.steps_per_epoch, **options)

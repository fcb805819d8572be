"""The schedules that MLR-SNet is compared with. All are stepped like MLRSNetLR: step(loss) between backward() and
optimizer.step(), with this rank's loss where there are several.

    functions of the time        fixed, multistep, exponential, cosine, sgdr, onecycle, warmup-cosine, linear, wsd
    rates from losses            val, plateau, greedy
    rates from gradients         hd, rtho, l4mom, l4adam
    self-tuning optimizers       schedule-free, schedule-free-radam, prodigy, dadaptation

greedy and the self-tuning optimizers come from the packages transformers, schedulefree, prodigyopt and dadaptation,
which are optional.
"""

import contextlib
import importlib
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlr_snet import (
    all_reduce_mean,
    check_affine,
    copied_rates,
    lr_ratios,
    on_host,
    parameters_with_grad,
    preserved,
    set_lr,
    update_directions,
)
from mlr_snet_scale import MeasuredScale, try_rates
from utils import build_optimizer


class Baseline(ABC):
    """What all schedules here share. `remembered` names the attributes that make up the state."""

    second_order = False  # whether step() differentiates the loss again, so that its graph has to be kept
    remembered: tuple[str, ...] = ("num_steps",)
    scheduler: Any  # another package's, where there is one

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        lr_ratios(optimizer)  # refuses an optimizer whose rates are all zero
        self.optimizer, self.num_epochs, self.steps_per_epoch = optimizer, num_epochs, steps_per_epoch
        self.initial_lr = max(group["initial_lr"] for group in optimizer.param_groups)
        self.num_steps = 0

    @abstractmethod
    def step(self, loss: float | Tensor) -> None:
        """Set the rate of the step about to be taken. loss is this rank's training loss, 0-d."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Copies of the parameter groups' rates, as last set."""
        return copied_rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, beside the optimizer's own state_dict."""
        state = {name: getattr(self, name) for name in self.remembered}
        if "scheduler" in state:
            state["scheduler"] = state["scheduler"].state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(). ValueError for a state of another schedule."""
        if state.keys() != set(self.remembered):
            different = ", ".join(sorted(state.keys() ^ set(self.remembered)))
            raise ValueError(f"not the state of a {type(self).__name__}: missing or unknown {different}")
        device = self.optimizer.param_groups[0]["params"][0].device
        for name, value in state.items():
            if isinstance(value, Tensor):
                value = value.to(device)
            if isinstance(value, list):
                value = [tensor.to(device) for tensor in value]
            if name == "scheduler":
                self.scheduler.load_state_dict(value)
            else:
                setattr(self, name, value)

    def _starts_new_epoch(self) -> bool:
        """Whether the step about to be taken is the first one of an epoch, the run's first epoch apart."""
        return self.num_steps > 0 and self.num_steps % self.steps_per_epoch == 0


# ---------------------------------------------------------------------------------------------- functions of the time


class ClosedForm(Baseline):
    """A rate that depends on the time alone."""

    @abstractmethod
    def factor(self, epoch: float) -> float:
        """The rate as a multiple of the initial rate; epoch is fractional and starts at 0."""

    def step(self, loss: float | Tensor) -> None:
        set_lr(self.optimizer, self.initial_lr * self.factor(self.num_steps / self.steps_per_epoch))
        self.num_steps += 1


class Fixed(ClosedForm):
    """The initial rate throughout."""

    def factor(self, epoch: float) -> float:
        return 1.0


class Multistep(ClosedForm):
    """×0.2 at 30 %, 60 % and 80 % of the run's epochs."""

    def factor(self, epoch: float) -> float:
        milestones = [percent * self.num_epochs // 100 for percent in (30, 60, 80)]
        return 0.2 ** len([milestone for milestone in milestones if int(epoch) >= milestone])


class Exponential(ClosedForm):
    """×0.95 after every epoch."""

    def factor(self, epoch: float) -> float:
        return 0.95 ** int(epoch)


class Cosine(ClosedForm):
    """Half a cosine from the initial rate to 0 over the run, step by step."""

    def factor(self, epoch: float) -> float:
        return (1 + math.cos(math.pi * epoch / self.num_epochs)) / 2


class SGDR(ClosedForm):
    """Cosine to 0 with warm restarts after 10, 30, 70, … epochs. Source: Loshchilov and Hutter, 2017."""

    def factor(self, epoch: float) -> float:
        period = 10.0
        while epoch >= period:
            epoch, period = epoch - period, 2 * period
        return (1 + math.cos(math.pi * epoch / period)) / 2


class OneCycle(ClosedForm):
    """Up from 1/25 of the rate for 30 % of the run, then down to 1/250,000 of it. Source: Smith and Topin, 2018."""

    def factor(self, epoch: float) -> float:
        num_steps = self.num_epochs * self.steps_per_epoch
        peak = 0.3 * num_steps - 1  # as torch counts
        step = epoch * self.steps_per_epoch
        if step <= peak:
            low, progress = 1 / 25, step / peak
        else:
            low, progress = 1 / 25e4, 1 - (step - peak) / (num_steps - 1 - peak)
        return low + (1.0 - low) * (1 - math.cos(math.pi * progress)) / 2


class Warmup(ClosedForm):
    """A linear climb over the first 5 % of the steps, then a decay from the initial rate over the others."""

    def factor(self, epoch: float) -> float:
        num_steps = self.num_epochs * self.steps_per_epoch
        num_warmup = num_steps // 20
        step = epoch * self.steps_per_epoch
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)  # never 0, which would waste a step
        return self.decay((step - num_warmup) / (num_steps - num_warmup))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor after the warm-up; progress runs from 0 to 1."""


class WarmupCosine(Warmup):
    """Linear warm-up over 5 % of the run, then half a cosine to 0."""

    def decay(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class Linear(Warmup):
    """Linear warm-up over 5 % of the run, then linear decay to 0."""

    def decay(self, progress: float) -> float:
        return 1 - progress


class WSD(Warmup):
    """Warm-up, stable, decay: linear warm-up over 5 % of the run, linear decay to 0 over its last 20 %.

    Source: Hu et al., "MiniCPM", 2024.
    """

    def factor(self, epoch: float) -> float:
        return min(super().factor(epoch), 5 * (1 - epoch / self.num_epochs))

    def decay(self, progress: float) -> float:
        return 1.0


# ---------------------------------------------------------------------------------------------- rates from losses


def _from_package(module: str, name: str, purpose: str) -> Any:
    """A class of an optional package. ValueError where the package is missing or too old."""
    package = module.split(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"{purpose} needs the package {package}: pip install {package}") from None
    except AttributeError:
        raise ValueError(f"{purpose} needs a {package} with {name}: pip install --upgrade {package}") from None


def _mean_loss(loss: float | Tensor) -> Tensor:
    """The mean over the ranks."""
    return all_reduce_mean(torch.as_tensor(loss).detach())


class Val(Baseline):
    """÷4 whenever an epoch has not lowered the validation loss. Source: PyTorch's word_language_model example.

    validate returns the validation loss of the network as it stands, the same on every rank.
    """

    remembered = ("num_steps", "lr", "min_loss")

    def __init__(
        self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, validate: Callable[[], float]
    ):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        self.validate, self.lr, self.min_loss = validate, self.initial_lr, math.inf

    def step(self, loss: float | Tensor) -> None:
        if self._starts_new_epoch():
            validation_loss = self.validate()
            if validation_loss < self.min_loss:
                self.min_loss = validation_loss
            else:
                self.lr /= 4
        set_lr(self.optimizer, self.lr)
        self.num_steps += 1


class Plateau(Baseline):
    """torch's ReduceLROnPlateau on the epoch's mean training loss: ÷10 after more than 10 epochs without improvement.

    The mean is taken over the epoch's steps.
    """

    remembered = ("num_steps", "epoch_loss", "scheduler")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        self.scheduler = ReduceLROnPlateau(optimizer)
        self.epoch_loss: float | Tensor = 0.0  # summed over the epoch's steps

    def step(self, loss: float | Tensor) -> None:
        if self._starts_new_epoch():
            self.scheduler.step(float(self.epoch_loss) / self.steps_per_epoch)
            self.epoch_loss = 0.0
        self.epoch_loss = self.epoch_loss + on_host(_mean_loss(loss))
        self.num_steps += 1


class Greedy(Baseline):
    """GreedyLR of the package transformers on every step's training loss, averaged over the last 50 steps.

    The rate is divided by 0.95 after more than 10 improvements in a row, and multiplied by it after more than 10 steps
    without one. Deviation: the package bounds the rate by 1e-3 and 1, which suits an initial rate of 0.1; here the
    bounds are 1/100 and 10 times the initial rate. Source: Subramanian et al., "Dynamic Learning Rate Scheduling based
    on Loss Changes Leads to Faster Convergence", 2025.
    """

    remembered = ("num_steps", "scheduler")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        greedy = _from_package("transformers.optimization", "GreedyLR", "--schedule greedy")
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.scheduler = greedy(
            optimizer, smooth=True, min_lr=[lr / 100 for lr in rates], max_lr=[10 * lr for lr in rates]
        )

    def step(self, loss: float | Tensor) -> None:
        self.scheduler.step(float(_mean_loss(loss)))
        self.num_steps += 1


# ---------------------------------------------------------------------------------------------- rates from gradients


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _positive(lr: float) -> float:
    return 0.0 if lr < 0 else lr  # a NaN stays one, so that the run ends as diverged


class HD(Baseline):
    """Hypergradient descent: lr_t = lr_{t−1} + β⟨∇L(w_t), u_{t−1}⟩, u the direction last applied.

    beta is β; coupled weight decay counts as part of L. Source: Baydin et al., "Online Learning Rate Adaptation with
    Hypergradient Descent", 2018.
    """

    remembered = ("num_steps", "lr", "last_directions")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, beta: float):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        check_affine(optimizer)
        self.beta, self.lr = beta, self.initial_lr
        self.last_directions: list[Tensor] = []

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:
        if self.last_directions:
            self.lr = _positive(self.lr + self.beta * float(_dot(self._decayed_gradients(), self.last_directions)))
        directions = update_directions(self.optimizer)
        self.last_directions = [direction(parameter) for parameter, direction in directions.items()]
        set_lr(self.optimizer, self.lr)
        self.num_steps += 1

    def _decayed_gradients(self) -> list[Tensor]:
        """∇L with the coupled weight decay, for every parameter."""
        gradients = []
        for group in self.optimizer.param_groups:
            weight_decay = 0.0 if isinstance(self.optimizer, AdamW) else group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradients.append(parameter.grad.add(parameter, alpha=weight_decay))
        return gradients


class RTHO(Baseline):
    """Real-time forward-mode differentiation of the validation loss in the rate, for SGD with momentum ρ.

        Z₁ ← (H + λ)·Z₀ + ρ·Z₁,  Z₀ ← Z₀ − lr·Z₁ − d_t   (∂w/∂lr and ∂v/∂lr; H the Hessian, λ the weight decay)
        lr ← max(0, lr − β⟨∇L_val(w⁺), Z₀⟩)

    meta_loss returns the 0-d loss of the network on the next validation batch. Gradient clipping counts as a constant
    factor. ValueError for another optimizer.

    The training loss has to be twice differentiable. That of cuDNN's LSTM and of fused attention is not: train inside
    twice_differentiable().
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
        self.lr = self.initial_lr
        self.along_weights: list[Tensor] = []  # Z₀
        self.along_velocity: list[Tensor] = []  # Z₁

    def step(self, loss: float | Tensor) -> None:
        assert isinstance(loss, Tensor)
        parameters = parameters_with_grad(self.optimizer)
        if not self.along_weights:
            self.along_weights = [torch.zeros_like(parameter) for parameter in parameters]
            self.along_velocity = [torch.zeros_like(parameter) for parameter in parameters]
        graph = torch.autograd.grad(loss, parameters, create_graph=True)
        products = torch.autograd.grad(graph, parameters, self.along_weights, materialize_grads=True)
        gradients = [all_reduce_mean(gradient.detach()) for gradient in graph]
        curvatures = [all_reduce_mean(product) for product in products]  # H·Z₀
        if self.num_steps:
            self.lr = _positive(self.lr - self.beta * float(self._validation_slope(parameters)))
        with torch.no_grad():
            norm = nn.utils.get_total_norm(gradients)
            clip = nn.utils.get_total_norm(_gradients(parameters)) / norm if norm > 0 else 1.0
            self._follow(curvatures, clip)
        set_lr(self.optimizer, self.lr)
        self.num_steps += 1

    def _validation_slope(self, parameters: list[nn.Parameter]) -> Tensor:
        """⟨∇L_val(w⁺), Z₀⟩."""
        with preserved(self.network.buffers()):
            slopes = torch.autograd.grad(self.meta_loss(), parameters, materialize_grads=True)
        return all_reduce_mean(_dot(list(slopes), self.along_weights))

    def _follow(self, curvatures: list[Tensor], clip: float | Tensor) -> None:
        """Move Z₁ and Z₀ along with the step about to be taken."""
        group = self.optimizer.param_groups[0]
        for index, (parameter, direction) in enumerate(update_directions(self.optimizer).items()):
            weights, velocity = self.along_weights[index], self.along_velocity[index]
            velocity.mul_(group["momentum"]).add_(curvatures[index] * clip)
            velocity.add_(weights, alpha=group["weight_decay"])
            weights.sub_(velocity, alpha=self.lr).sub_(direction(parameter))


@contextlib.contextmanager
def twice_differentiable(network: nn.Module) -> Iterator[None]:
    """Inside, LSTMs run without cuDNN and attention is not fused, so that their gradients have gradients."""
    cudnn = torch.backends.cudnn
    has_lstm = any(isinstance(module, nn.LSTM) for module in network.modules())
    flags = cudnn.flags(
        enabled=cudnn.enabled and not has_lstm, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
        allow_tf32=cudnn.allow_tf32,
    )
    with flags, sdpa_kernel(SDPBackend.MATH):
        yield


class L4(Baseline):
    """lr = α(L − 0.9·L_min) / ⟨g̃, v⟩: the step that takes the linearised loss a part of the way to its minimum.

    g̃ is the average of the gradients (0.9), v = g̃, or for Adam's direction g̃ / (√second moment + 1e-4), all
    bias-corrected. v replaces the gradient, so L4 needs plain SGD, which adds the weight decay to it; ValueError for
    another optimizer. Source: Rolínek and Martius, "L4: Practical Loss-Based Stepsize Adaptation", 2018.
    """

    adam = False
    fraction = 0.15  # α
    remembered = ("num_steps", "lr", "min_loss", "exp_avg", "exp_avg_sq")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        if type(optimizer) is not SGD or any(group["momentum"] for group in optimizer.param_groups):
            raise ValueError("l4 brings its own direction; use --optimizer sgd --momentum 0")
        self.lr = self.initial_lr
        self.min_loss = math.inf  # L_min
        self.exp_avg: list[Tensor] = []
        self.exp_avg_sq: list[Tensor] = []

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:
        value = float(_mean_loss(loss))
        parameters = parameters_with_grad(self.optimizer)
        if not self.num_steps:
            self.min_loss = 0.75 * value
            self.exp_avg = [torch.zeros_like(parameter) for parameter in parameters]
            if self.adam:
                self.exp_avg_sq = [torch.zeros_like(parameter) for parameter in parameters]
        self.num_steps += 1
        average = self._average(_gradients(parameters))
        directions = self._directions(average, _gradients(parameters))
        self.min_loss = min(self.min_loss, value)
        self.lr = self.fraction * (value - 0.9 * self.min_loss) / (float(_dot(average, directions)) + 1e-12)
        self.min_loss *= 1 + 1 / 1000
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.grad = direction.clone()
        set_lr(self.optimizer, self.lr)

    def _average(self, gradients: list[Tensor]) -> list[Tensor]:
        """g̃ after this step's gradients."""
        for exp_avg, gradient in zip(self.exp_avg, gradients, strict=True):
            exp_avg.lerp_(gradient, 0.1)
        return [exp_avg / (1 - 0.9**self.num_steps) for exp_avg in self.exp_avg]

    def _directions(self, average: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """v after this step's gradients."""
        if not self.adam:
            return average
        for exp_avg_sq, gradient in zip(self.exp_avg_sq, gradients, strict=True):
            exp_avg_sq.lerp_(gradient.square(), 0.001)
        roots = [(exp_avg_sq / (1 - 0.999**self.num_steps)).sqrt() for exp_avg_sq in self.exp_avg_sq]
        return [exp_avg / (root + 1e-4) for exp_avg, root in zip(average, roots, strict=True)]


class L4Adam(L4):
    """L4 with Adam's direction."""

    adam = True


# ---------------------------------------------------------------------------------------------- self-tuning optimizers


class SelfTuning(Baseline):
    """For an optimizer that sets its rate itself: nothing is left to set."""

    def step(self, loss: float | Tensor) -> None:
        self.num_steps += 1

    def get_last_lr(self) -> list[float | Tensor]:
        """The rate in effect, which the optimizer keeps in the parameter groups."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    @staticmethod
    def _rate(group: dict[str, Any]) -> float:
        if "scheduled_lr" in group:  # schedule-free; 0 before the first step
            return float(group["scheduled_lr"])
        lr = float(group["lr"] * group["d"])  # d is the distance that Prodigy and D-Adaptation estimate
        return lr / group.get("g0_norm", 1.0)  # D-Adaptation's SGD divides by the first gradient's norm


def schedule_free(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Schedule-free SGD (interpolation 0.9 unless momentum is given) or AdamW. Source: Defazio et al., 2024."""
    if name == "adam":
        raise ValueError("--schedule schedule-free works with --optimizer sgd or adamw")
    if name == "sgd":
        make = _from_package("schedulefree", "SGDScheduleFree", "--schedule schedule-free")
        optimizer = make(parameters, lr=lr, momentum=momentum or 0.9, weight_decay=weight_decay)
    else:
        make = _from_package("schedulefree", "AdamWScheduleFree", "--schedule schedule-free")
        optimizer = make(parameters, lr=lr, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


def schedule_free_radam(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Schedule-free RAdam, the package's newest form, which needs no warm-up."""
    if name != "adamw":
        raise ValueError("--schedule schedule-free-radam works with --optimizer adamw")
    make = _from_package("schedulefree", "RAdamScheduleFree", "--schedule schedule-free-radam")
    optimizer = make(parameters, lr=lr, weight_decay=weight_decay)
    optimizer.train()
    return optimizer


def prodigy(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Prodigy, an Adam that finds its rate; lr multiplies it. Source: Mishchenko and Defazio, 2023."""
    if name == "sgd":
        raise ValueError("--schedule prodigy works with --optimizer adam (coupled weight decay) or adamw")
    make = _from_package("prodigyopt", "Prodigy", "--schedule prodigy")
    return make(parameters, lr=lr, weight_decay=weight_decay, decouple=name == "adamw")


def dadaptation(name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """D-Adaptation: SGD or Adam that find their rate; lr multiplies it. Source: Defazio and Mishchenko, 2023."""
    if name == "sgd":
        make = _from_package("dadaptation", "DAdaptSGD", "--schedule dadaptation")
        optimizer = make(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if "g0_norm" in optimizer.defaults:  # version 2, which does not tell its rate
            raise ValueError("--schedule dadaptation needs dadaptation 3: pip install --upgrade dadaptation")
        return optimizer
    make = _from_package("dadaptation", "DAdaptAdam", "--schedule dadaptation")
    with contextlib.redirect_stdout(io.StringIO()):  # it announces decoupled weight decay
        return make(parameters, lr=lr, weight_decay=weight_decay, decouple=name == "adamw")


# ---------------------------------------------------------------------------------------------- Lightning's LR finder


class LightningFinder:
    """Lightning's LR finder: the rates of its range test, one a step, and the rate that it suggests after them.

    As in its Trainer, the second rate is left out. ValueError where the package lightning is missing.
    """

    def __init__(self, num_rates: int = 100, low: float = 1e-8, high: float = 1.0):
        self._finder_class = _from_package("lightning.pytorch.tuner.lr_finder", "_LRFinder", "Lightning's LR finder")
        growth = high / low
        self.rates = [low, *(low * growth ** (number / num_rates) for number in range(2, num_rates + 1))]

    def suggest(self, losses: Sequence[float]) -> float:
        """Where the smoothed loss falls most steeply; what follows a divergence is ignored.

        losses are the training losses at the rates, step by step. ValueError where there are too few of them.
        """
        smoothed = _lightning_smoothed(losses)
        finder = self._finder_class("exponential", self.rates[0], self.rates[-1], len(self.rates))
        finder.results = {"lr": self.rates[: len(smoothed)], "loss": smoothed}
        suggestion = finder.suggestion()
        if suggestion is None:
            raise ValueError(f"Lightning's LR finder has no suggestion after {len(smoothed)} steps; give more losses")
        return suggestion


def lightning_lr_finder(
    network: nn.Module, optimizer: Optimizer, next_loss: Callable[[], Tensor], num_steps: int,
    max_norm: float | None = None,
) -> MeasuredScale:
    """The rate that Lightning's LR finder suggests by default, found as measure_lr_scale finds its own."""
    finder = LightningFinder()
    test = try_rates(network, optimizer, next_loss, "range test", finder.rates, max_norm)
    return MeasuredScale(finder.suggest(test.losses), [test])


def _lightning_smoothed(losses: Sequence[float]) -> list[float]:
    """The losses as Lightning's finder sees them: smoothed by 0.98, up to the first above 4 times the lowest."""
    average, lowest = 0.0, math.inf
    smoothed: list[float] = []
    for number, loss in enumerate(losses, start=1):
        average = 0.98 * average + 0.02 * loss
        value = average / (1 - 0.98 ** (number + 1))
        smoothed.append(value)
        if value > 4 * lowest:
            break
        lowest = min(lowest, value)
    return smoothed


# ---------------------------------------------------------------------------------------------- the registry

SCHEDULES: dict[str, type[Baseline]] = {
    "fixed": Fixed,
    "multistep": Multistep,
    "exponential": Exponential,
    "cosine": Cosine,
    "sgdr": SGDR,
    "onecycle": OneCycle,
    "warmup-cosine": WarmupCosine,
    "linear": Linear,
    "wsd": WSD,
    "val": Val,
    "plateau": Plateau,
    "greedy": Greedy,
    "hd": HD,
    "rtho": RTHO,
    "l4mom": L4,
    "l4adam": L4Adam,
    "schedule-free": SelfTuning,
    "schedule-free-radam": SelfTuning,
    "prodigy": SelfTuning,
    "dadaptation": SelfTuning,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {  # of the self-tuning ones
    "schedule-free": schedule_free,
    "schedule-free-radam": schedule_free_radam,
    "prodigy": prodigy,
    "dadaptation": dadaptation,
}
VALIDATING = ("val", "rtho")  # need data held out of the training set
RATELESS = ("l4mom", "l4adam")  # have no initial rate
RATE_FACTORS = ("prodigy", "dadaptation")  # their lr multiplies the rate that they find


def default_lr(schedule: str, optimizer: str) -> float:
    """The usual initial rate of a baseline."""
    if schedule in RATE_FACTORS:
        return 1.0
    if schedule in ("schedule-free", "schedule-free-radam"):
        return 1.0 if optimizer == "sgd" else 0.0025
    if optimizer != "sgd":
        return 1e-3
    return 20.0 if schedule == "val" else 0.1


def default_beta(optimizer: str) -> float:
    """The usual step of hd and rtho on the rate."""
    return 1e-3 if optimizer == "sgd" else 1e-7


def build_baseline(
    schedule: str, optimizer: str, network: nn.Module, task: Any, num_epochs: int, lr: float | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, beta: float | None = None,
    meta_loss: Callable[[], Tensor] | None = None,
) -> tuple[Optimizer, Baseline]:
    """The optimizer ("sgd", "adam" or "adamw") and its schedule.

    lr is the initial rate and beta the step of hd and rtho on the rate; the default is the usual one. meta_loss
    returns the 0-d loss of the network on the next validation batch, for rtho. ValueError for what does not go
    together and for a package that is not installed.
    """
    make = OPTIMIZERS.get(schedule, build_optimizer)
    lr = default_lr(schedule, optimizer) if lr is None else lr
    built = make(optimizer, network.parameters(), lr, momentum, weight_decay)
    options: dict[str, Any] = {}
    if schedule == "val":
        options["validate"] = lambda: task.validate(network)
    if schedule in ("hd", "rtho"):
        options["beta"] = default_beta(optimizer) if beta is None else beta
    if schedule == "rtho":
        if meta_loss is None:
            raise ValueError("rtho needs meta_loss, the loss on the next validation batch")
        options |= {"network": network, "meta_loss": meta_loss}
    return built, SCHEDULES[schedule](built, num_epochs, task.steps_per_epoch, **options)

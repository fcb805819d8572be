"""Rates from gradients."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW, Optimizer

from baselines.base import Baseline, mean_loss
from mlr_snet_optim.directions import check_affine, update_directions
from mlr_snet_optim.ranks import all_reduce_mean
from mlr_snet_optim.rates import set_lr
from mlr_snet_optim.restoring import parameters_of, preserved


def _with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _positive(lr: float) -> float:
    return 0.0 if lr < 0 else lr  # a NaN stays one, so that the run ends as diverged


class HD(Baseline):
    """Hypergradient descent: lr_t = max(0, lr_{t−1} + β⟨∇L(w_t), u_{t−1}⟩), u the direction last applied.

    beta is β; coupled weight decay counts as part of L. Source: Baydin et al., "Online Learning Rate Adaptation with
    Hypergradient Descent", 2018. Deviation: theirs lets the rate fall below 0.
    """

    has_beta = True
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
        directions = update_directions(self.optimizer, self.ratios)
        self.last_directions = [direction(parameter) for parameter, direction in directions.items()]
        set_lr(self.optimizer, self.lr, self.ratios)
        self.num_steps += 1

    def _decayed_gradients(self) -> list[Tensor]:
        """∇L with the coupled weight decay, for every parameter."""
        gradients = []
        for group in self.optimizer.param_groups:
            weight_decay = 0.0 if isinstance(self.optimizer, AdamW) else group["weight_decay"]
            own = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients += [parameter.grad.add(parameter, alpha=weight_decay) for parameter in own]
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

    usual_lr = {"sgd": 0.1}
    has_beta = needs_validation = second_order = True
    takes = ("network", "meta_loss")
    remembered = ("num_steps", "lr", "along_weights", "along_velocity")

    def __init__(
        self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, beta: float, network: nn.Module,
        meta_loss: Callable[[], Tensor],
    ):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        groups = optimizer.param_groups
        if type(optimizer) is not SGD or any(group["nesterov"] or group["dampening"] for group in groups):
            raise ValueError("rtho works with SGD, with or without plain momentum")
        if any(ratio != 1 for ratio in self.ratios):
            raise ValueError("rtho works with one rate for all parameters")
        self.beta, self.network, self.meta_loss = beta, network, meta_loss
        self.lr = self.initial_lr
        self.along_weights: list[Tensor] = []  # Z₀
        self.along_velocity: list[Tensor] = []  # Z₁

    def step(self, loss: float | Tensor) -> None:
        assert isinstance(loss, Tensor)
        parameters = _with_gradient(self.optimizer)
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
        set_lr(self.optimizer, self.lr, self.ratios)
        self.num_steps += 1

    def _validation_slope(self, parameters: list[nn.Parameter]) -> Tensor:
        """⟨∇L_val(w⁺), Z₀⟩."""
        with preserved(self.network.buffers()):
            slopes = torch.autograd.grad(self.meta_loss(), parameters, materialize_grads=True)
        return all_reduce_mean(_dot(list(slopes), self.along_weights))

    def _follow(self, curvatures: list[Tensor], clip: float | Tensor) -> None:
        """Move Z₁ and Z₀ along with the step about to be taken."""
        group = self.optimizer.param_groups[0]
        for index, (parameter, direction) in enumerate(update_directions(self.optimizer, self.ratios).items()):
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

    usual_lr = {"sgd": 0.1}
    rate = "none"
    own_direction = True
    adam = False
    fraction = 0.15  # α
    remembered = ("num_steps", "lr", "min_loss", "exp_avg", "exp_avg_sq")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        if type(optimizer) is not SGD or any(group["momentum"] for group in optimizer.param_groups):
            raise ValueError("l4 brings its own direction; use SGD without momentum")
        self.lr = self.initial_lr
        self.min_loss = math.inf  # L_min
        self.exp_avg: list[Tensor] = []
        self.exp_avg_sq: list[Tensor] = []

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:
        value = float(mean_loss(loss))
        parameters = _with_gradient(self.optimizer)
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
        set_lr(self.optimizer, self.lr, self.ratios)

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

"""MLR-SNet: a small LSTM reads the training loss of every step and returns that step's learning rate.

    lr_t = γ · A(ℓ_t; θ)                            MLRSNet (A), lr_scale (γ), MLRSNetLR
    w_{t+1} = w_t − lr_t · d_t                      update_directions (d_t), train (the loop)
    ŵ(θ) = w_t − γ · A(ℓ_t; θ) · d_t                lookahead
    ∂L_meta(ŵ)/∂lr = −⟨∇L_meta(ŵ), d_t⟩             hypergradient
    θ_{t+1} = Adam(θ_t, ∂L_meta/∂lr · γ · ∂A/∂θ)    MetaMLRSNetLR

Symbols: ℓ_t mini-batch training loss; w weights of the task network; θ weights of MLR-SNet; γ the LR scale (gamma);
A in (0, 1) the fraction; d_t the base optimizer's update per unit of learning rate. d_t does not depend on θ, so the
hypergradient is exact without a second-order graph.

This file needs torch alone. To use a schedule in your own training loop, copy it and see MLRSNetLR; to learn one, see
MetaMLRSNetLR. Under torch.distributed every rank calls the same methods with its own loss.

Source: Shu, Zhu, Zhao, Meng, Xu, "MLR-SNet: Transferable LR Schedules for Heterogeneous Tasks", TPAMI 2022.
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# ---------------------------------------------------------------------------------------------- the net, A(·; θ)


class LSTMCell(nn.Module):
    """One LSTM step whose input and hidden maps are Linear–ReLU–Linear. Source: the authors' module.py, MLRSNetCell."""

    def __init__(self, num_inputs: int, hidden_size: int):
        super().__init__()

        def perceptron(width: int) -> nn.Sequential:
            half = hidden_size // 2
            return nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Linear(half, 4 * hidden_size))

        self.fc_i2h = perceptron(num_inputs)
        self.fc_h2h = perceptron(hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -0.1, 0.1)

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (features,), hidden and cell (hidden_size,) -> the next hidden and cell."""
        # Deviation: torch's gate order, without a forget-gate bias. The authors' two scripts use different orders, and
        # only this one makes their published checkpoints behave.
        gates = self.fc_i2h(inputs) + self.fc_h2h(hidden)  # (4 · hidden_size,)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell


class MLRSNet(nn.Module):
    """The learned schedule: an LSTM from the training loss to the fraction of the LR scale, in (0, 1).

    Its state_dict has the layout of the authors' checkpoints. Raises ValueError for a hidden size below 2 or no layer.
    """

    def __init__(self, hidden_size: int = 50, num_layers: int = 1):
        super().__init__()
        if hidden_size < 2 or num_layers < 1:
            raise ValueError(f"hidden size {hidden_size} and {num_layers} layers: need at least 2 and 1")
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.layer1 = LSTMCell(1, hidden_size)
        self.layer2 = nn.ModuleList(LSTMCell(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.layer3 = nn.Linear(hidden_size, 1)

    def initial_state(self) -> Tensor:
        """The zero state, (num_layers, 2, hidden_size): hidden and cell of each layer."""
        return self.layer3.weight.new_zeros(self.num_layers, 2, self.hidden_size)

    def forward(self, loss: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: 0-d loss and the state -> 0-d fraction in (0, 1) and the next state."""
        features, states = loss.to(state.dtype).reshape(1), []
        for layer, (hidden, cell) in zip([self.layer1, *self.layer2], state, strict=True):
            hidden, cell = layer(features, hidden, cell)
            features = hidden
            states.append(torch.stack((hidden, cell)))
        return self.layer3(features).sigmoid().squeeze(0), torch.stack(states)


def load_schedule(path: str | Path) -> MLRSNet:
    """An MLR-SNet from a .pth file, the authors' or ours, on the CPU.

    Raises ValueError when the file is missing, damaged, not an MLR-SNet, or would run code.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; meta-train.py writes mlr_snet_<epoch>.pth") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable file of weights ({type(error).__name__})") from None
    try:
        layers = {key.split(".")[1] for key in weights if key.startswith("layer2.")}
        net = MLRSNet(weights["layer3.weight"].shape[1], 1 + len(layers))
        net.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError):
        raise ValueError(f"{path}: not an MLR-SNet; expected layer1.fc_i2h.0.weight … layer3.bias") from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise ValueError(f"{path}: holds weights that are not finite")
    return net


# Learned on CIFAR-10 images, after 1/200, 1/2 and all of a run; and one net learned at averaged weights.
SHIPPED = {
    "shipped": ("mlr_snet_1.pth", "mlr_snet_100.pth", "mlr_snet_200.pth"),
    "average": ("mlr_snet_average.pth",),
}


def load_schedules(nets: str | Sequence[str | Path] = "shipped") -> list[MLRSNet]:
    """The nets of several files, or shipped ones by their name, "shipped" or "average". ValueError as load_schedule."""
    if not isinstance(nets, str):
        return [load_schedule(path) for path in nets]
    if nets not in SHIPPED:
        raise ValueError(f"nets {nets!r}: give a list of .pth files, or one of {', '.join(SHIPPED)}")
    here = Path(__file__).resolve().parent
    folder = here / "mlr_snet_nets"  # where the wheel puts them
    if not folder.is_dir():
        folder = here / "meta-test"  # where a clone has them
    if not folder.is_dir():
        raise ValueError(f"the shipped nets are not beside {__file__}; give the paths of .pth files")
    return [load_schedule(folder / name) for name in SHIPPED[nets]]


# ---------------------------------------------------------------------------------------------- the LR scale, γ


def lr_scale(loss: float, num_classes: int) -> float:
    """γ, the largest rate a schedule may give: √L · max(ln(L·C), 1) / C^¼ / 4.

    loss is the mean training loss L (language models: the perplexity), num_classes is C (the size of the vocabulary).
    Raises ValueError where L is not positive and finite, or C is not a whole number of at least 1.
    Source: the authors' meta_train.py.
    """
    _check_num_classes(num_classes)
    if not (math.isfinite(loss) and loss > 0):
        raise ValueError(f"the LR scale needs a positive and finite loss, got {loss}")
    # Deviation: the floor of 1. Without it γ crosses zero at L = 1/C and training stops there.
    return math.sqrt(loss) * max(math.log(loss * num_classes), 1.0) / num_classes**0.25 / 4


def has_paper_scale(optimizer: Optimizer) -> bool:
    """Whether lr_scale was made for the optimizer: SGD without momentum."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _check_num_classes(num_classes: int, least: int = 1) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < least:
        raise ValueError(f"num_classes {num_classes!r}: give a whole number of at least {least}")


# ---------------------------------------------------------------------------------------------- update directions, d_t

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


def update_directions(optimizer: Optimizer) -> Update:
    """What the optimizer's next step would subtract per unit of learning rate, from the gradients in .grad.

    For each parameter with a gradient, a function from its value before the step, so that a direction takes memory
    only while it is used. Changes neither the optimizer nor the parameters. Groups keep the ratios of their initial
    rates. An optimizer without an entry in DIRECTIONS is measured: it takes trial steps, which are undone bit for bit.
    Raises TypeError for an update that is not affine in the rate, and for complex or sparse gradients.
    """
    check_affine(optimizer)
    parameters = parameters_with_grad(optimizer)
    for parameter in parameters:
        if parameter.is_complex() or parameter.grad.is_sparse:  # type: ignore[union-attr]
            raise TypeError("complex parameters and sparse gradients are not supported; use dense real ones")
    if type(optimizer) not in DIRECTIONS:
        return _measured_directions(optimizer, parameters)
    return {
        parameter: partial(_direction, optimizer, group, ratio, parameter)
        for group, ratio in zip(optimizer.param_groups, lr_ratios(optimizer), strict=True)
        for parameter in group["params"] if parameter.grad is not None
    }


def parameters_with_grad(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that the optimizer's next step moves."""
    return [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]


@torch.no_grad()
def _direction(
    optimizer: Optimizer, group: Options, ratio: float, parameter: nn.Parameter, weight: Tensor
) -> Tensor:
    """A new tensor of the parameter's shape: its direction where its value is `weight`."""
    gradient, kind = parameter.grad, type(optimizer)
    assert gradient is not None
    if group.get("maximize"):
        gradient = -gradient
    is_decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
    if not is_decoupled:
        gradient = gradient.add(weight.detach(), alpha=group["weight_decay"])
    direction = DIRECTIONS[kind](gradient, group, optimizer.state.get(parameter, {}))
    if is_decoupled:
        direction.add_(weight.detach(), alpha=group["weight_decay"])
    return direction if ratio == 1 else direction.mul_(ratio)


def _measured_directions(optimizer: Optimizer, parameters: list[nn.Parameter]) -> Update:
    """d_t = w_t − w_{t+1} at rate 1, after checking that rate 1/2 moves the weights half as far."""
    name = type(optimizer).__name__

    def moved(lr: float) -> list[Tensor]:
        with preserved_optimizer(optimizer) as weights, torch.no_grad():
            set_lr(optimizer, lr)
            try:
                optimizer.step()
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


# ---------------------------------------------------------------------------------------------- the hypergradient

MetaPoint = Callable[[nn.Module, Update, float | Tensor], AbstractContextManager[dict[Tensor, Tensor]]]


@contextmanager
def lookahead(network: nn.Module, update: Update, lr: float | Tensor) -> Iterator[dict[Tensor, Tensor]]:
    """The network at ŵ = w − lr·d inside the block; yields w by parameter. Restores w and the buffers bit for bit."""
    with preserved([*network.parameters(), *network.buffers()]) as weights:
        descend(update, lr)
        yield weights


def hypergradient(
    network: nn.Module,
    optimizer: Optimizer,
    lr: float | Tensor,
    meta_loss: Callable[[], Tensor],
    meta_point: MetaPoint = lookahead,
) -> Tensor:
    """∂L_meta/∂lr = −⟨∇L_meta(ŵ), d_t⟩ at the lookahead point, a 0-d tensor.

    Call it between the training loss's backward() and optimizer.step(): d_t comes from the gradients in .grad.
    meta_loss returns the 0-d loss of the network on a held-out batch. Parameters, buffers, gradients and the optimizer
    stay as they are. With several ranks meta_loss is this rank's, and the result is the mean over the ranks.
    Raises TypeError for an optimizer that is not affine in lr.
    """
    update = update_directions(optimizer)
    terms: dict[nn.Parameter, Tensor] = {}

    def reduce(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Replace the gradient by its inner product with d_t: all gradients at once would be a copy of the network."""
        terms[parameter] = update[parameter](weights[parameter]).mul_(gradient).sum()
        return terms[parameter].expand_as(gradient)

    with meta_point(network, update, lr) as weights, torch.enable_grad(), ExitStack() as hooks:
        loss = meta_loss()
        for parameter in update:
            hooks.enter_context(parameter.register_hook(partial(reduce, parameter)))
        torch.autograd.grad(loss, list(update), allow_unused=True)
    return -all_reduce_mean(torch.stack([terms[parameter] for parameter in update if parameter in terms]).sum())


# ---------------------------------------------------------------------------------------------- the schedulers


class MLRSNetLR:
    """Drives an optimizer by learned schedules; call step(loss) between loss.backward() and optimizer.step().

    The K nets share the run, one per K-th of the epochs (three: they change at E//3 and 2·(E//3)); the LSTM state
    carries over, and past the planned end the last net goes on. gamma is the LR scale: a number, such as
    measure_lr_scale(...).gamma, or "paper" for lr_scale of the first loss and, at every change of nets, of the mean
    loss of the epoch before; "auto" is "paper" for SGD without momentum and refuses other optimizers. With
    perplexity=True (language models) num_classes is the size of the vocabulary, γ comes from exp(loss) and the net
    sees loss / ln(num_classes). Parameter groups keep the ratios of their initial rates; the largest gets the learned
    rate. On an accelerator the host waits only where γ is set, if the nets lie there too and the optimizer is fused.
    Raises ValueError for arguments that do not describe a run.
    """

    second_order = False  # whether step() differentiates the loss again, so that its graph has to be kept
    counters = ("num_steps", "phase", "gamma", "epoch_loss", "state")  # what changes from step to step

    def __init__(
        self,
        optimizer: Optimizer,
        nets: Sequence[MLRSNet],
        num_classes: int,
        num_epochs: int,
        steps_per_epoch: int,
        gamma: float | str = "auto",
        perplexity: bool = False,
    ):
        if not nets:
            raise ValueError("no nets: give at least one MLR-SNet")
        if len({(net.hidden_size, net.num_layers) for net in nets}) > 1:
            sizes = ", ".join(f"{net.hidden_size} x {net.num_layers}" for net in nets)
            raise ValueError(f"nets of different sizes ({sizes}) cannot share a run, since the LSTM state carries over")
        if num_epochs < 1 or steps_per_epoch < 1:
            raise ValueError(f"{num_epochs} epochs of {steps_per_epoch} steps: both must be at least 1")
        is_number = isinstance(gamma, (int, float)) and math.isfinite(gamma) and gamma > 0
        if gamma not in ("auto", "paper") and not is_number:
            raise ValueError(f"gamma {gamma!r}: give a positive number, 'auto' or 'paper'")
        _check_num_classes(num_classes, least=2 if perplexity else 1)
        while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = wrapped  # by Accelerate or Lightning
        lr_ratios(optimizer)  # refuses an optimizer whose rates are all zero
        self.optimizer, self.nets = optimizer, list(nets)
        self.num_classes, self.perplexity = num_classes, perplexity
        if gamma == "auto" and not has_paper_scale(self.optimizer):
            raise ValueError(
                "gamma='auto' is the paper's formula, made for SGD without momentum: for other optimizers give "
                "gamma=measure_lr_scale(network, optimizer, next_loss, num_steps).gamma, or gamma='paper'"
            )
        self.fixed_gamma = float(gamma) if is_number else None
        self.steps_per_epoch, self.phase_epochs = steps_per_epoch, max(1, num_epochs // len(self.nets))
        self.num_steps = 0
        self.phase = -1
        self.gamma = math.nan  # set at the first step
        self.epoch_loss: float | Tensor = 0.0
        self.state = self.nets[0].initial_state()
        self.lr_set: list[float | Tensor] | None = None

    @property
    def net(self) -> MLRSNet:
        """The net that drives the present step."""
        return self.nets[self.phase]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Set the rate of the step about to be taken from its training loss, a 0-d tensor or a number.

        With several ranks the loss is this rank's; the schedule reads the mean over the ranks. Raises TypeError without
        a loss, ValueError for a loss that is not 0-d, RuntimeError when something else has set the rate since the last
        step.
        """
        if loss is None:
            raise TypeError("step() needs the training loss: call step(loss) after backward(), before optimizer.step()")
        loss = torch.as_tensor(loss).detach()
        if loss.dim():
            raise ValueError(f"the loss has shape {tuple(loss.shape)}: give the mean over the batch, a 0-d tensor")
        self._check_rates()
        loss = all_reduce_mean(loss)
        self._start_epoch(on_host(loss))
        self._learn(loss)
        with torch.no_grad():
            fraction, self.state = self.net(self._input(loss), self.state)
        set_lr(self.optimizer, self.gamma * on_host(fraction))
        self.lr_set = self.get_last_lr()
        self.num_steps += 1

    def _learn(self, loss: Tensor) -> None:
        """Where MetaMLRSNetLR moves θ, before the rate is set."""

    def attach(self, next_loss: Callable[[], float | Tensor | None]) -> RemovableHandle:
        """Make every optimizer.step() call step(next_loss()) right before its update; the handle's remove() undoes it.

        For trainers that give no access between backward() and the update. Gradients are unscaled and clipped by then,
        and a step that GradScaler skips does not advance the schedule. A next_loss() of None keeps the rate.
        """
        is_stepping = False  # true during the trial steps that measure an optimizer

        def set_rate(optimizer: Optimizer) -> None:
            nonlocal is_stepping
            # GradScaler leaves it to a fused optimizer to skip a step
            is_skipped = bool(getattr(optimizer, "found_inf", 0))
            if is_stepping or is_skipped:
                return
            is_stepping = True
            try:
                loss = next_loss()
                if loss is not None:
                    self.step(loss)
            finally:
                is_stepping = False

        def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                set_rate(optimizer)
                return None

            def closure_then_rate() -> Any:
                result = closure()
                set_rate(optimizer)
                return result

            return args[:1], {**kwargs, "closure": closure_then_rate}

        return self.optimizer.register_step_pre_hook(before_step)

    def get_last_lr(self) -> list[float | Tensor]:
        """Copies of the parameter groups' rates, as last set; for a rate kept in a tensor, 0-d tensors."""
        return copied_rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, beside the optimizer's own state_dict."""
        return {name: getattr(self, name) for name in self.counters} | {"nets": [net.state_dict() for net in self.nets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(); its γ replaces a number. ValueError for a state of another schedule."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            different = ", ".join(sorted(state.keys() ^ expected))
            raise ValueError(f"not the state of a {type(self).__name__}: missing or unknown {different}")
        if len(state["nets"]) != len(self.nets):
            raise ValueError(f"the state is of a schedule of {len(state['nets'])} nets, this one has {len(self.nets)}")
        for net, weights in zip(self.nets, state["nets"], strict=True):
            try:
                net.load_state_dict(weights)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"the state holds nets of another layout ({' '.join(str(error).split())})") from None
        for name in self.counters:
            setattr(self, name, state[name])
        if self.fixed_gamma is not None and self.num_steps:
            self.fixed_gamma = self.gamma  # not a number that was measured again
        self.state = self.state.to(self.nets[0].layer3.weight)
        self.lr_set = None

    def _check_rates(self) -> None:
        """RuntimeError when a rate is not the one that the last step() set; looks at nothing on an accelerator."""
        for group, lr in zip(self.optimizer.param_groups, self.lr_set or [], strict=False):
            if not isinstance(lr, Tensor) and group["lr"] != lr and not math.isnan(lr):
                raise RuntimeError(
                    f"the learning rate is {group['lr']:g}, but this schedule had set {lr:g}; "
                    "remove the other scheduler that changes it"
                )

    def _input(self, loss: Tensor) -> Tensor:
        """What the LSTM reads, on its device."""
        loss = loss.to(self.state.device)
        return loss / math.log(self.num_classes) if self.perplexity else loss

    def _start_epoch(self, loss: float | Tensor) -> None:
        """At the first step of an epoch, change the net and γ where a phase begins; add up the epoch's losses."""
        epoch, position = divmod(self.num_steps, self.steps_per_epoch)
        if position == 0:
            phase = min(epoch // self.phase_epochs, len(self.nets) - 1)
            if phase != self.phase:
                self.phase = phase
                # Deviation: the authors pass over the whole training set for L; the losses at hand serve as well.
                mean = self.epoch_loss / self.steps_per_epoch if epoch else loss
                self.gamma = self._gamma_from(float(mean)) if self.fixed_gamma is None else self.fixed_gamma
            self.epoch_loss = 0.0
        self.epoch_loss = self.epoch_loss + loss

    def _gamma_from(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.nan  # so is the rate then, which ends the run as diverged
        if self.perplexity and loss > 100:
            raise FloatingPointError(f"the loss is {loss:.3g} nats at step {self.num_steps + 1}, beyond a perplexity")
        level = math.exp(loss) if self.perplexity else max(loss, 1e-30)  # a loss of 0 leaves nothing to learn
        return lr_scale(level, self.num_classes)


class MetaMLRSNetLR(MLRSNetLR):
    """An MLR-SNet that learns while it drives: every t_val-th step first moves θ by Adam, then sets the rate.

    meta_loss returns the 0-d loss of the network on the next held-out batch, with its graph. lr and weight_decay are
    Adam's on θ; the other arguments are MLRSNetLR's. Raises TypeError for an optimizer whose update is not affine in
    its learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        net: MLRSNet,
        network: nn.Module,
        meta_loss: Callable[[], Tensor],
        *,
        num_classes: int,
        num_epochs: int,
        steps_per_epoch: int,
        t_val: int = 300,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        gamma: float | str = "auto",
        perplexity: bool = False,
        meta_point: MetaPoint = lookahead,
    ):
        super().__init__(optimizer, [net], num_classes, num_epochs, steps_per_epoch, gamma, perplexity)
        check_affine(optimizer)
        if t_val < 1:
            raise ValueError(f"t_val {t_val}: must be at least 1")
        self.network, self.meta_loss, self.t_val, self.meta_point = network, meta_loss, t_val, meta_point
        self.adam = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)

    def _learn(self, loss: Tensor) -> None:
        """θ ← Adam(θ, ∂L_meta/∂lr · γ · ∂A/∂θ), with the LSTM state a constant."""
        if (self.num_steps + 1) % self.t_val:
            return
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError("the gradients are still scaled: call scaler.unscale_(optimizer) before scaler.step()")
        with torch.enable_grad():
            fraction, _ = self.net(self._input(loss), self.state)
            lr = self.gamma * on_host(fraction)
            slope = hypergradient(self.network, self.optimizer, lr, self.meta_loss, self.meta_point)
            self.adam.zero_grad()
            (slope.to(fraction) * self.gamma * fraction).backward()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.adam.load_state_dict(state["adam"])


# ---------------------------------------------------------------------------------------------- the training loop


class Task(Protocol):
    """What the loop needs of a problem; data/ has the implementations."""

    num_classes: int  # language models: the size of the vocabulary
    perplexity: bool  # whether the problem is measured by perplexity
    steps_per_epoch: int
    clip: float | None  # the largest norm of the gradient

    def train_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of batches from global step `start` on; batch.size is the number of targets in it."""

    def meta_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of meta batches, from number `start` on."""

    def loss(self, network: nn.Module, batch: Any, hidden: Any) -> tuple[Tensor, Tensor, Any]:
        """The 0-d loss, the batch's accuracy in %, and the hidden state for the next batch (None for images).

        With several ranks a batch is this rank's shard, and the means over the ranks are those of the whole batch.
        """

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """The test metrics by name."""

    def validate(self, network: nn.Module) -> float:
        """The mean loss over the meta data."""


class Schedule(Protocol):
    """Sets an optimizer's rates: MLRSNetLR, MetaMLRSNetLR and every baseline."""

    second_order: bool  # whether step() differentiates the loss again, so that its graph has to be kept

    def step(self, loss: float | Tensor) -> None: ...
    def get_last_lr(self) -> Sequence[float | Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Step:
    """What one step of the loop reports, for the whole batch: `number` counts from 1, `size` is its number of targets.

    Loss and accuracy (%) are 0-d tensors on the network's device, so that the loop does not wait for them.
    """

    number: int
    loss: Tensor
    accuracy: Tensor
    lr: float | Tensor
    size: int
    hidden: Any


def train(
    network: nn.Module,
    task: Task,
    optimizer: Optimizer,
    schedule: Schedule,
    num_epochs: int,
    start: int = 0,
    hidden: Any = None,
) -> Iterator[Step]:
    """Train for num_epochs under a schedule and yield every step; `start` and `hidden` continue an earlier run.

    The caller checks that loss and rate are finite, since the caller knows when the host can wait for them.
    """
    network.train()
    steps = range(start, num_epochs * task.steps_per_epoch)
    for number, batch in zip(steps, task.train_batches(start), strict=False):
        loss, accuracy, hidden = task.loss(network, batch, hidden)  # ℓ_t
        optimizer.zero_grad()
        loss.backward(retain_graph=schedule.second_order)
        if task.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), task.clip)
        schedule.step(loss)
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        yield Step(number + 1, all_reduce_mean(loss.detach()), all_reduce_mean(accuracy), lr, batch.size, hidden)


# ---------------------------------------------------------------------------------------------- rates and tensors


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over the ranks, bit-identical on each; the tensor itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def on_host(value: Tensor) -> float | Tensor:
    """A 0-d tensor as a float, unless that would make the host wait for an accelerator."""
    value = value.detach()
    return float(value) if value.device.type == "cpu" else value


def lr_ratios(optimizer: Optimizer) -> list[float]:
    """Each parameter group's initial rate over the largest one. ValueError when all are zero."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
    rates = [group["initial_lr"] for group in optimizer.param_groups]
    if max(rates) <= 0:
        raise ValueError("the optimizer's learning rates are all zero; give at least one group a positive lr")
    return [rate / max(rates) for rate in rates]


@torch.no_grad()
def set_lr(optimizer: Optimizer, lr: float | Tensor) -> None:
    """Give the group with the largest initial rate `lr`, and the others their share of it.

    A rate that is a tensor is filled in place, so that compiled and captured steps see it without recompiling. A rate
    on an accelerator stays there for a fused optimizer; other optimizers take floats alone.
    """
    for group, ratio in zip(optimizer.param_groups, lr_ratios(optimizer), strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(lr * ratio))
        elif isinstance(lr, Tensor) and group.get("fused"):
            group["lr"] = lr * ratio
        else:
            group["lr"] = float(lr) * ratio


def copied_rates(optimizer: Optimizer) -> list[float | Tensor]:
    """The learning rate of each parameter group; a tensor is copied, as torch's schedulers do."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


@contextmanager
def preserved(tensors: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Restores the tensors bit for bit on exit; yields their copies by tensor."""
    copies = {tensor: torch.empty_like(tensor, requires_grad=False) for tensor in tensors}
    _copy_all(copies.keys(), copies.values())
    try:
        yield copies
    finally:
        _copy_all(copies.values(), copies.keys())


@torch.no_grad()
def _copy_all(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    """Each source into its target: one call per dtype and device, since an accelerator's host pays per call."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        ones, others = kinds.setdefault((source.dtype, source.device), ([], []))
        ones.append(source)
        others.append(target)
    for ones, others in kinds.values():
        torch._foreach_copy_(others, ones)


@contextmanager
def preserved_optimizer(optimizer: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Restores weights, optimizer state, options and random generators bit for bit on exit; yields copies by tensor."""
    weights = parameters_of(optimizer)
    entries = [*optimizer.state.values(), *optimizer.param_groups]
    tensors = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    before = [{name: value if _has_tensors(value) else copy.deepcopy(value) for name, value in entry.items()}
              for entry in entries]
    known = list(optimizer.state)
    devices = {weight.device for weight in weights if weight.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), preserved([*weights, *tensors]) as copies:
        try:
            yield copies
        finally:
            for parameter in optimizer.state.keys() - known:
                del optimizer.state[parameter]
            for entry, values in zip(entries, before, strict=True):
                for name in entry.keys() - values.keys():
                    del entry[name]
                entry.update(values)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and any(isinstance(item, Tensor) for item in value))

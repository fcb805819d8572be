"""MLR-SNet: a small LSTM reads the training loss of every step and returns that step's learning rate.

    lr_t = γ · A(ℓ_t; θ) · e(t)                     MLRSNet (A), lr_scale (γ), MLRSNetLR (e, warm-up and cool-down)
    w_{t+1} = w_t − lr_t · d_t                      update_directions (d_t), train (the loop)
    ŵ(θ) = w_t − lr_t · d_t                         lookahead
    ∂L_meta(ŵ)/∂lr = −⟨∇L_meta(ŵ), d_t⟩             hypergradient
    θ_{t+1} = Adam(θ_t, ∂L_meta/∂lr · ∂lr/∂θ)       MetaMLRSNetLR

Symbols: ℓ_t mini-batch training loss; w weights of the task network; θ weights of MLR-SNet; γ the LR scale (gamma);
A in (0, 1) the fraction; d_t the base optimizer's update per unit of learning rate. d_t does not depend on θ, so the
hypergradient is exact without a second-order graph.

This file needs torch only. To use a schedule in your own loop, copy this file and see MLRSNetLR; to learn one, see
MetaMLRSNetLR. Under torch.distributed every rank calls the same methods with its own loss.

Source: Shu, Zhu, Zhao, Meng, Xu, "MLR-SNet: Transferable LR Schedules for Heterogeneous Tasks", TPAMI 2022.
"""

import bisect
import copy
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# ---------------------------------------------------------------------------------------------- the net, A(·; θ)

FORMS = ("images", "text")  # of the net, as in the authors' two scripts


class LSTMCell(nn.Module):
    """One LSTM step whose input and hidden maps are Linear–ReLU–Linear. Source: the authors' module.py, MLRSNetCell."""

    def __init__(self, num_inputs: int, hidden_size: int, form: str):
        super().__init__()
        width = hidden_size if form == "text" else hidden_size // 2

        def perceptron(inputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 4 * hidden_size))

        self.fc_i2h = perceptron(num_inputs)
        self.fc_h2h = perceptron(hidden_size)
        if form == "text":
            for linear in (*self.fc_i2h[::2], *self.fc_h2h[::2]):
                nn.init.uniform_(linear.weight, -0.1, 0.1)

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

    form "images": perceptrons of half the hidden size, torch's default initialisation. form "text": as wide as the
    hidden size, weights from U(−0.1, 0.1). The state_dict has the layout of the authors' checkpoints. Raises ValueError
    for another form, a hidden size below 2 or no layer.
    """

    def __init__(self, hidden_size: int = 50, num_layers: int = 1, form: str = "images"):
        super().__init__()
        if hidden_size < 2 or num_layers < 1:
            raise ValueError(f"hidden size {hidden_size} and {num_layers} layers: need at least 2 and 1")
        if form not in FORMS:
            raise ValueError(f"form {form!r}: choose from {', '.join(FORMS)}")
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.layer1 = LSTMCell(1, hidden_size, form)
        self.layer2 = nn.ModuleList(LSTMCell(hidden_size, hidden_size, form) for _ in range(num_layers - 1))
        self.layer3 = nn.Linear(hidden_size, 1)

    def initial_state(self) -> Tensor:
        """The zero state, (num_layers, 2, hidden_size): hidden and cell of each layer."""
        return self.layer3.weight.new_zeros(self.num_layers, 2, self.hidden_size)

    def forward(self, loss: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: 0-d loss and the state -> 0-d fraction in (0, 1) and the next state."""
        features, states = loss.to(state.dtype).reshape(1), []
        with torch.autocast(state.device.type, enabled=False):  # a caller's would round the rate
            for layer, (hidden, cell) in zip([self.layer1, *self.layer2], state, strict=True):
                hidden, cell = layer(features, hidden, cell)
                features = hidden
                states.append(torch.stack((hidden, cell)))
            return self.layer3(features).sigmoid().squeeze(0), torch.stack(states)


def load_schedule(path: str | Path) -> MLRSNet:
    """An MLR-SNet from a .pth file, the authors' or ours, on the CPU; the shapes tell its form.

    Raises ValueError when the file is missing, damaged, not an MLR-SNet, or would run code.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give one of meta-train.py, or {' or '.join(SHIPPED)}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: not a readable file of weights ({type(error).__name__})") from None
    try:
        layers = {key.split(".")[1] for key in weights if key.startswith("layer2.")}
        width, hidden_size = len(weights["layer1.fc_i2h.0.bias"]), weights["layer3.weight"].shape[1]
        with torch.device("cpu"):
            net = MLRSNet(hidden_size, 1 + len(layers), "text" if width == hidden_size else "images")
        net.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError):
        raise ValueError(f"{path}: not an MLR-SNet; expected layer1.fc_i2h.0.weight … layer3.bias") from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise ValueError(f"{path}: holds weights that are not finite")
    return net


# Learned on CIFAR-10 images: one net at averaged weights; and three as in the paper, after 1/200, 1/2 and all of a run.
SHIPPED = {
    "recommended": ("mlr_snet_average.pth",),
    "paper": ("mlr_snet_1.pth", "mlr_snet_100.pth", "mlr_snet_200.pth"),
}


def load_schedules(nets: str | Sequence[str | Path] = "recommended") -> list[MLRSNet]:
    """The nets of several files, or the shipped ones of that name, "recommended" or "paper".

    Raises ValueError as load_schedule does, and where the shipped nets are not found: they lie in `meta-test` of a
    clone, in the wheel, or in a folder `mlr_snet_nets` beside a copy of this file.
    """
    if not isinstance(nets, (str, Path)):
        return [load_schedule(path) for path in nets]
    if nets not in SHIPPED:
        raise ValueError(f"nets {nets!r}: give load_schedules([{nets!r}]) for a file, or one of {', '.join(SHIPPED)}")
    here = Path(__file__).resolve().parent
    places = (here / "mlr_snet_nets", here / "meta-test")  # where the wheel puts them, and where a clone has them
    folder = next(filter(Path.is_dir, places), None)
    if folder is None:
        raise ValueError(
            f"the shipped nets are not beside {__file__}: copy the .pth files of meta-test to "
            f"{here / 'mlr_snet_nets'}, or give the paths of .pth files"
        )
    return [load_schedule(folder / name) for name in SHIPPED[nets]]


# ---------------------------------------------------------------------------------------------- the LR scale, γ


class ScaleError(ValueError):
    """A loss from which the formula of γ gives no scale."""


def lr_scale(loss: float, num_classes: int) -> float:
    """γ, the largest rate a schedule may give: √L · max(|ln(L·C)|, 1) / C^¼ / 4.

    loss is the mean training loss L (language models: the perplexity), num_classes is C (the size of the vocabulary).
    Raises ScaleError where L is not positive and finite, ValueError where C is not a whole number of at least 1.
    Source: the authors' meta_train.py and meta_test.py.
    """
    _check_count("num_classes", num_classes)
    if not (math.isfinite(loss) and loss > 0):
        raise ScaleError(f"the formula of the LR scale needs a positive and finite loss, got {loss}; {_GIVE_A_NUMBER}")
    # Deviation: the floor of 1. Without it γ crosses zero at L = 1/C and training stops there.
    return math.sqrt(loss) * max(abs(math.log(loss * num_classes)), 1.0) / num_classes**0.25 / 4


_GIVE_A_NUMBER = "give gamma as a number, twice the peak rate that you would use"
LARGEST_LOSS = 100.0  # nats; no cross-entropy of a network that can still learn is above


def has_paper_scale(optimizer: Optimizer) -> bool:
    """Whether lr_scale was made for the optimizer: SGD without momentum."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _is_scale(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} {value!r}: give a whole number of at least {least}")
    return int(value)


# ---------------------------------------------------------------------------------------------- update directions, d_t

Options = dict[str, Any]  # of a parameter group
Moments = dict[str, Any]  # an optimizer's state of one parameter, before the step
Ratios = Sequence[float | None]  # each group's rate per unit of the schedule's; None for one that it does not drive
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
    rate, and for complex or sparse gradients.
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


class Average:
    """w̄_t = β·w̄_{t−1} + (1 − β)·w_t, from w̄_0 = w_0: a running average of the weights, and one copy of them.

    Call update() before every step; MetaMLRSNetLR does so in its step(). `decay` is β.

    As a meta point it stands for the lookahead point: the meta gradient is taken at
    w̄_{t+1} = β·w̄_t + (1 − β)·(w_t − lr·d_t), whose derivative in lr is −(1 − β)·d_t. Noise averages out of w̄, so only
    what lasts counts. hypergradient leaves out the factor 1 − β, since Adam is invariant to it.
    """

    def __init__(self, network: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"average decay {decay}: must be at least 0 and below 1")
        self.network, self.decay = network, decay
        self.parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # 16 bits would round (1 − β)·(w − w̄) away.
        self.weights = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self.parameters
        ]

    @staticmethod
    def decay_for(num_steps: int) -> float:
        """The β whose average reaches back over a twentieth of a run, between 10 and 1,000 steps."""
        return 1 - 1 / min(max(num_steps / 20, 10), 1000)

    @torch.no_grad()
    def update(self) -> None:
        # torch's AveragedModel, which does the same, makes the host wait for the GPU at every update.
        torch._foreach_lerp_(self.weights, self._present(), 1 - self.decay)

    @torch.no_grad()
    def mix_in(self) -> None:
        """w ← β·w̄_t + (1 − β)·w."""
        present = self._present()
        torch._foreach_lerp_(present, self.weights, self.decay)
        _copy_all(present, self.parameters)

    def _present(self) -> list[Tensor]:
        """The parameters in the average's precision: themselves, or copies of those of 16 bits."""
        return [parameter.to(weight.dtype) for parameter, weight in zip(self.parameters, self.weights, strict=True)]

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The network at the average, its present weights included, to evaluate or save it; restored on exit.

        Its BatchNorm statistics are those of the live weights: measure them anew inside the block, as
        torch.optim.swa_utils.update_bn does. They are restored, too.
        """
        with preserved_modules(self.network, self.parameters), preserved([*self.parameters, *self.network.buffers()]):
            self.mix_in()
            torch.clear_autocast_cache()
            yield self.network

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [weight.clone() for weight in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if [weight.shape for weight in self.weights] != [saved.shape for saved in state["weights"]]:
            raise ValueError("the state holds the average of another network, or of other parameters of it")
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)


@contextmanager
def lookahead(
    network: nn.Module, update: Update, lr: float | Tensor, rest: Update | None = None, average: Average | None = None
) -> Iterator[dict[Tensor, Tensor]]:
    """The network at ŵ = w − lr·d inside the block, or at the average that follows from it; yields w by parameter.

    `rest` moves at rate 1. Restores what has moved and the network's buffers bit for bit.
    """
    rest = rest or {}
    averaged = average.parameters if average else []
    with preserved([*update, *rest, *averaged, *network.buffers()]) as weights:
        descend(update, lr)
        descend(rest, 1.0)
        if average:
            average.mix_in()
        torch.clear_autocast_cache()
        yield weights


def hypergradient(
    network: nn.Module,
    optimizer: Optimizer,
    lr: float | Tensor,
    meta_loss: Callable[[], Tensor],
    *,
    average: Average | None = None,
    ratios: Ratios | None = None,
    process_group: Any = None,
) -> Tensor:
    """∂L_meta/∂lr = −⟨∇L_meta(ŵ), d_t⟩ at the lookahead point, or at the average of the weights; a 0-d tensor.

    Call it between the training loss's backward() and optimizer.step(): d_t comes from the gradients in .grad.
    meta_loss returns the 0-d loss of the network on a held-out batch. Parameters, buffers, modes, gradients and the
    optimizer stay as they are; `network` may be a ModuleList of all modules that meta_loss runs. Groups whose ratio is
    None move at their own rates. With several ranks meta_loss is this rank's, and the result is the mean over them.
    Your hooks on parameters act on the meta gradient, too; what modules keep in Python attributes is not restored.

    Raises TypeError for an optimizer that is not affine in lr, and for a meta loss without a graph. RuntimeError where
    no parameter has a gradient, where one that has gets none from meta_loss (it would count as zero), and where
    meta_loss changes parameters itself.
    """
    ratios = lr_ratios(optimizer) if ratios is None else ratios
    update = update_directions(optimizer, ratios)
    own = [group["lr"] if ratio is None else None for group, ratio in zip(optimizer.param_groups, ratios, strict=True)]
    rest = update_directions(optimizer, own)
    driven = [parameter for parameter in update if parameter.requires_grad]
    if not driven:
        raise RuntimeError("no parameter has a gradient: call step() between backward() and optimizer.step()")
    averaged = average.parameters if average else []
    if average and not set(driven) <= set(averaged):
        raise RuntimeError("the average of the weights leaves out parameters that train: make it, or the schedule that "
                           "keeps it, on a network that has them all, and while they require a gradient")
    terms: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter) -> None:
        """Turn a gradient into its inner product with d_t: all gradients at once would be a copy of the network."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        direction = update[parameter](weights[parameter])
        precise = torch.promote_types(direction.dtype, torch.float32)  # 16 bits would round small products to 0
        term = _whole(direction.to(precise).mul_(gradient).sum())
        terms[parameter] = terms[parameter] + term if parameter in terms else term

    with ExitStack() as stack:
        stack.enter_context(preserved_modules(network, [*update, *rest, *averaged]))
        weights = stack.enter_context(lookahead(network, update, lr, rest, average))
        stack.enter_context(without_gradients([*parameters_of(optimizer), *network.parameters()]))
        stack.enter_context(torch.enable_grad())
        try:
            loss = meta_loss()
        except StopIteration:
            raise RuntimeError("meta_loss has no more batches: start its loader over where it ends") from None
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise TypeError(f"meta_loss returned {loss!r}: give the 0-d loss of the network, with its graph")
        for parameter in driven:
            stack.enter_context(parameter.register_post_accumulate_grad_hook(take))
        # Sharded parameters get their gradients from hooks of a whole backward pass only.
        loss.backward(inputs=None if any(map(_is_sharded, driven)) else driven)
        for parameter in driven:
            if parameter.grad is not None:
                take(parameter)
    _check_arrived(driven, terms, network)
    return -all_reduce_mean(torch.stack([terms[parameter] for parameter in driven]).sum(), process_group)


@contextmanager
def preserved_modules(network: nn.Module, moving: Iterable[Tensor]) -> Iterator[None]:
    """Restores which of the network's modules are in training mode, and which tensors their buffers are.

    RuntimeError where the block changes or replaces a parameter that is not one of `moving`, as a forward pass does
    that moves a second encoder.
    """
    modules = [(module, module.training, dict(module._buffers)) for module in network.modules()]
    copied = set(moving)

    def others() -> dict[str, Any]:
        return {name: (id(parameter), _own_part(parameter).data_ptr(), parameter._version)
                for name, parameter in network.named_parameters() if parameter not in copied}

    before = others()
    try:
        yield
    finally:
        for module, is_training, buffers in modules:
            module.training = is_training
            module._buffers.update(buffers)
    after = others()
    changed = [name for name, place in before.items() if after.get(name) != place]
    if changed:
        raise RuntimeError(
            f"the loss changes parameters without a gradient ({', '.join(changed[:5])}): change them in the training "
            "loop only, or make them buffers, which are restored"
        )


def _check_arrived(driven: list[nn.Parameter], terms: dict[nn.Parameter, Tensor], network: nn.Module) -> None:
    missing = [parameter for parameter in driven if parameter not in terms]
    if missing:
        names = {parameter: name for name, parameter in network.named_parameters()}
        shown = ", ".join(names.get(parameter, f"one of shape {tuple(parameter.shape)}") for parameter in missing[:5])
        raise RuntimeError(
            f"{len(missing)} of {len(driven)} parameters with a training gradient got none from meta_loss ({shown}): "
            "it has to use the same network, without checkpointing by use_reentrant=True; or freeze them"
        )


# ---------------------------------------------------------------------------------------------- the schedulers


class MLRSNetLR:
    """Drives an optimizer by learned schedules; call step(loss) between loss.backward() and optimizer.step().

        lr_t = γ · A(ℓ_t; θ) · e(t)

    optimizer: any of torch's kind. Its rates count as ratios only: the group with the largest gets lr_t, and the others
        keep their share of it. A group that is added later gets its rate over the present one as its share, or the full
        rate where it names none.
    nets: a list of MLRSNet, one of them, or the name of a shipped set. Net k of K drives the steps from k·num_steps//K
        on; `changes` names other steps. The LSTM state carries over, and past num_steps the last net goes on.
    num_steps: the planned optimizer steps of the run.
    num_classes: C of the formula of γ; language models: the size of the vocabulary. Not needed where γ is a number.
    perplexity: True for language models. L of the formula is exp(loss) then, and the net reads loss / ln(num_classes).
    gamma: γ, twice the peak rate, as a number; or a function without arguments that returns it, called at the first
        step and never after a state was loaded: lambda: measure_lr_scale(…).gamma; or "paper", lr_scale of the first
        loss and, at every change of nets, of the median of the last 100; "auto" is "paper" for SGD without momentum
        and refuses other optimizers.
    warmup, cooldown: shares of the run over which e(t) rises linearly at the start and falls linearly to 0 at the end.
    groups: the indices of the parameter groups to drive (default: all); the others keep what their owner sets.
    scale_loss: a function that returns L of the formula wherever γ is set, such as the mean loss over the training set
        (perplexity=True: its perplexity) in eval mode, which is what the authors take.
    process_group: the ranks that train together (default: all); a group of one for independent runs.

    A loss that is not finite leaves state and fraction as they are. On an accelerator the host waits only where γ is
    set, if the nets lie there too and the optimizer is fused, and at every step of attach() under a GradScaler. Raises
    ValueError for arguments that describe no run.
    """

    second_order = False  # whether step() differentiates the loss again, so that its graph has to be kept
    counters = ("num_steps", "steps_taken", "phase", "gamma", "ratios")  # what changes from step to step,
    buffers = ("state", "fraction", "recent_losses")  # and its tensors, filled in place

    def __init__(
        self,
        optimizer: Optimizer,
        nets: Sequence[MLRSNet] | MLRSNet | str,
        num_steps: int,
        *,
        num_classes: int | None = None,
        perplexity: bool = False,
        gamma: float | str | Callable[[], float] = "auto",
        warmup: float = 0.0,
        cooldown: float = 0.0,
        groups: Sequence[int] | None = None,
        changes: Sequence[int] | None = None,
        scale_loss: Callable[[], float] | None = None,
        process_group: Any = None,
    ):
        if isinstance(nets, (str, Path, MLRSNet)):
            nets = [nets] if isinstance(nets, MLRSNet) else load_schedules(nets)
        self.optimizer, self.nets = unwrapped(optimizer), list(nets)
        self.num_steps = _check_count("num_steps", num_steps)
        if isinstance(self.optimizer, torch.optim.Rprop):
            raise TypeError(f"Rprop {NOT_AFFINE[torch.optim.Rprop]}, so that a schedule has no effect on it")
        if getattr(self.optimizer.step, "_wrapped_by_lr_sched", False):
            warnings.warn("the optimizer has another scheduler: remove it, or leave out its groups", stacklevel=2)
        _check_nets(self.nets, self.num_steps)
        self.num_classes, self.perplexity, self.scale_loss = num_classes, perplexity, scale_loss
        _check_gamma(gamma, self.optimizer, num_classes, perplexity)
        self.chosen_gamma = gamma
        if not (0 <= warmup <= 1 and 0 <= cooldown <= 1 and warmup + cooldown <= 1):
            raise ValueError(f"warmup {warmup} and cooldown {cooldown}: give shares of the run, together at most 1")
        self.warmup, self.cooldown = warmup, cooldown
        number = len(self.nets)
        even = [place * self.num_steps // number for place in range(1, number)]
        self.changes = even if changes is None else list(changes)
        if len(self.changes) != number - 1 or [0, *self.changes, num_steps] != sorted([0, *self.changes, num_steps]):
            raise ValueError(f"changes {self.changes}: give the {number - 1} steps at which the nets change, in order")
        self.groups, self.process_group = groups, process_group
        self.ratios = lr_ratios(self.optimizer, groups)
        if groups is not None:
            _unshare_rates(self.optimizer)
        self.steps_taken, self.phase, self.gamma = 0, -1, math.nan  # γ is set at the first step
        self.state = self.nets[0].initial_state()
        self.fraction = self.state.new_full((), math.nan)
        self.recent_losses = self.state.new_full((100,), math.nan)
        self.lr_set: list[float | Tensor] = []
        self.level: float | None = None  # as read by prepare()
        self.handle: RemovableHandle | None = None  # of attach()
        self.watch = _LoopWatch(self.optimizer)

    def prepare(self) -> None:
        """Read scale_loss now, where the coming step will set γ from it: before the forward pass, as the authors do.

        Optional: step(loss) reads it otherwise, when BatchNorm's statistics have seen one batch more.
        """
        if self.scale_loss and isinstance(self.chosen_gamma, str) and self._phase_now() != self.phase:
            self.level = self.scale_loss()

    @property
    def net(self) -> MLRSNet:
        """The net that drives the present step."""
        return self.nets[max(self.phase, 0)]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Set the rate of the step about to be taken from its training loss, a 0-d tensor or a number.

        Under accumulation the mean over the micro-batches. With several ranks the loss is this rank's; the schedule
        reads the mean over the ranks. Raises TypeError without a loss, ValueError for a loss that is not 0-d or that
        the formula of γ cannot take, RuntimeError beside attach() and when something else has set the rate.
        """
        if self._is_attached():
            raise RuntimeError("attach() makes optimizer.step() call step(loss) already; leave out one of them")
        self._step(loss)

    def _step(self, loss: float | Tensor | None) -> None:
        value = self._mean_loss(loss)
        self._check_rates()
        problem = self.watch.problem(self)
        if problem:
            warnings.warn(problem, stacklevel=3)
        self.recent_losses[self.steps_taken % len(self.recent_losses)] = torch.where(value.isfinite(), value, math.nan)
        if self._start_phase(value):
            self._learn(value)
            self._advance(value)
        self.steps_taken += 1
        self.watch.versions = self.watch.present_versions()

    @torch.no_grad()
    def _advance(self, loss: Tensor) -> None:
        """One step of the LSTM, and the rate; a loss that is not finite changes neither state nor fraction."""
        is_finite = loss.isfinite()
        fraction, state = self.net(self._input(loss), self.state)
        self.fraction.copy_(torch.where(is_finite | self.fraction.isnan(), fraction, self.fraction))
        self.state.copy_(torch.where(is_finite, state, self.state))
        set_lr(self.optimizer, self.gamma * self._envelope() * on_host(self.fraction), self.ratios)
        self.lr_set = self.get_last_lr()

    def _envelope(self) -> float:
        """e(t) of the step about to be taken."""
        done = self.steps_taken / self.num_steps
        num_warmup = round(self.warmup * self.num_steps)
        rise = min(1.0, (self.steps_taken + 1) / (num_warmup + 1))  # never 0, which would waste a step
        return min(rise, max(0.0, (1 - done) / self.cooldown)) if self.cooldown else rise

    def _learn(self, loss: Tensor) -> None:
        """Where MetaMLRSNetLR moves θ, before the rate is set."""

    def attach(self, next_loss: Callable[[], float | Tensor | None]) -> RemovableHandle:
        """Make every optimizer.step() call step(next_loss()) right before its update; the handle's remove() undoes it.

        For trainers that give no access between backward() and the update, and for GradScaler: gradients are unscaled
        and clipped by then, and a step that it skips does not advance the schedule. A next_loss() of None keeps the
        rate. An optimizer that evaluates its closure several times gets the rate after the first. Raises RuntimeError
        while it is attached, TypeError for LBFGS, which reads its rate before the closure.
        """
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS reads its rate before its closure: call step(loss) before optimizer.step(closure)")
        if self._is_attached():
            raise RuntimeError("the schedule is attached already: remove() the handle of the first attach()")

        def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            is_first = True

            def closure_then_rate() -> Any:
                nonlocal is_first
                result = closure() if closure else None
                # GradScaler leaves it to a fused optimizer to skip a step.
                if is_first and not getattr(optimizer, "found_inf", 0):
                    is_first = False
                    loss = next_loss()
                    if loss is not None:
                        self._step(loss)
                return result

            if closure:
                return args[:1], {**kwargs, "closure": closure_then_rate}
            closure_then_rate()
            return None

        self.handle = self.optimizer.register_step_pre_hook(before_step)
        return self.handle

    def _is_attached(self) -> bool:
        return self.handle is not None and _is_registered(self.handle)

    def __getstate__(self) -> dict[str, Any]:
        if self._is_attached():
            raise TypeError("an attached schedule cannot be copied, since torch copies optimizers without their hooks: "
                            "remove() the handle, copy, and attach() both")
        return vars(self)

    def get_last_lr(self) -> list[float | Tensor]:
        """Copies of the parameter groups' rates, as last set; for a rate kept in a tensor, 0-d tensors."""
        return copied_rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, beside the optimizer's own state_dict."""
        state = {name: copy.copy(getattr(self, name)) for name in self.counters}
        state |= {name: getattr(self, name).clone() for name in self.buffers}
        return state | {"nets": [copy.deepcopy(net.state_dict()) for net in self.nets]}

    def load_state_dict(self, state: dict[str, Any], rescale: bool = False) -> None:
        """Continue from state_dict(); its γ replaces a number, with a warning where they differ.

        Raises ValueError for a state of another schedule, and of a run of another length: with `rescale` it continues
        at the same share of this run. To keep the number of steps instead, set `steps_taken` afterwards.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            different = ", ".join(sorted(state.keys() ^ expected))
            raise ValueError(f"not the state of a {type(self).__name__}: missing or unknown {different}")
        if len(state["nets"]) != len(self.nets):
            raise ValueError(f"the state is of a schedule of {len(state['nets'])} nets, this one has {len(self.nets)}")
        planned, share = self.num_steps, self.num_steps / state["num_steps"]
        if share != 1 and not rescale:
            raise ValueError(
                f"the state is of a run of {state['num_steps']} steps, this one plans {planned}: give num_steps="
                f"{state['num_steps']}, or load_state_dict(state, rescale=True) to keep the share of the run"
            )
        driven, theirs = _driven(self.ratios), _driven(state["ratios"])
        if len(self.ratios) == len(state["ratios"]) and driven != theirs:
            raise ValueError(f"the state is of a schedule of the parameter groups {theirs}, this one has {driven}")
        for net, weights in zip(self.nets, state["nets"], strict=True):
            try:
                net.load_state_dict(weights)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"the state holds nets of another layout ({' '.join(str(error).split())})") from None
        for name in self.counters:
            setattr(self, name, copy.copy(state[name]))
        for name in self.buffers:
            getattr(self, name).copy_(state[name])
        self.num_steps, self.steps_taken = planned, round(state["steps_taken"] * share)
        self.lr_set = []
        if _is_scale(self.chosen_gamma) and self.phase >= 0 and self.chosen_gamma != self.gamma:
            number = f"{self.gamma:g}, not {self.chosen_gamma:g}"
            warnings.warn(f"the run continues with its own gamma {number}", stacklevel=2)

    def _check_rates(self) -> None:
        """Settle the ratios of the groups. RuntimeError when a rate is not the one that the last step() set.

        Looks at nothing on an accelerator after the first step, unless a group is new.
        """
        groups = self.optimizer.param_groups
        if not self.steps_taken:
            self.ratios = lr_ratios(self.optimizer, self.groups)
        if len(groups) < len(self.ratios):
            raise RuntimeError(f"the optimizer has {len(groups)} parameter groups, it had {len(self.ratios)}")
        for group, lr, ratio in zip(groups, self.lr_set, self.ratios, strict=False):
            lr = on_host(lr) if isinstance(lr, Tensor) else lr
            if ratio is None or isinstance(lr, Tensor) or group["lr"] == lr or math.isnan(lr):
                continue
            raise RuntimeError(
                f"the learning rate is {float(group['lr']):g}, but this schedule had set {lr:g}; "
                "remove the other scheduler that changes it, or leave its group out of `groups`; where the optimizer "
                "went back to an earlier state, load the schedule's state_dict(), too"
            )
        if len(groups) > len(self.ratios):
            _unshare_rates(self.optimizer)
        for group in groups[len(self.ratios) :]:  # added since the last step
            present = [float(old["lr"]) / ratio for old, ratio in zip(groups, self.ratios, strict=False) if ratio]
            is_driven = self.groups is None and present and present[0] > 0
            is_default = float(group["lr"]) == self.optimizer.defaults.get("lr")  # so that it has named no rate
            self.ratios.append((1.0 if is_default else float(group["lr"]) / present[0]) if is_driven else None)

    def _mean_loss(self, loss: float | Tensor | None) -> Tensor:
        """The loss as a 0-d tensor on the state's device, the mean over the ranks."""
        if loss is None:
            raise TypeError("step() needs the training loss: call step(loss) after backward(), before optimizer.step()")
        value = torch.as_tensor(loss).detach()
        if value.dim():
            raise ValueError(f"the loss has shape {tuple(value.shape)}: give the mean over the batch, a 0-d tensor")
        if not isinstance(loss, Tensor) and _num_ranks(self.process_group) > 1:
            value = value.to(self.optimizer.param_groups[0]["params"][0].device)  # where the ranks can reduce it
        return all_reduce_mean(value, self.process_group).to(self.state.device)

    def _over_ranks(self, number: float) -> float:
        """The mean over the ranks of a number that each has found by itself."""
        if _num_ranks(self.process_group) == 1:
            return number
        device = self.optimizer.param_groups[0]["params"][0].device  # where the ranks can reduce it
        return float(all_reduce_mean(torch.tensor(number, dtype=torch.float64, device=device), self.process_group))

    def _input(self, loss: Tensor) -> Tensor:
        """What the LSTM reads: the loss, 0 where it is not finite."""
        loss = torch.where(loss.isfinite(), loss, 0.0)
        return loss / math.log(self.num_classes) if self.perplexity else loss  # type: ignore[arg-type]

    def _phase_now(self) -> int:
        return bisect.bisect_right(self.changes, self.steps_taken)

    def _start_phase(self, loss: Tensor) -> bool:
        """Change the net, and set γ, where a phase begins. False while no finite loss has set γ."""
        phase = self._phase_now()
        if phase == self.phase:
            return True
        if isinstance(self.chosen_gamma, str):
            level = self._level(loss)
            if math.isnan(level):
                return self.phase >= 0  # at a change, the next step tries again
            self.gamma = lr_scale(level, self.num_classes)  # type: ignore[arg-type]
        elif self.phase < 0:
            gamma = self.chosen_gamma() if callable(self.chosen_gamma) else self.chosen_gamma
            if not _is_scale(gamma):
                raise ValueError(f"the function given as gamma returned {gamma!r}; it has to return a positive number")
            self.gamma = self._over_ranks(float(gamma))
        self.phase = phase
        return True

    def _level(self, loss: Tensor) -> float:
        """L of the formula; NaN where no finite loss is known."""
        if self.scale_loss:
            level, self.level = self.scale_loss() if self.level is None else self.level, None
            return self._over_ranks(float(level))
        # Deviation: the authors pass over the whole training set for L; scale_loss does, the losses at hand serve here.
        level = float(loss if self.phase < 0 else self.recent_losses.nanmedian())
        if not math.isfinite(level):
            return math.nan
        if level > LARGEST_LOSS:
            raise ScaleError(f"a loss of {level:g} is no cross-entropy, as the formula of γ needs; {_GIVE_A_NUMBER}")
        return math.exp(level) if self.perplexity else level


class MetaMLRSNetLR(MLRSNetLR):
    """An MLR-SNet that learns while it drives: every t_val-th step first moves θ by Adam, then sets the rate.

    network: what meta_loss runs, whose buffers are restored; a ModuleList where that is more than one module.
    meta_loss: returns the 0-d loss of the network on the next held-out batch, with its graph.
    t_val: steps between updates of θ (default: about 80 updates in the run; the paper's 300 for 200 epochs).
    lr, weight_decay: Adam's on θ.
    meta_point: where the meta gradient is taken, "lookahead" (one step ahead, the paper) or "average" (at the running
        average of the weights, which the schedule keeps: see averaged_weights). average_decay is its β, by default
        for a window of a twentieth of the run.

    The other arguments are MLRSNetLR's. Raises TypeError for an optimizer whose update is not affine in its learning
    rate, and for sparse gradients. step() raises RuntimeError for gradients that are still scaled: under GradScaler
    call scaler.unscale_(optimizer) before it, or use attach(). A meta loss that is not finite leaves the net as it is,
    with a warning; on an accelerator only the last update warns, so that the host need not wait.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        net: MLRSNet,
        network: nn.Module,
        meta_loss: Callable[[], Tensor],
        num_steps: int,
        *,
        t_val: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        meta_point: str = "lookahead",
        average_decay: float | None = None,
        **options: Any,
    ):
        if not isinstance(net, MLRSNet):
            raise TypeError(f"net {net!r}: give one MLRSNet, the net that learns")
        super().__init__(optimizer, net, num_steps, **options)
        check_affine(self.optimizer)
        if not set(parameters_of(self.optimizer)) & set(network.parameters()):
            raise ValueError("network shares no parameter with the optimizer: give the one that trains, not a copy")
        if any(getattr(module, "sparse", False) for module in network.modules()):
            raise TypeError("a module has sparse gradients, which are not supported; build it with sparse=False")
        self.t_val = max(1, num_steps // 80) if t_val is None else _check_count("t_val", t_val)
        if self.t_val > num_steps:
            advice = f"lower t_val; {max(1, num_steps // 80)} makes about 80 updates"
            raise ValueError(f"t_val {t_val}, num_steps {num_steps}: nothing would be learned; {advice}")
        if meta_point not in ("lookahead", "average"):
            raise ValueError(f"meta_point {meta_point!r}: choose 'lookahead' or 'average'")
        if meta_point == "lookahead" and average_decay is not None:
            raise ValueError("average_decay belongs to meta_point='average'; leave it out")
        self.network, self.meta_loss = network, meta_loss
        self.average: Average | None = None
        if meta_point == "average":
            self.average = Average(network, Average.decay_for(num_steps) if average_decay is None else average_decay)
        # Fused, so that an update that is not finite is skipped without waiting for an accelerator.
        self.adam = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=self.state.device)
        self.is_checked = False  # whether _check_reach has passed

    def averaged_weights(self) -> Any:
        """The network at the running average of its weights inside a with-block; see Average.averaged_weights."""
        if not self.average:
            raise RuntimeError("this schedule keeps no average of the weights; build it with meta_point='average'")
        return self.average.averaged_weights()

    def _learn(self, loss: Tensor) -> None:
        """θ ← Adam(θ, ∂L_meta/∂lr · γ · e · ∂A/∂θ), with the LSTM state a constant."""
        if self.average:
            self.average.update()
        if (self.steps_taken + 1) % self.t_val:
            return
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise RuntimeError("the gradients are still scaled: call scaler.unscale_(optimizer) before scaler.step()")
        with torch.enable_grad():
            fraction, _ = self.net(self._input(loss), self.state)
            scale = self.gamma * self._envelope()
            lr = scale * on_host(fraction)
            if not self.is_checked:
                self.is_checked = _check_reach(self.optimizer, self.ratios, lr)
            slope = hypergradient(
                self.network, self.optimizer, lr, self.meta_loss, average=self.average, ratios=self.ratios,
                process_group=self.process_group,
            ).to(fraction)
            self.adam.zero_grad()
            (slope * scale * fraction).backward()
        is_skipped = ~(slope.isfinite() & loss.isfinite())
        self.adam.found_inf = self.found_inf.copy_(is_skipped)  # type: ignore[attr-defined]
        self.adam.step()
        shown, is_last = on_host(is_skipped), self.steps_taken + self.t_val >= self.num_steps
        if (is_last or isinstance(shown, float)) and shown:
            warnings.warn("the training loss, the meta loss or its gradient is not finite: this update of the net is "
                          "left out", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        averaged = {"average": self.average.state_dict()} if self.average else {}
        return super().state_dict() | {"adam": copy.deepcopy(self.adam.state_dict())} | averaged

    def load_state_dict(self, state: dict[str, Any], rescale: bool = False) -> None:
        super().load_state_dict(state, rescale)
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))  # which keeps the tensors that it is given
        if self.average:
            self.average.load_state_dict(state["average"])


# ---------------------------------------------------------------------------------------------- the training loop


class Task(Protocol):
    """What the loop needs of a problem; data/ has the implementations."""

    num_classes: int | None  # language models: the size of the vocabulary; None for regression
    perplexity: bool  # whether the problem is measured by perplexity
    steps_per_epoch: int
    clip: float | None  # the largest norm of the gradient

    def train_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of batches from global step `start` on; batch.size is the number of targets in it."""

    def meta_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of meta batches, from number `start` on."""

    def micro_batches(self, batch: Any) -> list[Any]:
        """The parts of a training batch whose gradients are accumulated, as many on every rank."""

    def loss(self, network: nn.Module, batch: Any, hidden: Any) -> tuple[Tensor, Tensor, Any]:
        """The 0-d loss, the batch's accuracy in %, and the hidden state for the next batch (None for images).

        Those of micro-batches add up to those of their batch.

        With several ranks a batch is this rank's shard, and the means over the ranks are those of the whole batch.
        """

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """The test metrics by name."""

    def validate(self, network: nn.Module) -> float:
        """The mean loss over the meta data."""


class Schedule(Protocol):
    """Sets an optimizer's rates: MLRSNetLR, MetaMLRSNetLR and every baseline."""

    second_order: bool  # whether step() differentiates the loss again, so that its graph has to be kept

    def prepare(self) -> None: ...
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
        schedule.prepare()
        optimizer.zero_grad()
        losses, accuracies = [], []
        for part in task.micro_batches(batch):
            loss, accuracy, hidden = task.loss(network, part, hidden)
            loss.backward(retain_graph=schedule.second_order)
            losses.append(loss)
            accuracies.append(accuracy)
        loss, accuracy = reduce(torch.add, losses), reduce(torch.add, accuracies)  # ℓ_t
        if task.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), task.clip)
        schedule.step(loss)
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        yield Step(number + 1, all_reduce_mean(loss.detach()), all_reduce_mean(accuracy), lr, batch.size, hidden)


# ---------------------------------------------------------------------------------------------- the schedulers' checks


def _check_nets(nets: list[MLRSNet], num_steps: int) -> None:
    if not nets:
        raise ValueError("no nets: give at least one MLR-SNet")
    if not all(isinstance(net, MLRSNet) for net in nets):
        kinds = ", ".join(sorted({type(net).__name__ for net in nets}))
        raise TypeError(f"nets hold {kinds}: give MLRSNets; load_schedules([\"schedule.pth\"]) reads them")
    if len({(net.hidden_size, net.num_layers) for net in nets}) > 1:
        sizes = ", ".join(f"{net.hidden_size} x {net.num_layers}" for net in nets)
        raise ValueError(f"nets of different sizes ({sizes}) cannot share a run, since the LSTM state carries over")
    if num_steps < len(nets):
        raise ValueError(f"num_steps {num_steps}: fewer than the {len(nets)} nets that share the run")


def _check_gamma(gamma: Any, optimizer: Optimizer, num_classes: int | None, perplexity: bool) -> None:
    if perplexity or num_classes is not None:
        _check_count("num_classes", num_classes, least=2 if perplexity else 1)
    if callable(gamma) or _is_scale(gamma):
        return
    if gamma not in ("auto", "paper"):
        raise ValueError(f"gamma {gamma!r}: give a positive number, a function that returns one, 'auto' or 'paper'")
    if gamma == "auto" and not has_paper_scale(optimizer):
        raise ValueError(
            "gamma='auto' is the paper's formula, made for SGD without momentum: for other optimizers give "
            "gamma=lambda: measure_lr_scale(network, optimizer, next_loss, num_steps).gamma with "
            "mlr_snet_scale.measure_lr_scale, or a number, twice the peak rate that you would use"
        )
    if num_classes is None:
        raise ValueError(f"num_classes is missing, which gamma={gamma!r} needs; without classes {_GIVE_A_NUMBER}")


class _LoopWatch:
    """Tells where the first two steps of a schedule show that the loop is out of order, where its plan is over, and
    where the optimizer no longer steps.
    """

    LONG_IDLE = 50  # calls without a step of the optimizer; GradScaler skips fewer in a row

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.num_checks = 0
        self.num_updates = 0  # that the optimizer has made since the last check
        self.had_state = False  # whether the optimizer had a state at the first check
        self.hook = optimizer.register_step_post_hook(self._count_update)
        self.num_idle = 0  # calls since it has made a step
        self.versions: list[int] = []  # as of present_versions, after the last call

    def _count_update(self, *_: Any) -> None:
        self.num_updates += 1

    def present_versions(self) -> list[int]:
        """How often the optimizer's memory of some weights, or else these, have been written; looks at no value."""
        if self.optimizer.param_groups[0].get("capturable"):  # a captured step does not count
            return []
        weights = [weight for weight in parameters_of(self.optimizer) if weight.grad is not None][:8]
        memory = [value for weight in weights for value in self.optimizer.state.get(weight, {}).values()]
        return [tensor._version for tensor in memory if isinstance(tensor, Tensor)] or [w._version for w in weights]

    def problem(self, schedule: MLRSNetLR) -> str:
        """What is wrong before this step of the schedule; nothing where it seems right."""
        problem = ""
        if self.num_checks < 2 and _is_registered(self.hook):  # copies of an optimizer have no hooks
            problem = self._at_second_step(schedule) if self.num_checks else self._at_first_step(schedule)
            self.num_checks, self.num_updates = self.num_checks + 1, 0
        versions = self.present_versions()
        self.num_idle = self.num_idle + 1 if versions and versions == self.versions else 0
        if self.num_idle == self.LONG_IDLE and not problem:
            problem = (f"the optimizer has made no step for {self.LONG_IDLE} calls of step(loss): if another one "
                       "trains now, make a new schedule for it")
        if schedule.steps_taken == schedule.num_steps and not problem:
            end = "the cool-down ends at rate 0" if schedule.cooldown else "the last net goes on"
            steps = f"{schedule.num_steps} optimizer steps (not epochs or micro-batches)"
            problem = f"the planned {steps} are over: {end}"
        return problem

    def _at_first_step(self, schedule: MLRSNetLR) -> str:
        self.had_state = self._has_state()
        if self.num_updates and not schedule.steps_taken and not schedule.handle:  # which skips a step of GradScaler
            return ("optimizer.step() came before the schedule's first step(loss), which sets the rate of the step "
                    "after it: call step(loss) between backward() and optimizer.step()")
        if all(parameter.grad is None for parameter in parameters_of(self.optimizer)):
            return ("no parameter of the optimizer has a gradient: call step(loss) after backward(), and give the "
                    "schedule the optimizer of the network that trains")
        states = [state for state in self.optimizer.state.values() if isinstance(state, dict)]
        steps = [state.get("step", 1) for state in states]  # Adagrad's begins with 0
        if schedule.phase < 0 and not schedule.steps_taken and any(step > 0 for step in steps):
            return ("the optimizer has trained before, and this schedule starts at its first step: in a resumed run "
                    "load the schedule's state_dict(), too")
        return ""

    def _at_second_step(self, schedule: MLRSNetLR) -> str:
        self.hook.remove()
        if self.num_updates != 1 and not (schedule.handle and self.num_updates):  # GradScaler skips steps
            return (f"{self.num_updates} optimizer steps lie between two calls of step(loss): call it once before each "
                    "of them, but not before one that GradScaler skips, and under accumulation with the mean over the "
                    "micro-batches")
        if schedule.steps_taken > 1 and self._has_state() and not self.had_state:
            return (f"the optimizer began anew, and this schedule went on at step {schedule.steps_taken}: in a resumed "
                    "run load the optimizer's state_dict(), too")
        return ""

    def _has_state(self) -> bool:
        return any(self.optimizer.state.values())


def _check_reach(optimizer: Optimizer, ratios: Ratios, lr: float | Tensor) -> bool:
    """Whether the first lookahead is finite. RuntimeError where it is as long as with gradients of a GradScaler."""
    update = update_directions(optimizer, ratios)
    if not update:
        return False
    weights = torch.stack([_whole(parameter.detach().norm()) for parameter in update]).norm()
    lengths = [_whole(direction(parameter).norm()) for parameter, direction in update.items()]
    moved = float(lr) * torch.stack(lengths).norm()
    if not moved.isfinite():
        return False
    if moved > 10 * weights.clamp(min=1) or _has_scaled_gradients(optimizer):
        raise RuntimeError(
            f"the next step moves weights of norm {float(weights):.3g} by {float(moved):.3g}: under GradScaler "
            "call scaler.unscale_(optimizer) before step(loss), or use attach(); else lower gamma, and scale the "
            "targets of a regression to about 1"
        )
    return True


def _has_scaled_gradients(optimizer: Optimizer) -> bool:
    """Whether the gradients are a hundred times as long as the averages that SGD or Adam keeps of them."""
    lengths = []
    for group in optimizer.param_groups if type(optimizer) in DIRECTIONS else ():
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            average, weight = state.get("momentum_buffer"), 1.0
            if "exp_avg" in state:
                average, weight = state["exp_avg"], 1 - group["betas"][0] ** state["step"]
            if average is not None and parameter.grad is not None:
                lengths.append(torch.stack([_whole(parameter.grad.norm()), _whole(average.norm()) / weight]))
    gradients, averages = torch.stack(lengths).norm(dim=0).tolist() if lengths else (0.0, 0.0)
    return 0 < 100 * averages < gradients


# ---------------------------------------------------------------------------------------------- rates and tensors


def _num_ranks(process_group: Any = None) -> int:
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(tensor: Tensor, process_group: Any = None) -> Tensor:
    """The mean over the ranks, bit-identical on each; the tensor itself in a single process."""
    if _num_ranks(process_group) == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=process_group)
    return total / _num_ranks(process_group)


def on_host(value: Tensor) -> float | Tensor:
    """A 0-d tensor as a float, unless that would make the host wait for an accelerator."""
    value = value.detach()
    return float(value) if value.device.type == "cpu" else value


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


def _driven(ratios: Ratios) -> list[int]:
    """The indices of the groups that have a ratio."""
    return [index for index, ratio in enumerate(ratios) if ratio is not None]


def _unshare_rates(optimizer: Optimizer) -> None:
    """Give each group its own rate tensor, where torch has shared one among several groups."""
    seen: set[int] = set()
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


def copied_rates(optimizer: Optimizer) -> list[float | Tensor]:
    """The learning rate of each parameter group; a tensor is copied, as torch's schedulers do."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that Accelerate or Lightning has wrapped, or itself."""
    while type(optimizer).__module__.split(".")[0] in ("accelerate", "lightning", "pytorch_lightning"):
        optimizer = optimizer.optimizer
    return optimizer


def bare_step(optimizer: Optimizer) -> None:
    """optimizer.step() without the hooks that are registered on it; autocast forgets the weights that it has cast."""
    attributes = vars(optimizer)
    hooks = {name: attributes[name] for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    attributes.update((name, OrderedDict()) for name in hooks)
    try:
        type(optimizer).step(optimizer)  # not what a scheduler has put in its place
    finally:
        attributes.update(hooks)
    torch.clear_autocast_cache()


@contextmanager
def preserved(tensors: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Restores the tensors bit for bit on exit; yields their copies by tensor.

    Autocast forgets the weights that it has cast, as it has to wherever they have moved: where a caller's whole step
    lies in one autocast region, the network would run with old ones.
    """
    copies = {tensor: torch.empty_like(tensor, requires_grad=False) for tensor in tensors if not _is_expanded(tensor)}
    _copy_all(copies.keys(), copies.values())
    try:
        yield copies
    finally:
        _copy_all(copies.values(), copies.keys())
        torch.clear_autocast_cache()


@torch.no_grad()
def _copy_all(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    """Each source into its target: one call per dtype and device, since an accelerator's host pays per call."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        ones, others = kinds.setdefault((source.dtype, source.device), ([], []))
        ones.append(_own_part(source))
        others.append(_own_part(target))
    for ones, others in kinds.values():
        torch._foreach_copy_(others, ones)


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sets every .grad to None inside the block, and restores it afterwards.

    RuntimeError where one is a view, as DDP's buckets make them, which a backward pass through DDP would overwrite.
    """
    gradients = {parameter: parameter.grad for parameter in parameters}
    if any(gradient is not None and gradient._is_view() for gradient in gradients.values()):
        raise RuntimeError("gradients are views of DDP's buckets: build DDP without gradient_as_bucket_view=True")
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def preserved_optimizer(optimizer: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Restores weights, gradients, optimizer state, options and random generators bit for bit; yields copies by tensor.

    Also restores the optimizer's attributes that are numbers, tensors or optimizers, such as the one that it wraps.
    Inside, a fused optimizer does not divide its gradients by the scale of a GradScaler that is stepping it.
    """
    scaling: Options = {name: vars(optimizer).pop(name) for name in ("grad_scale", "found_inf")
                        if name in vars(optimizer)}
    optimizers = [optimizer]
    for one in optimizers:
        optimizers += [own for own in vars(one).values() if isinstance(own, Optimizer) and own not in optimizers]
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    # One that was frozen and keeps its gradient still moves.
    weights = [weight for weight in parameters_of(optimizer) if weight.requires_grad or weight.grad is not None]
    attributes = [
        {name: value for name, value in vars(one).items() if isinstance(value, (int, float, Tensor))}
        for one in optimizers
    ]
    entries = [entry for one in optimizers for entry in (*one.state.values(), *one.param_groups)
               if isinstance(entry, dict)]
    tensors = [value for entry in (*entries, *attributes) for value in entry.values() if isinstance(value, Tensor)]
    before = [{name: value if _stays(value) else copy.deepcopy(value) for name, value in entry.items()}
              for entry in entries]
    states = [dict(one.state) for one in optimizers]
    devices = {weight.device for weight in weights if weight.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), preserved([*weights, *gradients, *tensors]) as copies:
        try:
            yield copies
        finally:
            for one, state, numbers in zip(optimizers, states, attributes, strict=True):
                one.state.clear()
                one.state.update(state)
                vars(one).update(numbers)
            for entry, values in zip(entries, before, strict=True):
                for name in entry.keys() - values.keys():
                    del entry[name]
                entry.update(values)
            vars(optimizer).update(scaling)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _stays(value: Any) -> bool:
    """Whether the object itself is kept, as a tensor is, whose numbers are restored, and a group's parameters."""
    if isinstance(value, list):
        return any(isinstance(item, nn.Parameter) for item in value)
    return not isinstance(value, (dict, set, tuple))


def _is_registered(handle: RemovableHandle) -> bool:
    return handle.id in (handle.hooks_dict_ref() or {})


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share their memory, so that torch refuses to write the tensor."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, strides, strict=False))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, as FSDP2 makes


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> Tensor:
    """A 0-d result over all shards."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]

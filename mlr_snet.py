"""MLR-SNet: a small LSTM reads the training loss of every step and returns that step's learning rate.

    lr_t = γ · A(ℓ_t; θ) · e(t)                     MLRSNet (A), lr_scale (γ), MLRSNetLR (e, warm-up and cool-down)
    w_{t+1} = w_t − lr_t · d_t                      mlr_snet_optim/directions.py (d_t), train (the loop)
    ŵ(θ) = w_t − lr_t · d_t                         lookahead
    ∂L_meta(ŵ)/∂lr = −⟨∇L_meta(ŵ), d_t⟩             hypergradient
    θ_{t+1} = Adam(θ_t, ∂L_meta/∂lr · ∂lr/∂θ)       MetaMLRSNetLR

Symbols: ℓ_t mini-batch training loss; w weights of the task network; θ weights of MLR-SNet; γ the LR scale (gamma);
A in (0, 1) the fraction; d_t the base optimizer's update per unit of learning rate. d_t does not depend on θ, so the
hypergradient is exact without a second-order graph.

To use a schedule in your own loop, see MLRSNetLR; to learn one, see MetaMLRSNetLR. Needs torch only: copy this file and
the folder mlr_snet_optim. Under torch.distributed every rank calls the same methods with its own loss.

Source: Shu, Zhu, Zhao, Meng, Xu, "MLR-SNet: Transferable LR Schedules for Heterogeneous Tasks", TPAMI 2022.
"""

import bisect
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mlr_snet_optim.average import Average
from mlr_snet_optim.directions import NOT_AFFINE, Update, check_affine, descend, update_directions
from mlr_snet_optim.loop import LoopWatch, before_update, check_arrived, check_state, is_registered, unwrapped
from mlr_snet_optim.ranks import all_reduce_mean, check_count, mean_over_ranks, num_ranks, on_host
from mlr_snet_optim.rates import Ratios, copied_rates, driven_groups, lr_ratios, set_lr, settled_ratios, unshare_rates
from mlr_snet_optim.restoring import is_sharded, parameters_of, preserved, preserved_modules, whole, without_gradients

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
    except Exception as error:  # a damaged file fails in many ways
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
    """A loss from which the formula for γ gives no scale."""


def lr_scale(loss: float, num_classes: int) -> float:
    """γ, the largest rate a schedule may give: √L · max(|ln(L·C)|, 1) / C^¼ / 4.

    loss is the mean training loss L (language models: the perplexity), num_classes is C (the size of the vocabulary).
    Raises ScaleError where L is not positive and finite, ValueError where C is not a whole number of at least 1.
    Source: the authors' meta_train.py and meta_test.py.
    """
    check_count("num_classes", num_classes)
    if not (math.isfinite(loss) and loss > 0):
        raise ScaleError(f"the formula for the LR scale needs a positive and finite loss, got {loss}; {_GIVE_A_NUMBER}")
    # Deviation: the floor of 1. Without it γ crosses zero at L = 1/C and training stops there.
    return math.sqrt(loss) * max(abs(math.log(loss * num_classes)), 1.0) / num_classes**0.25 / 4


_GIVE_A_NUMBER = "give gamma as a number, twice the peak rate that you would use"
LARGEST_LOSS = 100.0  # nats; no cross-entropy of a network that can still learn is above


def has_paper_scale(optimizer: Optimizer) -> bool:
    """Whether lr_scale was made for the optimizer: SGD without momentum."""
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)


def _is_scale(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


# ---------------------------------------------------------------------------------------------- the hypergradient


@contextmanager
def lookahead(
    network: nn.Module, update: Update, lr: float | Tensor, rest: Update | None = None, average: Average | None = None
) -> Iterator[dict[Tensor, Tensor]]:
    """The network at ŵ = w − lr·d inside the block, or at the average that follows from it; yields w by parameter.

    `rest` moves at rate 1. Restores what has moved, and the network's buffers and modes, bit for bit.
    """
    rest = rest or {}
    moving = [*update, *rest, *(average.parameters if average else [])]
    with preserved_modules(network, moving), preserved([*moving, *network.buffers()]) as weights:
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
    if average:
        average.check_holds(driven)
    terms: dict[nn.Parameter, Tensor] = {}

    def take(parameter: nn.Parameter) -> None:
        """Turn a gradient into its inner product with d_t: all gradients at once would be a copy of the network."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        direction = update[parameter](weights[parameter])
        precise = torch.promote_types(direction.dtype, torch.float32)  # 16 bits would round small products to 0
        term = whole(direction.to(precise).mul_(gradient).sum())
        terms[parameter] = terms[parameter] + term if parameter in terms else term

    ahead = lookahead(network, update, lr, rest, average)
    parameters = [*parameters_of(optimizer), *network.parameters()]
    with ahead as weights, without_gradients(parameters), torch.enable_grad(), ExitStack() as hooks:
        try:
            loss = meta_loss()
        except StopIteration:
            raise RuntimeError("meta_loss has no more batches: start its loader over where it ends") from None
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise TypeError(f"meta_loss returned {loss!r}: give the 0-d loss of the network, with its graph")
        for parameter in driven:
            hooks.enter_context(parameter.register_post_accumulate_grad_hook(take))
        # Sharded parameters get their gradients from hooks of a whole backward pass only.
        loss.backward(inputs=None if any(map(is_sharded, driven)) else driven)
        for parameter in driven:
            if parameter.grad is not None:
                take(parameter)
    check_arrived(driven, terms, network)
    return -all_reduce_mean(torch.stack([terms[parameter] for parameter in driven]).sum(), process_group)


# ---------------------------------------------------------------------------------------------- the schedulers


class MLRSNetLR:
    """Drives an optimizer by learned schedules; call step(loss) between loss.backward() and optimizer.step().

        lr_t = γ · A(ℓ_t; θ) · e(t)

    optimizer: any of torch's kind. Its rates count as ratios only: the group with the largest gets lr_t, and the others
        keep their share of it. A group that is added later has its rate over the present one as its share, or 1 where
        it sets none.
    nets: a list of MLRSNet, one of them, or the name of a shipped set. Net k of K drives the steps from k·num_steps//K
        on; `changes` names other steps. The LSTM state carries over, and past num_steps the last net goes on.
    num_steps: the planned optimizer steps of the run.
    num_classes: C of the formula for γ; language models: the size of the vocabulary. Not needed where γ is a number.
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

    A loss that is not finite leaves state and fraction as they are. If the nets are on the accelerator too and the
    optimizer is fused, the host waits only when γ is set, and at every step of attach() under a GradScaler. Raises
    ValueError for invalid arguments.
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
        self.num_steps = check_count("num_steps", num_steps)
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
        self.steps_taken, self.phase, self.gamma = 0, -1, math.nan  # γ is set at the first step
        self.state = self.nets[0].initial_state()
        self.fraction = self.state.new_full((), math.nan)
        self.recent_losses = self.state.new_full((100,), math.nan)
        self.lr_set: list[float | Tensor] = []
        self.level: float | None = None  # as read by prepare()
        self.handle: RemovableHandle | None = None  # of attach()
        self.watch = LoopWatch(self.optimizer)

    def prepare(self) -> None:
        """Read scale_loss now, where the coming step will set γ from it: before the forward pass, as the authors do.

        Optional: otherwise step(loss) reads it, after BatchNorm's statistics have seen one more batch.
        """
        if self.scale_loss and isinstance(self.chosen_gamma, str) and self._phase_now() != self.phase:
            self.level = self.scale_loss()

    @property
    def net(self) -> MLRSNet:
        """The net that drives the present step."""
        return self.nets[max(self.phase, 0)]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Set the rate of the step about to be taken from its training loss, a 0-d tensor or a number.

        Under accumulation give the mean over the micro-batches. With several ranks give this rank's loss; the schedule
        reads the mean over the ranks. Raises TypeError without a loss, ValueError for a loss that is not 0-d or that
        the formula for γ cannot take, RuntimeError beside attach() and when something else has set the rate.
        """
        if self._is_attached():
            raise RuntimeError("attach() makes optimizer.step() call step(loss) already; leave out one of them")
        self._step(loss)

    def _step(self, loss: float | Tensor | None) -> None:
        value = self._mean_loss(loss)
        if not self.steps_taken:  # until now the rates may have been changed
            self.ratios = lr_ratios(self.optimizer, self.groups)
        if not self.lr_set:  # the first step, or the first since a state was loaded
            unshare_rates(self.optimizer)
        self.ratios = settled_ratios(self.optimizer, self.groups, self.ratios, self.lr_set)
        self.watch.before_step(self)
        self.recent_losses[self.steps_taken % len(self.recent_losses)] = torch.where(value.isfinite(), value, math.nan)
        if self._start_phase(value):
            self._learn(value)
            self._advance(value)
        self.steps_taken += 1

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

        def rate() -> None:
            loss = next_loss()
            if loss is not None:
                self._step(loss)

        self.handle = before_update(self.optimizer, rate)
        return self.handle

    def _is_attached(self) -> bool:
        return self.handle is not None and is_registered(self.handle)

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
        check_state(self, state, self.state_dict().keys())
        if len(state["nets"]) != len(self.nets):
            raise ValueError(f"the state is of a schedule of {len(state['nets'])} nets, this one has {len(self.nets)}")
        planned, share = self.num_steps, self.num_steps / state["num_steps"]
        if share != 1 and not rescale:
            raise ValueError(
                f"the state is of a run of {state['num_steps']} steps, this one plans {planned}: give num_steps="
                f"{state['num_steps']}, or load_state_dict(state, rescale=True) to keep the share of the run"
            )
        driven, theirs = driven_groups(self.ratios), driven_groups(state["ratios"])
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
        chosen = float(self.chosen_gamma) if isinstance(self.chosen_gamma, Real) else self.gamma
        if self.phase >= 0 and not math.isclose(chosen, self.gamma):
            warnings.warn(f"the run continues with its own gamma {self.gamma:g}, not {chosen:g}", stacklevel=2)

    def _mean_loss(self, loss: float | Tensor | None) -> Tensor:
        """The loss as a 0-d tensor on the state's device, the mean over the ranks."""
        if loss is None:
            raise TypeError("step() needs the training loss: call step(loss) after backward(), before optimizer.step()")
        value = torch.as_tensor(loss).detach()
        if value.dim():
            raise ValueError(f"the loss has shape {tuple(value.shape)}: give the mean over the batch, a 0-d tensor")
        if not isinstance(loss, Tensor) and num_ranks(self.process_group) > 1:
            value = value.to(self._device())
        return all_reduce_mean(value, self.process_group).to(self.state.device)

    def _device(self) -> torch.device:
        """Where the ranks can reduce a number."""
        return parameters_of(self.optimizer)[0].device

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
            self.gamma = mean_over_ranks(float(gamma), self._device(), self.process_group)
        self.phase = phase
        return True

    def _level(self, loss: Tensor) -> float:
        """L of the formula; NaN where no finite loss is known."""
        if self.scale_loss:
            if self.level is None:
                self.level = self.scale_loss()
            level, self.level = self.level, None
            return mean_over_ranks(float(level), self._device(), self.process_group)
        # Deviation: the authors pass over the whole training set for L; scale_loss does, the losses at hand serve here.
        level = float(loss if self.phase < 0 else self.recent_losses.nanmedian())
        if not math.isfinite(level) or (level == 0 and self.phase >= 0):  # 0: all is learned, and γ stays
            return math.nan
        if level > LARGEST_LOSS:
            raise ScaleError(f"a loss of {level:g} is no cross-entropy, as the formula for γ needs; {_GIVE_A_NUMBER}")
        return math.exp(level) if self.perplexity else level


def steps_between_updates(t_val: int | None, num_steps: int) -> int:
    """t_val, by default for about 80 updates in the run. ValueError where nothing would be learned."""
    default = max(1, num_steps // 80)
    chosen = default if t_val is None else check_count("t_val", t_val)
    if chosen > num_steps:
        advice = f"lower t_val; {default} makes about 80 updates"
        raise ValueError(f"t_val {t_val}, num_steps {num_steps}: nothing would be learned; {advice}")
    return chosen


class MetaMLRSNetLR(MLRSNetLR):
    """An MLR-SNet that learns while it drives: every t_val-th step first moves θ by Adam, then sets the rate.

    network: what meta_loss runs, whose buffers are restored; a ModuleList where that is more than one module.
    meta_loss: returns the 0-d loss of the network on the next held-out batch, with its graph.
    t_val: steps between updates of θ (default: num_steps // 80, for some 80 updates; the paper's 300 for 200 epochs).
    lr, weight_decay: Adam's on θ.
    meta_point: where the meta gradient is taken, "lookahead" (one step ahead, the paper) or "average" (at the running
        average of the weights, which the schedule keeps: see averaged_weights). average_decay is its β, by default
        for a window of a twentieth of the run.

    The other arguments are MLRSNetLR's. Raises TypeError for an optimizer whose update is not affine in its learning
    rate, and for sparse gradients. step() raises RuntimeError for gradients that are still scaled: under GradScaler
    call scaler.unscale_(optimizer) before it, or use attach(). Where the meta loss is not finite, the update is
    skipped, with a warning; on an accelerator only the last update warns, so that the host does not wait.
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
        if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse for module in network.modules()):
            raise TypeError("a module has sparse gradients, which are not supported; build it with sparse=False")
        self.t_val = steps_between_updates(t_val, num_steps)
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
        with torch.enable_grad():
            fraction, _ = self.net(self._input(loss), self.state)
            scale = self.gamma * self._envelope()
            lr = scale * on_host(fraction)
            self.watch.check_reach(self.ratios, lr)
            slope = hypergradient(
                self.network, self.optimizer, lr, self.meta_loss, average=self.average, ratios=self.ratios,
                process_group=self.process_group,
            ).to(fraction)
            self.adam.zero_grad()
            (slope * scale * fraction).backward()
        is_skipped = ~(slope.isfinite() & loss.isfinite())
        self.adam.found_inf = self.found_inf.copy_(is_skipped)  # type: ignore[attr-defined]
        self.adam.step()
        shown = on_host(is_skipped)
        is_last = self.steps_taken + self.t_val >= self.num_steps
        if (is_last or isinstance(shown, float)) and shown:
            warnings.warn("the training loss, the meta loss or its gradient is not finite: this update of the net is "
                          "left out", stacklevel=4)

    def state_dict(self) -> dict[str, Any]:
        averaged = {"average": self.average.state_dict()} if self.average else {}
        return super().state_dict() | {"adam": copy.deepcopy(self.adam.state_dict())} | averaged

    def load_state_dict(self, state: dict[str, Any], rescale: bool = False) -> None:
        super().load_state_dict(state, rescale)
        self.adam.load_state_dict(copy.deepcopy(state["adam"]))  # which keeps the tensors that it is given
        self.watch.is_reach_checked = self.steps_taken >= self.t_val  # as in the unbroken run
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

        Those of micro-batches add up to those of their batch. With several ranks a batch is this rank's shard, and the
        means over the ranks are those of the whole batch.
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
        check_count("num_classes", num_classes, least=2 if perplexity else 1)
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

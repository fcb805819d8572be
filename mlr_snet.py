"""MLR-SNet: a small LSTM that reads the training loss and answers with the learning rate.

    lr_t = γ · A(ℓ_t; θ)                    MLRSNet (A), lr_scale (γ), MLRSNetLR
    w_{t+1} = w_t − lr_t · d_t              train: the one loop
    ŵ(θ) = w_t − lr_t · d_t                 lookahead
    ∂L_meta(ŵ)/∂lr = −⟨∇L_meta(ŵ), d_t⟩     hypergradient
    θ ← Adam(θ, ∂L_meta/∂lr · γ · ∂A/∂θ)    MetaMLRSNetLR

Symbols: ℓ_t mini-batch training loss; w weights of the task network; θ weights of MLR-SNet; γ the LR scale;
A in (0, 1) the *fraction*; d_t the base optimizer's update per unit of learning rate (directions.py). Because d_t
does not depend on θ, the hypergradient is exact without a second-order graph.

Source: Shu, Zhu, Zhao, Meng, Xu, "MLR-SNet: Transferable LR Schedules for Heterogeneous Tasks", TPAMI 2022.
"""

import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from directions import Update, check_affine, descend, update_directions
from distributed import over_ranks
from utils import MetaStream, kept, lr_ratios, on_host, set_lr

# Learned on CIFAR-10 images, after 1/200, 1/2 and all of a run, and at averaged weights (one net); provenance.json
# beside them says how.
SHIPPED = [Path(__file__).resolve().parent / "meta-test" / f"mlr_snet_{epoch}.pth" for epoch in (1, 100, 200)]
SHIPPED_AVERAGE = [SHIPPED[0].with_name("mlr_snet_average.pth")]

# ---------------------------------------------------------------------------------------------- the net, A(·; θ)


class LSTMCell(nn.Module):
    """One LSTM step whose input and state maps are Linear–ReLU–Linear. Source: the authors' module.py, MLRSNetCell."""

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
        # Deviation: the gate order is torch's own, without forget-gate bias; the authors' scripts disagree with
        # each other, and this order is the one under which their published checkpoints behave.
        gates = self.fc_i2h(inputs) + self.fc_h2h(hidden)  # (4 · hidden_size,)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell


class MLRSNet(nn.Module):
    """The learned schedule: an LSTM from the training loss to the fraction of the LR scale, in (0, 1).

    Its state_dict is the authors' checkpoint layout. Raises ValueError for sizes that make no net.
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


def lr_scale(loss: float, num_classes: int) -> float:
    """γ, the largest rate a schedule may give: √L · max(ln(L·C), 1) / C^¼ / 4.

    loss is the mean training loss L (language models: the perplexity), num_classes is C (the vocabulary's size).
    Raises ValueError where L is not positive and finite or C < 1. Source: the authors' meta_train.py.
    """
    if not (math.isfinite(loss) and loss > 0 and num_classes >= 1):
        raise ValueError(f"the LR scale needs a positive loss and a class, got loss {loss}, {num_classes} classes")
    # Deviation: the floor of 1. Without it γ crosses zero at L = 1/C and training stops there.
    return math.sqrt(loss) * max(math.log(loss * num_classes), 1.0) / num_classes**0.25 / 4


def load_schedule(path: str | Path) -> MLRSNet:
    """An MLR-SNet from a .pth file, the authors' or ours, on the CPU.

    Raises ValueError when the file is missing, damaged, no MLR-SNet, or would run code.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; meta-train.py writes mlr_snet_<epoch>.pth") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable file of weights ({type(error).__name__})") from None
    try:
        layers = {key.split(".")[1] for key in weights if key.startswith("layer2.")}
        net = MLRSNet(weights["layer3.weight"].shape[1], 1 + len(layers))
        net.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        raise ValueError(f"{path}: holds no MLR-SNet; expected layer1.fc_i2h.0.weight … layer3.bias") from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise ValueError(f"{path}: holds weights that are not finite")
    return net


def load_schedules(paths: Sequence[str | Path]) -> list[MLRSNet]:
    """The nets of several files, or of one meta-train run folder: its snapshots at 1/200, 1/2 and 1 of the run.

    ["average"] stands for SHIPPED_AVERAGE.
    """
    if list(paths) == ["average"]:
        paths = SHIPPED_AVERAGE
    if len(paths) == 1 and Path(paths[0]).is_dir():
        folder = Path(paths[0])
        try:
            num_epochs = json.loads((folder / "args.json").read_text())["arguments"]["num_epoch"]
        except (OSError, ValueError, KeyError):
            raise ValueError(f"{folder}: no meta-train run (no readable args.json)") from None
        epochs = [max(1, round(num_epochs / 200)), max(1, num_epochs // 2), num_epochs]
        paths = [folder / f"mlr_snet_{epoch}.pth" for epoch in epochs]
    return [load_schedule(path) for path in paths]


# ---------------------------------------------------------------------------------------------- the hypergradient

@contextmanager
def lookahead(network: nn.Module, update: Update, lr: float | Tensor) -> Iterator[dict[Tensor, Tensor]]:
    """Inside, the network is at ŵ = w − lr·d; yields w by parameter. It gets w and its buffers back to the bit."""
    with kept([*network.parameters(), *network.buffers()]) as weights:
        descend(update, lr)
        yield weights


MetaPoint = Callable[[nn.Module, Update, float | Tensor], AbstractContextManager[dict[Tensor, Tensor]]]


def hypergradient(
    network: nn.Module,
    optimizer: Optimizer,
    lr: float | Tensor,
    meta_loss: Callable[[nn.Module], Tensor],
    meta_point: MetaPoint = lookahead,
) -> Tensor:
    """∂L_meta/∂lr = −⟨∇L_meta(ŵ), d_t⟩ at the lookahead point, a 0-d tensor.

    Call it after the training loss's backward(), before optimizer.step(): d_t comes from the gradients that lie in
    .grad. meta_loss maps the network to a 0-d loss. Parameters, buffers, gradients and the optimizer stay as they are.
    Under several ranks meta_loss is of this rank's share of the meta batch, and the scalar the mean over all.
    Raises TypeError for an optimizer that is not affine in lr.
    """
    update = update_directions(optimizer)
    terms: dict[nn.Parameter, Tensor] = {}

    def reduce(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Put the gradient's inner product with d_t in its place: all gradients at once are a copy of the network."""
        terms[parameter] = update[parameter](weights[parameter]).mul_(gradient).sum()
        return gradient.new_zeros(()).expand_as(gradient)

    with meta_point(network, update, lr) as weights, torch.enable_grad(), ExitStack() as hooks:
        loss = meta_loss(network)
        for parameter in update:
            hooks.enter_context(parameter.register_hook(partial(reduce, parameter)))
        torch.autograd.grad(loss, list(update), allow_unused=True)
    return -over_ranks(torch.stack([terms[parameter] for parameter in update if parameter in terms]).sum())


# ---------------------------------------------------------------------------------------------- the schedulers


class MLRSNetLR:
    """Drives an optimizer by learned schedules; call step(loss) between loss.backward() and optimizer.step().

    The K nets share the run, one per K-th of the epochs (three: they change at E//3 and 2·(E//3)); the LSTM state
    carries over. gamma is the LR scale: a number, or "auto" from the first loss and, at every change of nets, from
    the mean loss of the epoch before. With perplexity=True (language models) num_classes is the vocabulary, γ comes
    from exp(loss) and the net sees loss / ln(num_classes). Parameter groups keep the ratios of their initial rates;
    the largest gets the learned rate.
    """

    second_order = False

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
        if num_epochs < 1 or steps_per_epoch < 1:
            raise ValueError(f"{num_epochs} epochs of {steps_per_epoch} steps: both must be at least 1")
        if gamma != "auto" and not (isinstance(gamma, (int, float)) and math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma {gamma!r}: give a positive number or 'auto'")
        lr_ratios(optimizer)  # refuses an optimizer whose rates are all zero
        self.optimizer, self.nets = optimizer, list(nets)
        self.num_classes, self.perplexity, self.gamma = num_classes, perplexity, gamma
        self.steps_per_epoch, self.phase_epochs = steps_per_epoch, max(1, num_epochs // len(self.nets))
        self.num_steps = 0
        self.phase = -1
        self.scale = 0.0
        self.epoch_loss: float | Tensor = 0.0
        self.state = self.nets[0].initial_state()

    @property
    def net(self) -> MLRSNet:
        return self.nets[self.phase]

    def step(self, loss: float | Tensor) -> None:
        """Set the rate of the step about to be taken from its mini-batch training loss, a 0-d tensor or a number."""
        loss = torch.as_tensor(loss).detach()
        self._enter(on_host(loss))
        self._learn(loss)
        with torch.no_grad():
            fraction, self.state = self.net(self._seen(loss), self.state)
        set_lr(self.optimizer, self.scale * on_host(fraction))
        self.num_steps += 1

    def _learn(self, loss: Tensor) -> None:
        """Where MetaMLRSNetLR moves θ, before the rate is set."""

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates of the parameter groups, as last set; for a fused optimizer on an accelerator, 0-d tensors."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        names = ("num_steps", "phase", "scale", "epoch_loss", "state")
        return {name: getattr(self, name) for name in names} | {"nets": [net.state_dict() for net in self.nets]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for net, weights in zip(self.nets, state.pop("nets"), strict=True):
            net.load_state_dict(weights)
        state["state"] = state["state"].to(self.state)
        self.__dict__.update(state)

    def _seen(self, loss: Tensor) -> Tensor:
        """What the LSTM reads, on its device."""
        loss = loss.to(self.state.device)
        return loss / math.log(self.num_classes) if self.perplexity else loss

    def _enter(self, loss: float | Tensor) -> None:
        """Open an epoch: change the net and the LR scale where a phase begins."""
        epoch, first = divmod(self.num_steps, self.steps_per_epoch)
        if first == 0:
            phase = min(epoch // self.phase_epochs, len(self.nets) - 1)
            if phase != self.phase:
                self.phase = phase
                # Deviation: the authors pass over the whole training set for L; the losses at hand serve as well.
                mean = self.epoch_loss / self.steps_per_epoch if epoch else loss
                self.scale = self._auto_scale(float(mean)) if self.gamma == "auto" else float(self.gamma)
            self.epoch_loss = 0.0
        self.epoch_loss = self.epoch_loss + loss

    def _auto_scale(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.nan  # the rate becomes one too, and ends the run as diverged
        if self.perplexity and loss > 100:
            raise FloatingPointError(f"the loss is {loss:.3g} nats at step {self.num_steps + 1}, beyond a perplexity")
        level = math.exp(loss) if self.perplexity else max(loss, 1e-30)  # a loss of 0 leaves nothing to learn
        return lr_scale(level, self.num_classes)


class MetaMLRSNetLR(MLRSNetLR):
    """An MLR-SNet that learns while it drives: every t_val-th step first moves θ by Adam, then sets the rate.

    The meta batches and the loss come from the task; the other arguments are MLRSNetLR's. lr is Adam's rate on θ.
    Raises TypeError for an optimizer whose update is not affine in its learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        net: MLRSNet,
        network: nn.Module,
        task: "Task",
        num_epochs: int,
        t_val: int,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        gamma: float | str = "auto",
        meta_point: MetaPoint = lookahead,
    ):
        super().__init__(optimizer, [net], task.num_classes, num_epochs, task.steps_per_epoch, gamma, task.perplexity)
        check_affine(optimizer)
        if t_val < 1:
            raise ValueError(f"t_val {t_val}: must be at least 1")
        self.network, self.t_val, self.meta_point = network, t_val, meta_point
        self.meta = MetaStream(task)
        self.adam = Adam(net.parameters(), lr=lr, weight_decay=weight_decay)

    def _learn(self, loss: Tensor) -> None:
        """θ ← Adam(θ, ∂L_meta/∂lr · γ · ∂A/∂θ), with the LSTM state a constant."""
        if (self.num_steps + 1) % self.t_val:
            return
        fraction, _ = self.net(self._seen(loss), self.state)
        lr = self.scale * on_host(fraction)
        slope = hypergradient(self.network, self.optimizer, lr, self.meta.next_loss, self.meta_point)
        self.adam.zero_grad()
        (slope.to(fraction) * self.scale * fraction).backward()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adam": self.adam.state_dict(), "meta": self.meta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.adam.load_state_dict(state.pop("adam"))
        self.meta.load_state_dict(state.pop("meta"))
        super().load_state_dict(state)


# ---------------------------------------------------------------------------------------------- the one loop


class Task(Protocol):
    """What the loop needs of a problem; data/ has the implementations."""

    num_classes: int  # language models: the vocabulary's size
    perplexity: bool  # whether the problem is measured by perplexity
    steps_per_epoch: int
    clip: float | None  # the largest norm of the gradient

    def train_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of batches, each with its number of targets, `size`, from global step `start` on."""

    def meta_batches(self, start: int) -> Iterator[Any]:
        """The endless stream of meta batches, from number `start` on."""

    def loss(self, network: nn.Module, batch: Any, carry: Any) -> tuple[Tensor, Tensor, Any]:
        """The 0-d loss, the batch's accuracy in %, and what the next batch needs (None for images).

        Under several ranks a batch holds this one's share, and the means over the ranks are those of the whole.
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

    Loss and accuracy (%) are 0-d tensors on the network's device, so that the loop need not wait for them.
    """

    number: int
    loss: Tensor
    accuracy: Tensor
    lr: float | Tensor
    size: int
    carry: Any


def train(
    network: nn.Module,
    task: Task,
    optimizer: Optimizer,
    schedule: Schedule,
    num_epochs: int,
    start: int = 0,
    carry: Any = None,
) -> Iterator[Step]:
    """Train for num_epochs under a schedule and yield every step; `start` and `carry` continue an earlier run.

    Whether loss and rate are finite is for the caller to check, who knows when the host can wait for them.
    """
    network.train()
    steps = range(start, num_epochs * task.steps_per_epoch)
    for number, batch in zip(steps, task.train_batches(start), strict=False):
        loss, accuracy, carry = task.loss(network, batch, carry)
        optimizer.zero_grad()
        loss.backward(retain_graph=schedule.second_order)
        if task.clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), task.clip)
        mean = over_ranks(loss.detach())  # ℓ_t
        schedule.step(loss if schedule.second_order else mean)
        optimizer.step()
        yield Step(number + 1, mean, over_ranks(accuracy), schedule.get_last_lr()[0], batch.size, carry)

"""The measured LR scale: the peak learning rate of a run, found by training on real batches at trial rates.

    measured = measure_lr_scale(network, optimizer, next_loss, num_steps)
    schedule = MLRSNetLR(optimizer, nets, num_steps, gamma=measured.gamma)

An LR range test, then three short cosines; network, optimizer and random generators are as before afterwards. Where the
loss falls at no rate, the scale is a guess and `refusal` says why. In a run that may be resumed give the schedule a
function instead, gamma=lambda: measure_lr_scale(…).gamma, which is called at its first step only. This file needs torch
and mlr_snet only.
"""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlr_snet import (
    all_reduce_mean,
    bare_step,
    lr_ratios,
    parameters_of,
    preserved,
    preserved_optimizer,
    set_lr,
    unwrapped,
    without_gradients,
)

RANGE_STEPS = 120  # in the range test, which spans five decades
UNTRAINED_STEPS = 20  # the first of them, at rates that are too small to matter
CLEARLY = 3  # standard errors by which the best trial has to end below the untrained loss


@dataclass
class Trial:
    """A short training at trial rates: the rate of every step, and the mini-batch loss before it."""

    kind: str  # "range test" or "cosine"
    rates: list[float]
    losses: list[float]  # not finite once it blew up


@dataclass
class MeasuredScale:
    """The peak rate that measure_lr_scale chose, everything it tried, and why the rate is a guess, where it is one."""

    scale: float  # the peak rate: where a decaying schedule starts
    trials: list[Trial]
    refusal: str = ""

    @property
    def gamma(self) -> float:
        """The γ of an MLR-SNet, twice the peak rate: an untrained net gives half of γ, and so starts at the peak."""
        return 2 * self.scale

    @property
    def num_steps(self) -> int:
        """The training steps that measuring took."""
        return sum(len(trial.rates) for trial in self.trials)


# ---------------------------------------------------------------------------------------------- the scale


def usual_lr(optimizer: Optimizer) -> float:
    """The rate that is best on the average calibration problem: 0.5 · (1 − ρ) for SGD with momentum ρ, 0.005 for Adam.

    Other optimizers were not calibrated: Adadelta has torch's default of 1, the rest have Adam's.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 0.5 * (1 - optimizer.param_groups[0]["momentum"])
    return 1.0 if isinstance(optimizer, torch.optim.Adadelta) else 0.005


def run_over_trial(optimizer: Optimizer) -> float:
    """c of measure_lr_scale: the best peak of a run over that of a trial.

    Near the fits of the calibration; under Adam half-way from 0.6 to its fit. Like usual_lr, it has Adam's value for
    the rest.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 0.6 if optimizer.param_groups[0]["momentum"] else 0.7
    return 0.5


def guessed_scale(optimizer: Optimizer, range_test: Trial) -> float:
    """The usual rate or, if lower, c · the rate at which the smoothed loss rises clearly above the untrained one."""
    return min(usual_lr(optimizer), run_over_trial(optimizer) * _lr_of_rise(range_test))


def measure_lr_scale(
    network: nn.Module,
    optimizer: Optimizer,
    next_loss: Callable[[], Any],
    num_steps: int,
    max_norm: float | None = None,
    budget: int | None = None,
) -> MeasuredScale:
    """The LR scale of a run of num_steps steps.

        lr_range = c · the rate at which the smoothed loss of an LR range test is lowest
        scale = c · Π peak^w, with w ∝ exp(−(loss − lowest loss) / (2·s)) and Σ w = 1

    The three peaks are those of short cosines: lr_usual / c, lr_range / c and their geometric mean. Their loss is
    the mean over the last third, and s the standard error of a difference of two such means by the noise of the
    batches. Where even the lowest peak blows up, a quarter and a sixteenth of it replace the others.

    next_loss: returns the 0-d training loss of the network on the next batch, with its graph; or a list or generator of
        the micro-batches' losses, whose sum is the loss of the step; or None where an epoch ends, and is asked again.
        Where it has state_dict and load_state_dict, every trial sees the same batches.
    max_norm: clips the gradient.
    budget: the training steps to take, at least 135 (default: 150, or 5 % of num_steps if that is more).

    Restores network, optimizer, gradients and random generators bit for bit, copies only what training moves, and runs
    no hooks of the optimizer. With several ranks all of them find the same scale. Where the loss falls at no rate, the
    scale is guessed_scale: the falls in the range test and in the best trial have to be three standard errors together.

    Raises ValueError for a loss that is not finite at rates near zero and for a stream that ends, TypeError for a loss
    without a graph. Source of the range test: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.
    """
    optimizer, budget = unwrapped(optimizer), max(150, num_steps // 20) if budget is None else budget
    if num_steps < 1 or budget < RANGE_STEPS + 15:
        raise ValueError(f"num_steps {num_steps}, budget {budget}: give at least 1 and {RANGE_STEPS + 15}")
    usual, factor = usual_lr(optimizer), run_over_trial(optimizer)
    try_at = partial(try_rates, network, optimizer, next_loss, max_norm=max_norm)
    growth = 1e5 ** (1 / (RANGE_STEPS - 1))
    range_rates = [usual / 1000 * growth**step for step in range(RANGE_STEPS)]
    range_test = try_at("range test", range_rates, until=_has_blown_up)
    start, noise = _untrained_loss(range_test.losses)
    if not math.isfinite(start):
        raise ValueError(f"the training loss is {range_test.losses[0]:.4g} at rates near zero; check network and data")
    lr_of_lowest, lowest = _lowest(range_test)
    range_fall = (start - lowest) / (noise * math.sqrt(2 / UNTRAINED_STEPS))
    if range_fall < 2.2:
        refusal = (
            f"the training loss falls at no learning rate up to {range_test.rates[-1]:.2g}: from "
            f"{start:.4g} to {lowest:.4g} at best; check loss and data, or give the scale as a number"
        )
        return MeasuredScale(guessed_scale(optimizer, range_test), [range_test], refusal)
    trial_steps = (budget - len(range_test.rates)) // 3
    cosine = [(1 + math.cos(math.pi * step / trial_steps)) / 2 for step in range(trial_steps)]

    def train_from(lr: float) -> Trial:
        return try_at("cosine", [lr / factor * share for share in cosine])

    low, high = sorted((usual, factor * lr_of_lowest))
    trials = {low: train_from(low)}
    others = (math.sqrt(low * high), high)
    if _final_loss(trials[low]) > start + noise:
        others = (low / 4, low / 16)
    trials |= {lr: train_from(lr) for lr in others}
    losses = {lr: _final_loss(trial) for lr, trial in trials.items()}
    lowest, everything = min(losses.values()), [range_test, *trials.values()]
    trial_fall = (start - lowest) / (noise * math.sqrt(1 / UNTRAINED_STEPS + 1 / _third(trial_steps)))
    if range_fall + trial_fall < CLEARLY * math.sqrt(2):
        tried = ", ".join(f"{lr / factor:.2g}" for lr in trials)
        refusal = (
            f"the training loss falls clearly at none of the peak learning rates {tried}: from {start:.4g} to "
            f"{lowest:.4g} at best; give the scale as a number"
        )
        return MeasuredScale(guessed_scale(optimizer, range_test), everything, refusal)
    error = noise * math.sqrt(2 / _third(trial_steps))
    weights = {lr: math.exp((lowest - loss) / max(2 * error, 1e-12)) for lr, loss in losses.items()}
    scale = math.exp(sum(weight * math.log(lr) for lr, weight in weights.items()) / sum(weights.values()))
    return MeasuredScale(scale, everything)


# ---------------------------------------------------------------------------------------------- trials


def try_rates(
    network: nn.Module,
    optimizer: Optimizer,
    next_loss: Callable[[], Any],
    kind: str,
    rates: list[float],
    max_norm: float | None = None,
    until: Callable[[list[float]], bool] = lambda losses: False,
) -> Trial:
    """Train one step at each of the rates, then restore everything as measure_lr_scale does.

    Ends early once `until` is true of the losses; it is asked every ten steps, since the host waits for its answer.
    """
    losses: list[float] = []
    with _restored_run(network, optimizer, next_loss), torch.enable_grad():
        while len(losses) < len(rates) and not until(losses):
            losses += _losses_at(rates[len(losses) :][:10], network, optimizer, next_loss, max_norm)
    return Trial(kind, rates[: len(losses)], losses)


@contextmanager
def _restored_run(network: nn.Module, optimizer: Optimizer, next_loss: Any) -> Iterator[None]:
    """Restores everything that training changes, bit for bit, on exit; without gradients at the start."""
    was_training, python_state, numpy = network.training, random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    stream_state = copy.deepcopy(next_loss.state_dict()) if hasattr(next_loss, "state_dict") else None
    everything = [*parameters_of(optimizer), *network.parameters()]
    try:
        with without_gradients(everything), preserved_optimizer(optimizer), preserved(network.buffers()):
            network.train()
            yield
    finally:
        network.train(was_training)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if stream_state is not None:
            next_loss.load_state_dict(stream_state)


def _losses_at(
    rates: list[float], network: nn.Module, optimizer: Optimizer, next_loss: Callable[[], Any], max_norm: float | None,
) -> list[float]:
    """Train one step at each rate; the mean loss over the ranks before every step."""
    losses, ratios = [], lr_ratios(optimizer)
    for lr in rates:
        for parameter in [*parameters_of(optimizer), *network.parameters()]:
            parameter.grad = None
        losses.append(_backward(next_loss))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        set_lr(optimizer, lr, ratios)
        bare_step(optimizer)
    return all_reduce_mean(torch.stack(losses).double()).tolist()  # once, so that the host does not wait at every step


def _backward(next_loss: Callable[[], Any]) -> Tensor:
    """Backward through the next loss, or through several whose sum it is; returns it without its graph."""
    try:
        given = next_loss()
        given = next_loss() if given is None else given  # an epoch has ended
    except StopIteration:
        given = None
    if given is None:
        raise ValueError("next_loss has no more batches: start the loader over where it ends")
    losses = [given] if isinstance(given, (Tensor, float, int)) else given
    total = torch.zeros(())
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise TypeError(f"next_loss gave {loss!r}: give the 0-d training loss as a tensor, with its graph")
        loss.backward()
        total = loss.detach() + total.to(loss.device)
    return total


# ---------------------------------------------------------------------------------------------- reading the losses


def _untrained_loss(losses: list[float]) -> tuple[float, float]:
    """Mean and noise, above 0, of the loss while the rates of the range test are too small to matter."""
    first = torch.tensor(losses[:UNTRAINED_STEPS], dtype=torch.float64)
    mean = first.mean().item()
    return mean, max(first.diff().std().item() / math.sqrt(2), 1e-12 * abs(mean), 1e-300)


def smoothed(losses: list[float], has_to_fall: bool = True) -> list[float]:
    """The running mean of the range test's losses, up to where it blows up.

    That is once the loss has fallen and is again clearly worse than untrained: a network with BatchNorm can recover at
    an absurd rate. Without has_to_fall, once it is clearly worse.
    """
    start, noise = _untrained_loss(losses)
    means: list[float] = []
    total = weight = 0.0
    for loss in losses:
        total, weight = 0.8 * total + 0.2 * loss, 0.8 * weight + 0.2
        can_blow_up = len(means) > UNTRAINED_STEPS and (not has_to_fall or min(means) < start - noise)
        if not math.isfinite(total) or (can_blow_up and total / weight > start + 3 * noise):
            break
        means.append(total / weight)
    return means


def _lr_of_rise(range_test: Trial) -> float:
    """The rate at which the smoothed loss rises clearly above the untrained one; infinite where it does not."""
    count = len(smoothed(range_test.losses, has_to_fall=False))
    return range_test.rates[count] if count < len(range_test.rates) else math.inf


def _has_blown_up(losses: list[float]) -> bool:
    return len(losses) > UNTRAINED_STEPS and len(smoothed(losses)) < len(losses)


def _lowest(range_test: Trial) -> tuple[float, float]:
    """The rate at which the smoothed loss is lowest; and the lowest mean, over as many steps as the untrained loss."""
    smooth = smoothed(range_test.losses)
    losses = torch.tensor(range_test.losses[: len(smooth)], dtype=torch.float64)
    return range_test.rates[smooth.index(min(smooth))], losses.unfold(0, UNTRAINED_STEPS, 1).mean(1).min().item()


def _final_loss(trial: Trial) -> float:
    """The mean loss of the last third; infinite if it blew up."""
    last = trial.losses[-_third(len(trial.losses)) :]
    return sum(last) / len(last) if all(map(math.isfinite, trial.losses)) else math.inf


def _third(num_steps: int) -> int:
    return max(1, num_steps // 3)

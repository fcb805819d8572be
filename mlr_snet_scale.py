"""The measured LR scale: the peak learning rate of a run, found by training on real batches at trial rates.

    measured = measure_lr_scale(network, optimizer, next_loss, num_steps, num_classes=10)
    schedule = MLRSNetLR(optimizer, nets, num_steps, gamma=measured.gamma)

It runs an LR range test and four short cosines, and restores everything. In a run that may be resumed give a function
instead, gamma=lambda: measure_lr_scale(…).gamma, which is called at the first step only. Needs torch only.
"""

import copy
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mlr_snet import LARGEST_LOSS, lr_scale
from mlr_snet_optim.directions import bare_step
from mlr_snet_optim.loop import unwrapped
from mlr_snet_optim.ranks import all_reduce_mean, check_count
from mlr_snet_optim.rates import lr_ratios, set_lr, unshare_rates
from mlr_snet_optim.restoring import parameters_of, preserved, preserved_modules, preserved_optimizer, without_gradients

RANGE_STEPS = 120  # in the range test, which spans five decades
UNTRAINED_STEPS = 20  # the first of them, at rates that are too small to matter
CLEARLY = 1.2  # standard deviations of the batches' losses that the loss has to fall by: three standard errors


@dataclass
class Trial:
    """A short training at trial rates: the rate of every step, and the mini-batch loss before it."""

    kind: str  # "range test" or "cosine"
    rates: list[float]
    losses: list[float]  # not finite once it diverged


@dataclass
class MeasuredScale:
    """The peak rate that measure_lr_scale chose, everything it tried, and why the rate is a guess, where it is one."""

    scale: float  # the peak rate: where a decaying schedule starts
    trials: list[Trial] = field(repr=False)  # long
    refusal: str = ""

    @property
    def gamma(self) -> float:
        """γ, twice the peak rate, since an untrained net gives half of it. Warns where the scale is a guess."""
        if self.refusal:
            warnings.warn(f"the LR scale {self.scale:.3g} is a guess: {self.refusal}", stacklevel=2)
        return 2 * self.scale

    @property
    def num_steps(self) -> int:
        """The training steps that measuring took."""
        return sum(len(trial.rates) for trial in self.trials)


# ---------------------------------------------------------------------------------------------- the scale


def usual_lr(optimizer: Optimizer) -> float:
    """A fixed rate that suits small image problems: 0.5 · (1 − ρ) for SGD with momentum ρ, 0.005 for Adam."""
    if isinstance(optimizer, torch.optim.SGD):
        return 0.5 * (1 - optimizer.param_groups[0]["momentum"])
    return 1.0 if isinstance(optimizer, torch.optim.Adadelta) else 0.005  # not calibrated: torch's default, and Adam's


def run_over_trial(optimizer: Optimizer) -> float:
    """c of measure_lr_scale: the best peak of a run over that of a trial, near the fits of the calibration."""
    if isinstance(optimizer, torch.optim.SGD):
        return 0.6 if optimizer.param_groups[0]["momentum"] else 0.7
    return 0.4


def guessed_scale(optimizer: Optimizer, loss: float, num_classes: int | None = None, perplexity: bool = False) -> float:
    """The peak rate by the untrained loss: γ / 2 for SGD, γ / 2 · 1.5·(1 − ρ) with momentum ρ, usual_lr for the rest.

    γ is lr_scale. Without classes, and where the formula refuses the loss, SGD has usual_lr, too.
    """
    if num_classes is None or not isinstance(optimizer, torch.optim.SGD) or not 0 < loss <= LARGEST_LOSS:
        return usual_lr(optimizer)
    gamma = lr_scale(math.exp(loss) if perplexity else loss, num_classes)
    momentum = optimizer.param_groups[0]["momentum"]
    return gamma / 2 * (1.5 * (1 - momentum) if momentum else 1)


def measure_lr_scale(
    network: nn.Module, optimizer: Optimizer, next_loss: Callable[[], Any], num_steps: int,
    max_norm: float | None = None, num_classes: int | None = None, perplexity: bool = False, budget: int | None = None,
    groups: Sequence[int] | None = None, process_group: Any = None,
) -> MeasuredScale:
    """The LR scale of a run of num_steps steps.

        scale = median(guess, c · lr_range, c · lr_trial)
        guess = γ / 2 for SGD, γ / 2 · 1.5·(1 − ρ) with momentum ρ; the usual rate for others and without classes

    c is run_over_trial. lr_range is the rate at which the smoothed loss of an LR range test is lowest. lr_trial is the
    best peak of four short cosines, guess/c times 1/6, 1/2, 3/2 or 9/2, by the mean loss of their second half; so the
    scale is at most 4.5 guesses. Where even the lowest peak diverges, a 27th of the guess takes its place.

    next_loss: returns the 0-d training loss of the network on the next batch, with its graph; or a list or generator of
        the micro-batches' losses, whose sum is the loss of the step; or None at the end of an epoch, after which it is
        called again. Where it has state_dict and load_state_dict, every trial sees the same batches.
    max_norm: clips the gradient.
    num_classes, perplexity, process_group: as in MLRSNetLR; groups, too: those left out train at their own rates.
    budget: the training steps to take, at least 140 (default: 180, or 5 % of num_steps if that is more).

    Restores network, optimizer, gradients and the global random generators bit for bit; runs no hooks of the optimizer.
    `network` is a ModuleList where next_loss runs several modules: what it lacks keeps the trials' gradients and
    statistics. All ranks find the same scale. Where the range test's loss does not fall clearly, the scale is the guess
    or, if lower, c · the rate where it diverges; `refusal` says so, and where another optimizer than SGD and Adam does
    best at the largest peak.

    Raises ValueError for a loss that is not finite at rates near zero and for a stream that ends, TypeError for a loss
    without a graph. Source of the range test: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.
    """
    optimizer, num_steps = unwrapped(optimizer), check_count("num_steps", num_steps)
    budget = check_count("budget", max(180, num_steps // 20) if budget is None else budget, least=RANGE_STEPS + 20)
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.Rprop)):
        raise TypeError(f"the LR scale of {type(optimizer).__name__} cannot be measured: give it as a number")
    usual, c = usual_lr(optimizer), run_over_trial(optimizer)
    try_at = partial(try_rates, network, optimizer, next_loss, max_norm, groups, process_group)
    range_rates = [usual * 10 ** (5 * step / (RANGE_STEPS - 1) - 3) for step in range(RANGE_STEPS)]
    range_test = try_at("range test", range_rates, until=lambda losses: len(smoothed(losses)) < len(losses))
    start, noise = _untrained_loss(range_test.losses)
    if not math.isfinite(start):
        raise ValueError("a training loss at rates near zero is not finite; check network and data")
    guess, smooth = guessed_scale(optimizer, start, num_classes, perplexity), smoothed(range_test.losses)
    lowest = min(smooth[UNTRAINED_STEPS:], default=start)
    if start - lowest < CLEARLY * noise:
        highest = range_test.rates[len(smooth) - 1]
        refusal = (f"the training loss falls clearly at no learning rate up to {highest:.2g}: from {start:.4g} to "
                   f"{lowest:.4g} at best; check loss and data, or give the scale as a number")
        return MeasuredScale(min(guess, c * highest), [range_test], refusal)
    trial_steps = (budget - len(range_test.rates)) // 4
    cosine = [(1 + math.cos(math.pi * step / trial_steps)) / 2 for step in range(trial_steps)]
    peak, ratio, trials = guess / c / 6, 3.0, []
    for number in range(4):
        trials.append(try_at("cosine", [peak * share for share in cosine]))
        if number == 0 and _final_loss(trials[0]) > start + noise:
            guess, ratio = guess / 27, 1 / 3
        peak *= ratio
    lr_range, lr_trial = range_test.rates[smooth.index(lowest)], min(trials, key=_final_loss).rates[0]
    refusal, calibrated = "", (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    if lr_trial == max(trial.rates[0] for trial in trials) <= lr_range and not isinstance(optimizer, calibrated):
        refusal = "the largest peak tried is the best, and a far larger one may be better; give the scale as a number"
    return MeasuredScale(median((guess, c * lr_range, c * lr_trial)), [range_test, *trials], refusal)


# ---------------------------------------------------------------------------------------------- trials


def try_rates(
    network: nn.Module, optimizer: Optimizer, next_loss: Callable[[], Any], max_norm: float | None,
    groups: Sequence[int] | None, process_group: Any, kind: str, rates: list[float],
    until: Callable[[list[float]], bool] = lambda losses: False,
) -> Trial:
    """Train one step at each of the rates, then restore everything as measure_lr_scale does.

    Ends early once `until` is true of the losses; it is checked every ten steps, since the host waits for it.
    """
    losses: list[float] = []
    ratios = lr_ratios(optimizer, groups)
    with _restored_run(network, optimizer, next_loss), torch.enable_grad():
        unshare_rates(optimizer)  # groups that are left out keep theirs; the sharing is restored with the options
        while len(losses) < len(rates) and not (losses and until(losses)):
            some = []
            for lr in rates[len(losses) :][:10]:
                for parameter in [*parameters_of(optimizer), *network.parameters()]:
                    parameter.grad = None
                some.append(_backward(next_loss))
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), max_norm)
                set_lr(optimizer, lr, ratios)
                bare_step(optimizer)
            found = torch.stack(some).to(torch.promote_types(some[0].dtype, torch.float32))
            losses += all_reduce_mean(found, process_group).tolist()
    return Trial(kind, rates[: len(losses)], losses)


@contextmanager
def _restored_run(network: nn.Module, optimizer: Optimizer, next_loss: Any) -> Iterator[None]:
    """Restores everything that training changes, bit for bit, on exit; without gradients at the start."""
    python_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    stream_state = copy.deepcopy(next_loss.state_dict()) if hasattr(next_loss, "state_dict") else None
    moving = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
    try:
        with preserved_modules(network, moving), without_gradients([*parameters_of(optimizer), *network.parameters()]):
            if not network.training:  # else as it trains: parts of it may be in eval mode
                network.train()
            with preserved_optimizer(optimizer), preserved(network.buffers()):
                yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        if stream_state is not None:
            next_loss.load_state_dict(stream_state)


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


def _untrained_loss(losses: list[float]) -> tuple[float, float]:
    """Mean and noise, above 0, of the loss while the rates of the range test are too small to matter."""
    first = torch.tensor(losses[:UNTRAINED_STEPS], dtype=torch.float64)
    mean = first.mean().item()
    return mean, max(first.diff().std().item() / math.sqrt(2), 1e-12 * abs(mean), 1e-300)


def smoothed(losses: list[float]) -> list[float]:
    """The running mean of the range test's losses, until they diverge, that is, clearly lose a fifth of their fall.

    What follows does not count: a network can recover at an absurd rate.
    """
    start, noise = _untrained_loss(losses)
    means: list[float] = []
    total = weight = 0.0
    for loss in losses:
        total, weight = 0.8 * total + 0.2 * loss, 0.8 * weight + 0.2
        lowest = min([start, *means[UNTRAINED_STEPS:]])  # not the first means, which are of few batches
        limit = 0.8 * lowest + 0.2 * start + 3 * noise
        if not math.isfinite(total) or (len(means) > UNTRAINED_STEPS and total / weight > limit):
            break
        means.append(total / weight)
    return means


def _final_loss(trial: Trial) -> float:
    """The mean loss of the second half; infinite if it diverged."""
    last = trial.losses[len(trial.losses) // 2 :]
    return sum(last) / len(last) if all(map(math.isfinite, trial.losses)) else math.inf

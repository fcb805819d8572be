"""Functions of the time."""

import math
from abc import abstractmethod

from torch import Tensor

from baselines.base import Baseline
from mlr_snet_optim.rates import set_lr


class ClosedForm(Baseline):
    """A rate that depends on the time only."""

    @abstractmethod
    def factor(self, epoch: float) -> float:
        """The rate as a multiple of the initial rate; epoch is fractional and starts at 0."""

    def step(self, loss: float | Tensor) -> None:
        set_lr(self.optimizer, self.initial_lr * self.factor(self.num_steps / self.steps_per_epoch), self.ratios)
        self.num_steps += 1


class Fixed(ClosedForm):
    """The initial rate throughout."""

    def factor(self, epoch: float) -> float:
        return 1.0


class Multistep(ClosedForm):
    """×0.2 at 30 %, 60 % and 80 % of the run."""

    knows_length = True

    def factor(self, epoch: float) -> float:
        return 0.2 ** len([percent for percent in (30, 60, 80) if epoch >= percent * self.num_epochs / 100])


class Exponential(ClosedForm):
    """×0.95 after every epoch."""

    def factor(self, epoch: float) -> float:
        return 0.95 ** int(epoch)


class Cosine(ClosedForm):
    """Half a cosine from the initial rate to 0 over the run, step by step."""

    knows_length = True

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

    knows_length = True

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

    knows_length = True

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

    Source: Hu et al., "MiniCPM", 2024. Deviation: theirs decays exponentially, over a tenth of the run.
    """

    def factor(self, epoch: float) -> float:
        return min(super().factor(epoch), 5 * (1 - epoch / self.num_epochs))

    def decay(self, progress: float) -> float:
        return 1.0

"""Rates from losses."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from baselines.base import Baseline, from_package, mean_loss
from mlr_snet_optim.ranks import on_host
from mlr_snet_optim.rates import set_lr


class Val(Baseline):
    """÷4 whenever an epoch has not lowered the validation loss. Source: PyTorch's word_language_model example.

    validate returns the validation loss of the network as it stands, the same on every rank.
    """

    usual_lr = {**Baseline.usual_lr, "sgd": Baseline.text_lr}
    for_text = True
    needs_validation = True
    takes = ("validate",)
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
        set_lr(self.optimizer, self.lr, self.ratios)
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
        self.epoch_loss = self.epoch_loss + on_host(mean_loss(loss))
        self.num_steps += 1


class Greedy(Baseline):
    """GreedyLR of the package transformers on every step's training loss, averaged over the last 50 steps.

    The rate is divided by 0.95 after more than 10 improvements in a row, and multiplied by it after more than 10 steps
    without one; after 500 steps at the lower bound it starts again. Deviation: the package bounds the rate by 1e-3
    and 1, which suits an initial rate of 0.1; here the bounds are 1/100 and 10 times the initial rate. Source:
    Subramanian et al., "Dynamic Learning Rate Scheduling based on Loss Changes Leads to Faster Convergence", 2025.
    """

    remembered = ("num_steps", "scheduler")

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        greedy = from_package("transformers.optimization", "GreedyLR")
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.scheduler = greedy(
            optimizer, smooth=True, min_lr=[lr / 100 for lr in rates], max_lr=[10 * lr for lr in rates]
        )

    def step(self, loss: float | Tensor) -> None:
        self.scheduler.step(float(mean_loss(loss)))
        self.num_steps += 1

"""The schedules that MLR-SNet is compared with: closed forms of the time in epochs, and the val strategy.

Each scales the optimizer's initial rate and is stepped like MLRSNetLR: step(loss) between backward() and
optimizer.step().
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from utils import lr_ratios, set_lr


class Fixed:
    """The initial rate throughout, and the base of the other schedules. epoch is fractional, from 0."""

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        lr_ratios(optimizer)
        self.optimizer, self.num_epochs, self.steps_per_epoch = optimizer, num_epochs, steps_per_epoch
        self.initial_lr = max(group["initial_lr"] for group in optimizer.param_groups)
        self.num_steps = 0

    def factor(self, epoch: float) -> float:
        """The rate at `epoch` as a multiple of the initial rate."""
        return 1.0

    def step(self, loss: float | Tensor) -> None:
        """Set the rate of the step about to be taken; a closed form does not look at the loss."""
        set_lr(self.optimizer, self.initial_lr * self.factor(self.num_steps / self.steps_per_epoch))
        self.num_steps += 1

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class Multistep(Fixed):
    """×0.2 at 30 %, 60 % and 80 % of the run's epochs."""

    def factor(self, epoch: float) -> float:
        return 0.2 ** sum(int(epoch) >= percent * self.num_epochs // 100 for percent in (30, 60, 80))


class Exponential(Fixed):
    """×0.95 after every epoch."""

    def factor(self, epoch: float) -> float:
        return 0.95 ** int(epoch)


class Cosine(Fixed):
    """Half a cosine from the initial rate to 0 over the run, step by step."""

    def factor(self, epoch: float) -> float:
        return (1 + math.cos(math.pi * epoch / self.num_epochs)) / 2


class SGDR(Fixed):
    """Cosine to 0 with warm restarts after 10, 30, 70, … epochs. Source: Loshchilov and Hutter, 2017."""

    def factor(self, epoch: float) -> float:
        period = 10.0
        while epoch >= period:
            epoch, period = epoch - period, 2 * period
        return (1 + math.cos(math.pi * epoch / period)) / 2


class Val(Fixed):
    """÷4 whenever an epoch has not lowered the validation loss. Source: PyTorch's word_language_model example.

    validate gives the validation loss of the network as it stands.
    """

    def __init__(
        self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int, validate: Callable[[], float]
    ):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        self.validate, self.best, self.shrunk = validate, math.inf, 1.0

    def factor(self, epoch: float) -> float:
        if epoch.is_integer() and epoch > 0:
            loss = self.validate()
            if loss < self.best:
                self.best = loss
            else:
                self.shrunk /= 4
        return self.shrunk

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best, "shrunk": self.shrunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best, self.shrunk = state["best"], state["shrunk"]


SCHEDULES = {
    "fixed": Fixed,
    "multistep": Multistep,
    "exponential": Exponential,
    "cosine": Cosine,
    "sgdr": SGDR,
    "val": Val,
}

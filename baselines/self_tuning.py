"""Optimizers that set their rate themselves, each from its own package."""

import contextlib
import io
import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from baselines.base import Baseline, from_package
from mlr_snet_optim.rates import set_lr


class SelfTuning(Baseline):
    """For an optimizer that sets its rate itself: nothing is left to set."""

    def step(self, loss: float | Tensor) -> None:
        self.num_steps += 1


class CosineFactor(SelfTuning):
    """A cosine to 0 on the factor of the rate that is found, as the authors of D-Adaptation and Prodigy advise."""

    knows_length = True

    def step(self, loss: float | Tensor) -> None:
        factor = (1 + math.cos(math.pi * self.num_steps / (self.num_epochs * self.steps_per_epoch))) / 2
        set_lr(self.optimizer, self.initial_lr * factor, self.ratios)
        super().step(loss)


class ScheduleFree(SelfTuning):
    """Schedule-free SGD (interpolation 0.9 unless momentum is given) or AdamW, with a warm-up over 5 % of the run.

    The package advises a warm-up, and for SGD 10 to 50 times the classical rate: here 10 times 0.05, which is good with
    momentum 0.9, and in tables on text 5 times 20. Source: Defazio et al., 2024.
    """

    text_lr = 100.0
    usual_lr = {"sgd": 0.5, "adamw": 0.0025}
    packaged = {"sgd": "SGDScheduleFree", "adamw": "AdamWScheduleFree"}
    knows_length = True  # by its warm-up

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        super().__init__(optimizer, num_epochs, steps_per_epoch)
        if self.knows_length:
            for group in optimizer.param_groups:
                group["warmup_steps"] = num_epochs * steps_per_epoch // 20

    @classmethod
    def build_optimizer(cls, name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        make = from_package("schedulefree", cls.packaged[name])
        options = {"momentum": momentum or 0.9} if name == "sgd" else {}
        optimizer = make(parameters, lr=lr, weight_decay=weight_decay, **options)
        optimizer.train()
        return optimizer

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in effect; 0 before the first step."""
        return [float(group["scheduled_lr"]) for group in self.optimizer.param_groups]


class ScheduleFreeRAdam(ScheduleFree):
    """Schedule-free RAdam, the package's newest form, which brings its own warm-up."""

    usual_lr = {"adamw": 0.0025}
    packaged = {"adamw": "RAdamScheduleFree"}
    knows_length = False


class DAdaptation(SelfTuning):
    """D-Adaptation: SGD or Adam that find their rate. Source: Defazio and Mishchenko, 2023."""

    usual_lr = {"sgd": 1.0, "adam": 1.0, "adamw": 1.0}
    rate = "factor"

    @classmethod
    def build_optimizer(cls, name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        make = from_package("dadaptation", "DAdaptSGD" if name == "sgd" else "DAdaptAdam")
        options = {"momentum": momentum} if name == "sgd" else {"decouple": name == "adamw"}
        with contextlib.redirect_stdout(io.StringIO()):  # it announces decoupled weight decay
            optimizer = make(parameters, lr=lr, weight_decay=weight_decay, **options)
        if "g0_norm" in optimizer.defaults:  # version 2, which does not tell its rate
            raise ValueError("the package dadaptation is older than version 3: pip install --upgrade dadaptation")
        return optimizer

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in effect: lr times the estimated distance d, for SGD over the first gradient's norm."""
        groups = self.optimizer.param_groups
        return [float(group["lr"] * group["d"]) / group.get("g0_norm", 1.0) for group in groups]


class Prodigy(DAdaptation):
    """Prodigy, the Adam that followed D-Adaptation. Source: Mishchenko and Defazio, 2023."""

    usual_lr = {"adam": 1.0, "adamw": 1.0}

    @classmethod
    def build_optimizer(cls, name: str, parameters: Any, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        make = from_package("prodigyopt", "Prodigy")
        with contextlib.redirect_stdout(io.StringIO()):
            return make(parameters, lr=lr, weight_decay=weight_decay, decouple=name == "adamw")


class DAdaptationCosine(CosineFactor, DAdaptation):
    """D-Adaptation with a cosine on its factor."""


class ProdigyCosine(CosineFactor, Prodigy):
    """Prodigy with a cosine on its factor."""

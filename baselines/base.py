"""What all rivals share, and what a rival says of itself."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlr_snet_optim.loop import check_state
from mlr_snet_optim.ranks import all_reduce_mean
from mlr_snet_optim.rates import copied_rates, lr_ratios
from utils import build_optimizer


class Baseline(ABC):
    """A schedule that MLR-SNet is compared with. Scripts and tables read here what a rival is and needs."""

    usual_lr: Mapping[str, float] = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}  # for each optimizer that it works with
    text_lr = 20.0  # usual in tables for SGD on text, with clipped gradients
    rate = "initial"  # what lr is: the initial or peak rate, a "factor" of the rate that it finds, or "none": not used
    has_beta = False  # whether its constructor takes beta, the step on the rate
    knows_length = False  # whether its rates depend on the length of the run
    for_text = False  # whether its usual rate of SGD is one for language models
    needs_validation = False  # whether it reads data held out of the training set
    own_direction = False  # whether it replaces the optimizer's direction
    second_order = False  # whether step() differentiates the loss again, so that its graph has to be kept
    takes: tuple[str, ...] = ()  # what else its constructor takes: "network", "meta_loss" or "validate"
    remembered: tuple[str, ...] = ("num_steps",)  # the attributes that make up the state
    scheduler: Any  # another package's, where there is one
    build_optimizer = staticmethod(build_optimizer)

    def __init__(self, optimizer: Optimizer, num_epochs: int, steps_per_epoch: int):
        self.ratios = lr_ratios(optimizer)  # refuses an optimizer whose rates are all zero
        self.optimizer, self.num_epochs, self.steps_per_epoch = optimizer, num_epochs, steps_per_epoch
        self.initial_lr = max(float(group["lr"]) for group in optimizer.param_groups)
        self.num_steps = 0

    def prepare(self) -> None:  # noqa: B027
        """What comes before the forward pass: nothing."""

    @abstractmethod
    def step(self, loss: float | Tensor) -> None:
        """Set the rate of the step about to be taken. loss is this rank's training loss, 0-d."""

    def get_last_lr(self) -> list[float | Tensor]:
        """Copies of the parameter groups' rates, as last set."""
        return copied_rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, beside the optimizer's own state_dict."""
        state = {name: getattr(self, name) for name in self.remembered}
        if "scheduler" in state:
            state["scheduler"] = state["scheduler"].state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(). ValueError for a state of another schedule."""
        check_state(self, state, self.remembered)
        device = self.optimizer.param_groups[0]["params"][0].device
        for name, value in state.items():
            if isinstance(value, Tensor):
                value = value.to(device)
            if isinstance(value, list):
                value = [tensor.to(device) for tensor in value]
            if name == "scheduler":
                self.scheduler.load_state_dict(value)
            else:
                setattr(self, name, value)

    def _starts_new_epoch(self) -> bool:
        """Whether the step about to be taken is the first one of an epoch, the run's first epoch apart."""
        return self.num_steps > 0 and self.num_steps % self.steps_per_epoch == 0


def mean_loss(loss: float | Tensor) -> Tensor:
    """The mean over the ranks."""
    return all_reduce_mean(torch.as_tensor(loss).detach())


def from_package(module: str, name: str) -> Any:
    """A class of an optional package. ValueError where the package is missing or too old."""
    package = module.split(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise ValueError(f"the package {package} is missing: pip install {package}") from None
    except AttributeError:
        raise ValueError(f"the package {package} has no {name}: pip install --upgrade {package}") from None

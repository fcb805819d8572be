"""A running average of a network's weights: evaluated beside the live ones, and a point for the meta gradient."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from mlr_snet import Update, lookahead, preserved
from utils import average_buffers


def auto_decay(steps_per_epoch: int) -> float:
    """The β whose average reaches back about an epoch, from 0.9 to 0.999."""
    return min(max(1 - 1 / steps_per_epoch, 0.9), 0.999)


@contextlib.contextmanager
def fresh_statistics(network: nn.Module, task: Any) -> Iterator[None]:
    """BatchNorm statistics measured anew on up to 50 training batches; restores the network's own on exit."""
    with preserved(network.buffers()):
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            batches = itertools.islice(task.train_batches(0), min(50, task.steps_per_epoch))
            # Eager, for a mean over batches would be compiled anew at each of them.
            with torch.compiler.set_stance("force_eager"), task.autocast():
                update_bn(batches, network)
            average_buffers(network)
        yield


@contextlib.contextmanager
def evaluating(optimizer: Optimizer, network: nn.Module, task: Any) -> Iterator[None]:
    """The network as it is meant to be evaluated: schedule-free methods at their average, its BatchNorm recomputed."""
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    optimizer.eval()
    with fresh_statistics(network, task):
        yield
    optimizer.train()


class Average:
    """w̄_t = β·w̄_{t−1} + (1 − β)·w_t, from w̄_0 = w_0. One copy of the weights.

    Train through following(), or call update() after every step.

    As the meta point of a MetaMLRSNetLR it stands for the lookahead point: the meta gradient is taken at
    w̄_{t+1} = β·w̄_t + (1 − β)·(w_t − lr·d_t), whose derivative in lr is −(1 − β)·d_t. Noise averages out of w̄, so only
    what lasts counts. hypergradient leaves out the factor 1 − β, since Adam is invariant to it.
    """

    def __init__(self, network: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"average decay {decay}: must be at least 0 and below 1")
        self.network, self.decay = network, decay
        self.parameters: list[Tensor] = list(network.parameters())
        self.weights = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        # torch's AveragedModel, which does the same, makes the host wait for the GPU at every update.
        torch._foreach_lerp_(self.weights, self.parameters, 1 - self.decay)

    def following(self, steps: Iterator[Any]) -> Iterator[Any]:
        """The steps of a training loop, each with its update()."""
        for step in steps:
            self.update()
            yield step

    @contextlib.contextmanager
    def __call__(self, network: nn.Module, update: Update, lr: float | Tensor) -> Iterator[dict[Tensor, Tensor]]:
        """The network at w̄_{t+1} inside the block; yields w_t by parameter. Restores it bit for bit on exit."""
        with lookahead(network, update, lr) as weights:
            self._mix_in(self.decay)
            yield weights

    @contextlib.contextmanager
    def swapped_in(self, task: Any) -> Iterator[nn.Module]:
        """The network at w̄_t inside the block, ready to be evaluated. Restores it bit for bit on exit."""
        with preserved(self.parameters):
            self._mix_in(1.0)
            with fresh_statistics(self.network, task):
                yield self.network

    @torch.no_grad()
    def _mix_in(self, share: float) -> None:
        """w ← share·w̄_t + (1 − share)·w."""
        torch._foreach_lerp_(self.parameters, self.weights, share)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)

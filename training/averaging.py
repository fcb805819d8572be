"""Evaluation at averaged weights: with BatchNorm statistics measured for them."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from mlr_snet_optim.average import Average
from mlr_snet_optim.restoring import preserved
from utils import average_buffers


@contextlib.contextmanager
def fresh_statistics(network: nn.Module, task: Any) -> Iterator[None]:
    """BatchNorm statistics measured anew on up to 50 training batches; restores the network's own on exit."""
    with preserved(network.buffers()):
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            batches = _without_short(itertools.islice(task.train_batches(0), min(50, task.steps_per_epoch)))
            # Eager, for a mean over batches would be compiled anew at each of them.
            with torch.compiler.set_stance("force_eager"), task.autocast():
                update_bn(batches, network)
            average_buffers(network)
        yield


def _without_short(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches without a short last one, whose noisy statistics would weigh as much as those of the others."""
    largest = 0
    for batch in batches:
        largest = max(largest, batch.size)
        if 2 * batch.size >= largest:
            yield batch


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


@contextlib.contextmanager
def evaluating_average(average: Average, task: Any) -> Iterator[None]:
    """The average's network at the averaged weights inside the block, ready to be evaluated; restored on exit."""
    with average.averaged_weights() as network, fresh_statistics(network, task):
        yield

"""Lightning's LR finder, the rival of measure_lr_scale."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.base import from_package
from mlr_snet_scale import MeasuredScale, try_rates

FINDER = ("lightning.pytorch.tuner.lr_finder", "_LRFinder")


def lightning_lr_finder(
    network: nn.Module, optimizer: Optimizer, next_loss: Callable[[], Tensor], num_steps: int,
    max_norm: float | None = None, num_classes: int | None = None, perplexity: bool = False,
) -> MeasuredScale:
    """The rate that Lightning's LR finder suggests by default. The arguments are those of measure_lr_scale.

    The finder takes 100 steps whatever num_steps is, and reads nothing but the losses: num_classes and perplexity make
    no difference to it. ValueError where the package lightning is missing, or where the loss is finite at too few
    rates.
    """
    from_package(*FINDER)  # refuses before a step is taken
    rates = finder_rates()
    range_test = try_rates(network, optimizer, next_loss, "range test", rates, max_norm)
    return MeasuredScale(suggestion(rates, range_test.losses), [range_test])


def finder_rates(high: float = 1.0) -> list[float]:
    """The rates of Lightning's range test, one a step. As in its Trainer, the second of them is left out."""
    low, num_rates = 1e-8, 100
    return [low, *(low * (high / low) ** (number / num_rates) for number in range(2, num_rates + 1))]


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the smoothed loss falls most steeply; what follows a divergence is ignored.

    losses are the training losses at the rates, step by step. ValueError where too few of them are finite.
    """
    smoothed = _smoothed(losses)
    finder = from_package(*FINDER)("exponential", rates[0], rates[-1], len(rates))
    finder.results = {"lr": rates[: len(smoothed)], "loss": smoothed}
    lr = finder.suggestion()
    if lr is None:
        raise ValueError(f"Lightning's LR finder has no suggestion: too few finite losses in {len(smoothed)} steps")
    return lr


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The losses as Lightning's finder sees them: smoothed by 0.98, up to the first above 4 times the lowest."""
    average, lowest = 0.0, math.inf
    smoothed: list[float] = []
    for number, loss in enumerate(losses, start=1):
        average = 0.98 * average + 0.02 * loss
        value = average / (1 - 0.98 ** (number + 1))
        smoothed.append(value)
        if value > 4 * lowest:
            break
        lowest = min(lowest, value)
    return smoothed

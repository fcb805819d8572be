"""The schedules that MLR-SNet is compared with. A rival is one class in its family's file and one line in SCHEDULES.

    of_time           functions of the time
    from_losses       rates from losses
    from_gradients    rates from gradients
    self_tuning       optimizers that set their rate themselves

All are stepped like MLRSNetLR: step(loss) between backward() and optimizer.step(), with this rank's loss where there
are several. greedy and the self-tuning optimizers come from packages that are optional.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.base import Baseline
from baselines.from_gradients import HD, L4, RTHO, L4Adam
from baselines.from_losses import Greedy, Plateau, Val
from baselines.of_time import SGDR, WSD, Cosine, Exponential, Fixed, Linear, Multistep, OneCycle, WarmupCosine
from baselines.self_tuning import (
    DAdaptation,
    DAdaptationCosine,
    Prodigy,
    ProdigyCosine,
    ScheduleFree,
    ScheduleFreeRAdam,
)

SCHEDULES: dict[str, type[Baseline]] = {
    "fixed": Fixed,
    "multistep": Multistep,
    "exponential": Exponential,
    "cosine": Cosine,
    "sgdr": SGDR,
    "onecycle": OneCycle,
    "warmup-cosine": WarmupCosine,
    "linear": Linear,
    "wsd": WSD,
    "val": Val,
    "plateau": Plateau,
    "greedy": Greedy,
    "hd": HD,
    "rtho": RTHO,
    "l4mom": L4,
    "l4adam": L4Adam,
    "schedule-free": ScheduleFree,
    "schedule-free-radam": ScheduleFreeRAdam,
    "prodigy": Prodigy,
    "prodigy-cosine": ProdigyCosine,
    "dadaptation": DAdaptation,
    "dadaptation-cosine": DAdaptationCosine,
}


def default_lr(schedule: str, optimizer: str) -> float:
    """The usual initial rate of a baseline. ValueError for one that is unknown or does not work with the optimizer."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
    usual_lr = SCHEDULES[schedule].usual_lr
    if optimizer not in usual_lr:
        raise ValueError(f"{schedule} works with the optimizer {' or '.join(usual_lr)}, not {optimizer}")
    return usual_lr[optimizer]


def default_beta(optimizer: str) -> float:
    """The usual step of hd and rtho on the rate."""
    return 1e-3 if optimizer == "sgd" else 1e-7


def build_baseline(
    schedule: str, optimizer: str, network: nn.Module, task: Any, num_epochs: int, lr: float | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, beta: float | None = None,
    meta_loss: Callable[[], Tensor] | None = None,
) -> tuple[Optimizer, Baseline]:
    """The optimizer ("sgd", "adam" or "adamw") and its schedule.

    lr is the initial rate and beta the step on the rate of those that have one; the default is the usual one.
    meta_loss returns the 0-d loss of the network on the next validation batch, for rtho. ValueError for what does not
    go together and for a package that is not installed.
    """
    usual_lr = default_lr(schedule, optimizer)
    rival = SCHEDULES[schedule]
    if "meta_loss" in rival.takes and meta_loss is None:
        raise ValueError(f"{schedule} needs meta_loss, the loss on the next validation batch")
    offered = {"network": network, "meta_loss": meta_loss, "validate": lambda: task.validate(network)}
    options: dict[str, Any] = {name: offered[name] for name in rival.takes}
    if rival.has_beta:
        options["beta"] = default_beta(optimizer) if beta is None else beta
    built = rival.build_optimizer(
        optimizer, network.parameters(), usual_lr if lr is None else lr, momentum, weight_decay
    )
    return built, rival(built, num_epochs, task.steps_per_epoch, **options)

"""MLR-SNet in Lightning: a callback that sets the rate of every optimizer step, or learns to.

    use = partial(MLRSNetLR, nets="recommended", num_classes=10, cooldown=0.2)
    learn = partial(MetaMLRSNetLR, net=MLRSNet(), network=module, meta_loss=meta_loss, num_classes=10, cooldown=0.2)
    Trainer(callbacks=[MLRSNetCallback(use)], max_epochs=90).fit(module, loader)

Lightning has no hook between clipping and the update: on_before_optimizer_step comes before the clipping. So the
schedule attaches to the optimizer itself and acts inside its step(). The callback only collects the loss.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mlr_snet import MLRSNetLR

SET_RATES_THEMSELVES = {  # and what to use in their place
    StochasticWeightAveraging: "average the weights by WeightAveraging or EMAWeightAveraging",
    BaseFinetuning: "unfreeze layers and add their group to the optimizer in the module's on_train_epoch_start",
    LearningRateFinder: "give the schedule gamma=lambda: measure_lr_scale(...).gamma",
}


class MLRSNetCallback(Callback):
    """Drives the module's optimizer; `schedule` is the schedule from the start of training on.

    make_schedule is called with optimizer and num_steps, the planned optimizer steps, and returns the schedule. The
    applied rate is logged as "lr"; the state goes into the checkpoint. Where a checkpoint has none, the schedule starts
    at the run's step of the plan, with a warning. Raises ValueError for manual optimization, for a scheduler or a
    callback that sets rates beside this one, and for a run without a planned end.
    """

    def __init__(self, make_schedule: Callable[..., MLRSNetLR]):
        self.make_schedule = make_schedule
        self.schedule: MLRSNetLR | None = None
        self.saved: dict[str, Any] = {}
        self.handle: RemovableHandle | None = None
        self.losses: list[Tensor] = []  # of the micro-batches since the last step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_step == 0:
            self.saved = {}  # of another run
        for callback in trainer.callbacks:
            for kind, instead in SET_RATES_THEMSELVES.items():
                if stage == "fit" and isinstance(callback, kind):
                    name = type(callback).__name__
                    raise ValueError(f"{name} sets learning rates itself, as MLRSNetCallback does: {instead}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "MLRSNetCallback needs automatic optimization; in a manual training_step call schedule.step(loss) "
                "between manual_backward() and optimizer.step()"
            )
        if trainer.lr_scheduler_configs:
            raise ValueError("configure_optimizers returns a scheduler, too: return only the optimizer")
        self.schedule = self.make_schedule(optimizer=trainer.optimizers[0], num_steps=planned_steps(trainer))
        if self.saved:
            self.schedule.load_state_dict(self.saved)
        elif trainer.global_step:
            self.schedule.steps_taken = trainer.global_step
            rank_zero_warn(
                f"the checkpoint has no state of a schedule: it starts at step {trainer.global_step} of the "
                f"{self.schedule.num_steps} planned, with a fresh hidden state, and sets γ there"
            )
        self.saved = {}
        self.handle = self.schedule.attach(self.next_loss)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A window of micro-batches begins. What is still there belongs to a step that fp16 has skipped."""
        self.losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Lightning has divided the loss by the present accumulation, and fp16 has scaled it."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.scale(torch.ones_like(loss)) if scaler else 1.0
        self.losses.append(loss.detach() * trainer.accumulate_grad_batches / scale)

    def next_loss(self) -> Tensor | None:
        """The mean loss of the window; None where every training_step returned None."""
        return torch.stack(self.losses).mean() if self.losses else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.schedule:
            pl_module.log("lr", self.schedule.get_last_lr()[0])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer, which another fit() may use, and keep the state for one that goes on."""
        if self.schedule and self.handle:
            self.handle.remove()
            self.saved = self.saved or self.schedule.state_dict()  # not empty: it could not be loaded

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.schedule and self.handle:
            self.handle.remove()
            self.saved = self.schedule.state_dict()  # for another fit() of this trainer, which goes on

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict() if self.schedule else self.saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict  # Lightning restores callbacks before it builds the optimizer


def planned_steps(trainer: Trainer) -> int:
    """The optimizer steps of the run, with a warning where something else may end it earlier.

    Raises ValueError for a run that only a time limit or nothing ends.
    """
    num_steps, num_batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    for callback in trainer.callbacks:
        is_changing = isinstance(callback, GradientAccumulationScheduler)
        if is_changing and trainer.max_epochs != -1 and math.isfinite(num_batches):
            accumulations = map(callback.get_accumulate_grad_batches, range(trainer.max_epochs))
            num_steps = sum(math.ceil(num_batches / accumulation) for accumulation in accumulations)
            num_steps = num_steps if trainer.max_steps == -1 else min(num_steps, trainer.max_steps)
    if not 0 < num_steps < math.inf:
        raise ValueError(
            "the run has no planned end: give the Trainer max_steps, or max_epochs and a loader with a length"
        )
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):
        rank_zero_warn(f"the schedule plans {num_steps} steps; max_time may end the run before them")
    if trainer.max_epochs != -1 and math.isinf(num_batches):
        rank_zero_warn(f"the schedule plans {num_steps} steps; max_epochs may end the run before them")
    return int(num_steps)

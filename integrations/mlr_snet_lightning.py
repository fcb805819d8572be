"""MLR-SNet in Lightning: a callback that sets the rate of every optimizer step, or learns to.

    use = partial(MLRSNetLR, nets=load_schedules(), num_classes=10)
    learn = partial(MetaMLRSNetLR, net=MLRSNet(), network=module, meta_loss=meta_loss, num_classes=10)
    Trainer(callbacks=[MLRSNetCallback(use)], max_epochs=90).fit(module, loader)

Lightning has no hook between clipping and the update: on_before_optimizer_step comes before the clipping. So the
schedule attaches to the optimizer itself and acts inside its step(). The callback only collects the loss.
"""

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mlr_snet import MLRSNetLR


class MLRSNetCallback(Callback):
    """Drives the module's optimizer; `schedule` is the schedule from the start of training on.

    make_schedule is called with optimizer, num_epochs and steps_per_epoch, in optimizer steps, and returns the
    schedule. The applied rate is logged as "lr"; the state goes into the checkpoint. Raises ValueError for manual
    optimization, for a scheduler beside this one, and for a run without an end.
    """

    def __init__(self, make_schedule: Callable[..., MLRSNetLR]):
        self.make_schedule = make_schedule
        self.schedule: MLRSNetLR | None = None
        self.saved: dict[str, Any] = {}
        self.losses: list[Tensor] = []  # of the micro-batches since the last step, over accumulate_grad_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "MLRSNetCallback needs automatic optimization; in a manual training_step call schedule.step(loss) "
                "between manual_backward() and optimizer.step()"
            )
        if trainer.lr_scheduler_configs:
            raise ValueError("configure_optimizers returns a scheduler, too: return the optimizer alone")
        num_epochs, steps_per_epoch = planned_run(trainer)
        self.schedule = self.make_schedule(
            optimizer=trainer.optimizers[0], num_epochs=num_epochs, steps_per_epoch=steps_per_epoch
        )
        if self.saved:
            self.schedule.load_state_dict(self.saved)
            self.saved = {}
        self.accumulation = trainer.accumulate_grad_batches
        self.handle = self.schedule.attach(self.next_loss)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A window of micro-batches begins. What is still there belongs to a step that fp16 has skipped."""
        self.losses = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.losses.append(loss.detach() / scaler.get_scale() if scaler else loss.detach())

    def next_loss(self) -> Tensor | None:
        """The mean loss of the window. The last one of an epoch can be short; Lightning divides by the full length."""
        if not self.losses:
            return None  # every training_step returned None
        return sum(self.losses) * (self.accumulation / len(self.losses))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.schedule:
            pl_module.log("lr", self.schedule.get_last_lr()[0])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.schedule:
            self.handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict() if self.schedule else self.saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict  # Lightning restores callbacks before it builds the optimizer


def planned_run(trainer: Trainer) -> tuple[int, int]:
    """The epochs of a run and the optimizer steps of each. A run planned in steps has about 30 equal "epochs"."""
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if trainer.max_steps == -1 and math.isfinite(steps_per_epoch) and trainer.max_epochs != -1:
        return trainer.max_epochs, math.ceil(steps_per_epoch)
    if trainer.max_steps == -1:
        raise ValueError("the run has no end: give the Trainer max_steps, or max_epochs and a loader with a length")
    steps = max(1, trainer.max_steps // 30)
    return trainer.max_steps // steps, steps

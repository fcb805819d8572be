"""MLR-SNet in the Hugging Face Trainer: sets the rate of every optimizer step, or learns to.

    use = partial(MLRSNetLR, nets=load_schedules(), num_classes=1000, perplexity=True)  # a vocabulary of 1,000
    learn = partial(MetaMLRSNetLR, net=MLRSNet(), network=model, meta_loss=meta_loss, num_classes=1000, perplexity=True)
    MLRSNetTrainer(model, args, train_dataset=texts, schedule=use).train()

No callback of the Trainer gets the loss, and its scheduler slot is stepped after the update, without one. So
training_step collects the loss, the schedule attaches to the optimizer and acts inside its step(), and the slot only
logs and saves it. For another Trainer: class MyTrainer(MLRSNetTrainer, SFTTrainer).
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from mlr_snet import MLRSNetLR


class SchedulerSlot:
    """A schedule as the Trainer's lr_scheduler: logged, saved to scheduler.pt and restored. Its step() does nothing."""

    def __init__(self, schedule: MLRSNetLR):
        self.schedule = schedule
        self.get_last_lr = schedule.get_last_lr
        self.state_dict = schedule.state_dict
        self.load_state_dict = schedule.load_state_dict

    def step(self) -> None:
        pass


class MLRSNetTrainer(Trainer):
    """The Trainer, its optimizer driven by a schedule.

    schedule is called with optimizer, num_epochs and steps_per_epoch, in optimizer steps, and returns the schedule;
    from then on it is trainer.lr_scheduler.schedule. Raises ValueError for another scheduler, warm-up and DeepSpeed.
    """

    lr_scheduler: SchedulerSlot | None

    def __init__(self, *args: Any, schedule: Callable[..., MLRSNetLR], **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.lr_scheduler is not None:
            raise ValueError("optimizers=(optimizer, scheduler) beside schedule=: give (optimizer, None)")
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed hides the step of its optimizer; train with DDP or on one device")
        self.make_schedule = schedule
        self.handle: RemovableHandle | None = None
        self.window = -1  # the global step that window_loss belongs to; it counts on when fp16 skips a step
        self.window_loss: Tensor | float = 0.0

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> SchedulerSlot:
        if self.lr_scheduler is None:
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            if warmup_steps:
                raise ValueError(f"{warmup_steps} warm-up steps: a learned schedule has none; leave warmup_steps at 0")
            if self.handle:
                self.handle.remove()  # of an earlier train() with the same optimizer
            num_epochs, steps_per_epoch = self.planned_run(num_training_steps)
            schedule = self.make_schedule(
                optimizer=optimizer or self.optimizer, num_epochs=num_epochs, steps_per_epoch=steps_per_epoch
            )
            self.handle, self.window = schedule.attach(self.next_loss), -1
            self.lr_scheduler = SchedulerSlot(schedule)
            self._created_lr_scheduler = True  # the next train() makes a new one
        return self.lr_scheduler

    def planned_run(self, num_training_steps: int) -> tuple[int, int]:
        """The epochs of a run and the optimizer steps of each. A run planned in steps has about 30 equal "epochs"."""
        if self.args.max_steps <= 0:
            return math.ceil(self.args.num_train_epochs), math.ceil(num_training_steps / self.args.num_train_epochs)
        steps = max(1, num_training_steps // 30)
        return num_training_steps // steps, steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # this micro-batch's part of the mean over the window
        if self.window != self.state.global_step:
            self.window, self.window_loss = self.state.global_step, 0.0
        self.window_loss = self.window_loss + loss
        return loss

    def next_loss(self) -> Tensor | float:
        return self.window_loss

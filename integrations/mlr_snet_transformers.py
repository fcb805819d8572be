"""MLR-SNet in the Hugging Face Trainer: sets the rate of every optimizer step, or learns to.

    language = {"num_classes": len(tokenizer), "perplexity": True, "cooldown": 0.2}
    use = partial(MLRSNetLR, nets="recommended", gamma=0.001, **language)
    learn = partial(MetaMLRSNetLR, net=MLRSNet(), network=model, meta_loss=meta_loss, gamma=0.001, **language)
    MLRSNetTrainer(model, args, train_dataset=texts, schedule=use).train()

No callback of the Trainer gets the loss, and its scheduler slot is stepped after the update, without one. So
training_step collects the loss, the schedule attaches to the optimizer and acts inside its step(), and the slot only
logs and saves it. For another Trainer: class MyTrainer(MLRSNetTrainer, SFTTrainer).
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from mlr_snet import MLRSNetLR
from mlr_snet_optim.loop import unwrapped


class SchedulerSlot:
    """A schedule as the Trainer's lr_scheduler: logged, saved to scheduler.pt and restored. Its step() does nothing."""

    def __init__(self, schedule: MLRSNetLR):
        self.schedule = schedule
        self.is_restored = False
        self.get_last_lr = schedule.get_last_lr
        self.state_dict = schedule.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignores the state of one of the Trainer's own schedulers."""
        if "nets" in state:
            self.schedule.load_state_dict(state)
            self.is_restored = True

    def step(self) -> None:
        pass


class MLRSNetTrainer(Trainer):
    """The Trainer, its optimizer driven by a schedule.

    schedule is called with optimizer and num_steps, the planned optimizer steps, and returns the schedule; from then on
    it is trainer.lr_scheduler.schedule. The Trainer's warm-up becomes the schedule's, unless that has one. Where a
    checkpoint has no state of a schedule, it starts at the run's step of the plan, with a warning. Raises ValueError
    for another scheduler, for more warm-up than the run has room for, and for DeepSpeed.
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
            if self.handle:
                self.handle.remove()  # of an earlier train() with the same optimizer
            optimizer = unwrapped(optimizer or self.optimizer)  # so that a function can measure with it
            schedule = self.make_schedule(optimizer=optimizer, num_steps=num_training_steps)
            self.set_warmup(schedule, self.args.get_warmup_steps(num_training_steps), num_training_steps)
            self.handle, self.window = schedule.attach(self.next_loss), -1
            self.lr_scheduler = SchedulerSlot(schedule)
            self._created_lr_scheduler = True  # the next train() makes a new one
        return self.lr_scheduler

    def set_warmup(self, schedule: MLRSNetLR, warmup_steps: int, num_steps: int) -> None:
        """Give the schedule the Trainer's warm-up, unless it has one of its own."""
        share = warmup_steps / num_steps
        if not schedule.warmup:
            if share + schedule.cooldown > 1:
                raise ValueError(
                    f"warmup_steps {warmup_steps} and the schedule's cooldown {schedule.cooldown}: together more than "
                    f"the {num_steps} steps of the run; lower one of them"
                )
            schedule.warmup = share

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.window == -1:
            self.find_place()
        loss = super().training_step(*args, **kwargs)  # this micro-batch's part of the mean over the window
        if self.window != self.state.global_step:
            self.window, self.window_loss = self.state.global_step, 0.0
        self.window_loss = self.window_loss + loss
        return loss

    def find_place(self) -> None:
        """Start at the run's step of the plan where its first steps had no schedule."""
        slot, step = self.lr_scheduler, self.state.global_step
        if slot and step and not slot.is_restored:
            slot.schedule.steps_taken = step
            warnings.warn(
                f"the checkpoint has no state of a schedule: it starts at step {step} of the "
                f"{slot.schedule.num_steps} planned, with a fresh hidden state, and sets γ there", stacklevel=2,
            )

    def next_loss(self) -> Tensor | float:
        return self.window_loss

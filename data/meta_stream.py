"""The losses on meta and on training batches, and the arguments that a schedule takes from a task."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from mlr_snet import Task
from utils import Hidden, gather_hidden, shard_hidden


def schedule_arguments(task: Task, num_epochs: int) -> dict[str, Any]:
    """The arguments of MLRSNetLR and MetaMLRSNetLR that describe the task and the length of the run."""
    return {
        "num_steps": num_epochs * task.steps_per_epoch, "num_classes": task.num_classes, "perplexity": task.perplexity,
    }


def epoch_changes(task: Task, num_epochs: int, num_nets: int) -> list[int] | None:
    """The steps at which the authors change the nets, at whole epochs; None for a run of fewer epochs than nets."""
    if num_epochs < num_nets:
        return None
    return [place * (num_epochs // num_nets) * task.steps_per_epoch for place in range(1, num_nets)]


class LossStream:
    """The losses of the network on batch after batch, with their graphs.

    batches_from(number) is the endless stream of batches from that number on. A language model's hidden state is kept
    from one batch to the next. With several ranks, the loss is this rank's share of it: the mean over the ranks is the
    loss of the whole batch.
    """

    def __init__(self, task: Task, network: nn.Module, batches_from: Callable[[int], Iterator[Any]]):
        self.task, self.network, self.batches_from, self.index = task, network, batches_from, 0
        self.hidden: Hidden = None
        self.batches: Iterator[Any] | None = None

    def next_batch(self) -> Any:
        if self.batches is None:
            self.batches = self.batches_from(self.index)
        self.index += 1
        return next(self.batches)

    def loss(self, batch: Any) -> Tensor:
        loss, _, self.hidden = self.task.loss(self.network, batch, self.hidden)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "hidden": gather_hidden(self.hidden)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index, self.hidden, self.batches = state["index"], shard_hidden(state["hidden"]), None


class MetaStream(LossStream):
    """Calling it returns the 0-d loss on the task's next meta batch, which steers MLR-SNet."""

    def __init__(self, task: Task, network: nn.Module):
        super().__init__(task, network, task.meta_batches)

    def __call__(self) -> Tensor:
        return self.loss(self.next_batch())


class TrainStream(LossStream):
    """Calling it yields the losses on the micro-batches of the next training batch, for measuring the LR scale."""

    def __init__(self, task: Task, network: nn.Module):
        super().__init__(task, network, task.train_batches)

    def __call__(self) -> Iterator[Tensor]:
        return map(self.loss, self.task.micro_batches(self.next_batch()))

"""Image classification: splits held in memory, and the task that feeds any image data set to the training loop."""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils import Hidden, all_reduce_sum, broadcast_buffers, check_memory, shard, world_size

from .cache import say
from .corruption import Corruption, noisy_labels
from .sampling import balanced_sample, generator_for, without

# A plan lists the batches to come: the indices of their images, and the key that seeds their augmentation, or None.
Plan = Iterator[tuple[Tensor, tuple[int, ...] | None]]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, in [0, 1]


class Split(Protocol):
    """The images of one split, in memory or on disk."""

    labels: Tensor  # (number,) int64, on the device that trains
    true_labels: Tensor | None  # those before label noise, if there is some

    def corrupt(self, indices: Tensor, corruption: Corruption) -> None:
        """Damage the images of these indices."""

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        """This rank's shard of every batch of the plan: normalised images (shard, 3, height, width) on the device.

        A batch with a key is augmented; the randomness depends on the key only.
        """

    def add_to_digest(self, digest: Any) -> None:
        """Feed the images and labels to a hashlib digest."""


class Data(Protocol):
    """A data set: the number of classes, and a method that makes the training and the test split."""

    num_classes: int
    meta_pool: Tensor | None  # indices of training images that only the meta set is drawn from; None: no such images

    @property
    def image_size(self) -> int:
        """Pixels of a side."""

    def splits(self, device: torch.device, workers: int) -> tuple[Split, Split]: ...


@dataclass
class ImageData:
    """A decoded data set: uint8 images (number, 3, height, width) and int64 labels (number,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    statistics: Statistics
    augment: bool  # random crop with padding 4, and random flip
    meta_pool: Tensor | None = None

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]

    def splits(self, device: torch.device, workers: int) -> tuple["InMemorySplit", "InMemorySplit"]:
        return (
            InMemorySplit(self.train_images, self.train_labels, self.statistics, self.augment, device),
            InMemorySplit(self.test_images, self.test_labels, self.statistics, False, device),
        )


class InMemorySplit:
    """A split that is held decoded on the device, and augmented there one batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor, statistics: Statistics, augment: bool, device: torch.device):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in statistics)
        self.augment, self.device = augment, device
        self.true_labels: Tensor | None = None

    def corrupt(self, indices: Tensor, corruption: Corruption) -> None:
        images = self.images.to("cpu", copy=True)  # the data set keeps its own
        for index in indices.tolist():
            images[index] = corruption(images[index], index)
        self.images = images.to(self.device)

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        for indices, key in plan:
            own, _ = shard(len(indices))
            images = self.images[indices[own]]
            if self.augment and key is not None:
                generator = generator_for(*key, device=self.device)
                images = random_crop_and_flip(images, generator, len(indices), own)
            yield ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def add_to_digest(self, digest: Any) -> None:
        digest.update(str(list(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())


class Batch(NamedTuple):
    inputs: Tensor  # (shard, 3, height, width), normalised; this rank's shard of the batch
    targets: Tensor  # (shard,); −100 for an image that does not count
    size: int  # of the whole batch
    true_targets: Tensor | None = None  # (shard,), the targets before label noise, if there is some


class ImageTask:
    """Image classification as the training loop sees it.

    The meta images are class-balanced, chosen by the seed, and disjoint from the training images. A batch depends on
    the seed and the step only. `corruption` damages the training images, and a share `label_noise` of the training
    labels is wrong; meta and test data stay clean. A training batch is taken in `accumulate` micro-batches. Raises
    ValueError for sizes that the data set does not allow.
    """

    perplexity = False
    clip: float | None = None
    metric = "acc"  # test_acc and train_acc are its columns of metrics.csv
    num_classes: int | None
    num_outputs: int  # of the network

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        batch_size: int,
        num_meta: int = 0,
        limit_train: int | None = None,
        limit_test: int | None = None,
        corruption: Corruption | None = None,
        label_noise: float = 0.0,
        noise_kind: str = "uniform",
        accumulate: int = 1,
        device: torch.device,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        workers: int = 0,
    ):
        self.train, self.test = data.splits(device, workers)
        labels, test_labels = self.train.labels.cpu(), self.test.labels.cpu()
        total = len(labels)
        if batch_size < world_size():
            raise ValueError(f"batch size {batch_size}: must be at least {world_size()}, one for every rank")
        pool = torch.arange(total) if data.meta_pool is None else data.meta_pool
        most_meta = min(len(pool), total - 1)
        if not 0 <= num_meta <= most_meta:
            raise ValueError(f"num_meta {num_meta}: must be from 0 to {most_meta}, the images that can be set aside")
        generator = generator_for(seed, 1)
        self.meta_indices = balanced_sample(labels, pool, num_meta, generator)
        self.train_indices = without(total, self.meta_indices if data.meta_pool is None else pool)
        if self.metric == "acc":
            check_classes(labels[self.train_indices], labels[self.meta_indices], test_labels)
        number = len(labels[self.train_indices].unique())
        self.train_indices = limited(labels, self.train_indices, limit_train, "limit_train", generator)
        lost = number - len(labels[self.train_indices].unique())
        if lost and self.metric == "acc":
            say(f"{limit_train} training images leave out {lost} of {number} classes")
        everything = torch.arange(len(test_labels))
        self.test_indices = limited(test_labels, everything, limit_test, "limit_test", generator_for(0, 2))
        if corruption is not None and corruption.severity > 0:
            self.train.corrupt(self.train_indices, corruption)
        if label_noise:
            noisy = noisy_labels(labels, self.train_indices, data.num_classes, label_noise, noise_kind, seed)
            self.train.labels, self.train.true_labels = noisy.to(device), self.train.labels
        self.num_classes = self.num_outputs = data.num_classes
        self.image_size = data.image_size  # pixels
        self.seed, self.batch_size, self.accumulate = seed, batch_size, accumulate
        self.device, self.autocast = device, autocast
        self.steps_per_epoch = len(cut(self.train_indices, batch_size))
        size, images = data.image_size, min(batch_size, len(self.train_indices))
        if accumulate > (most := max(1, images // world_size() // 2)):
            raise ValueError(f"accumulate {accumulate}: at most {most}, so that each part of a batch has two images")
        check_memory(4 * 3 * size**2 * images, f"{images} images of {size}×{size} pixels in a batch")

    def in_words(self) -> str:
        """How many images there are, such as "1,238 training, 200 held-out and 359 test images"."""
        sizes = [len(indices) for indices in (self.train_indices, self.meta_indices, self.test_indices)]
        return "{:,} training, {:,} held-out and {:,} test images".format(*sizes)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify images, labels and split indices; the same on every rank."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            split.add_to_digest(digest)
        for indices in (self.train_indices, self.meta_indices, self.test_indices):
            digest.update(str(len(indices)).encode())
            digest.update(indices.numpy().data)
        return digest.hexdigest()[:16]

    def train_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of training batches from global step `start` on; every epoch has its own order."""
        plan = self._plan(self.train_indices, start, 3)
        keys = ((indices, (self.seed, 4, *divmod(number, self.steps_per_epoch))) for indices, number in plan)
        return self._batches(self.train, keys)

    def meta_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of meta batches from batch number `start` on. ValueError without meta images."""
        self._require_meta()
        plan = self._plan(self.meta_indices, start, 5)
        return self._batches(self.train, ((indices, (self.seed, 6, number)) for indices, number in plan))

    def loss(self, network: nn.Module, batch: Batch, hidden: Hidden) -> tuple[Tensor, Tensor, Hidden]:
        """The batch's mean cross-entropy (0-d) and accuracy in %; the hidden state is for text and passes through.

        The accuracy is 0-d. Under label noise it is (2,): the accuracy on the noisy labels and that on the true ones.
        """
        with self.autocast():
            outputs = network(batch.inputs)
        number = batch.size / world_size()  # so that the mean over the ranks is the whole batch's
        loss, correct = self.sums(outputs, batch.targets)
        accuracy = 100 * (correct.detach() / number)
        if batch.true_targets is not None:
            truly_correct = (outputs.detach().argmax(1) == batch.true_targets).sum()
            accuracy = torch.stack([accuracy, 100 * (truly_correct / number)])
        return loss / number, accuracy, hidden

    def sums(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the images of the cross-entropy and of the correct guesses, 0-d."""
        loss = functional.cross_entropy(outputs.float(), targets, reduction="sum")
        return loss, (outputs.detach().argmax(1) == targets).sum()

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The batch in parts, as many on every rank; their losses add up to that of the batch.

        A part has at least two images, for BatchNorm.
        """
        number = max(1, min(self.accumulate, batch.size // world_size() // 2))
        if number == 1:
            return [batch]
        tensors = [batch.inputs, batch.targets, *([] if batch.true_targets is None else [batch.true_targets])]
        parts = zip(*(tensor.tensor_split(number) for tensor in tensors), strict=True)
        return [Batch(inputs, targets, batch.size, *others) for inputs, targets, *others in parts]

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy (%) over the test images. Restores the network's mode."""
        loss, accuracy = self._measure(network, self.test, self.test_indices)
        return {"test_loss": loss, f"test_{self.metric}": accuracy}

    def validate(self, network: nn.Module) -> float:
        """Mean loss over the meta images, without augmentation. ValueError if there are none."""
        self._require_meta()
        return self._measure(network, self.train, self.meta_indices)[0]

    def scale_loss(self, network: nn.Module) -> float:
        """L of the formula for γ: the mean loss over the training images in eval mode. Source: the authors' utils.py.

        Deviation: without augmentation, and above 0, since γ has a floor where the images are memorised.
        """
        return max(self._measure(network, self.train, self.train_indices)[0], 1e-12)

    def train_metrics(self, loss: float, accuracy: float, clean_accuracy: float | None = None) -> dict[str, float]:
        """The training columns of metrics.csv, from the epoch's mean loss and accuracy (%).

        Under label noise, clean_accuracy is the accuracy on the true labels.
        """
        columns = {"train_loss": loss, f"train_{self.metric}": accuracy}
        if clean_accuracy is not None:
            columns["train_clean_acc"] = clean_accuracy
        return columns

    @torch.no_grad()
    def _measure(self, network: nn.Module, split: Split, indices: Tensor) -> tuple[float, float]:
        """Mean loss and accuracy (%) over the images of these indices."""
        training = network.training
        network.eval()
        broadcast_buffers(network)
        loss = correct = 0.0
        most = max(1, 4 * self.batch_size // self.accumulate)  # at a time: without gradients each needs less memory
        for batch in self._batches(split, ((part, None) for part in indices.to(self.device).split(500))):
            with self.autocast():
                outputs = torch.cat([network(images) for images in batch.inputs.split(most)])
            batch_loss, batch_correct = self.sums(outputs, batch.targets)
            loss += batch_loss.item()
            correct += batch_correct.item()
        network.train(training)
        loss, correct = all_reduce_sum(loss, correct)
        return loss / len(indices), 100 * correct / len(indices)

    def _require_meta(self) -> None:
        if not len(self.meta_indices):
            raise ValueError("num_meta 0: there are no meta images; give at least 1")

    def _plan(self, indices: Tensor, start: int, stream: int) -> Iterator[tuple[Tensor, int]]:
        """The images and the number of each batch from `start` on: pass after pass, each in its own order."""
        per_pass = len(cut(indices, self.batch_size))
        for pass_ in itertools.count(start // per_pass):
            order = torch.randperm(len(indices), generator=generator_for(self.seed, stream, pass_))
            batches = cut(indices[order].to(self.device), self.batch_size)
            for number in range(max(start, pass_ * per_pass), (pass_ + 1) * per_pass):
                yield batches[number % per_pass], number

    def _batches(self, split: Split, plan: Plan) -> Iterator[Batch]:
        plan, same_plan = itertools.tee(plan)  # a split may read ahead of the batches that it gives
        for (indices, _), inputs in zip(same_plan, split.batches(plan), strict=False):
            own, is_duplicate = shard(len(indices))
            targets = split.labels[indices[own]]
            true_targets = split.true_labels[indices[own]] if split.true_labels is not None else None
            if is_duplicate:
                targets.fill_(-100)
                if true_targets is not None:
                    true_targets.fill_(-100)
            yield Batch(inputs, targets, len(indices), true_targets)


def limited(labels: Tensor, indices: Tensor, limit: int | None, name: str, generator: torch.Generator) -> Tensor:
    """A class-balanced sample of the indices, or all where there is no limit. ValueError for more than there are."""
    if limit is None:
        return indices
    if not 1 <= limit <= len(indices):
        raise ValueError(f"{name} {limit}: must be from 1 to {len(indices)}, the images available")
    return balanced_sample(labels, indices, limit, generator)


def check_classes(train: Tensor, meta: Tensor, test: Tensor) -> None:
    """Check the labels of the three sets: ValueError for a class without a training image, since a class-balanced
    sample can take them all. Says where a class has more meta images than training images.
    """
    number = int(torch.cat([train, meta, test]).max()) + 1
    training, steering, tested = (torch.bincount(labels, minlength=number) for labels in (train, meta, test))
    for label in ((training == 0) & (steering + tested > 0)).nonzero().flatten().tolist():
        if steering[label]:
            raise ValueError(f"num_meta {len(meta)}: holds out all {steering[label]} images of class {label}; lower it")
        raise ValueError(f"class {label}, counted from 0, has {tested[label]} images to test on and none to train on")
    if few := (steering > training).nonzero().flatten().tolist():
        say(f"more images are held out to steer than to train on in {len(few)} of {number} classes, such as "
            f"{steering[few[0]]} and {training[few[0]]} of class {few[0]}, counted from 0")


def cut(indices: Tensor, size: int) -> list[Tensor]:
    """Batches of `size`, the last one of what is left over.

    A single index left over joins the batch before it, since BatchNorm over 1×1 features cannot train on one image.
    """
    batches = list(indices.split(size))
    if size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def random_crop_and_flip(
    images: Tensor, generator: torch.Generator, number: int, own: slice, padding: int = 4
) -> Tensor:
    """Each image (shard, 3, h, w) shifted by up to `padding` pixels over black, and mirrored with probability 1/2.

    The images are the part `own` of a batch of `number`, and change as they would in the whole batch.
    """
    _, _, height, width = images.shape
    where: dict[str, Any] = {"generator": generator, "device": images.device}
    down, right = torch.randint(2 * padding + 1, (2, number, 1), **where)[:, own]
    flip = torch.rand(number, 1, **where)[own] < 0.5
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = right + torch.where(flip, width - 1 - columns, columns)  # (shard, width)
    rows = down + torch.arange(height, device=images.device)  # (shard, height)
    padded = functional.pad(images, (padding,) * 4)
    first = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[first, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

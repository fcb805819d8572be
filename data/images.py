"""Image classification: the data sets that fit in memory, and the task that feeds any of them to the loop."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import resize

from distributed import all_reduce_sum, broadcast_buffers, shard, world_size

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


Key = Callable[[int, int], tuple[int, ...]]  # of the lap and the place in it -> what seeds a batch's augmentation
Plan = Iterator[tuple[Tensor, tuple[int, ...] | None]]  # batches: indices of images, and the key of their augmentation


class Split(Protocol):
    """The images of one split, wherever they lie."""

    labels: Tensor  # (number,) int64, on the device that trains

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        """This rank's share of every batch of the plan: images (share, 3, height, width), normalised, on the device.

        Where there is a key, they are augmented by randomness that depends on the key alone.
        """


class Data(Protocol):
    """A data set: its number of classes, and what makes its training and test split."""

    num_classes: int

    def splits(self, device: torch.device, workers: int) -> tuple[Split, Split]: ...


@dataclass
class ImageData:
    """A data set decoded: uint8 images (number, 3, height, width) and int64 labels (number,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    statistics: tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, in 0 … 1
    augment: bool  # random crop with padding 4, and random flip

    def splits(self, device: torch.device, workers: int) -> tuple["Resident", "Resident"]:
        return (
            Resident(self.train_images, self.train_labels, self.statistics, self.augment, device),
            Resident(self.test_images, self.test_labels, self.statistics, False, device),
        )


class Resident:
    """A split that lies decoded on the device and is augmented there, a batch at a time."""

    def __init__(
        self, images: Tensor, labels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]], augment: bool,
        device: torch.device,
    ):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in statistics)
        self.augment, self.device = augment, device

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        for indices, key in plan:
            mine, _ = shard(len(indices))
            images = self.images[indices[mine]]
            if self.augment and key is not None:
                images = random_crop_and_flip(images, generator_for(*key, device=self.device), len(indices), mine)
            yield ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _from_torchvision(name: str, make: Callable[[bool], Any], root: Path) -> list[Any]:
    """The training and the test set, downloaded and checked by torchvision where they are not at hand."""
    try:
        return [make(True), make(False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name}: not in {root} and not to be downloaded ({reason}); put it there, or try --dataset digits"
        ) from None


def _sized(images: Tensor, image_size: int | None) -> Tensor:
    return images if image_size in (None, images.shape[-1]) else resize(images, [image_size, image_size])


def _cifar(kind: Any, name: str, statistics: Any, root: Path, image_size: int | None) -> ImageData:
    sets = _from_torchvision(name, lambda train: kind(root, train=train, download=True), root)
    images = [_sized(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), image_size) for split in sets]
    labels = [torch.tensor(split.targets) for split in sets]
    return ImageData(images[0], labels[0], images[1], labels[1], len(sets[0].classes), statistics, augment=True)


def cifar10(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(torchvision.datasets.CIFAR10, "cifar10", CIFAR10_STATISTICS, root, image_size)


def cifar100(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(torchvision.datasets.CIFAR100, "cifar100", CIFAR100_STATISTICS, root, image_size)


def svhn(root: Path, image_size: int | None, seed: int) -> ImageData:
    def make(train: bool) -> Any:
        return torchvision.datasets.SVHN(str(root), split="train" if train else "test", download=True)

    sets = _from_torchvision("svhn", make, root)
    images = [_sized(torch.from_numpy(split.data), image_size) for split in sets]
    labels = [torch.from_numpy(split.labels).long() for split in sets]
    return ImageData(images[0], labels[0], images[1], labels[1], 10, HALF, augment=False)


def folder(root: Path, image_size: int | None, seed: int) -> ImageData:
    """root/train and root/test of class folders; without test, a fifth of train, class-balanced and seeded."""
    size = image_size or 32

    def decode(split: str) -> tuple[Tensor, Tensor, list[str]]:
        try:
            files = torchvision.datasets.ImageFolder(str(root / split))
            images = [resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), [size, size]) for image, _ in files]
        except OSError as error:
            hint = "expected folders train/CLASS and test/CLASS of images"
            raise ValueError(f"{root / split}: {hint} ({str(error).splitlines()[0]})") from None
        return torch.stack(images), torch.tensor(files.targets), files.classes

    images, labels, classes = decode("train")
    if (root / "test").is_dir():
        test_images, test_labels, test_classes = decode("test")
        if test_classes != classes:
            raise ValueError(f"{root}: train and test have different class folders; make them the same")
    else:
        generator = generator_for(seed, 0)
        test = balanced_sample(labels, torch.arange(len(labels)), max(1, len(labels) // 5), generator)
        train = _without(len(labels), test)
        images, labels, test_images, test_labels = images[train], labels[train], images[test], labels[test]
    return ImageData(images, labels, test_images, test_labels, len(classes), CIFAR10_STATISTICS, augment=True)


def digits(root: Path, image_size: int | None, seed: int) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, 360 of them for the test; needs no download."""
    from sklearn.datasets import load_digits  # here, since it makes a fifth of a script's start
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (torch.from_numpy(images) * (255 / 16)).round().byte().reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    images, labels = _sized(images, image_size), torch.from_numpy(labels)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return ImageData(images[train], labels[train], images[test], labels[test], 10, HALF, augment=False)


# ---------------------------------------------------------------------------------------------- randomness and splits


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every key, so that any step's randomness is known without the steps before."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def balanced_sample(labels: Tensor, candidates: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` of the candidate indices, the classes as equal as they can be."""
    shuffled = candidates[torch.randperm(len(candidates), generator=generator)]
    rank = torch.empty(len(shuffled), dtype=torch.long)  # of each image within its class
    for label in labels[shuffled].unique():
        mine = labels[shuffled] == label
        rank[mine] = torch.arange(int(mine.sum()))
    return shuffled[rank.argsort(stable=True)[:number]].sort().values


def _without(total: int, taken: Tensor) -> Tensor:
    free = torch.ones(total, dtype=torch.bool)
    free[taken] = False
    return free.nonzero().squeeze(1)


# ---------------------------------------------------------------------------------------------- the task


class Batch(NamedTuple):
    inputs: Tensor  # (share, 3, height, width), normalised; this rank's share of the batch
    targets: Tensor  # (share,); −100 for one that does not count
    size: int  # of the whole batch


class ImageTask:
    """Image classification as the loop meets it.

    Meta images are class-balanced, seeded, and disjoint from the training images. Batches depend on the seed and the
    step alone. Raises ValueError for sizes that the data set cannot give.
    """

    perplexity = False
    clip: float | None = None

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        batch_size: int,
        num_meta: int = 0,
        limit_train: int | None = None,
        limit_test: int | None = None,
        device: torch.device,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        workers: int = 0,
    ):
        self.train, self.test = data.splits(device, workers)
        labels, test_labels = self.train.labels.cpu(), self.test.labels.cpu()
        total = len(labels)
        if batch_size < world_size():
            raise ValueError(f"batch size {batch_size}: must be at least {world_size()}, one for every rank")
        if not 0 <= num_meta < total:
            raise ValueError(f"--num-meta {num_meta}: the training data hold {total} images; leave some to train on")
        if limit_train is not None and not 1 <= limit_train <= total - num_meta:
            raise ValueError(f"--limit-train {limit_train}: from 1 to {total - num_meta} images are left to train on")
        if limit_test is not None and not 1 <= limit_test <= len(test_labels):
            raise ValueError(f"--limit-test {limit_test}: from 1 to {len(test_labels)} test images are there")
        generator = generator_for(seed, 1)
        self.meta_indices = balanced_sample(labels, torch.arange(total), num_meta, generator)
        self.train_indices = _without(total, self.meta_indices)
        if limit_train is not None:
            self.train_indices = balanced_sample(labels, self.train_indices, limit_train, generator)
        self.test_indices = torch.arange(len(test_labels))
        if limit_test is not None:
            self.test_indices = balanced_sample(test_labels, self.test_indices, limit_test, generator_for(0, 2))
        self.num_classes, self.seed, self.batch_size = data.num_classes, seed, batch_size
        self.device, self.autocast = device, autocast
        self.steps_per_epoch = -(-len(self.train_indices) // batch_size)

    def train_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of training batches from global step `start` on; every epoch has its own order."""
        plan = self._plan(
            self.train_indices, self.batch_size, self.steps_per_epoch, start, 3,
            lambda epoch, place: (self.seed, 4, epoch, place),
        )
        return self._batches(self.train, plan)

    def meta_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of meta batches from number `start` on."""
        size = min(self.batch_size, len(self.meta_indices))
        per_lap = len(self.meta_indices) // size
        plan = self._plan(
            self.meta_indices, size, per_lap, start, 5, lambda lap, place: (self.seed, 6, lap * per_lap + place)
        )
        return self._batches(self.train, plan)

    def loss(self, network: nn.Module, batch: Batch, hidden: Any) -> tuple[Tensor, Tensor, Any]:
        """Mean cross-entropy (0-d), the batch's accuracy in %, and the hidden, of which images make no use."""
        with self.autocast():
            logits = network(batch.inputs)
        number = batch.size / world_size()  # so that the mean over the ranks is the whole batch's
        accuracy = 100 * ((logits.detach().argmax(1) == batch.targets).sum() / number)
        return functional.cross_entropy(logits.float(), batch.targets, reduction="sum") / number, accuracy, hidden

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Mean loss and accuracy (%) over the test images; the network's mode is restored."""
        loss, accuracy = self._measure(network, self.test, self.test_indices)
        return {"test_loss": loss, "test_acc": accuracy}

    def validate(self, network: nn.Module) -> float:
        """Mean loss over the meta images, without augmentation. ValueError where there are none."""
        if not len(self.meta_indices):
            raise ValueError("no meta images to validate on; set some aside with num_meta")
        return self._measure(network, self.train, self.meta_indices)[0]

    def train_metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """The epoch's training columns from its mean loss and accuracy (%)."""
        return {"train_loss": loss, "train_acc": accuracy}

    @torch.no_grad()
    def _measure(self, network: nn.Module, split: Split, indices: Tensor) -> tuple[float, float]:
        training = network.training
        network.eval()
        broadcast_buffers(network)
        loss = correct = 0.0
        for batch in self._batches(split, ((part, None) for part in indices.to(self.device).split(500))):
            with self.autocast():
                logits = network(batch.inputs)
            loss += functional.cross_entropy(logits.float(), batch.targets, reduction="sum").item()
            correct += (logits.argmax(1) == batch.targets).sum().item()
        network.train(training)
        loss, correct = all_reduce_sum(loss, correct)
        return loss / len(indices), 100 * correct / len(indices)

    def _plan(self, indices: Tensor, size: int, per_lap: int, start: int, order: int, key: Key) -> Plan:
        """Lap after lap over the images, each in an order of its own, from batch number `start` on."""
        lap, first = divmod(start, per_lap)
        while True:
            parts = self._order(indices, order, lap).split(size)
            for place in range(first, per_lap):
                yield parts[place], key(lap, place)
            lap, first = lap + 1, 0

    def _order(self, indices: Tensor, *key: int) -> Tensor:
        return indices[torch.randperm(len(indices), generator=generator_for(self.seed, *key))].to(self.device)

    def _batches(self, split: Split, plan: Plan) -> Iterator[Batch]:
        plan, again = itertools.tee(plan)  # a split may read ahead of what it gives
        for (indices, _), inputs in zip(again, split.batches(plan), strict=False):
            mine, is_duplicate = shard(len(indices))
            targets = split.labels[indices[mine]]
            yield Batch(inputs, targets.fill_(-100) if is_duplicate else targets, len(indices))


def random_crop_and_flip(
    images: Tensor, generator: torch.Generator, number: int, mine: slice, padding: int = 4
) -> Tensor:
    """Each image (share, 3, h, w) moved by up to `padding` pixels over black, and mirrored in half of the cases.

    The images are the part `mine` of a batch of `number`, and are treated as they would be in the whole batch.
    """
    _, _, height, width = images.shape
    where: dict[str, Any] = {"generator": generator, "device": images.device}
    down, right = torch.randint(2 * padding + 1, (2, number, 1), **where)[:, mine]
    flip = torch.rand(number, 1, **where)[mine] < 0.5
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = right + torch.where(flip, width - 1 - columns, columns)  # (share, width)
    rows = down + torch.arange(height, device=images.device)  # (share, height)
    padded = functional.pad(images, (padding,) * 4)
    first = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[first, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

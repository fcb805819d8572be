"""Image data sets that fit in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.functional import resize

from .files import first_line
from .images import ImageData, Statistics
from .sampling import balanced_sample, generator_for, without

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def cifar10(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(torchvision.datasets.CIFAR10, "cifar10", CIFAR10_STATISTICS, root, image_size)


def cifar100(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(torchvision.datasets.CIFAR100, "cifar100", CIFAR100_STATISTICS, root, image_size)


def _cifar(kind: Any, name: str, statistics: Statistics, root: Path, image_size: int | None) -> ImageData:
    train, test = _from_torchvision(name, lambda is_train: kind(root, train=is_train, download=True), root)
    train_images, test_images = (
        _resized(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), image_size) for split in (train, test)
    )
    return ImageData(
        train_images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), len(train.classes),
        statistics, augment=True,
    )


def svhn(root: Path, image_size: int | None, seed: int) -> ImageData:
    def make(is_train: bool) -> Any:
        return torchvision.datasets.SVHN(str(root), split="train" if is_train else "test", download=True)

    train, test = _from_torchvision("svhn", make, root)
    return ImageData(
        _resized(torch.from_numpy(train.data), image_size), torch.from_numpy(train.labels).long(),
        _resized(torch.from_numpy(test.data), image_size), torch.from_numpy(test.labels).long(),
        10, HALF, augment=False,
    )


def folder(root: Path, image_size: int | None, seed: int) -> ImageData:
    """root/train and root/test of class folders; without test, a class-balanced fifth of train, chosen by the seed."""
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
        train = without(len(labels), test)
        images, labels, test_images, test_labels = images[train], labels[train], images[test], labels[test]
    return ImageData(images, labels, test_images, test_labels, len(classes), CIFAR10_STATISTICS, augment=True)


def digits(root: Path, image_size: int | None, seed: int) -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, 360 of them for testing; needs no download."""
    from sklearn.datasets import load_digits  # imported here: it takes a fifth of a script's start-up time
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)  # pixels (1797, 64) from 0 to 16
    images = (torch.from_numpy(pixels) * (255 / 16)).round().byte().reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    images, labels = _resized(images, image_size), torch.from_numpy(targets)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return ImageData(images[train], labels[train], images[test], labels[test], 10, HALF, augment=False)


def _from_torchvision(name: str, make: Callable[[bool], Any], root: Path) -> tuple[Any, Any]:
    """The training and the test set, downloaded and checked by torchvision if they are not in root."""
    try:
        return make(True), make(False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name}: not in {root} and could not be downloaded ({first_line(error)}); "
            "put it there, or try --dataset digits"
        ) from None


def _resized(images: Tensor, image_size: int | None) -> Tensor:
    if image_size in (None, images.shape[-1]):
        return images
    return resize(images, [image_size, image_size])

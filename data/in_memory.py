"""Image data sets that fit in memory."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms.functional import resize

from utils import check_memory

from .cache import say
from .corruption import read_cifar_c
from .files import class_folders, decode, downloading, readable, train_and_test
from .images import ImageData, Statistics
from .sampling import balanced_sample, generator_for, without

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def cifar10(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(10, torchvision.datasets.CIFAR10, CIFAR10_STATISTICS, root, image_size)


def cifar100(root: Path, image_size: int | None, seed: int) -> ImageData:
    return _cifar(100, torchvision.datasets.CIFAR100, CIFAR100_STATISTICS, root, image_size)


def _cifar(num_classes: int, kind: Any, statistics: Statistics, root: Path, image_size: int | None) -> ImageData:
    with downloading(f"cifar{num_classes}", root, f"cifar-{num_classes}-*", "digits"):
        train, test = (kind(root, train=is_train, download=True) for is_train in (True, False))
    train_images, test_images = (
        _resized(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), image_size) for split in (train, test)
    )
    return ImageData(
        train_images, torch.tensor(train.targets), test_images, torch.tensor(test.targets), num_classes, statistics,
        augment=True,
    )


def cifar10_c(root: Path, image_size: int | None, seed: int, *, corruption: str, severity: int) -> ImageData:
    """CIFAR-10-C from root/CIFAR-10-C to train on; meta and test images are clean ones of CIFAR-10."""
    images, labels = read_cifar_c(root / "CIFAR-10-C", corruption, severity, 10)
    return _steered_by_clean_images(images, labels, cifar10(root, image_size, seed), seed)


def cifar100_c(root: Path, image_size: int | None, seed: int, *, corruption: str, severity: int) -> ImageData:
    """CIFAR-100-C from root/CIFAR-100-C to train on; meta and test images are clean ones of CIFAR-100."""
    images, labels = read_cifar_c(root / "CIFAR-100-C", corruption, severity, 100)
    return _steered_by_clean_images(images, labels, cifar100(root, image_size, seed), seed)


def _steered_by_clean_images(images: Tensor, labels: Tensor, clean: ImageData, seed: int) -> ImageData:
    """Training on these images, with a meta pool of ten clean training images of each class.

    The published images are damaged copies of CIFAR's test images, so training has seen what the test shows clean.
    Source: the abstract of the paper. Compare methods by it; its accuracies say nothing about unseen images.
    """
    everything = torch.arange(len(clean.train_labels))
    pool = balanced_sample(clean.train_labels, everything, 10 * clean.num_classes, generator_for(seed, 9))
    train_images = torch.cat([_resized(images, clean.image_size), clean.train_images[pool]])
    train_labels = torch.cat([labels, clean.train_labels[pool]])
    meta_pool = torch.arange(len(labels), len(train_labels))
    return replace(clean, train_images=train_images, train_labels=train_labels, meta_pool=meta_pool)


def svhn(root: Path, image_size: int | None, seed: int) -> ImageData:
    with downloading("svhn", root, "*_32x32.mat", "digits"):
        train, test = (torchvision.datasets.SVHN(str(root), split, download=True) for split in ("train", "test"))
    return ImageData(
        _resized(torch.from_numpy(train.data), image_size), torch.from_numpy(train.labels).long(),
        _resized(torch.from_numpy(test.data), image_size), torch.from_numpy(test.labels).long(),
        10, HALF, augment=False,
    )


def folder(root: Path, image_size: int | None, seed: int, *, skip_bad_images: bool = False) -> ImageData:
    """root/train and root/test (or root/val) of class folders; without these, a fifth of each class is for testing.

    That fifth is the same for every seed, so that a run may start from the weights of another.
    """
    size = image_size or 32
    for name in ("test", "val"):
        if os.path.lexists(root / name):  # also a link to a folder that is gone
            classes, train, test = train_and_test(root, name, skip_bad_images)
            images, labels = decode(train, root / "train", size)
            test_images, test_labels = decode(test, root / name, size)
            break
    else:
        classes, train = class_folders(root / "train")
        say(f"{root}: neither test nor val, so a fifth of each class in train is held out for testing")
        if skip_bad_images:
            train = readable(train, root / "train")
        images, labels = decode(train, root / "train", size)
        shuffled = torch.randperm(len(labels), generator=generator_for(0, 0))
        members = [shuffled[labels[shuffled] == label] for label in range(len(classes))]
        taken = torch.cat([images_of[: max(1, len(images_of) // 5)] for images_of in members]).sort().values
        test_images, test_labels = images[taken], labels[taken]
        rest = without(len(labels), taken)
        images, labels = images[rest], labels[rest]
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


def _resized(images: Tensor, image_size: int | None) -> Tensor:
    if image_size is None or image_size == images.shape[-1]:
        return images
    check_memory(3 * image_size**2 * len(images), f"{len(images)} images of {image_size}×{image_size} pixels")
    return resize(images, [image_size, image_size])

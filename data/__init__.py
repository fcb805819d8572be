"""The data sets; to add one: its loader and a line in DATASETS."""

from pathlib import Path
from typing import Any

from .images import ImageTask, cifar10, cifar100, digits, folder, svhn

DATASETS = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "folder": folder, "digits": digits}


def build_task(name: str, root: Path, *, image_size: int | None = None, seed: int, **options: Any) -> ImageTask:
    """The task of that data set under `root`; options are ImageTask's. ValueError for what cannot be had."""
    if name not in DATASETS:
        raise ValueError(f"data set {name!r}: choose from {', '.join(DATASETS)}")
    return ImageTask(DATASETS[name](root, image_size, seed), seed=seed, **options)

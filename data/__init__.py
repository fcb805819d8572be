"""The data sets. To add one, write its loader and add a line to IMAGES or TEXTS."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .corruption import DEFAULT_SEVERITY, PUBLISHED, Corruption
from .images import Data, ImageTask
from .in_memory import cifar10, cifar10_c, cifar100, cifar100_c, digits, folder, svhn
from .regression import PREDICTED, RegressionTask
from .streamed import imagenet, tinyimagenet
from .text import TextTask, ptb, pydoc, text_folder

IMAGES: dict[str, Callable[..., Data]] = {  # of root, image size and seed
    "cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "tinyimagenet": tinyimagenet, "imagenet": imagenet,
    "folder": folder, "digits": digits, "cifar10-c": cifar10_c, "cifar100-c": cifar100_c,
}
STREAMED = ("tinyimagenet", "imagenet")  # read from disk by worker processes; the others are held in memory
PUBLISHED_CORRUPTED = {"cifar10-c": 100, "cifar100-c": 1000}  # with the number of clean images for the meta set
IMAGE_FILES = ("folder", *STREAMED)  # one file per image
TEXTS = {"ptb": ptb, "text": text_folder, "pydoc": pydoc}
TOKENS = ["word", "char"]  # the units of a text
DATASETS = [*IMAGES, *TEXTS]
PREDICTIONS = ["class", *PREDICTED]


def build_task(name: str, root: Path, **options: Any) -> ImageTask | TextTask:
    """The task of the data set `name` under `root`; the options are those of text_task or of image_task.

    Raises ValueError for data that are not available, TypeError for an option that is for the other modality.
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose from {', '.join(DATASETS)}")
    return text_task(name, root, **options) if name in TEXTS else image_task(name, root, **options)


def text_task(name: str, root: Path, *, tokens: str = "word", **options: Any) -> TextTask:
    """`options` are those of TextTask. tokens, "word" or "char", is the unit of the text."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens {tokens!r}: choose from {', '.join(TOKENS)}")
    return TextTask(TEXTS[name](root, tokens), **options)


def image_task(
    name: str, root: Path, *, seed: int = 0, image_size: int | None = None, workers: int | None = None,
    skip_bad_images: bool = False, corruption: str | None = None, severity: int | None = None,
    label_noise: float | None = None, noise_kind: str | None = None, predict: str = "class", **options: Any
) -> ImageTask:
    """`options` are those of ImageTask.

    image_size is in pixels. workers is the number of processes that read a streamed data set, by default one per core
    and at most 8. skip_bad_images leaves out image files that cannot be read; without it they raise
    files.ImageFileError, in a streamed data set when their turn comes. corruption, severity (0 to 5, default 3),
    label_noise (a share) and noise_kind (default "uniform") spoil the training images, see corruption.py. predict is
    "class", or one of PREDICTED for regression on images, see regression.py.
    """
    if predict not in PREDICTIONS:
        raise ValueError(f"predict {predict!r}: choose from {', '.join(PREDICTIONS)}")
    if corruption is None and severity is not None:
        raise ValueError("severity belongs to corruption; leave it out")
    if label_noise is None and noise_kind is not None:
        raise ValueError("noise_kind belongs to label_noise; leave it out")
    if workers is not None and name not in STREAMED:
        raise ValueError(f"workers is for {' and '.join(STREAMED)}; {name} lies in memory, leave it out")
    if skip_bad_images and name not in IMAGE_FILES:
        raise ValueError(f"skip_bad_images is for {', '.join(IMAGE_FILES)}; leave it out for {name}")
    if severity is None:
        severity = DEFAULT_SEVERITY
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    for_loader: dict[str, Any] = {"skip_bad_images": True} if skip_bad_images else {}
    if name in PUBLISHED_CORRUPTED:
        if corruption is None:
            raise ValueError(f"{name} needs corruption; choose from {', '.join(PUBLISHED)}")
        for_loader.update(corruption=corruption, severity=severity)
    elif corruption is not None:
        options["corruption"] = Corruption(corruption, severity, seed)
    data = IMAGES[name](root, image_size, seed, **for_loader)
    if predict == "class" and data.num_classes < 2:
        raise ValueError(f"{name} has {data.num_classes} class, and a network learns to tell at least 2 apart")
    make = ImageTask if predict == "class" else partial(RegressionTask, predict=predict)
    return make(
        data, seed=seed, workers=workers, label_noise=label_noise or 0.0, noise_kind=noise_kind or "uniform", **options
    )

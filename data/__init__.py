"""The data sets. To add one, write its loader and add a line to IMAGES or TEXTS."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .images import Data, ImageTask
from .in_memory import cifar10, cifar100, digits, folder, svhn
from .streamed import imagenet, tinyimagenet
from .text import TextTask, ptb, pydoc, text_folder

IMAGES: dict[str, Callable[[Path, int | None, int], Data]] = {  # of root, image size and seed
    "cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "tinyimagenet": tinyimagenet, "imagenet": imagenet,
    "folder": folder, "digits": digits,
}
STREAMED = ("tinyimagenet", "imagenet")  # read from disk by worker processes; the others are held in memory
TEXTS = {"ptb": ptb, "text": text_folder, "pydoc": pydoc}
DATASETS = [*IMAGES, *TEXTS]


def build_task(
    name: str, root: Path, *, seed: int = 0, image_size: int | None = None, tokens: str = "word",
    workers: int | None = None, **options: Any
) -> ImageTask | TextTask:
    """The task of the data set `name` under `root`; `options` are those of ImageTask or TextTask.

    image_size is in pixels. tokens, "word" or "char", is the unit of a text. workers is the number of processes that
    read a streamed data set, by default one per core and at most 8. Raises ValueError for data that are not available.
    """
    if name in IMAGES:
        workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        return ImageTask(IMAGES[name](root, image_size, seed), seed=seed, workers=workers, **options)
    if name in TEXTS:
        return TextTask(TEXTS[name](root, tokens), **options)
    raise ValueError(f"data set {name!r} is unknown; choose from {', '.join(DATASETS)}")

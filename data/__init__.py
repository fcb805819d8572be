"""The data sets; to add one: its loader and a line in IMAGES or TEXTS."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .images import ImageTask, cifar10, cifar100, digits, folder, svhn
from .streamed import imagenet, tinyimagenet
from .text import TextTask, ptb, pydoc, text_folder

IMAGES: dict[str, Callable[[Path, int | None, int], Any]] = {
    "cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "tinyimagenet": tinyimagenet, "imagenet": imagenet,
    "folder": folder, "digits": digits,
}
STREAMED = ("tinyimagenet", "imagenet")  # read from disk by workers; the others lie in memory
TEXTS = {"ptb": ptb, "text": text_folder, "pydoc": pydoc}
DATASETS = [*IMAGES, *TEXTS]


def build_task(
    name: str, root: Path, *, seed: int = 0, image_size: int | None = None, tokens: str = "word",
    workers: int | None = None, **options: Any
) -> ImageTask | TextTask:
    """The task of that data set under `root`; options are ImageTask's or TextTask's.

    image_size is in pixels; tokens of a text are "word" or "char"; workers is the number of processes that read what
    does not fit in memory, by default one a core and at most 8. ValueError for what cannot be had.
    """
    if name in IMAGES:
        workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        return ImageTask(IMAGES[name](root, image_size, seed), seed=seed, workers=workers, **options)
    if name in TEXTS:
        return TextTask(TEXTS[name](root, tokens), **options)
    raise ValueError(f"data set {name!r}: choose from {', '.join(DATASETS)}")

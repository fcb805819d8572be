"""The data sets; to add one: its loader and a line in IMAGES or TEXTS."""

from pathlib import Path
from typing import Any

from .images import ImageTask, cifar10, cifar100, digits, folder, svhn
from .text import TextTask, ptb, pydoc, text_folder

IMAGES = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "folder": folder, "digits": digits}
TEXTS = {"ptb": ptb, "text": text_folder, "pydoc": pydoc}
DATASETS = [*IMAGES, *TEXTS]


def build_task(
    name: str, root: Path, *, seed: int = 0, image_size: int | None = None, tokens: str = "word", **options: Any
) -> ImageTask | TextTask:
    """The task of that data set under `root`; options are ImageTask's or TextTask's.

    image_size is in pixels; tokens of a text are "word" or "char". ValueError for what cannot be had.
    """
    if name in IMAGES:
        return ImageTask(IMAGES[name](root, image_size, seed), seed=seed, **options)
    if name in TEXTS:
        return TextTask(TEXTS[name](root, tokens), **options)
    raise ValueError(f"data set {name!r}: choose from {', '.join(DATASETS)}")

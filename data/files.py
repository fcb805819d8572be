"""Reading image files: every format as RGB, bad files by name, and class folders."""

import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import resize

from utils import check_memory, first_line, rank

from . import cache

MOST_REPORTED = 10  # bad files that are listed by name

Samples = list[tuple[str, int]]  # file and class of every image


class ImageFileError(ValueError):
    """An image file that cannot be read; the message names the file and the cause."""

    def __init__(self, path: str, cause: str):
        super().__init__(path, cause)
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}; repair or remove it, or pass --skip-bad-images"


def read_image(path: str) -> Image.Image:
    """The image in mode RGB. Raises ImageFileError for a file that cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a FIFO or a device may never end
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            return _as_rgb(image)
    except Exception as error:  # Pillow raises many types for a damaged file
        raise ImageFileError(path, f"cannot be read as an image ({first_line(error)})") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """16 bits are scaled to 8, and transparent pixels are blended with white. ValueError for a mode without a range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.array(image).astype(np.uint32)
        eight_bits = ((levels + 128) // 257).astype(np.uint8)  # 65535 = 257 · 255; Pillow would clip at 255
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels, Pillow's mode {image.mode}; convert them to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def class_folders(folder: Path) -> ImageFolder:
    """The classes and files of folder/CLASS/*. ValueError if there are none."""
    try:
        return ImageFolder(str(folder))
    except OSError as error:
        raise ValueError(f"{folder}: expected class folders of images ({first_line(error)})") from None


def decode(samples: Samples, folder: Path, size: int, skip_bad: bool) -> tuple[Tensor, Tensor]:
    """The images of a folder, uint8 (number, 3, size, size), and their labels (number,); decoded once and then cached.

    Raises ImageFileError at the first file that cannot be read, or with `skip_bad` leaves such files out.
    """
    check_memory(3 * size * size * len(samples), f"{len(samples)} images of {size}×{size} pixels")
    shape = (len(samples), 3, size, size)
    entry = cache.entry_for([path for path, _ in samples], folder, size)
    cached = cache.load(entry, shape) if entry else None
    if cached is not None:
        return cached, torch.tensor([label for _, label in samples])
    images, labels, errors = _decode(samples, size, skip_bad)
    _report(errors, folder, len(samples))
    if entry and not errors:
        cache.store(entry, images)
    return images, labels


def _decode(samples: Samples, size: int, skip_bad: bool) -> tuple[Tensor, Tensor, list[ImageFileError]]:
    """Images, their labels, and the errors of the files left out."""
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    labels: list[int] = []
    errors: list[ImageFileError] = []
    for path, label in samples:
        try:
            pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
        except ImageFileError as error:
            if not skip_bad:
                raise
            errors.append(error)
            continue
        images[len(labels)] = resize(pixels, [size, size])
        labels.append(label)
    return images[: len(labels)], torch.tensor(labels), errors


def readable(samples: Samples, folder: Path) -> Samples:
    """The samples of a folder whose files can be read. Reads them all."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # Pillow decodes without Python's lock
        found = list(pool.map(_error_in, [path for path, _ in samples]))
    errors = [error for error in found if error is not None]
    _report(errors, folder, len(samples))
    bad = {error.path for error in errors}
    return [sample for sample in samples if sample[0] not in bad]


def _error_in(path: str) -> ImageFileError | None:
    try:
        read_image(path)
    except ImageFileError as error:
        return error
    return None


def _report(errors: list[ImageFileError], folder: Path, total: int) -> None:
    """Print what is skipped. ValueError if that is everything."""
    if len(errors) == total:
        raise ValueError(f"{folder}: none of its {total} images can be read, the first because: {errors[0].cause}")
    if errors and rank() == 0:
        for error in errors[:MOST_REPORTED]:
            print(f"skipped {error.path}: {error.cause}", file=sys.stderr)
        print(f"{folder}: skipped {len(errors)} of {total} images", file=sys.stderr)

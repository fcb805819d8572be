"""Reading image files: every format as RGB, bad files by name, and class folders."""

import errno
import hashlib
import os
import stat
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import resize

from utils import check_memory, first_line

from . import cache
from .cache import say

MOST_REPORTED = 10  # bad files that are listed by name, and causes
NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of a process that holds too much
# Left by network drives, trash bins, disk checks, Windows and zip files made on a Mac; others begin with a dot
FOREIGN = ("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler",
           "lost+found", "system volume information", "thumbs.db", "desktop.ini", "__macosx")

Samples = list[tuple[str, int]]  # file and class of every image


class ImageFileError(ValueError):
    """An image file that cannot be read; the message names the file and the cause."""

    def __init__(self, path: str, cause: str):
        super().__init__(path, cause)
        self.path, self.cause = path, cause

    def __str__(self) -> str:
        return f"{self.path}: {self.cause}; repair or remove it, or pass skip_bad_images"


def read_image(path: str) -> Image.Image:
    """The image in mode RGB. The EXIF orientation is ignored, as torchvision does.

    ImageFileError for a file that cannot be read, unless this process holds too much.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a FIFO or a device may never end
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            return _as_rgb(image)
    except Exception as error:  # Pillow raises many types for a damaged file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_FILE:
            raise
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


def class_folders(folder: Path, seen: dict[str, str] | None = None) -> tuple[list[str], Samples]:
    """The classes and the images of folder/CLASS/**, sorted by name, without what other programs have left there.

    Says what is skipped, and which classes may be one. `seen` are folders that have been read, by their real paths.
    ValueError for a class without images, for a folder that would count twice, and for a link that leads nowhere.
    """
    skipped: Counter[str] = Counter()
    try:
        found = sorted(_images(str(folder), "", {} if seen is None else seen, skipped))
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_foreign(entry.name))
    except OSError as error:
        raise ValueError(f"{folder}: expected class folders of images ({first_line(error)})") from None
    causes = ", ".join(f"{number} {cause}" for cause, number in skipped.most_common(MOST_REPORTED))
    report = f"skipped: {skipped.total()} ({causes or 'none'}); images end in {', '.join(IMG_EXTENSIONS)}"
    empty = ", ".join(sorted(set(classes) - {label for label, _, _ in found}))
    if empty or not classes:
        raise ValueError(f"{folder}: expected class folders of images, none in {empty or 'it'}; {report}")
    if causes:
        say(f"{folder}: {report}")
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(ascii(name))
    if several := ", ".join(" and ".join(names) for names in alike.values() if len(names) > 1):
        say(f"{folder}: classes that differ only in case or Unicode form: {several}; merge them if they are one")
    index = {name: number for number, name in enumerate(classes)}
    return classes, [(os.path.join(place, name), index[label]) for label, place, name in found]


def _images(place: str, label: str, seen: dict[str, str], skipped: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """Class, folder and name of every image below `place`, through links; counts what it skips by the cause."""
    real = os.path.realpath(place)
    if real in seen:
        raise ValueError(f"{place} is the folder {seen[real]} again; remove the link, or its images count twice")
    seen[real] = place
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
        if _is_foreign(entry.name):
            skipped["hidden or of the system"] += 1
        elif entry.is_dir():
            yield from _images(entry.path, label or entry.name, seen, skipped)
        elif label and entry.name.lower().endswith(IMG_EXTENSIONS):
            yield label, place, entry.name
        elif not os.path.exists(entry.path):
            raise ValueError(f"{entry.path}: a link that leads nowhere; restore its target or remove it")
        else:
            ending = os.path.splitext(entry.name)[1].lower() or "without an ending"
            skipped[ending if label else "outside the class folders"] += 1


def _is_foreign(name: str) -> bool:
    """Whether a file or folder is hidden, or made by the system or another program."""
    return name.startswith(".") or name.lower() in FOREIGN


def train_and_test(root: Path, test: str, skip_bad: bool) -> tuple[list[str], Samples, Samples]:
    """The classes, and the images of root/train and of root/`test`, with `skip_bad` those that can be read.

    ValueError unless both have the same classes, and for a folder that is in both.
    """
    seen: dict[str, str] = {}
    (classes, train), (others, tested) = class_folders(root / "train", seen), class_folders(root / test, seen)
    if different := ", ".join(map(ascii, sorted(set(classes) ^ set(others))[:MOST_REPORTED])):
        raise ValueError(f"{root}: train and {test} have different class folders ({different}); make them the same")
    if skip_bad:
        train, tested = readable(train, root / "train"), readable(tested, root / test)
    return classes, train, tested


@contextmanager
def downloading(name: str, root: Path, files: str, instead: str) -> Iterator[None]:
    """The block looks for the `files` of the data set `name` under root, and downloads what is missing there.

    Waits while another process of this machine does. ValueError where the block fails; it says what lies there, and
    names the data set `instead`, which needs no download.
    """
    place = hashlib.sha256(str(root.absolute()).encode(errors="surrogateescape")).hexdigest()[:16]
    with ExitStack() as stack:
        with suppress(ImportError, OSError):  # Windows has no such locks, and the file may be another user's
            import fcntl

            lock = stack.enter_context(open(Path(tempfile.gettempdir(), f"mlr-snet-{place}.lock"), "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except (OSError, RuntimeError) as error:
            found = ", ".join(sorted(path.name for path in root.glob(files)))
            state = f"damaged or incomplete in {root} ({found})" if found else f"not in {root}"
            raise ValueError(
                f"{name}: {state}, and could not be downloaded ({first_line(error)}); "
                f"put it there, or try dataset {instead}, which needs no download"
            ) from None


def decode(samples: Samples, folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """The images of a folder, uint8 (number, 3, size, size), and their labels (number,); decoded once and then cached.

    Raises ImageFileError at the first file that cannot be read.
    """
    shape = (len(samples), 3, size, size)
    check_memory(3 * size * size * len(samples), f"{len(samples)} images of {size}×{size} pixels")
    labels = torch.tensor([label for _, label in samples])
    entry = cache.entry_for([path for path, _ in samples], folder, size)
    cached = cache.load(entry, shape) if entry else None
    if cached is not None:
        return cached, labels
    images = torch.empty(shape, dtype=torch.uint8)
    for index, (path, _) in enumerate(samples):
        pixels = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)
        images[index] = resize(pixels, [size, size])
    if entry:
        cache.store(entry, images)
    return images, labels


def readable(samples: Samples, folder: Path) -> Samples:
    """The samples of a folder whose files can be read. Reads them all, and says what is skipped; ValueError if all."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # Pillow decodes without Python's lock
        errors = [error for error in pool.map(_error_in, [path for path, _ in samples]) if error]
    if len(errors) == len(samples):
        raise ValueError(f"{folder}: none of its {len(samples)} images can be read, the first because: "
                         f"{errors[0].cause}")
    for error in errors[:MOST_REPORTED]:
        say(f"skipped {error.path}: {error.cause}")
    if errors:
        say(f"{folder}: skipped {len(errors)} of {len(samples)} images")
    bad = {error.path for error in errors}
    return [sample for sample in samples if sample[0] not in bad]


def _error_in(path: str) -> ImageFileError | None:
    try:
        read_image(path)
    except ImageFileError as error:
        return error
    return None

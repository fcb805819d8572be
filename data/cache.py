"""Decoded class folders, stored outside the data folder so that later runs need not decode the files again.

An entry's name identifies the files, the image size and the decoding libraries; its content is a header, the SHA-256
of the images, and the images. So the cache never changes a result: an entry is right, or it is ignored and written
anew. The folder may hold files of others: what has no name of ours is never touched.
"""

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import features
from torch import Tensor

from utils import rank

MOST_BYTES = 8 * 2**30  # of the whole cache; the entries unused for longest make room for new ones
NAME = re.compile(r"mlr-snet-[0-9a-f]{32}(\.\w+\.tmp)?")  # an entry, or one that is being written
HEADER = b"decoded images of MLR-SNet\n"
DIGEST_BYTES = 32


def cache_folder() -> Path | None:
    """$MLR_SNET_CACHE, or mlr-snet in the user's cache folder. None, no cache, if it is empty or there is no home."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mlr-snet")
    chosen = os.environ.get("MLR_SNET_CACHE", default)
    try:
        return Path(chosen).expanduser() if chosen else None
    except RuntimeError:
        say("decoded images are not cached (there is no home folder); set MLR_SNET_CACHE to a folder")
        return None


def entry_for(paths: list[str], folder: Path, size: int) -> Path | None:
    """The place of the decoded files in a folder at `size` pixels, whether it exists or not. None without a cache."""
    cache = cache_folder()
    if cache is None:
        return None
    libraries = (PIL.__version__, features.version("jpg"), torch.__version__, torchvision.__version__)
    digest = hashlib.sha256(f"{libraries} {size}\n".encode())
    for path in paths:
        try:
            file = os.stat(path)
        except OSError:  # decoding names the file
            return None
        # A file with an old mtime, unpacked from an archive for example, still has a new ctime.
        times = f"{file.st_mtime_ns} {file.st_ctime_ns}"
        name = path.removeprefix(f"{folder}{os.sep}")
        digest.update(f"{name}\n{file.st_size} {times}\n".encode(errors="surrogateescape"))
    return cache / f"mlr-snet-{digest.hexdigest()[:32]}"


def load(entry: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The uint8 images of an entry. None if it does not exist or is damaged."""
    try:
        content = np.fromfile(entry, np.uint8)
        os.utime(entry)  # marks it as used
    except OSError:
        return None
    digest, images = np.split(content[len(HEADER) :], [DIGEST_BYTES])
    if hashlib.sha256(images.data).digest() != digest.tobytes():
        return None
    return torch.from_numpy(images).view(shape)


def store(entry: Path, images: Tensor) -> None:
    """Write an entry, whole or not at all. A cache that cannot be written is reported and costs nothing but time."""
    if rank() or images.nbytes > MOST_BYTES:
        return
    pixels = images.numpy().data
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _make_room(entry.parent, pixels.nbytes)
        descriptor, name = tempfile.mkstemp(".tmp", f"{entry.name}.", entry.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as file:
            file.writelines([HEADER, hashlib.sha256(pixels).digest(), pixels])
        os.replace(temporary, entry)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        where = f"in {entry.parent} ({error.strerror})"
        say(f"decoded images are not cached {where}; set MLR_SNET_CACHE to another folder")


def _make_room(cache: Path, num_bytes: int) -> None:
    """Delete the entries unused for longest until `num_bytes` more fit."""
    entries = []
    for path in cache.iterdir():
        if NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                file = path.stat()
                entries.append((file.st_mtime, file.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total + num_bytes <= MOST_BYTES:
            return
        total -= size
        path.unlink(missing_ok=True)


@functools.cache
def say(text: str) -> None:
    """Warn the user once, on rank 0."""
    if rank() == 0:
        print(f"warning: {text}", file=sys.stderr)

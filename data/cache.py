"""Decoded class folders, stored outside the data folder so that later runs need not decode the files again.

An entry's name identifies the files, the image size and the decoding libraries; its content is the SHA-256 of the
images and then the images. So the cache never changes a result: an entry is right, or it is ignored and written anew.
"""

import hashlib
import os
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
DIGEST_BYTES = 32


def cache_folder() -> Path | None:
    """$MLR_SNET_CACHE, or mlr-snet in the user's cache folder. None if MLR_SNET_CACHE is empty: no cache."""
    if "MLR_SNET_CACHE" in os.environ:
        chosen = os.environ["MLR_SNET_CACHE"]
        return Path(chosen) if chosen else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlr-snet"


def entry_for(paths: list[str], folder: Path, size: int) -> Path | None:
    """The place of the decoded files of a folder at `size` pixels, whether it exists or not. None without a cache."""
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
        digest.update(f"{os.path.relpath(path, folder)}\n{file.st_size} {times}\n".encode())
    return cache / digest.hexdigest()[:32]


def load(entry: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The uint8 images of an entry. None if it does not exist or is damaged."""
    num_bytes = int(np.prod(shape))
    try:
        if entry.stat().st_size != DIGEST_BYTES + num_bytes:
            return None
        content = np.fromfile(entry, np.uint8)
        os.utime(entry)  # marks it as used
    except OSError:
        return None
    images = content[DIGEST_BYTES:]
    if hashlib.sha256(images.data).digest() != content[:DIGEST_BYTES].tobytes():
        return None
    return torch.from_numpy(images).view(shape)


def store(entry: Path, images: Tensor) -> None:
    """Write an entry, whole or not at all. A cache that cannot be written is reported and costs nothing but time."""
    if rank() or images.nbytes > MOST_BYTES:
        return
    pixels = images.numpy().data
    temporary = ""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _make_room(entry.parent, pixels.nbytes)
        with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(pixels).digest())
            file.write(pixels)
        os.replace(temporary, entry)
    except OSError as error:
        print(f"decoded images are not cached ({error}); set MLR_SNET_CACHE to another folder", file=sys.stderr)
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _make_room(cache: Path, num_bytes: int) -> None:
    """Delete the entries unused for longest until `num_bytes` more fit."""
    files: list[tuple[float, int, Path]] = []
    for path in cache.iterdir():
        try:
            file = path.stat()
        except FileNotFoundError:  # another process has deleted it
            continue
        files.append((file.st_mtime, file.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total + num_bytes <= MOST_BYTES:
            return
        total -= size
        path.unlink(missing_ok=True)

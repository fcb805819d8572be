"""Image data sets that do not fit in memory: worker processes read them from disk, ahead of the training."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from utils import shard

from .corruption import Corruption
from .files import ImageFileError, Samples, class_folders, downloading, read_image, readable, train_and_test
from .images import Plan
from .sampling import generator_for

NORMALISE = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"

Transform = Callable[[Image.Image], Tensor]


@dataclass
class StreamedData:
    """A data set on disk. `random` makes a (3, height, width) tensor of a training image, `plain` of any other."""

    train: Samples
    test: Samples
    num_classes: int
    image_size: int  # pixels of a side
    random: Transform
    plain: Transform
    meta_pool: Tensor | None = None

    def splits(self, device: torch.device, workers: int) -> tuple["StreamedSplit", "StreamedSplit"]:
        return StreamedSplit(self.train, self, device, workers), StreamedSplit(self.test, self, device, workers)


class StreamedSplit(Dataset):
    """A split whose images are read, decoded and augmented by worker processes, or by this process with 0 workers."""

    def __init__(self, samples: Samples, data: StreamedData, device: torch.device, workers: int):
        self.samples, self.random, self.plain = samples, data.random, data.plain
        self.labels = torch.tensor([label for _, label in samples], device=device)
        self.device, self.workers = device, workers
        self.true_labels: Tensor | None = None
        self.corruption: Corruption | None = None
        self.is_corrupted = torch.zeros(len(samples), dtype=torch.bool)

    def corrupt(self, indices: Tensor, corruption: Corruption) -> None:
        """Damage the images of these indices as they are read, before they are resized and augmented."""
        self.corruption = corruption
        self.is_corrupted[indices] = True

    def __getitem__(self, wanted: tuple[int, tuple[int, ...] | None]) -> Tensor:
        """The image of an index, augmented if there is a key. Raises ImageFileError for a file that cannot be read."""
        index, key = wanted
        image = read_image(self.samples[index][0])
        if self.corruption is not None and self.is_corrupted[index]:
            image = to_pil_image(self.corruption(pil_to_tensor(image), index))
        if key is None:
            return self.plain(image)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator_for(*key).get_state())
            return self.random(image)

    def __getitems__(self, wanted: list[tuple[int, tuple[int, ...] | None]]) -> list[Tensor] | ImageFileError:
        """The images of a batch. Returns an error, since DataLoader buries one that a worker raises."""
        try:
            return [self[item] for item in wanted]
        except ImageFileError as error:
            return error

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        loader: DataLoader[Any] = DataLoader(
            self, batch_sampler=self._wanted(plan), collate_fn=_collate, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=_quiet,
            generator=torch.Generator(),  # its own, since dropout depends on the global one
        )
        for images in _read(loader) if self.workers else loader:
            if isinstance(images, ImageFileError):
                raise images
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def add_to_digest(self, digest: Any) -> None:
        """Names, sizes and classes of the files: reading them all would take too long."""
        folder = os.path.commonpath([path for path, _ in self.samples])
        for path, label in self.samples:
            size = os.path.getsize(path)
            digest.update(f"{os.path.relpath(path, folder)} {size} {label}\n".encode(errors="surrogateescape"))
        digest.update(self.labels.cpu().numpy())  # with their noise
        if self.corruption is not None:
            digest.update(str(self.corruption).encode())

    @staticmethod
    def _wanted(plan: Plan) -> Iterator[list[tuple[int, tuple[int, ...] | None]]]:
        """For each batch of the plan, index and key of every image in this rank's shard."""
        for indices, key in plan:
            own, _ = shard(len(indices))
            places = range(len(indices))[own]
            yield [(index, key and (*key, place)) for index, place in zip(indices[own].tolist(), places, strict=True)]


def _quiet(worker: int) -> None:
    """In a worker process: threads whose pipes break print no traceback, since the training process says it."""
    sys.excepthook = lambda *error: None
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: Any) -> None:
    """In a worker process: SIGTERM, which a whole job may get, ends it in 10 s, for a last batch may be awaited."""
    signal.signal(number, signal.SIG_DFL)
    signal.alarm(10)


def _read(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of worker processes. OSError, with the remedy, where these or what they need have gone."""
    try:
        with contextlib.ExitStack() as files:  # torch's loader fails with a traceback where it may not open these
            for _ in range(6 * loader.num_workers + 10):
                files.enter_context(open(os.devnull))
        on_end = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        batches = iter(loader)
        if on_end is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_end)  # torch's raises in whatever line is running, not here
        yield from batches
    except (OSError, RuntimeError, EOFError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[-1]
        workers = f"workers {loader.num_workers}: the processes that read images failed"
        raise OSError(f"{workers} ({cause}); give 0 to read them in the training process") from None


def _collate(images: list[Tensor] | ImageFileError) -> Any:
    return images if isinstance(images, ImageFileError) else default_collate(images)


def imagenet(root: Path, image_size: int | None, seed: int, *, skip_bad_images: bool = False) -> StreamedData:
    """root/train and root/val of class folders, ImageNet's own layout; images of `image_size` (default 224) pixels."""
    size = image_size or 224
    classes, train, test = train_and_test(root, "val", skip_bad_images)
    return StreamedData(
        train, test, len(classes), size,
        transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *NORMALISE]),
        transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *NORMALISE]),
    )


def tinyimagenet(root: Path, image_size: int | None, seed: int, *, skip_bad_images: bool = False) -> StreamedData:
    """Stanford's tiny-imagenet-200 of 64×64 pixels under root, downloaded if missing; the test split is its val."""
    folder, size = root / "tiny-imagenet-200", image_size or 64
    with downloading("tinyimagenet", root, f"{folder.name}.zip", "digits"):
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as place:  # whole, or not at all
                download_and_extract_archive(TINY_URL, str(root), place, md5=TINY_MD5)
                Path(place, folder.name).rename(folder)
    classes, train = class_folders(folder / "train")
    test = _annotated(folder / "val", classes)
    if skip_bad_images:
        train, test = readable(train, folder / "train"), readable(test, folder / "val")
    resize = [transforms.Resize((size, size))]  # leaves those of 64 pixels as they are
    return StreamedData(
        train, test, len(classes), size,
        transforms.Compose(
            [*resize, transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip(), *NORMALISE]
        ),
        transforms.Compose([*resize, *NORMALISE]),
    )


def _annotated(folder: Path, classes: list[str]) -> Samples:
    """The images listed in the folder's val_annotations.txt: file, class and box on every line, tab-separated."""
    try:
        lines = (folder / "val_annotations.txt").read_text("utf-8-sig").splitlines()
        samples = []
        for line in lines:
            name, label = line.split("\t")[:2]
            samples.append((str(folder / "images" / name), classes.index(label)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/val_annotations.txt: expected lines of FILE<tab>CLASS<tab>… ({error})") from None
    if not samples:
        raise ValueError(f"{folder}/val_annotations.txt: lists no image")
    return samples

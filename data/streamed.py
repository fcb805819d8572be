"""Image data sets that do not fit in memory: worker processes read them from disk, ahead of the training."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.utils import download_and_extract_archive

from distributed import shard

from .files import first_line
from .images import Plan
from .sampling import generator_for

NORMALISE = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"

Samples = list[tuple[str, int]]  # file and class of every image
Transform = Callable[[Image.Image], Tensor]


@dataclass
class StreamedData:
    """A data set on disk. `random` makes a (3, height, width) tensor of a training image, `plain` of any other."""

    train: Samples
    test: Samples
    num_classes: int
    random: Transform
    plain: Transform

    def splits(self, device: torch.device, workers: int) -> tuple["StreamedSplit", "StreamedSplit"]:
        return StreamedSplit(self.train, self, device, workers), StreamedSplit(self.test, self, device, workers)


class StreamedSplit(Dataset):
    """A split whose images are read, decoded and augmented by worker processes, or by this process with 0 workers."""

    def __init__(self, samples: Samples, data: StreamedData, device: torch.device, workers: int):
        self.samples, self.random, self.plain = samples, data.random, data.plain
        self.labels = torch.tensor([label for _, label in samples], device=device)
        self.device, self.workers = device, workers

    def __getitem__(self, wanted: tuple[int, tuple[int, ...] | None]) -> Tensor:
        """The image of an index, augmented if there is a key."""
        index, key = wanted
        with Image.open(self.samples[index][0]) as file:
            image = file.convert("RGB")
        if key is None:
            return self.plain(image)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator_for(*key).get_state())
            return self.random(image)

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        # a generator of its own, so that it draws nothing from the global one, on which dropout depends
        loader = DataLoader(self, batch_sampler=self._wanted(plan), generator=torch.Generator(), **options)
        for images in loader:
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def add_to_digest(self, digest: Any) -> None:
        """Names, sizes and classes of the files: reading them all would take too long."""
        folder = os.path.commonpath([path for path, _ in self.samples])
        for path, label in self.samples:
            name = os.path.relpath(path, folder)
            digest.update(f"{name} {os.path.getsize(path)} {label}\n".encode())

    @staticmethod
    def _wanted(plan: Plan) -> Iterator[list[tuple[int, tuple[int, ...] | None]]]:
        """For each batch of the plan, index and key of every image in this rank's shard."""
        for indices, key in plan:
            own, _ = shard(len(indices))
            places = range(len(indices))[own]
            wanted: list[tuple[int, tuple[int, ...] | None]] = []
            for index, place in zip(indices[own].tolist(), places, strict=True):
                wanted.append((index, None if key is None else (*key, place)))
            yield wanted


def imagenet(root: Path, image_size: int | None, seed: int) -> StreamedData:
    """root/train and root/val of class folders, ImageNet's own layout; images of `image_size` (default 224) pixels."""
    size = image_size or 224
    train, test = _class_folders(root / "train"), _class_folders(root / "val")
    if train.classes != test.classes:
        raise ValueError(f"{root}: train and val have different class folders; make them the same")
    return StreamedData(
        train.samples, test.samples, len(train.classes),
        transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *NORMALISE]),
        transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *NORMALISE]),
    )


def tinyimagenet(root: Path, image_size: int | None, seed: int) -> StreamedData:
    """Stanford's tiny-imagenet-200 of 64×64 pixels under root, downloaded if missing; the test split is its val."""
    folder, size = root / "tiny-imagenet-200", image_size or 64
    if not folder.is_dir():
        try:
            download_and_extract_archive(TINY_URL, str(root), md5=TINY_MD5)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"tinyimagenet: {folder} does not exist and could not be downloaded ({first_line(error)})"
            ) from None
    train = _class_folders(folder / "train")
    resize = [transforms.Resize((size, size))] if size != 64 else []
    return StreamedData(
        train.samples, _annotated(folder / "val", train.class_to_idx), len(train.classes),
        transforms.Compose(
            [*resize, transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip(), *NORMALISE]
        ),
        transforms.Compose([*resize, *NORMALISE]),
    )


def _class_folders(folder: Path) -> torchvision.datasets.ImageFolder:
    try:
        return torchvision.datasets.ImageFolder(str(folder))
    except OSError as error:
        raise ValueError(f"{folder}: expected class folders of images ({first_line(error)})") from None


def _annotated(folder: Path, class_to_index: dict[str, int]) -> Samples:
    """The images listed in the folder's val_annotations.txt: file, class and box on every line, tab-separated."""
    try:
        lines = (folder / "val_annotations.txt").read_text().splitlines()
        samples = []
        for line in lines:
            name, label = line.split("\t")[:2]
            samples.append((str(folder / "images" / name), class_to_index[label]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/val_annotations.txt: expected lines of FILE<tab>CLASS<tab>… ({error})") from None
    if not samples:
        raise ValueError(f"{folder}/val_annotations.txt: lists no image")
    return samples

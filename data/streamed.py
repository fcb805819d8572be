"""Image data sets that do not fit in memory: worker processes read them from disk, ahead of the training."""

import os
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

from utils import first_line, shard

from .corruption import Corruption
from .files import ImageFileError, Samples, class_folders, read_image, readable
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
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, since dropout depends on the global one
        )
        for images in loader:
            if isinstance(images, ImageFileError):
                raise images
            yield images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    def add_to_digest(self, digest: Any) -> None:
        """Names, sizes and classes of the files: reading them all would take too long."""
        folder = os.path.commonpath([path for path, _ in self.samples])
        for path, label in self.samples:
            name = os.path.relpath(path, folder)
            digest.update(f"{name} {os.path.getsize(path)} {label}\n".encode())
        digest.update(self.labels.cpu().numpy())  # with their noise
        if self.corruption is not None:
            digest.update(str(self.corruption).encode())

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


def _collate(images: list[Tensor] | ImageFileError) -> Any:
    return images if isinstance(images, ImageFileError) else default_collate(images)


def imagenet(root: Path, image_size: int | None, seed: int, *, skip_bad_images: bool = False) -> StreamedData:
    """root/train and root/val of class folders, ImageNet's own layout; images of `image_size` (default 224) pixels."""
    size = image_size or 224
    train, test = class_folders(root / "train"), class_folders(root / "val")
    if train.classes != test.classes:
        raise ValueError(f"{root}: train and val have different class folders; make them the same")
    train_samples, test_samples = train.samples, test.samples
    if skip_bad_images:
        train_samples, test_samples = readable(train_samples, root / "train"), readable(test_samples, root / "val")
    return StreamedData(
        train_samples, test_samples, len(train.classes), size,
        transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *NORMALISE]),
        transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *NORMALISE]),
    )


def tinyimagenet(root: Path, image_size: int | None, seed: int, *, skip_bad_images: bool = False) -> StreamedData:
    """Stanford's tiny-imagenet-200 of 64×64 pixels under root, downloaded if missing; the test split is its val."""
    folder, size = root / "tiny-imagenet-200", image_size or 64
    if not folder.is_dir():
        try:
            download_and_extract_archive(TINY_URL, str(root), md5=TINY_MD5)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"tinyimagenet: {folder} does not exist and could not be downloaded ({first_line(error)})"
            ) from None
    train = class_folders(folder / "train")
    train_samples, test_samples = train.samples, _annotated(folder / "val", train.class_to_idx)
    if skip_bad_images:
        train_samples, test_samples = readable(train_samples, folder / "train"), readable(test_samples, folder / "val")
    resize = [transforms.Resize((size, size))] if size != 64 else []
    return StreamedData(
        train_samples, test_samples, len(train.classes), size,
        transforms.Compose(
            [*resize, transforms.RandomCrop(size, padding=size // 8), transforms.RandomHorizontalFlip(), *NORMALISE]
        ),
        transforms.Compose([*resize, *NORMALISE]),
    )


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

"""Corrupted training data: damaged images, wrong labels, and the published CIFAR-10-C and CIFAR-100-C.

Only training data are corrupted; the meta set and the test data stay clean. Damage is drawn by the seed and the image's
index, wrong labels by the seed and the list of training images, so they are the same on every rank, in every worker and
after a resume; another meta set has other wrong labels.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor, to_pil_image

from utils import first_line

from .sampling import generator_for

DEFAULT_SEVERITY = 3
PER_SEVERITY = 10_000  # images in a file of CIFAR-10-C for each of its five severities

# The files of CIFAR-10-C and CIFAR-100-C
PUBLISHED = (
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur", "gaussian_noise",
    "glass_blur", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "saturate", "shot_noise", "snow",
    "spatter", "speckle_noise", "zoom_blur",
)


# ---------------------------------------------------------------------------------------------- damaged images
# Each takes an image (3, height, width) in [0, 1], the constant of a severity and a generator.


def _gaussian_noise(image: Tensor, deviation: float, generator: Generator) -> Tensor:
    return image + deviation * torch.randn(image.shape, generator=generator)


def _shot_noise(image: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson(image * photons, generator) / photons


def _impulse_noise(image: Tensor, share: float, generator: Generator) -> Tensor:
    is_replaced = torch.rand(image.shape, generator=generator) < share
    salt_or_pepper = torch.rand(image.shape, generator=generator).round()
    return torch.where(is_replaced, salt_or_pepper, image)


def _gaussian_blur(image: Tensor, deviation: float, generator: Generator) -> Tensor:
    reach = min(math.ceil(4 * deviation), image.shape[1] - 1, image.shape[2] - 1)  # the padding is a reflection
    return gaussian_blur(image, [2 * reach + 1, 2 * reach + 1], [deviation, deviation])


def _contrast(image: Tensor, factor: float, generator: Generator) -> Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return mean + factor * (image - mean)


def _brightness(image: Tensor, shift: float, generator: Generator) -> Tensor:
    """Raise the value of HSV; hue and saturation stay."""
    value = image.amax(0)
    raised = (value + shift).clamp(max=1)
    return torch.where(value > 0, image * (raised / value.clamp(min=1e-6)), raised)


def _pixelate(image: Tensor, share: float, generator: Generator) -> Tensor:
    """Shrink and enlarge with a box filter, which torch does not have."""
    picture = to_pil_image(image)
    width, height = picture.size
    small = picture.resize((max(1, int(share * width)), max(1, int(share * height))), Image.Resampling.BOX)
    return pil_to_tensor(small.resize((width, height), Image.Resampling.BOX)) / 255


def _jpeg_compression(image: Tensor, quality: float, generator: Generator) -> Tensor:
    file = io.BytesIO()
    to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return pil_to_tensor(Image.open(file)) / 255


# The constants of severities 1 to 5 are those of CIFAR-10-C (Hendrycks and Dietterich, 2019).
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, Generator], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),  # standard deviation
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),  # photons of a white pixel
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),  # share of the values
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),  # standard deviation in pixels
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),  # factor
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),  # added value
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),  # share of the pixels of a side
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),  # quality
}


@dataclass(frozen=True)
class Corruption:
    """Damages images: called with a uint8 image (3, height, width) and its index, it gives the damaged uint8 image.

    Severity 0 changes nothing. Raises ValueError for an unknown name or severity.
    """

    name: str
    severity: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            only = f"{self.name} comes with cifar10-c and cifar100-c only" if self.name in PUBLISHED else "unknown"
            raise ValueError(f"corruption {self.name}: {only}; choose from {', '.join(CORRUPTIONS)}")
        if not 0 <= self.severity <= 5:
            raise ValueError(f"severity {self.severity}: must be from 0 (none) to 5")

    def __call__(self, image: Tensor, index: int) -> Tensor:
        if self.severity == 0:
            return image
        damage, constants = CORRUPTIONS[self.name]
        damaged = damage(image / 255, constants[self.severity - 1], generator_for(self.seed, 7, index))
        return (damaged.clamp(0, 1) * 255).round().byte()


# ---------------------------------------------------------------------------------------------- wrong labels


NOISE_KINDS = ("uniform", "flip", "flip2")


def noisy_labels(labels: Tensor, indices: Tensor, num_classes: int, rate: float, kind: str, seed: int) -> Tensor:
    """A copy of the labels (number,) in which a share `rate` of those at `indices` is wrong, exactly but for rounding.

    uniform: any other class, all equally likely. flip: one other class for each class. flip2: one of two others.
    Deviation: the authors draw each label on its own, and their uniform noise may draw the true class again.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise_kind {kind}: choose from {', '.join(NOISE_KINDS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"label_noise {rate}: must be from 0 to 1")
    num_others = {"uniform": num_classes - 1, "flip": 1, "flip2": 2}[kind]
    if not 1 <= num_others < num_classes:
        raise ValueError(f"noise_kind {kind}: {num_classes} classes are too few")
    generator = generator_for(seed, 8)
    wrong = indices[torch.randperm(len(indices), generator=generator)[: round(rate * len(indices))]]
    others = [torch.randperm(num_classes - 1, generator=generator)[:num_others] for _ in range(num_classes)]
    offsets = 1 + torch.stack(others)  # of each class: how far its other classes lie from it, modulo num_classes
    choice = torch.randint(num_others, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + offsets[labels[wrong], choice]) % num_classes
    return noisy


# ---------------------------------------------------------------------------------------------- CIFAR-10-C, CIFAR-100-C


def read_cifar_c(folder: Path, name: str, severity: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The 10,000 images of a corruption and severity, uint8 (10000, 3, 32, 32), and their labels (10000,).

    Reads the published files, NAME.npy and labels.npy. They hold the test images of CIFAR, one severity after another.
    """
    if name not in PUBLISHED:
        raise ValueError(f"corruption {name}: choose from {', '.join(PUBLISHED)}")
    if not 1 <= severity <= 5:
        raise ValueError(f"severity {severity}: must be from 1 to 5, the severities of {folder.name}")
    images = _read_array(folder / f"{name}.npy", (5 * PER_SEVERITY, 32, 32, 3))
    labels = _read_array(folder / "labels.npy", (5 * PER_SEVERITY,))
    if labels.max() >= num_classes:
        raise ValueError(f"{folder}/labels.npy: holds label {labels.max()}, of {num_classes} classes from 0")
    rows = slice((severity - 1) * PER_SEVERITY, severity * PER_SEVERITY)
    pixels = torch.from_numpy(np.array(images[rows])).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.array(labels[rows])).long()


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of a .npy file, mapped into memory. ValueError for a file that is not one of this shape."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; download and unpack the published files of {path.parent.name} there")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({first_line(error)})") from None
    if array.dtype != np.uint8 or array.shape != shape:
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, expected uint8 {shape}")
    return array

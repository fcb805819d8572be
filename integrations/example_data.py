"""What the examples train on: scikit-learn's handwritten digits, which need no download."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that the examples run in a clone without installing


def digits(part: slice) -> tuple[Tensor, Tensor]:
    """Images (number, 1, 8, 8) in [0, 1] and labels (number,) of a part of the 1,797 digits."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels[part])


TRAIN, HELD_OUT, TEST = slice(1200), slice(1200, 1400), slice(1400, None)


def train_loader(batch_size: int = 20) -> DataLoader:
    """60 batches of images and labels."""
    return DataLoader(TensorDataset(*digits(TRAIN)), batch_size, shuffle=True)


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
    )


def meta_loss_of(network: nn.Module) -> Callable[[], Tensor]:
    """The loss on held-out digits, for learning a schedule."""
    images, labels = digits(HELD_OUT)
    return lambda: functional.cross_entropy(network(images), labels)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """On the test digits, in %."""
    images, labels = digits(TEST)
    return 100 * (network.eval()(images).argmax(1) == labels).float().mean().item()

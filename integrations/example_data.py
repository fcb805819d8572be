"""What the examples share: scikit-learn's handwritten digits, which need no download, a network, and the two schedules.

Started with "learn" an example learns a schedule while it trains, otherwise it uses the shipped one.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that the examples run in a clone without installing

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR

TRAIN, HELD_OUT, TEST = slice(1200), slice(1200, 1400), slice(1400, None)


def digits(part: slice) -> tuple[Tensor, Tensor]:
    """Images (number, 1, 8, 8) in [0, 1] and labels (number,) of a part of the 1,797 digits."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels[part])


def train_loader(batch_size: int = 20) -> DataLoader:
    """60 batches of images and labels."""
    return DataLoader(TensorDataset(*digits(TRAIN)), batch_size, shuffle=True)


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
    )


def meta_loss_of(network: nn.Module) -> Callable[[], Tensor]:
    """The loss on held-out digits, for learning a schedule. They fit in one batch, so there is no place to save."""
    images, labels = digits(HELD_OUT)
    return lambda: functional.cross_entropy(network(images), labels)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """On the test digits, in %."""
    images, labels = digits(TEST)
    return 100 * (network.eval()(images).argmax(1) == labels).float().mean().item()


def use_or_learn(network: nn.Module, meta_loss: Callable[[], Tensor], **options: Any) -> Callable[..., MLRSNetLR]:
    """A function from optimizer and num_steps to the schedule; options are MLRSNetLR's."""
    if "learn" in sys.argv:
        return partial(MetaMLRSNetLR, net=MLRSNet(), network=network, meta_loss=meta_loss, cooldown=0.2, **options)
    return partial(MLRSNetLR, nets="recommended", cooldown=0.2, **options)


def main(train: Callable[..., MLRSNetLR], network: nn.Module, optimizer: Optimizer, **options: Any) -> None:
    """What the examples on digits do: train for four epochs, then print γ and the accuracy."""
    make_schedule = use_or_learn(network, meta_loss_of(network), **options)
    with tempfile.TemporaryDirectory() as folder:
        schedule = train(network, optimizer, make_schedule, train_loader(), 4, Path(folder) / "checkpoint")
    print(f"{schedule.steps_taken} steps, γ {schedule.gamma:.3f}, test accuracy {accuracy(network):.1f} %")

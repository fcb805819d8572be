"""The problems of the calibration: small networks, optimizers and data, and how one of them is trained."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlr_snet_scale import run_over_trial, usual_lr
from models.mobilenetv2 import Bottleneck
from models.resnet import CifarResNet
from models.shufflenetv2 import Unit, convolution

# ---------------------------------------------------------------------------------------------- networks


def perceptron(pixels: int, depth: int, norm: Callable[[int], nn.Module] | None = None, width: int = 96) -> nn.Module:
    """depth hidden layers, each followed by its norm and ReLU; depth 0 is a linear model."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = pixels
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), *([norm(width)] if norm else []), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def convnet(norm: bool) -> nn.Module:
    """Three 3×3 convolutions, with or without BatchNorm, pooled in between."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (24, 48, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def narrow(units: list[nn.Module], width: int) -> nn.Module:
    """Units of a network for phones after a first convolution to 16 channels; the last one leaves `width`."""
    return nn.Sequential(convolution(3, 16, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Transformer(nn.Module):
    """Two pre-norm blocks over patches of 4×4 pixels, or causal over characters."""

    def __init__(self, num_outputs: int, length: int, causal: bool, width: int = 64):
        super().__init__()
        self.causal, self.length = causal, length
        self.embedding = nn.Embedding(num_outputs, width) if causal else nn.Linear(48, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, 3, h, w) -> (batch, classes), or tokens (batch, length) -> (batch, length, vocabulary)."""
        if not self.causal:
            x = functional.unfold(x, 4, stride=4).mT  # (batch, patches, 48)
        mask = nn.Transformer.generate_square_subsequent_mask(self.length) if self.causal else None
        hidden = self.blocks(self.embedding(x) + self.position, mask=mask, is_causal=self.causal)
        return self.decoder(hidden if self.causal else hidden.mean(1))


class Recurrent(nn.Module):
    """One GRU or LSTM layer over characters."""

    def __init__(self, vocabulary: int, cell: type[nn.GRU] | type[nn.LSTM], width: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cells = cell(width, width, batch_first=True)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, length) -> logits (batch, length, vocabulary)."""
        return self.decoder(self.cells(self.embedding(tokens))[0])


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {  # of the image size (text: the length) and the outputs
    "linear": lambda size, outputs: perceptron(3 * size**2, 0),
    "digits-linear": lambda size, outputs: perceptron(64, 0),
    "digits-mlp3": lambda size, outputs: perceptron(64, 3),
    "mlp2": lambda size, outputs: perceptron(3 * size**2, 2),
    "mlp6": lambda size, outputs: perceptron(3 * size**2, 6),
    "mlp4-bn": lambda size, outputs: perceptron(3 * size**2, 4, nn.BatchNorm1d),
    "mlp4-ln": lambda size, outputs: perceptron(3 * size**2, 4, nn.LayerNorm),
    "conv": lambda size, outputs: convnet(norm=False),
    "conv-bn": lambda size, outputs: convnet(norm=True),
    "resnet8": lambda size, outputs: CifarResNet(1, 10),
    "resnet14": lambda size, outputs: CifarResNet(2, 10),
    "shuffle": lambda size, outputs: narrow(
        [Unit(16, 48, 2), Unit(48, 48, 1), Unit(48, 96, 2), Unit(96, 96, 1)], 96),
    "mobile": lambda size, outputs: narrow(
        [Bottleneck(16, 24, 2, 4), Bottleneck(24, 24, 1, 4), Bottleneck(24, 48, 2, 4), Bottleneck(48, 48, 1, 4)], 48),
    "patches": lambda size, outputs: Transformer(10, (size // 4) ** 2, causal=False),
    "gru": lambda size, outputs: Recurrent(outputs, nn.GRU),
    "lstm": lambda size, outputs: Recurrent(outputs, nn.LSTM),
    "transformer": lambda size, outputs: Transformer(outputs, size, causal=True),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, 1.0, weight_decay=5e-4),
    "momentum": lambda parameters: SGD(parameters, 1.0, momentum=0.9, weight_decay=5e-4),
    "nesterov": lambda parameters: SGD(parameters, 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda parameters: Adam(parameters, 1.0),
    "adamw": lambda parameters: AdamW(parameters, 1.0, weight_decay=0.01),
}
FAMILY = {"sgd": "sgd", "momentum": "momentum", "nesterov": "momentum", "adam": "adam", "adamw": "adam"}

# ---------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """A network, an optimizer and data, trained for each of some run lengths."""

    data: str
    size: int  # side of the images in pixels, length of the text in characters
    network: str
    optimizer: str
    batch_size: int
    lengths: tuple[int, ...]  # in steps
    max_norm: float | None = None

    @property
    def name(self) -> str:
        return f"{self.data}{self.size} {self.network} {self.optimizer} b{self.batch_size}"

    @property
    def is_text(self) -> bool:
        return self.data in ("shakespeare", "wikitext")

    @property
    def usual(self) -> float:
        """The usual rate of the optimizer, on which the grids are centred."""
        return usual_lr(self._some_optimizer)

    @property
    def factor(self) -> float:
        """c of measure_lr_scale for the optimizer."""
        return run_over_trial(self._some_optimizer)

    @property
    def _some_optimizer(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer]([nn.Parameter(torch.zeros(1))])


PROBLEMS = [Problem(*row) for row in (
    ("digits", 8, "digits-linear", "sgd", 32, (300,)),
    ("digits", 8, "digits-linear", "adam", 16, (100,)),
    ("digits", 8, "digits-mlp3", "momentum", 64, (100, 300)),
    ("cifar", 8, "mlp2", "sgd", 16, (100, 300, 1000, 3000)),
    ("cifar", 8, "mlp2", "momentum", 64, (300, 1000)),
    ("cifar", 8, "mlp6", "adam", 16, (300, 1000, 3000)),
    ("cifar", 12, "mlp6", "sgd", 64, (1000,)),
    ("cifar", 8, "mlp4-bn", "momentum", 32, (100, 300, 1000, 3000)),
    ("cifar", 8, "mlp4-bn", "sgd", 16, (300,)),
    ("cifar", 8, "mlp4-ln", "adamw", 32, (100, 300, 1000, 3000)),
    ("cifar", 12, "mlp4-ln", "nesterov", 128, (300,)),
    ("cifar", 12, "linear", "momentum", 128, (300,)),
    ("cifar", 12, "conv", "nesterov", 32, (300,)),
    ("cifar", 16, "conv", "sgd", 32, (300,)),
    ("cifar", 12, "conv", "adamw", 64, (100, 300)),
    ("cifar", 12, "conv-bn", "momentum", 16, (300,)),
    ("cifar", 16, "conv-bn", "adam", 64, (100,)),
    ("cifar", 12, "resnet8", "momentum", 32, (100, 300, 1000)),
    ("cifar", 12, "resnet8", "sgd", 64, (100,)),
    ("cifar", 16, "resnet8", "adamw", 16, (300,)),
    ("cifar", 12, "resnet14", "momentum", 32, (300,)),
    ("cifar", 12, "resnet14", "adam", 32, (100,)),
    ("cifar", 12, "shuffle", "momentum", 32, (100, 300)),
    ("cifar", 16, "shuffle", "adamw", 32, (300,)),
    ("cifar", 12, "shuffle", "sgd", 64, (100,)),
    ("cifar", 12, "mobile", "momentum", 32, (100, 300)),
    ("cifar", 12, "mobile", "adamw", 16, (300,)),
    ("cifar", 16, "patches", "adamw", 32, (100, 300)),
    ("cifar", 16, "patches", "momentum", 64, (300,)),
    ("cifar", 12, "patches", "sgd", 32, (300,)),
    ("shakespeare", 16, "gru", "sgd", 16, (300,)),
    ("shakespeare", 16, "gru", "adamw", 16, (100, 300)),
    ("wikitext", 16, "lstm", "momentum", 16, (300,), 0.25),
    ("wikitext", 12, "lstm", "adam", 32, (100,)),
    ("wikitext", 16, "lstm", "sgd", 16, (300,)),
    ("shakespeare", 16, "transformer", "adamw", 16, (100, 300), 1.0),
    ("wikitext", 16, "transformer", "momentum", 16, (300,), 1.0),
    ("shakespeare", 24, "transformer", "sgd", 16, (100,)),
)]


@dataclass
class Data:
    """Training and validation inputs and targets, and how many outputs a network needs."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    num_outputs: int


@cache
def load_data(root: Path, name: str, size: int) -> Data:
    """One of the calibration's data sets. OSError where its files are missing."""
    if name == "digits":
        digits = load_digits()
        inputs = torch.tensor(digits.images, dtype=torch.float32).div(16).sub(0.3).div(0.37)
        return split(inputs, torch.tensor(digits.target), 1200, 10)
    if name == "cifar":
        return load_images(root / "cifar10" / "train", size)
    path = root / {"shakespeare": "tinyshakespeare.txt", "wikitext": "wikitext-2-valid.txt"}[name]
    text = path.read_text(encoding="utf-8")[:500_000]  # the final table reads other halves
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    windows = tokens[: len(tokens) // (size + 1) * (size + 1)].view(-1, size + 1)
    return split(windows[:, :-1], windows[:, 1:], len(windows) * 9 // 10, len(alphabet), validation=600)


def load_images(folder: Path, size: int) -> Data:
    """The last 1,000 training images of every class, shrunk to size × size pixels: on average 600 to train."""
    images, labels = [], []
    for label, path in enumerate(sorted(folder.iterdir())):
        for file in sorted(path.iterdir())[-1000:]:
            image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BOX)
            images.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3))
            labels.append(label)
    pixels = torch.stack(images).permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25).contiguous()
    return split(pixels, torch.tensor(labels), 6000, 10)


def split(inputs: Tensor, targets: Tensor, num_train: int, num_outputs: int, validation: int = 4000) -> Data:
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:num_train], order[num_train:][:validation]
    return Data((inputs[train], targets[train]), (inputs[held_out], targets[held_out]), num_outputs)


# ---------------------------------------------------------------------------------------------- training


def batch_indices(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices without end, every pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batch for batch in torch.randperm(size, generator=generator).split(batch_size)
                    if len(batch) == batch_size)


def cross_entropy(network: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss, and the share of right answers."""
    logits = network(inputs).flatten(0, -2)
    return functional.cross_entropy(logits, targets.flatten()), (logits.argmax(1) == targets.flatten()).float().mean()


class Training:
    """A problem's network from its initial weights, trained at any sequence of rates."""

    def __init__(self, problem: Problem, data: Data, seed: int):
        torch.manual_seed(seed)
        self.problem, self.data = problem, data
        self.network = NETWORKS[problem.network](problem.size, data.num_outputs)
        self.initial = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.seed = seed

    def run(self, rates: list[float], stream: int = 0) -> list[float]:
        """Train from the initial weights; the loss before every step, up to the first that is not finite.

        Every stream brings other batches.
        """
        batches = batch_indices(len(self.data.train[0]), self.problem.batch_size, 1000 * stream + self.seed)
        self.network.load_state_dict(self.initial)
        self.network.train()
        optimizer = OPTIMIZERS[self.problem.optimizer](self.network.parameters())
        losses: list[float] = []
        for rate, batch in zip(rates, batches, strict=False):
            loss, _ = cross_entropy(self.network, self.data.train[0][batch], self.data.train[1][batch])
            losses.append(float(f"{loss.item():.5g}"))
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()
            if self.problem.max_norm:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.problem.max_norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        return losses

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Validation loss and accuracy in %."""
        self.network.eval()
        batches = list(zip(*(part.split(500) for part in self.data.validation), strict=True))
        results = [[float(value) for value in cross_entropy(self.network, *batch)] for batch in batches]
        sizes = [len(inputs) for inputs, _ in batches]
        loss, accuracy = (statistics.fmean(column, sizes) for column in zip(*results, strict=True))
        return loss, 100 * accuracy


class LossStream:
    """The loss of a Training's network on batch after batch, for measure_lr_scale."""

    def __init__(self, training: Training):
        self.training = training
        self.load_state_dict({"drawn": 0})

    def __call__(self) -> Tensor:
        batch = next(self.batches)
        self.drawn += 1
        inputs, targets = self.training.data.train
        return cross_entropy(self.training.network, inputs[batch], targets[batch])[0]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        training = self.training
        self.batches = batch_indices(len(training.data.train[0]), training.problem.batch_size, training.seed)
        self.drawn = state["drawn"]
        for _ in range(self.drawn):
            next(self.batches)

"""Calibrates the measured LR scale: small problems whose best cosine peak is known, and rules that should find it.

    python calibrate.py --data-root DIR

DIR holds cifar10/train/{class}/*.jpg, tinyshakespeare.txt and wikitext-2-valid.txt; digits come with scikit-learn.
Every problem trains with a cosine over a grid of peaks a factor of 2 apart (its best is the target), and leaves
traces: the losses of range tests and of short cosine trials. Every rule then reads the traces alone. At last
measure_lr_scale itself is judged on seeds that no trace has; as in the scripts, its guess counts where it refuses.
What is in runs.jsonl is not run again.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlr_snet_scale import UNTRAINED_STEPS, measure_lr_scale, run_over_trial, smoothed, usual_lr
from models.mobilenetv2 import Bottleneck
from models.resnet import CifarResNet
from models.shufflenetv2 import Unit, convolution
from training.folder import provenance
from utils import write_atomically

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


def shuffle_net() -> nn.Module:
    """Four units of ShuffleNetV2, narrow."""
    units = [Unit(16, 48, 2), Unit(48, 48, 1), Unit(48, 96, 2), Unit(96, 96, 1)]
    return nn.Sequential(convolution(3, 16, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def mobile_net() -> nn.Module:
    """Four bottlenecks of MobileNetV2, narrow."""
    units = [Bottleneck(16, 24, 2, 4), Bottleneck(24, 24, 1, 4), Bottleneck(24, 48, 2, 4), Bottleneck(48, 48, 1, 4)]
    return nn.Sequential(convolution(3, 16, 3), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


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

    def __init__(self, vocabulary: int, cell: type[nn.RNNBase], num_layers: int = 1, width: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cells = cell(width, width, num_layers, batch_first=True)
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
    "shuffle": lambda size, outputs: shuffle_net(),
    "mobile": lambda size, outputs: mobile_net(),
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


def load_data(root: Path, name: str, size: int) -> Data:
    """One of the calibration's data sets. ValueError where its files are missing."""
    if name == "digits":
        digits = load_digits()
        inputs = torch.tensor(digits.images, dtype=torch.float32).div(16).sub(0.3).div(0.37)
        return split(inputs, torch.tensor(digits.target), 1200, 10)
    if name == "cifar":
        return load_images(root / "cifar10" / "train", size)
    path = root / {"shakespeare": "tinyshakespeare.txt", "wikitext": "wikitext-2-valid.txt"}[name]
    if not path.exists():
        raise ValueError(f"{path}: no such file; give --data-root the folder that holds it")
    text = path.read_text(encoding="utf-8")[:500_000]  # the final table reads other halves
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    windows = tokens[: len(tokens) // (size + 1) * (size + 1)].view(-1, size + 1)
    return split(windows[:, :-1], windows[:, 1:], len(windows) * 9 // 10, len(alphabet), validation=600)


def load_images(folder: Path, size: int) -> Data:
    """The last 1,000 training images of every class, shrunk to size × size pixels: 600 to train, 400 to validate."""
    images, labels = [], []
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    if not classes:
        raise ValueError(f"{folder}: no class folders; give --data-root the folder that holds cifar10/train/CLASS")
    for label, path in enumerate(classes):
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
        halves = zip(*(part.split(500) for part in self.data.validation), strict=True)
        results = [[float(value) for value in cross_entropy(self.network, *half)] for half in halves]
        loss, accuracy = (statistics.fmean(column) for column in zip(*results, strict=True))
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


def measure(problem: Problem, data: Data, seed: int, num_steps: int) -> dict[str, Any]:
    """What measure_lr_scale says of a run, or where it refuses its guess and why."""
    training = Training(problem, data, seed)
    optimizer = OPTIMIZERS[problem.optimizer](training.network.parameters())
    measured = measure_lr_scale(training.network, optimizer, LossStream(training), num_steps, problem.max_norm)
    outcome = {"refusal": measured.refusal} if measured.refusal else {"steps": measured.num_steps}
    return {"scale": float(f"{measured.scale:.4g}"), **outcome}


def cosine(peak: float, num_steps: int) -> list[float]:
    return [peak * (1 + math.cos(math.pi * step / num_steps)) / 2 for step in range(num_steps)]


def sweep(low: float, high: float, num_steps: int) -> list[float]:
    return [low * (high / low) ** (step / (num_steps - 1)) for step in range(num_steps)]


class Cache:
    """Everything that was trained, a line each, found again by what it was."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.rows[row["key"]] = row

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.rows:
            start = time.perf_counter()
            row = {"key": key, **make()}
            row["seconds"] = round(time.perf_counter() - start, 2)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[key] = row
        return self.rows[key]


def final(problem: Problem, data: Data, seed: int, peak: float, num_steps: int) -> dict[str, Any]:
    """A whole run under a cosine from that peak."""
    training = Training(problem, data, seed)
    losses = training.run(cosine(peak, num_steps))
    loss, accuracy = training.validate() if math.isfinite(losses[-1]) else (math.nan, math.nan)
    if not math.isfinite(loss):
        loss, accuracy = math.log(data.num_outputs), 100 / data.num_outputs
    return {"loss": round(loss, 4), "accuracy": round(accuracy, 2)}


def best_exponent(values: dict[int, float]) -> int:
    return min(values, key=lambda exponent: (values[exponent], exponent))


def run_grid(problem: Problem, data: Data, num_steps: int, seeds: int, cache: Cache) -> None:
    """Cosines from usual · 2^k for k = -2 … 2, and on until the best is two places from either end."""
    mean: dict[int, float] = {}
    wanted = set(range(-2, 3))
    while wanted:
        for exponent in sorted(wanted):
            peak = problem.usual * 2.0**exponent
            rows = [cache.get(f"{problem.name} | cosine {num_steps} | 2^{exponent} | seed {seed}",
                              lambda seed=seed, peak=peak: final(problem, data, seed, peak, num_steps))
                    for seed in range(seeds)]
            mean[exponent] = statistics.fmean(score(problem, row) for row in rows)
        best = best_exponent(mean)
        wanted = {k for k in range(best - 2, best + 3) if k not in mean and -9 <= k <= 9}


def score(problem: Problem, row: dict[str, Any]) -> float:
    """What is to be small: the error in %, or for text the loss in per cent of a nat (so in % of perplexity)."""
    return 100 * row["loss"] if problem.is_text else 100 - row["accuracy"]


def run_traces(problem: Problem, data: Data, seeds: int, cache: Cache) -> None:
    """Range tests around the usual rate, and short cosines from usual · 2^k: the losses of their steps."""
    usual = problem.usual
    plans = {f"range {num_steps}": sweep(usual / 1000, usual * 100, num_steps) for num_steps in (60, 120)}
    for num_steps in (15, 30, 60) if max(problem.lengths) >= 1000 else (15,):
        plans |= {f"trial {num_steps} | 2^{k}": cosine(usual * 2.0**k, num_steps) for k in range(-5, 7)}
    for seed in range(seeds):
        training = Training(problem, data, 100 + seed)
        for stream, (kind, rates) in enumerate(plans.items(), start=1):
            if seed and kind.startswith(("range 60", "trial 30", "trial 60")):
                continue  # one seed of these
            cache.get(f"{problem.name} | {kind} | seed {seed}",
                      lambda run=training.run, rates=rates, stream=stream: {"losses": run(rates, stream)})


def run_measure(problem: Problem, data: Data, num_steps: int, seeds: int, cache: Cache) -> None:
    for seed in range(500, 500 + seeds):
        cache.get(f"{problem.name} | measured {num_steps} | seed {seed}",
                  lambda seed=seed: measure(problem, data, seed, num_steps))


# ---------------------------------------------------------------------------------------------- rules

# Rates are in octaves above the usual rate of the optimizer: log2(rate / usual).


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, one run length, and the traces of one seed."""

    problem: Problem
    num_steps: int
    scores: dict[int, float]  # of whole runs, by the peak in octaves; small is good
    ranges: dict[int, list[float]]  # losses of range tests, by their steps
    trials: dict[int, list[float]]  # losses of cosines over 15 steps, by the peak in octaves

    @cached_property
    def best(self) -> float:
        """The best peak: the vertex of the parabola through the lowest score and its neighbours."""
        middle = best_exponent(self.scores)
        left, low, right = (self.scores[middle + offset] for offset in (-1, 0, 1))
        return middle + (left - right) / (left - 2 * low + right) / 2 if left + right > 2 * low else float(middle)

    def regret(self, rate: float) -> float:
        """What a run from that peak loses against the best of the grid: interpolated, and level outside the grid."""
        low = max(min(self.scores), min(math.floor(rate), max(self.scores) - 1))
        share = min(max(rate - low, 0.0), 1.0)
        return (1 - share) * self.scores[low] + share * self.scores[low + 1] - min(self.scores.values())

    def range_rate(self, num_steps: int) -> float:
        """Where the function's smoothed loss of the range test is lowest, once the rates are large enough to matter."""
        smooth = smoothed(self.ranges[num_steps])
        trained = smooth[UNTRAINED_STEPS:]
        return math.log2(sweep(1e-3, 1e2, num_steps)[UNTRAINED_STEPS + trained.index(min(trained))])

    def best_trial(self, peaks: list[float]) -> float:
        """The peak with the lowest final loss, among those trials that are nearest to the given peaks."""
        nearest = {min(self.trials, key=lambda peak, wanted=peak: abs(peak - wanted)) for peak in peaks}
        return float(min(nearest, key=self.final_loss))

    def final_loss(self, peak: int) -> float:
        losses = self.trials[peak]
        return statistics.fmean(losses[-5:]) if math.isfinite(losses[-1]) else math.inf


def between(case: Case, c: float) -> float:
    """c · the best of three cosine trials, from usual / c to the rate of the range test."""
    high = case.range_rate(120)
    rate = case.best_trial([-c, (high - c) / 2, high]) + c
    return min(max(rate, min(0.0, high + c)), max(0.0, high + c))


def weighted_by_noise(case: Case, c: float) -> float:
    """The mean of the three trials of between, weighted by how clearly the noise of the batches tells them apart."""
    high = case.range_rate(120)
    peaks = [case.best_trial([peak]) for peak in (-c, (high - c) / 2, high)]
    losses = [case.final_loss(int(peak)) for peak in peaks]
    error = statistics.pstdev(case.ranges[120][:20]) * math.sqrt(2 / 5)
    weights = [math.exp((min(losses) - loss) / (2 * error)) if math.isfinite(loss) else 0.0 for loss in losses]
    return sum(weight * peak for weight, peak in zip(weights, peaks, strict=True)) / (sum(weights) or 1) + c


def all_trials(case: Case) -> float:
    return case.best_trial(list(case.trials))


RULES: dict[str, Callable[[Case, float], float]] = {  # of the case and log2 c
    "the usual rate": lambda case, c: 0.0,
    "c per optimizer": lambda case, c: c,
    "c · range test, 60 steps": lambda case, c: case.range_rate(60) + c,
    "c · range test": lambda case, c: case.range_rate(120) + c,
    "c · trials": lambda case, c: all_trials(case) + c,
    "c · √(usual · range test)": lambda case, c: case.range_rate(120) / 2 + c,
    "c · ∛(usual · range test · trials)": lambda case, c: (case.range_rate(120) + all_trials(case)) / 3 + c,
    "median of usual, c · range test, c · trials":
        lambda case, c: statistics.median((0.0, case.range_rate(120) + c, all_trials(case) + c)),
    "c · best of three trials between usual and c · range test": between,
    "best of the three, c = 0.6": lambda case, c: between(case, math.log2(0.6)),
    "mean of the three, weighted by loss and noise": weighted_by_noise,
    "the same, c = 0.6": lambda case, c: weighted_by_noise(case, math.log2(0.6)),
    "the same, c per optimizer": weighted_by_noise,
    "the same, c of the function": lambda case, c: weighted_by_noise(case, math.log2(case.problem.factor)),
    "best of the three, c = 0.6, then ^¾ · usual^¼": lambda case, c: 0.75 * between(case, math.log2(0.6)),
    "best of the three, c = (15 / steps)^(1/6)": lambda case, c: between(case, math.log2(15 / case.num_steps) / 6),
}
PER_OPTIMIZER = ("c per optimizer", "the same, c per optimizer")  # c is fitted on the problems of the optimizer alone


def weighted_mean(values: dict[Case, float]) -> float:
    """The mean over problems; the lengths and seeds of one share its weight."""
    by_problem: dict[str, list[float]] = {}
    for case, value in values.items():
        by_problem.setdefault(case.problem.name, []).append(value)
    return statistics.fmean(statistics.fmean(group) for group in by_problem.values())


def estimates(name: str, cases: list[Case]) -> dict[Case, float]:
    """The rule's rate for every case, its constant fitted on the other problems alone."""
    rule, grid = RULES[name], [octave / 10 for octave in range(-25, 11)]
    table = {case: [rule(case, c) for c in grid] for case in cases}
    problems: dict[Problem, list[Case]] = {}
    for case in cases:
        problems.setdefault(case.problem, []).append(case)
    errors = {problem: [statistics.fmean((table[case][place] - case.best) ** 2 for case in group)
                        for place in range(len(grid))] for problem, group in problems.items()}
    result = {}
    for problem, group in problems.items():
        others = [row for other, row in errors.items() if other != problem and (
            name not in PER_OPTIMIZER or FAMILY[other.optimizer] == FAMILY[problem.optimizer])]
        sums = [sum(column) for column in zip(*others, strict=True)]
        result |= {case: table[case][sums.index(min(sums))] for case in group}
    return result


def fitted_factor(cases: list[Case]) -> float:
    """c of weighted_by_noise with the smallest mean squared error over these cases."""
    grid = [octave / 10 for octave in range(-25, 11)]
    errors = [weighted_mean({case: (weighted_by_noise(case, c) - case.best) ** 2 for case in cases}) for c in grid]
    return 2 ** grid[errors.index(min(errors))]


def collect(cache: Cache, longest: int) -> list[Case]:
    """Every problem, length and seed whose runs and traces are all there."""
    scores: dict[tuple[str, int], dict[int, list[float]]] = {}
    traces: dict[tuple[str, int], dict[str, dict[int, list[float]]]] = {}
    problems = {problem.name: problem for problem in PROBLEMS}
    for row in cache.rows.values():
        name, kind, *peak, seed = row["key"].split(" | ")
        kind, steps = kind.split()
        if name not in problems:
            continue
        if kind == "cosine":
            places = scores.setdefault((name, int(steps)), {})
            places.setdefault(int(peak[0][2:]), []).append(score(problems[name], row))
        elif kind == "range" or steps == "15":
            place = int(steps) if kind == "range" else int(peak[0][2:])
            traces.setdefault((name, int(seed[5:])), {"range": {}, "trial": {}})[kind][place] = row["losses"]
    cases = []
    for (name, num_steps), places in scores.items():
        mean = {peak: statistics.fmean(values) for peak, values in sorted(places.items())}
        best = best_exponent(mean)
        for (other, _), trace in traces.items():
            complete = 120 in trace["range"] and len(trace["trial"]) == 12
            if other == name and complete and set(range(best - 2, best + 3)) <= mean.keys() and num_steps <= longest:
                trace["range"].setdefault(60, traces[name, 0]["range"][60])  # one seed only
                cases.append(Case(problems[name], num_steps, mean, trace["range"], trace["trial"]))
    return cases


@dataclass(frozen=True, eq=False)
class Judged:
    """A problem, one run length, and the rates of measure_lr_scale in octaves, seed by seed."""

    case: Case  # of any seed of the traces
    rates: list[float]
    refusals: int  # of them

    def within(self, factor: float) -> float:
        """The share of seeds whose rate is that close to the best peak."""
        return statistics.fmean(abs(rate - self.case.best) <= math.log2(factor) for rate in self.rates)

    @property
    def regrets(self) -> list[float]:
        return [self.case.regret(rate) for rate in self.rates]


def judge(cases: list[Case], cache: Cache) -> list[Judged]:
    """Every problem and run length that measure_lr_scale has measured, in the order of the problems."""
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in cache.rows.values():
        name, kind, *_ = row["key"].split(" | ")
        if kind.startswith("measured"):
            measured.setdefault((name, int(kind.split()[1])), []).append(row)
    judged = []
    for case in {(case.problem.name, case.num_steps): case for case in cases}.values():
        rows = measured.get((case.problem.name, case.num_steps))
        if rows:
            rates = [math.log2(row["scale"] / case.problem.usual) for row in rows]
            judged.append(Judged(case, rates, sum("refusal" in row for row in rows)))
    return sorted(judged, key=lambda one: (PROBLEMS.index(one.case.problem), one.case.num_steps))


def row_of(name: str, within: list[dict[Case, float]], regrets: dict[Case, list[float]]) -> str:
    """A line of a table of rules."""
    cells = [weighted_mean(values) for values in within]
    for is_text in (False, True):
        some = {case: values for case, values in regrets.items() if case.problem.is_text == is_text and values}
        mean = weighted_mean({case: statistics.fmean(values) for case, values in some.items()}) if some else math.nan
        cells += [mean, max(map(max, some.values()), default=math.nan)]
    return f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


COLUMNS = "within ×2 | within ×3 | regret, images | worst | regret, text | worst |"


def function_table(judged: list[Judged]) -> list[str]:
    """The function against the usual rate, over all problems, and where it refused."""
    seeds = {len(one.rates) for one in judged}
    lines = [
        "## The function", "",
        f"measure_lr_scale on {' or '.join(map(str, sorted(seeds)))} seeds that no trace has; where it "
        "refuses, its guess counts.", "", f"| | {COLUMNS}", "|---|---|---|---|---|---|---|",
        row_of("measure_lr_scale", [{one.case: one.within(factor) for one in judged} for factor in (2, 3)],
               {one.case: one.regrets for one in judged}),
        row_of("the usual rate",
               [{one.case: float(abs(one.case.best) <= math.log2(factor)) for one in judged} for factor in (2, 3)],
               {one.case: [one.case.regret(0.0)] for one in judged}),
    ]
    refused = [f"{one.case.problem.name} at {one.case.num_steps} ({one.refusals} of {len(one.rates)} seeds)"
               for one in judged if one.refusals]
    if refused:
        counts = sum(one.refusals for one in judged), sum(len(one.rates) for one in judged)
        lines += ["", f"Refused, {counts[0]} of {counts[1]}: {', '.join(refused)}."]
    return lines


def problem_table(judged: list[Judged]) -> list[str]:
    """The function on every problem."""
    lines = ["| problem | steps | best peak | measured (median) | ratios | mean regret |", "|---" * 6 + "|"]
    for one in judged:
        case, usual = one.case, one.case.problem.usual
        ratios = [2 ** (rate - case.best) for rate in one.rates]
        lines.append(
            f"| {case.problem.name} | {case.num_steps} | {usual * 2**case.best:.2g} | "
            f"{usual * 2 ** statistics.median(one.rates):.2g} | {min(ratios):.2f} to {max(ratios):.2f} | "
            f"{statistics.fmean(one.regrets):.1f} |")
    return lines


def rules_table(cases: list[Case]) -> list[str]:
    """Every rule over all problems."""
    lines = [
        "## The rules", "",
        f"On the traces of {len(cases)} problems, lengths and seeds, with trials a factor of 2 apart; c is fitted on "
        "all other problems.", "", f"| rule | std (decades) | {COLUMNS}", "|---|---|---|---|---|---|---|---|",
    ]
    for name in RULES:
        rates = estimates(name, cases)
        errors = {case: rates[case] - case.best for case in cases}
        deviation = math.log10(2) * math.sqrt(weighted_mean({case: error**2 for case, error in errors.items()}))
        within = [{case: float(abs(error) <= math.log2(factor)) for case, error in errors.items()} for factor in (2, 3)]
        regrets = {case: [case.regret(rates[case])] for case in cases}
        lines.append(row_of(f"{name} | {deviation:.2f}", within, regrets))
    fits = [f"{fitted_factor([case for case in cases if FAMILY[case.problem.optimizer] == family]):.2f} ({family})"
            for family in dict.fromkeys(FAMILY.values())]
    return [*lines, "", f"c of the weighted mean that fits all problems of an optimizer best: {', '.join(fits)}."]


def report(cases: list[Case], judged: list[Judged], out: Path) -> None:
    """table.md: the function over all problems and on each, then every rule."""
    record = provenance(argparse.Namespace())
    done = {(case.problem.name, case.num_steps) for case in cases}
    missing = [f"{problem.name} at {length}" for problem in PROBLEMS for length in problem.lengths
               if (problem.name, length) not in done]
    lines = [
        "# Calibration of the measured LR scale", "",
        "`python calibrate.py --data-root DIR`. Runs have seed 0, traces seeds 100, 101 and so on, and "
        f"measure_lr_scale has seeds 500, 501 and so on. Commit {record['commit']}, torch "
        f"{record['versions']['torch']}, one thread of {record['hardware']['cores']} cores, "
        f"{record['hardware']['cpu']}.", "",
        f"{len({case.problem.name for case in cases})} problems, {len(done)} with their run lengths. Against the best "
        "cosine peak of a grid. Regret in points of accuracy, and in % of perplexity.", "",
        *function_table(judged), "", *problem_table(judged), "", *rules_table(cases),
    ]
    if missing:
        lines += ["", f"Not run to the end yet (steps): {', '.join(missing)}."]
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with cifar10 and the texts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every run (default: 1)")
    parser.add_argument("--trace-seeds", type=int, default=5, help="seeds of every trace (default: 5)")
    parser.add_argument("--judge-seeds", type=int, default=10, help="seeds of measure_lr_scale (default: 10)")
    parser.add_argument("--longest", type=int, default=3000, help="steps of the longest runs (default: 3000)")
    parser.add_argument("--only", default="", help="problems whose name contains this (default: all)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    cache = Cache(args.out / "runs.jsonl")
    loaded: dict[tuple[str, int], Data] = {}
    for problem in PROBLEMS:
        if args.only not in problem.name:
            continue
        key = problem.data, problem.size
        if key not in loaded:
            loaded[key] = load_data(args.data_root, *key)
        run_traces(problem, loaded[key], args.trace_seeds, cache)
        for num_steps in (length for length in problem.lengths if length <= args.longest):
            run_grid(problem, loaded[key], num_steps, args.seeds, cache)
            run_measure(problem, loaded[key], num_steps, args.judge_seeds, cache)
        print(problem.name, flush=True)
    cases = collect(cache, args.longest)
    report(cases, judge(cases, cache), args.out)


if __name__ == "__main__":
    main(parse_args())

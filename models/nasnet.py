"""NASNet-A for 32×32 images. Source: Zoph, Vasudevan, Shlens, Le, "Learning Transferable Architectures", 2018.

The cells, biases and widths are those of the CIFAR variant that the paper's code uses.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Separable(nn.Sequential):
    """Twice ReLU, depthwise and pointwise convolution, BatchNorm; the first may have a stride."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, bias: bool = False):
        layers: list[nn.Module] = []
        for step, has_bias in ((stride, bias), (1, True)):
            depthwise = nn.Conv2d(channels, channels, kernel, step, kernel // 2, groups=channels, bias=has_bias)
            layers += [nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)]
        super().__init__(*layers)


def projection(in_channels: int, out_channels: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=bias), nn.BatchNorm2d(out_channels))


class Fit(nn.Module):
    """Brings the output of the cell before last to this cell's channels, and to the last one's resolution.

    Holds the weights of both ways, so that the parameter count is the published one; a cell uses one of them at most.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.even = nn.Conv2d(in_channels, channels // 2, 1)
        self.odd = nn.Conv2d(in_channels, channels // 2, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.project = projection(in_channels, channels)
        self.same = in_channels == channels

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        if before.shape[2:] == last.shape[2:]:
            return before if self.same else self.project(before)
        before = before.relu()
        shifted = functional.pad(before, (-1, 1, -1, 1))
        halves = self.even(before[:, :, ::2, ::2]), self.odd(shifted[:, :, ::2, ::2])
        return self.bn(torch.cat(halves, 1))


class NormalCell(nn.Module):
    """Keeps the resolution: last (batch, in_channels, h, w) -> (batch, 6 · channels, h, w)."""

    def __init__(self, last_channels: int, before_channels: int, channels: int):
        super().__init__()
        self.fit = Fit(before_channels, channels)
        self.project = projection(last_channels, channels, bias=False)
        self.last_3, self.last_5 = Separable(channels, 3), Separable(channels, 5)
        self.before_3, self.before_5, self.before_3b = (Separable(channels, kernel) for kernel in (3, 5, 3))
        self.average = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, last: Tensor, before: Tensor) -> Tensor:
        before, last = self.fit(before, last), self.project(last)
        blocks = (
            before,
            self.last_3(last) + last,
            self.before_3(before) + self.last_5(last),
            self.average(last) + last,
            2 * self.average(before),
            self.before_5(before) + self.before_3b(before),
        )
        return torch.cat(blocks, 1)


class ReductionCell(nn.Module):
    """Halves the resolution: last (batch, in_channels, h, w) -> (batch, 4 · channels, h / 2, w / 2)."""

    def __init__(self, last_channels: int, before_channels: int, channels: int):
        super().__init__()
        self.fit = Fit(before_channels, channels)
        self.project = projection(last_channels, channels)
        self.before_7, self.before_7b, self.before_5 = (Separable(channels, k, 2, bias=True) for k in (7, 7, 5))
        self.last_5 = Separable(channels, 5, 2, bias=True)
        self.inner_3 = Separable(channels, 3, bias=True)
        self.largest = nn.MaxPool2d(3, stride=2, padding=1)
        self.halve = nn.AvgPool2d(3, stride=2, padding=1)
        self.average = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, last: Tensor, before: Tensor) -> Tensor:
        before, last = self.fit(before, last), self.project(last)
        first = self.before_7(before) + self.last_5(last)
        second = self.largest(last) + self.before_7b(before)
        third = self.halve(last) + self.before_5(before)
        fourth = self.largest(last) + self.inner_3(first)
        return torch.cat((second, third, fourth, self.average(first) + second), 1)


class NASNetA(nn.Module):
    """NASNet-A (repeats, 2, channels): images (batch, 3, h, w) -> logits (batch, classes)."""

    has_unused_parameters = True  # cells hold both ways of fitting and use one

    def __init__(self, repeats: int, channels: int, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.cells = nn.ModuleList()
        before = last = channels
        for stage in range(3):
            width = channels * 2**stage
            if stage > 0:
                self.cells.append(ReductionCell(last, before, width))
                before, last = last, 4 * width
            for _ in range(repeats):
                self.cells.append(NormalCell(last, before, width))
                before, last = last, 6 * width
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        last = before = self.stem(x)
        for cell in self.cells:
            last, before = cell(last, before), last
        return self.fc(last.relu().mean((2, 3)))

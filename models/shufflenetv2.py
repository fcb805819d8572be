"""ShuffleNetV2 for 32×32 images. Source: Ma, Zhang, Zheng, Sun, "ShuffleNet V2", 2018."""

import torch
from torch import Tensor, nn


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1,
                activate: bool = True) -> nn.Sequential:
    """A convolution with bias, as in the CIFAR variant that the paper's code uses, then BatchNorm and ReLU."""
    layers = [nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups)]
    return nn.Sequential(*layers, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if activate else []))


class Unit(nn.Module):
    """Half of the channels pass, half are transformed (stride 2: all are, on both sides); then both are shuffled."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.split = stride == 1
        width = in_channels // 2 if self.split else in_channels
        self.residual = nn.Sequential(
            convolution(width, width, 1),
            convolution(width, width, 3, stride, groups=width, activate=False),
            convolution(width, out_channels // 2, 1),
        )
        self.shortcut = nn.Identity() if self.split else nn.Sequential(
            convolution(width, width, 3, stride, groups=width, activate=False),
            convolution(width, out_channels // 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.split else (x, x)
        pair = torch.stack((self.shortcut(left), self.residual(right)), 2)  # (batch, channels / 2, 2, h, w)
        return pair.flatten(1, 2)


def shufflenetv2(num_classes: int) -> nn.Module:
    """The ×1 net: images (batch, 3, h, w) -> logits (batch, classes)."""
    layers: list[nn.Module] = [convolution(3, 24, 3, activate=False)]  # no ReLU, as in the authors' shufflenetv2.py
    channels = 24
    for width, repeats in ((116, 3), (232, 7), (464, 3)):
        layers += [Unit(channels, width, 2), *(Unit(width, width, 1) for _ in range(repeats))]
        channels = width
    return nn.Sequential(*layers, convolution(channels, 1024, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(1024, num_classes))

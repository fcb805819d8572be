"""MobileNetV2 for 32×32 images. Source: Sandler et al., "MobileNetV2", 2018; sizes of the paper's CIFAR variant."""

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Expand by 1×1, filter depthwise by 3×3, project by 1×1; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        width = expansion * in_channels
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, width, 1), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, out_channels, 1), nn.BatchNorm2d(out_channels),
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.shortcut else self.residual(x)


def mobilenetv2(num_classes: int) -> nn.Module:
    """The ×1 net: images (batch, 3, h, w) -> logits (batch, classes)."""
    # The 1×1 stem with padding 1 is the variant's own: it widens 32×32 to 34×34.
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6()]
    channels = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
    for expansion, width, repeats, stride in stages:
        for index in range(repeats):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1, expansion))
            channels = width
    layers += [nn.Conv2d(channels, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, num_classes))

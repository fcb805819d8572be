"""WideResNet for 32×32 images. Source: Zagoruyko and Komodakis, "Wide Residual Networks", 2016.

The authors' meta_image_model.py differs from that paper, and we follow the authors: the stride is on a block's second
convolution, and the shortcut takes the block's raw input.
"""

from torch import Tensor, nn

from .resnet import init_convolutions


class Block(nn.Module):
    """BatchNorm–ReLU–convolution twice, beside a shortcut that is a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x).relu())
        out = self.conv2(self.bn2(out).relu())
        return out + (x if self.shortcut is None else self.shortcut(x))


def wideresnet(num_classes: int) -> nn.Module:
    """WRN-28-10: images (batch, 3, h, w) -> logits (batch, classes)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for width, stride in ((160, 1), (320, 2), (640, 2)):
        for index in range(4):
            layers.append(Block(channels, width, stride if index == 0 else 1))
            channels = width
    # Momentum 0.9 is the authors': the running statistics are nearly those of the last batch.
    head = [nn.BatchNorm2d(channels, momentum=0.9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return init_convolutions(nn.Sequential(*layers, *head, nn.Linear(channels, num_classes)))

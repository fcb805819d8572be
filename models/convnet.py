"""Plain convolutional networks without normalisation. They start as He, Zhang, Ren, Sun, 2015, recommend."""

from torch import Tensor, nn


def convolutions(*channels: int, strides: tuple[int, ...]) -> list[nn.Module]:
    """3×3 convolutions between these numbers of channels, each with its stride and followed by a ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(channels, channels[1:], strides, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return layers


class ConvNet(nn.Module):
    """Six convolutions and a linear layer: images (batch, 3, h, w) -> logits (batch, classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(*convolutions(3, 32, 32, 64, 64, 128, 128, strides=(1, 1, 2, 1, 2, 1)))
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def denoiser(num_channels: int) -> nn.Module:
    """Five convolutions of the same resolution: images (batch, 3, h, w) -> (batch, channels, h, w)."""
    return nn.Sequential(
        *convolutions(3, 32, 32, 32, 32, strides=(1, 1, 1, 1)), nn.Conv2d(32, num_channels, 3, padding=1)
    )

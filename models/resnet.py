"""ResNets for 32×32 images. Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016."""

import math

import torchvision
from torch import Tensor, nn
from torch.nn import functional


def init_convolutions(network: nn.Module) -> nn.Module:
    """Draws the convolutions anew, Xavier-uniform with gain √2, and returns the network.

    Source: the authors' meta_image_model.py, init_weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
    return network


def small_stem(name: str, num_classes: int) -> nn.Module:
    """torchvision's ResNet of that name whose stem keeps the resolution: 3×3, stride 1, no max-pool.

    It starts as the authors' does, see init_convolutions.
    """
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return init_convolutions(network)


def resnet50_imagenet(num_classes: int) -> nn.Module:
    """torchvision's ResNet-50 as it is, for images of 224×224 pixels."""
    return torchvision.models.resnet50(num_classes=num_classes)


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A: stride, and zeros for new channels)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return (out + functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))).relu()


class CifarResNet(nn.Module):
    """He et al.'s ResNet of 6n + 2 layers for CIFAR: images (batch, 3, h, w) -> logits (batch, classes)."""

    def __init__(self, blocks_per_stage: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        for width in (16, 32, 64):
            for _ in range(blocks_per_stage):
                layers.append(Block(channels, width, stride=1 if channels == width else 2))
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))

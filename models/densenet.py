"""DenseNet for 32×32 images. Source: Huang, Liu, van der Maaten, Weinberger, 2017."""

from collections import OrderedDict

import torchvision
from torch import nn


def densenet121(num_classes: int) -> nn.Module:
    """torchvision's DenseNet-121 whose stem, one 3×3 convolution, keeps the resolution."""
    network = torchvision.models.densenet121(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    rest = [(name, child) for name, child in network.features.named_children() if not name.endswith("0")]
    network.features = nn.Sequential(OrderedDict([("conv0", stem), *rest]))
    return network

"""A small vision transformer. Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021."""

from torch import nn
from torchvision.models import VisionTransformer

PATCH = 4  # pixels


def vit(num_classes: int, image_size: int = 32) -> nn.Module:
    """torchvision's VisionTransformer, 4 layers of width 128: images (batch, 3, size, size) -> logits (batch, classes).

    A step costs about as much as resnet20's. Only images of `image_size` pixels fit. ValueError for a size that is not
    a multiple of the patches' 4 pixels.
    """
    if image_size % PATCH:
        raise ValueError(f"vit: image size {image_size}: give a multiple of {PATCH} pixels with --image-size")
    return VisionTransformer(
        image_size, PATCH, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=num_classes
    )

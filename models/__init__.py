"""The task networks; to add one: its file and a line in IMAGE_NETWORKS or LANGUAGE_MODELS."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .convnet import ConvNet, denoiser
from .densenet import densenet121
from .gpt import GPT
from .lstm import LanguageModel
from .mobilenetv2 import mobilenetv2
from .nasnet import NASNetA
from .resnet import CifarResNet, resnet50_imagenet, small_stem
from .shufflenetv2 import shufflenetv2
from .vit import vit
from .wideresnet import wideresnet

IMAGE_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet": partial(small_stem, "resnet18"),
    "resnet34": partial(small_stem, "resnet34"),
    "resnet50": partial(small_stem, "resnet50"),
    "resnet101": partial(small_stem, "resnet101"),
    "resnet152": partial(small_stem, "resnet152"),
    "resnet50-imagenet": resnet50_imagenet,
    "resnet8": partial(CifarResNet, 1),
    "resnet20": partial(CifarResNet, 3),
    "shufflenetv2": shufflenetv2,
    "wideresnet": wideresnet,
    "mobilenetv2": mobilenetv2,
    "nasnet": partial(NASNetA, 4, 44),
    "densenet121": densenet121,
    "vit": vit,
    "convnet": ConvNet,
    "denoiser": denoiser,
}
LANGUAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lstm2": partial(LanguageModel, 2),
    "lstm3": partial(LanguageModel, 3),
    "gpt": partial(GPT, 2),  # the size of lstm3 at the same width
}
NETWORKS = IMAGE_NETWORKS | LANGUAGE_MODELS


def build_network(
    name: str, num_outputs: int, *, image_size: int = 32, seq_len: int = 512, **options: Any
) -> nn.Module:
    """The network of that name, for images (batch, 3, h, w) or tokens (length, batch).

    num_outputs is the number of classes, of words in the vocabulary, or of channels for the denoiser. image_size is in
    pixels and seq_len in tokens; only some networks depend on them. options are embed_size and dropout of a language
    model. ValueError for an unknown name or a size that does not fit.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r}: choose from {', '.join(NETWORKS)}")
    sizes = {"vit": {"image_size": image_size}, "gpt": {"seq_len": seq_len}}  # of the input that it is built for
    return NETWORKS[name](num_outputs, **sizes.get(name, {}), **options)

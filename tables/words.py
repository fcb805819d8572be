"""The names of lines and problems: for the files of a result, and for its readers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data import TEXTS

NETWORKS = {
    "resnet": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "resnet152": "ResNet-152", "resnet50-imagenet": "ResNet-50", "resnet8": "ResNet-8", "resnet20": "ResNet-20",
    "shufflenetv2": "ShuffleNetV2", "wideresnet": "WRN-28-10", "mobilenetv2": "MobileNetV2", "nasnet": "NASNet",
    "densenet121": "DenseNet-121", "vit": "a vision transformer", "lstm2": "2-layer LSTM", "lstm3": "3-layer LSTM",
    "gpt": "a causal transformer", "convnet": "a plain convolutional network", "denoiser": "a denoiser",
}
DATASETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cifar10-c": "CIFAR-10-C", "cifar100-c": "CIFAR-100-C",
    "svhn": "SVHN", "tinyimagenet": "TinyImageNet", "imagenet": "ImageNet", "digits": "scikit-learn's digits",
    "ptb": "Penn Treebank", "pydoc": "Python's documentation",
}
CORRUPTIONS = {"gaussian_noise": "Gaussian noise", "jpeg_compression": "JPEG compression"}
DETAILS: dict[str, Callable[[str], str]] = {  # how the value of a flag tells lines apart
    "num-epoch": lambda value: f"{value} epochs",
    "limit-train": lambda value: f"{int(value):,} images",
    "image-size": lambda value: f"{value} pixels",
    "predict": lambda value: f"predicting the {value}",
    "batch-size": lambda value: f"batch {value}",
    "accumulate": lambda value: f"{value} micro-batches",
    "tokens": lambda value: {"word": "words", "char": "characters"}.get(value, value),
    "corruption": lambda value: CORRUPTIONS.get(value, value),
    "label-noise": lambda value: f"{float(value):.0%} wrong labels",
    "noise-kind": lambda value: value,
    "t-val": lambda value: f"T_val {value}",
}


def problem_of(arguments: Mapping[str, Any]) -> str:
    """What the methods of a line are compared on: network and data set, as flag values."""
    return f"{arguments['network']} {arguments['dataset']}"


def in_words(arguments: Mapping[str, Any]) -> str:
    """The problem for a reader, such as "ResNet-8 on CIFAR-10 images (class folder)"."""
    network, dataset = arguments["network"], arguments["dataset"]
    title = DATASETS.get(dataset, dataset)
    if dataset in ("folder", "text"):
        name = Path(arguments.get("data-root") or "").name.encode(errors="backslashreplace").decode() or "your"
        content, kind = ("text", "text folder") if dataset == "text" else ("images", "class folder")
        title = f"{DATASETS.get(name, name)} {content} ({kind})"
    return f"{NETWORKS.get(network, network)} on {title}"


def detail_of(line: Mapping[str, str], named_by: tuple[str, ...]) -> str:
    """What tells a line from others on the same problem, such as "momentum, 12 epochs"."""
    details = []
    for flag in named_by:
        if flag == "optimizer":
            optimizer = {"adam": "Adam", "adamw": "AdamW"}.get(line.get("optimizer", "sgd"), "SGD")
            details.append("momentum" if float(line.get("momentum", 0)) else optimizer)
        elif flag in line and not (flag == "limit-train" and line["dataset"] in TEXTS):  # which counts tokens there
            details.append(DETAILS[flag](line[flag]))
    return ", ".join(details)


def joined(*words: str) -> str:
    """The words that are not empty, with commas between them."""
    return ", ".join(word for word in words if word)

"""The registry: parameter counts, shapes and errors."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models import IMAGE_NETWORKS, build_network

COUNTS = json.loads((Path(__file__).parent / "golden.json").read_text())["fresh_parameter_counts"]


@pytest.mark.parametrize("key", [key for key in COUNTS if key.split("/")[0] in IMAGE_NETWORKS])
def test_parameter_counts_are_the_papers(key):
    name, classes = key.split("/")
    assert sum(parameter.numel() for parameter in build_network(name, int(classes)).parameters()) == COUNTS[key]


@pytest.mark.parametrize("name", sorted(IMAGE_NETWORKS.keys() - {"resnet50", "resnet101", "resnet152"}))
@pytest.mark.parametrize("size", [8, 32])
def test_a_network_takes_images_and_trains(name, size):
    network = build_network(name, 7)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert all(".fit." in name for name in unused)  # NASNet's cells hold both ways of fitting and use one


def test_nasnet_fits_both_parities_of_the_pixels():
    """The second half sees the pixels between those of the first, so no pixel is lost."""
    from models.nasnet import Fit

    fit = Fit(1, 2)
    for convolution in (fit.even, fit.odd):
        nn.init.ones_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    fit.bn = nn.Identity()
    before = torch.arange(1.0, 17).reshape(1, 1, 4, 4)
    even, odd = fit(before, torch.zeros(1, 1, 2, 2))[0]
    assert even.tolist() == [[1, 3], [9, 11]] and odd.tolist() == [[6, 8], [14, 16]]


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        build_network("nonsense", 10)

"""The registry: parameter counts, shapes and errors."""

import json
from pathlib import Path

import pytest
import torch

from models import NETWORKS, build_network

COUNTS = json.loads((Path(__file__).parent / "golden.json").read_text())["fresh_parameter_counts"]


@pytest.mark.parametrize("key", [key for key in COUNTS if key.split("/")[0] in NETWORKS])
def test_parameter_counts_are_the_papers(key):
    name, classes = key.split("/")
    assert sum(parameter.numel() for parameter in build_network(name, int(classes)).parameters()) == COUNTS[key]


@pytest.mark.parametrize("name", [name for name in NETWORKS if "1" not in name])
@pytest.mark.parametrize("size", [8, 32])
def test_a_network_takes_images_and_trains(name, size):
    network = build_network(name, 7)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        build_network("nonsense", 10)

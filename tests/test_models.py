"""The task networks: the authors' outputs, initialisation, parameter counts, shapes and errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import utils
from models import IMAGE_NETWORKS, LANGUAGE_MODELS, build_network
from models.nasnet import Fit
from utils import gather_hidden, shard_hidden

HERE = Path(__file__).parent
COUNTS = json.loads((HERE / "golden.json").read_text())["fresh_parameter_counts"]
GOLDEN = json.loads((HERE / "golden_networks.json").read_text())


@pytest.mark.parametrize("key", [key for key in COUNTS if key.split("/")[0] in IMAGE_NETWORKS])
def test_parameter_counts_are_the_papers(key):
    name, classes = key.split("/")
    assert sum(parameter.numel() for parameter in build_network(name, int(classes)).parameters()) == COUNTS[key]


def filled(network):
    """The network in float64 with the parameters that GOLDEN["how"] describes."""
    for k, parameter in enumerate(network.double().parameters()):
        i = torch.arange(parameter.numel(), dtype=torch.float64)
        if parameter.dim() == 1:
            values = 0.3 + 0.2 * torch.sin(0.11 * i + k)
        else:
            values = torch.sin(0.37 * i + k) * math.sqrt(2 * len(parameter) / parameter.numel())
        parameter.detach().copy_(values.view_as(parameter))
    return network


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(GOLDEN.keys() - {"how"}))
def test_a_network_computes_what_the_authors_does(name):
    network, golden = filled(build_network(name, 10)), GOLDEN[name]
    images = 1.5 * torch.sin(0.013 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)).view(4, 3, 32, 32)
    logits = network(images)[0]
    last = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    assert logits.tolist() == pytest.approx(golden["logits_of_image_0"], rel=0, abs=1e-9)  # given to nine decimals
    assert last.running_mean.sum().item() == pytest.approx(golden["last_batchnorm_running_mean_sum"], rel=1e-9)
    assert last.running_var.sum().item() == pytest.approx(golden["last_batchnorm_running_var_sum"], rel=1e-9)


def assert_uniform(values, bound):
    """They lie within ±bound and, where they are many, fill it as a uniform distribution does."""
    assert values.abs().max() <= bound * (1 + 1e-6)
    if values.numel() >= 5_000:  # the standard error of the standard deviation is below 0.7 % then
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(values.mean()) < 0.05 * bound


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet", "resnet34", "resnet50", "wideresnet"])
def test_a_network_of_the_paper_starts_as_the_authors_does(name):
    """Convolutions Xavier-uniform with gain √2; BatchNorm and the linear layer as torch's."""
    torch.manual_seed(0)
    for module in build_network(name, 100).modules():
        if isinstance(module, nn.Conv2d):
            area = math.prod(module.kernel_size)
            bound = math.sqrt(2) * math.sqrt(6 / (area * (module.in_channels + module.out_channels)))
            assert_uniform(module.weight, bound)
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)
        elif isinstance(module, nn.Linear):
            for parameter in module.parameters():
                assert_uniform(parameter, 1 / math.sqrt(module.in_features))


@pytest.mark.parametrize(("name", "fan"), [("resnet8", 1), ("resnet20", 1), ("resnet50-imagenet", 0)])
def test_the_other_resnets_start_as_he_et_al_do(name, fan):
    """Convolutions normal, of variance 2 / fan in (torchvision: fan out)."""
    torch.manual_seed(0)
    for module in build_network(name, 10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 2_000:
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.weight.shape[fan]))
            assert module.weight.std().item() == pytest.approx(std, rel=0.1)
            assert module.weight.abs().max() > 3 * std  # a uniform distribution ends at √3 of them


@pytest.mark.parametrize("name", sorted(IMAGE_NETWORKS.keys() - {"resnet50", "resnet101", "resnet152", "denoiser"}))
@pytest.mark.parametrize("size", [8, 32])
def test_a_network_takes_images_and_trains(name, size):
    network = build_network(name, 7, image_size=size)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    unused = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert all(".fit." in key for key in unused)  # NASNet's cells hold both ways of fitting and use one


def test_nasnet_fits_both_parities_of_the_pixels():
    """The second half sees the pixels between those of the first, so no pixel is lost."""
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


@pytest.mark.parametrize(("image_size", "classes", "count"), [(32, 10, 809_354), (32, 100, 820_964), (16, 10, 803_210)])
def test_the_vit_has_the_stated_size(image_size, classes, count):
    network = build_network("vit", classes, image_size=image_size)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_the_gpt_is_as_large_as_the_lstm_of_three_layers():
    counts = [sum(parameter.numel() for parameter in build_network(name, 10_000, seq_len=35).parameters())
              for name in ("gpt", "lstm3")]
    assert counts == [11_453_712, 11_433_744]


@pytest.mark.parametrize("size", [2, 30])
def test_a_size_that_patches_do_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"image size {size}: give a multiple of 4"):
        build_network("vit", 10, image_size=size)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("embed_size", [6, 32])
def test_a_language_model_gives_logits_for_every_token_and_trains(name, embed_size):
    network = build_network(name, 9, embed_size=embed_size, dropout=0.1, seq_len=7)
    logits, hidden = network(torch.randint(9, (7, 3)), None)
    assert logits.shape == (7, 3, 9)
    again, _ = network(torch.randint(9, (4, 3)), tuple(state.detach() for state in hidden))
    again.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_prediction_does_not_depend_on_later_tokens(name):
    torch.manual_seed(0)
    network = build_network(name, 9, embed_size=8, dropout=0.0)
    tokens = torch.randint(9, (6, 2))
    logits, _ = network(tokens, None)
    for position in range(5):
        changed = tokens.clone()
        changed[position + 1 :] = (changed[position + 1 :] + 1) % 9
        others, _ = network(changed, None)
        torch.testing.assert_close(others[: position + 1], logits[: position + 1])
        assert not torch.allclose(others[position + 1 :], logits[position + 1 :])


def test_the_layers_of_the_gpt_start_from_weights_of_their_own():
    first, second = build_network("gpt", 9, embed_size=8).transformer.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_empty_state_of_the_gpt_is_gathered_and_sharded(ranks, monkeypatch):

    monkeypatch.setattr(utils, "world_size", lambda: ranks)
    monkeypatch.setattr(utils, "all_gather", lambda value: [value] * ranks)
    assert gather_hidden(()) == () and shard_hidden(()) == ()


def todays_losses(autocast):
    """vit and gpt, each with its loss on a few examples."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    tokens = torch.randint(9, (7, 3))
    vit = build_network("vit", 4, image_size=8)
    gpt = build_network("gpt", 9, embed_size=16, dropout=0.0, seq_len=6)

    def image_loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = vit(images)
        return functional.cross_entropy(logits.float(), labels)

    def text_loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, _ = gpt(tokens[:-1])
        return functional.cross_entropy(logits.float().flatten(0, 1), tokens[1:].flatten())

    return {vit: image_loss, gpt: text_loss}


def trained(network, loss_of, num_steps):
    """The losses of so many steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(num_steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [False, True])
def test_the_networks_of_today_learn_a_few_examples_with_adamw(autocast):
    for network, loss_of in todays_losses(autocast).items():
        losses = trained(network, loss_of, 20)
        assert losses[-1] < 0.75 * losses[0]


@pytest.mark.slow
def test_the_networks_of_today_train_compiled_as_they_do_otherwise():
    eager = [trained(network, loss_of, 3) for network, loss_of in todays_losses(False).items()]
    compiled = []
    for network, loss_of in todays_losses(False).items():
        network.compile(backend="eager")
        compiled.append(trained(network, loss_of, 3))
    assert compiled == eager

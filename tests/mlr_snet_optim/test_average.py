"""The running average of the weights."""


import pytest
import torch
from test_mlr_snet import loss_on, small_network, trained
from test_schedulers import meta_schedule
from torch import nn
from torch.optim import SGD

from mlr_snet import MetaMLRSNetLR, MLRSNet
from mlr_snet_optim.average import Average


def test_a_decay_without_an_average_is_refused():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="average_decay belongs to meta_point='average'"):
        meta_schedule(network, optimizer, average_decay=0.9)


def test_an_average_of_16_bits_follows_its_weights():
    network = nn.Linear(4, 1).bfloat16()
    nn.init.ones_(network.weight)
    average = Average(network, 0.999)
    average.update()
    nn.init.constant_(network.weight, 2.0)
    for _ in range(5000):
        average.update()
    with average.averaged_weights():
        assert network.weight.dtype == torch.bfloat16 and network.weight.float().mean() > 1.95


def test_an_average_starts_where_its_weights_are_at_the_first_update():
    network = nn.Linear(4, 1)
    average = Average(network, 0.9)
    nn.init.constant_(network.weight, 7.0)  # as loading pretrained weights does
    average.update()
    restored = Average(network, 0.9)
    restored.load_state_dict(average.state_dict())
    nn.init.constant_(network.weight, 8.0)
    for one in (average, restored):
        one.update()
        with one.averaged_weights():
            torch.testing.assert_close(network.weight, torch.full((1, 4), 7.19))


def test_an_average_that_has_not_started_is_saved_and_evaluated_at_the_present_weights():
    network = nn.Linear(4, 1)
    average, restored = Average(network, 0.9), Average(network, 0.9)
    nn.init.constant_(network.weight, 7.0)
    with average.averaged_weights():
        assert (network.weight == 7).all()
    nn.init.constant_(network.weight, 8.0)
    restored.load_state_dict(average.state_dict())
    for one in (average, restored):
        one.update()
        with one.averaged_weights():
            assert (network.weight == 8).all()


def test_weights_unfrozen_after_their_average_was_made_are_an_error_of_the_meta_step():
    network = small_network()
    network[0].requires_grad_(False)
    optimizer = SGD(network.parameters(), lr=0.1)
    meta = MetaMLRSNetLR(
        optimizer, MLRSNet(6), network, lambda: loss_on(network, 9), 10, gamma=0.1, t_val=1, meta_point="average"
    )
    network[0].requires_grad_(True)
    loss = loss_on(network, 0)
    loss.backward()
    with pytest.raises(RuntimeError, match="the average of the weights leaves out parameters that train"):
        meta.step(loss)

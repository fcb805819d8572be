"""The schedulers: their arguments, nets, scale, envelope and states, and losses that are not finite."""

import copy
import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from test_mlr_snet import loss_on, one_weight_sgd, small_network, trained
from torch import nn

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules, lr_scale

SGD = torch.optim.SGD


def rates(schedule, losses):
    """The largest group's rate after each loss."""
    return [(schedule.step(loss), max(map(float, schedule.get_last_lr())))[1] for loss in losses]


def meta_schedule(network, optimizer, meta_loss=None, num_steps=10, **options):
    options = {"num_classes": 4, "t_val": 1, **options}
    meta_loss = meta_loss or (lambda: loss_on(network, 99))
    return MetaMLRSNetLR(optimizer, MLRSNet(6).double(), network, meta_loss, num_steps, **options)


# ---------------------------------------------------------------------------------------------- plan and envelope


@pytest.mark.parametrize(("num_steps", "starts"), [(3, [0, 1, 2]), (7, [0, 2, 4]), (30, [0, 10, 20])])
def test_a_run_of_any_length_has_all_its_nets(num_steps, starts):
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet() for _ in range(3)], num_steps, num_classes=10)
    phases = [(schedule.step(2.3), schedule.phase)[1] for _ in range(num_steps)]
    assert [phases.index(phase) for phase in range(3)] == starts


def test_the_nets_change_at_other_steps_where_they_are_named():
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 10, num_classes=10, changes=[7])
    phases = [(schedule.step(2.3), schedule.phase)[1] for _ in range(10)]
    assert phases == [0] * 7 + [1] * 3


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.0, 0.2), (0.1, 0.0), (0.3, 0.7), (0.0, 1.0)])
def test_the_envelope_rises_and_falls_linearly_over_its_shares(warmup, cooldown):
    num_steps = 20
    plain, shaped = (
        MLRSNetLR(one_weight_sgd(), load_schedules(), num_steps, gamma=1.0, **options)
        for options in ({}, {"warmup": warmup, "cooldown": cooldown})
    )
    factors = [ours / theirs for ours, theirs in zip(rates(shaped, [2.0] * 20), rates(plain, [2.0] * 20), strict=True)]
    climb = int(warmup * num_steps)
    expected = []
    for step in range(num_steps):
        fall = (1 - step / num_steps) / cooldown if cooldown else 1.0
        expected.append(min((step + 1) / (climb + 1), 1.0, fall))
    assert factors == pytest.approx(expected)


def test_the_hypergradient_follows_the_envelope_by_the_chain_rule():
    def gradients(**options):
        torch.manual_seed(0)
        network, optimizer = trained(lambda p: SGD(p, lr=1.0))
        torch.manual_seed(1)

        def meta_loss():
            return sum(parameter.sum() for parameter in network.parameters())  # its slope is the same at any point

        schedule = meta_schedule(network, optimizer, meta_loss, gamma=0.1, **options)
        schedule.step(1.0)
        return torch.cat([parameter.grad.flatten() for parameter in schedule.net.parameters()])

    torch.testing.assert_close(gradients(warmup=0.4), gradients() / 5)


def test_past_the_end_of_a_cool_down_the_rate_is_0_and_said_once():
    schedule = MLRSNetLR(one_weight_sgd(), load_schedules(), 5, gamma=1.0, cooldown=0.4)
    rates(schedule, [2.0] * 5)
    with pytest.warns(UserWarning, match="planned 5 optimizer steps") as caught:
        assert rates(schedule, [2.0] * 3) == [0.0] * 3
    assert len(caught) == 1


def test_past_the_planned_steps_a_schedule_without_a_cool_down_goes_on_and_says_so():
    schedule = MLRSNetLR(one_weight_sgd(), load_schedules(), 5, gamma=1.0)
    rates(schedule, [2.0] * 5)
    with pytest.warns(UserWarning, match="not epochs or micro-batches.* are over: the last net goes on") as caught:
        assert all(rate > 0 for rate in rates(schedule, [2.0] * 3))
    assert len(caught) == 1


@pytest.mark.parametrize("options", [
    {"warmup": 0.6, "cooldown": 0.6}, {"warmup": -0.1}, {"cooldown": 1.5},
    {"changes": [3, 2]}, {"changes": [2]}, {"changes": [-1, 2]}, {"changes": [2, 11]},
    {"groups": [1]}, {"groups": []}, {"gamma": -1.0}, {"gamma": "fast"}, {"gamma": math.nan}, {"gamma": True},
])
def test_arguments_that_describe_no_run_are_refused(options):
    with pytest.raises(ValueError):
        MLRSNetLR(one_weight_sgd(), [MLRSNet() for _ in range(3)], 10, **{"num_classes": 10, **options})


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, "10", None, math.inf, True])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], num_steps, num_classes=10)


@pytest.mark.parametrize("nets", ["recommended", "paper", None])
def test_nets_are_a_list_one_net_or_the_name_of_a_shipped_set(nets):
    nets = nets or load_schedules()[0]
    schedule = MLRSNetLR(one_weight_sgd(), nets, 9, num_classes=10)
    assert len(schedule.nets) == (3 if nets == "paper" else 1)
    rates(schedule, [2.3] * 9)


@pytest.mark.parametrize("nets", ["schedule.pth", Path("schedule.pth")])
def test_a_file_in_place_of_a_list_of_nets_is_answered_with_the_call_that_reads_it(nets):
    with pytest.raises(ValueError, match=r"give load_schedules\(\["):
        MLRSNetLR(one_weight_sgd(), nets, 9, num_classes=10)


def test_fewer_steps_than_nets_are_refused():
    with pytest.raises(ValueError, match="fewer than the 3 nets"):
        MLRSNetLR(one_weight_sgd(), "paper", 2, num_classes=10)


@pytest.mark.parametrize("t_val", [11, 300, 0, 2.5])
def test_a_t_val_at_which_nothing_would_be_learned_is_refused(t_val):
    network = small_network()
    with pytest.raises(ValueError, match="t_val"):
        meta_schedule(network, SGD(network.parameters(), lr=1.0), t_val=t_val)


# ---------------------------------------------------------------------------------------------- γ


def test_gamma_may_be_a_function_that_is_called_at_the_first_step_and_never_after_a_state_was_loaded():
    calls = []

    def gamma():
        calls.append(1)
        return 0.3 * len(calls)

    def make():
        return MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 4, gamma=gamma)

    whole = make()
    assert not calls
    whole.step(2.0)
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert rates(whole, [1.9] * 3) == rates(resumed, [1.9] * 3)
    assert len(calls) == 1 and resumed.gamma == whole.gamma == 0.3


@pytest.mark.parametrize("kind", [float, numpy.float32, Fraction])
def test_gamma_is_any_real_number(kind):
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, gamma=kind(0.25))
    assert rates(schedule, [2.0])[0] < 0.25 and type(schedule.state_dict()["gamma"]) is float


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_function_that_returns_no_scale_is_refused(value):
    with pytest.raises(ValueError, match="returned"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, gamma=lambda: value).step(2.0)


@pytest.mark.parametrize("loss", [-0.5, 0.0, 1e4])
def test_the_formula_refuses_losses_beyond_its_domain_and_asks_for_a_number(loss):
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, num_classes=10)
    with pytest.raises(ValueError, match="give gamma as a number"):
        schedule.step(loss)
    assert rates(MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, gamma=0.1), [loss])[0] < 0.1


def test_a_perplexity_beyond_the_formula_is_refused():
    with pytest.raises(ValueError, match="give gamma as a number"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, num_classes=10, perplexity=True).step(200.0)


@pytest.mark.parametrize("gamma", ["auto", "paper"])
def test_the_formula_needs_classes_and_a_number_does_not(gamma):
    with pytest.raises(ValueError, match="num_classes is missing"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, gamma=gamma)
    MLRSNetLR(one_weight_sgd(), [MLRSNet()], 4, gamma=0.1).step(2.0)


def test_the_formula_takes_its_loss_from_scale_loss_wherever_gamma_is_set():
    levels = iter([3.0, 0.5])
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 4, num_classes=10, scale_loss=lambda: next(levels))
    gammas = [(schedule.step(1.0), schedule.gamma)[1] for _ in range(4)]
    assert gammas == [lr_scale(3.0, 10)] * 2 + [lr_scale(0.5, 10)] * 2


# ---------------------------------------------------------------------------------------------- what is restored


def snapshot(*tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# ---------------------------------------------------------------------------------------------- losses not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("learning", [False, True])
def test_a_loss_that_is_not_finite_leaves_state_and_rate_as_they_are(bad, learning):
    def make():
        torch.manual_seed(0)
        network, optimizer = trained(lambda p: SGD(p, lr=0.1))
        if learning:
            return meta_schedule(network, optimizer, gamma=0.1)
        return MLRSNetLR(optimizer, load_schedules("paper"), 10, gamma=0.1)

    schedule = make()
    before = rates(schedule, [2.0, 1.9])[-1]
    state = schedule.state.clone()
    if learning:
        schedule.meta_loss = lambda: loss_on(schedule.network, 99) * bad
    theta = snapshot(*schedule.net.parameters())
    assert rates(schedule, [bad]) == [before]
    assert torch.equal(state, schedule.state) and same(theta, schedule.net.parameters())
    schedule.meta_loss = lambda: loss_on(schedule.network, 99)
    assert math.isfinite(rates(schedule, [1.8])[0])


@pytest.mark.parametrize(("on_accelerator", "warned"), [(False, [1, 2, 3]), (True, [3])])
def test_a_net_that_cannot_learn_since_the_meta_loss_overflows_says_so(on_accelerator, warned, stay_on_device):
    if on_accelerator:
        stay_on_device()
    torch.manual_seed(0)
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    schedule = meta_schedule(network, optimizer, lambda: loss_on(network, 99) * math.inf, 3, gamma=0.1)
    theta, seen = snapshot(*schedule.net.parameters()), []
    for number in (1, 2, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule.step(2.0)
        seen += [number for warning in caught if "the meta loss or its gradient is not finite" in str(warning.message)]
    assert seen == warned and same(theta, schedule.net.parameters())


def test_gamma_waits_for_the_first_finite_loss():
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet()], 10, num_classes=10)
    assert rates(schedule, [math.nan, math.inf]) == [1.0, 1.0]  # as the optimizer was built
    schedule.step(2.3)
    assert schedule.gamma == lr_scale(torch.tensor(2.3).item(), 10) and schedule.steps_taken == 3


# ---------------------------------------------------------------------------------------------- states of other runs


@pytest.mark.parametrize(("saved_at", "planned"), [(7000, 4500), (10, 20000), (8999, 9001)])
def test_a_state_of_a_run_of_another_length_is_refused_or_rescaled(saved_at, planned):
    nets = load_schedules("paper")
    saved = MLRSNetLR(one_weight_sgd(), nets, 9000, gamma=1.0)
    saved.steps_taken = saved_at
    saved.step(1.0)
    loaded = MLRSNetLR(one_weight_sgd(), nets, planned, gamma=1.0)
    with pytest.raises(ValueError, match=f"9000 steps, this one plans {planned}.*rescale=True"):
        loaded.load_state_dict(saved.state_dict())
    loaded.load_state_dict(saved.state_dict(), rescale=True)
    assert loaded.num_steps == planned and loaded.steps_taken == round((saved_at + 1) * planned / 9000)
    loaded.step(1.0)
    assert loaded.phase == saved.phase


@pytest.mark.parametrize("learning", [False, True])
def test_a_state_that_was_kept_does_not_change_as_the_run_goes_on(learning):
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    schedule = MLRSNetLR(optimizer, "paper", 10, gamma=0.1)
    if learning:
        schedule = meta_schedule(network, optimizer, gamma=0.1, meta_point="average")
    schedule.step(2.0)
    kept = schedule.state_dict()
    before = copy.deepcopy(kept)
    for parameter in network.parameters():
        parameter.data.add_(0.1)
    rates(schedule, [1.0, 0.5])
    torch.testing.assert_close(kept, before, rtol=0, atol=0, equal_nan=True)
    schedule.load_state_dict(kept)
    rates(schedule, [1.0, 0.5])
    torch.testing.assert_close(kept, before, rtol=0, atol=0, equal_nan=True)


def test_parameters_frozen_after_the_last_backward_are_skipped():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    network[0].requires_grad_(False)
    schedule = meta_schedule(network, optimizer)
    schedule.step(1.0)
    assert math.isfinite(schedule.get_last_lr()[0])


def test_no_gradient_at_all_is_said_in_words():
    network = small_network()
    schedule = meta_schedule(network, SGD(network.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="between backward\\(\\) and optimizer.step\\(\\)"):
        schedule.step(1.0)


@pytest.mark.parametrize("value", [0.3, None, torch.tensor(1.0), torch.ones(2, requires_grad=True)])
def test_a_meta_loss_without_a_graph_is_refused(value):
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    with pytest.raises(TypeError, match="meta_loss returned"):
        meta_schedule(network, optimizer, lambda: value).step(1.0)


def test_meta_batches_that_end_are_named():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    batches = iter([])
    schedule = meta_schedule(network, optimizer, lambda: loss_on(network, next(batches)), gamma=0.1)
    with pytest.raises(RuntimeError, match="meta_loss has no more batches: start its loader over"):
        schedule.step(1.0)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor])
def test_an_optimizer_that_cannot_be_learned_with_is_refused_at_the_start(kind):
    network = small_network()
    with pytest.raises(TypeError, match=kind.__name__):
        meta_schedule(network, kind(network.parameters()), gamma=0.1)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_at_the_start(make):
    network = nn.Sequential(make(5, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(TypeError, match="sparse=False"):
        meta_schedule(network, SGD(network.parameters(), lr=0.1))


@pytest.mark.parametrize("meta_point", ["lookahead", "average"])
def test_a_network_that_is_a_copy_is_refused_at_the_start(meta_point):
    network = small_network()
    with pytest.raises(ValueError, match="not a copy"):
        meta_schedule(copy.deepcopy(network), SGD(network.parameters(), lr=0.1), meta_point=meta_point)


@pytest.mark.parametrize("net", ["recommended", None, []])
def test_what_is_no_net_cannot_learn(net):
    network = small_network()
    with pytest.raises(TypeError, match="the net that learns"):
        MetaMLRSNetLR(SGD(network.parameters(), lr=0.1), net, network, lambda: None, 10, num_classes=4)


def test_weights_in_place_of_a_net_are_named():
    weights = MLRSNet().state_dict()
    with pytest.raises(TypeError, match="nets hold str: give MLRSNets"):
        MLRSNetLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), weights, 10, gamma=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_does_not_stop_the_run(bad):
    schedule = MLRSNetLR(one_weight_sgd(), "paper", 8, gamma=0.1)
    first, second = rates(schedule, [bad, 2.0])
    assert 0 < first < 0.1 and 0 < second < 0.1


def test_an_empty_first_group_and_an_attribute_named_sparse_are_no_errors():
    network = nn.Linear(4, 1)
    network.sparse = True
    optimizer = SGD([{"params": []}, {"params": network.parameters()}], lr=0.1)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    meta = MetaMLRSNetLR(
        optimizer, MLRSNet(6), network, lambda: network(inputs).square().mean(), 4, gamma=lambda: 0.1, t_val=1
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss = network(inputs).square().mean()
        loss.backward()
        meta.step(loss)
        optimizer.step()
    assert all(0 < lr <= 0.1 for lr in meta.get_last_lr())


def test_a_resumed_schedule_does_not_check_the_length_of_its_lookahead_again():
    network, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.1))
    meta, resumed = (meta_schedule(network, optimizer) for _ in range(2))
    for steps in (0, meta.t_val):
        meta.steps_taken = steps
        resumed.load_state_dict(meta.state_dict())
        assert resumed.watch.is_reach_checked == (steps > 0)

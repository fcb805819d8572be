"""The schedulers in loops that nobody foresaw: what is refused, what is restored, and what stays right."""

import copy
import itertools
import math
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from test_mlr_snet import loss_on, one_weight_sgd, small_network, trained
from torch import nn

import mlr_snet
from mlr_snet import (
    MetaMLRSNetLR,
    MLRSNet,
    MLRSNetLR,
    bare_step,
    hypergradient,
    load_schedules,
    lr_scale,
    preserved_optimizer,
    update_directions,
)
from mlr_snet_scale import measure_lr_scale

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
    assert rates(whole, [1.9] * 3) != rates(resumed, [1.9] * 3) or whole.nets != resumed.nets
    assert len(calls) == 1 and resumed.gamma == whole.gamma == 0.3


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


# ---------------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("built_with", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_group_added_in_mid_run_has_its_rate_over_the_present_one_as_its_share(built_with, step):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=built_with)
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    rates(schedule, [2.0] * step)
    present = optimizer.param_groups[0]["lr"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": present / 10})
    for _ in range(3):
        schedule.step(1.5)
        first, second = schedule.get_last_lr()
        assert second == pytest.approx(first / 10)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_group_added_without_a_rate_has_the_full_one(make):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=make(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=0.02)
    rates(schedule, [2.0, 2.0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    schedule.step(1.5)
    first, second = schedule.get_last_lr()
    assert first == second == pytest.approx(0.01, rel=0.1)


def test_a_group_added_beside_the_driven_ones_has_a_rate_tensor_of_its_own():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=0.02, groups=[0])
    rates(schedule, [2.0, 2.0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    seconds = [(schedule.step(loss), float(schedule.get_last_lr()[1]))[1] for loss in (1.5, 1.0, 0.5)]
    assert len(set(seconds)) == 1 and len({float(lr) for lr in schedule.get_last_lr()}) == 2


def test_a_rate_tensor_of_integers_is_refused():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1))
    with pytest.raises(ValueError, match="a tensor of torch.int64, which rounds it"):
        MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)


def test_another_scheduler_is_told_where_the_rate_is_a_tensor_on_the_host():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    schedule.step(2.0)
    optimizer.param_groups[0]["lr"].fill_(0.3)
    with pytest.raises(RuntimeError, match="the learning rate is 0.3, but this schedule had set"):
        schedule.step(2.0)


def test_an_attached_schedule_is_not_copied_and_a_free_copy_does_not_complain():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(1)
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    handle = schedule.attach(lambda: 2.0)
    with pytest.raises(TypeError, match="an attached schedule cannot be copied"):
        copy.deepcopy(schedule)
    handle.remove()
    other = copy.deepcopy(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            other.step(2.0)
            other.optimizer.step()
    assert other.net is other.nets[0] and schedule.net is schedule.nets[0]


@pytest.mark.parametrize("how", ["new network", "new optimizer", "kept", "skipping"])
@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.9), torch.optim.AdamW])
def test_an_optimizer_that_no_longer_trains_is_told(kind, how):
    network = small_network()
    optimizer = trains = kind(network.parameters(), lr=0.01)
    schedule = MLRSNetLR(optimizer, "recommended", 100, gamma=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(70):
            if step == 5 and how.startswith("new"):
                trains = kind((network if how == "new optimizer" else small_network()).parameters(), lr=0.01)
            loss = loss_on(network, step)
            loss.backward()
            schedule.step(loss)
            if how != "skipping" or step < 2 or step % 30 == 0:
                trains.step()
    told = [str(warning.message) for warning in caught]
    assert len(told) == how.startswith("new") and all("if another one trains now" in message for message in told)


def test_what_another_scheduler_left_behind_does_not_count():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = SGD([{"params": weights[0]}, {"params": weights[1]}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # sets initial_lr
    optimizer.param_groups[1]["lr"] = 0.05  # layer decay
    with pytest.warns(UserWarning, match="another scheduler"):
        schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    schedule.step(2.0)
    first, second = schedule.get_last_lr()
    assert second == pytest.approx(first / 2)


def test_only_the_named_groups_are_driven_and_the_others_belong_to_their_owner():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = SGD([{"params": [weight]} for weight in weights], lr=0.1)
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0, groups=[0, 2])
    for step in range(3):
        optimizer.param_groups[1]["lr"] = 0.01 * step
        schedule.step(2.0)
        first, own, third = schedule.get_last_lr()
        assert own == 0.01 * step and first == third == pytest.approx(0.5, rel=0.1)
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(RuntimeError, match="had set"):
        schedule.step(2.0)


def test_the_lookahead_moves_groups_that_are_not_driven_at_their_own_rate():
    network, _ = trained(lambda p: SGD(p, lr=0.1))
    body, head = list(network[:5].parameters()), list(network[5].parameters())
    optimizer = SGD([{"params": body}, {"params": head, "lr": 0.2}], lr=0.1, weight_decay=0.1)
    slope = hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99), ratios=[1.0, None])

    def meta_loss(lr):
        other = copy.deepcopy(network)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), network.parameters(), strict=True):
                is_head = any(theirs is parameter for parameter in head)
                mine.sub_((0.2 if is_head else lr) * (theirs.grad + 0.1 * theirs))
        return loss_on(other, 99).item()

    assert slope.item() == pytest.approx((meta_loss(0.05 + 1e-5) - meta_loss(0.05 - 1e-5)) / 2e-5, rel=1e-5)


# ---------------------------------------------------------------------------------------------- what is restored


def snapshot(*tensors):
    return [tensor.detach().clone() for tensor in tensors]


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_a_parameter_outside_the_network_does_not_move_at_a_meta_step():
    network, _ = trained(lambda p: SGD(p, lr=0.1))
    log_sigma = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = SGD([*network.parameters(), log_sigma], lr=1.0)

    def loss(seed):
        return loss_on(network, seed) * (-log_sigma).exp() + log_sigma

    loss(0).backward()
    before = snapshot(log_sigma, log_sigma.grad)
    meta_schedule(network, optimizer, lambda: loss(99)).step(1.0)
    assert same(before, [log_sigma, log_sigma.grad])


def test_buffers_of_every_module_that_the_network_argument_names_are_restored():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    teacher = small_network()
    before = snapshot(*teacher.buffers(), *network.buffers())

    def meta_loss():
        return loss_on(network, 99) + loss_on(teacher, 99).detach()

    meta_schedule(nn.ModuleList([network, teacher]), optimizer, meta_loss).step(1.0)
    assert same(before, [*teacher.buffers(), *network.buffers()])


@pytest.mark.parametrize("what", ["lookahead", "average", "measuring"])
def test_only_what_moves_is_copied(what, monkeypatch):
    import mlr_snet

    frozen = nn.Linear(100, 100).requires_grad_(False)
    head = nn.Linear(100, 4)
    network = nn.Sequential(frozen, head)
    inputs, labels = torch.randn(8, 100), torch.arange(8) % 4
    optimizer = SGD(network.parameters(), lr=1.0)
    copied, copy_all = [], mlr_snet._copy_all

    def copy_and_tell(sources, targets):
        copied.extend(sources)
        copy_all(sources, targets)

    monkeypatch.setattr(mlr_snet, "_copy_all", copy_and_tell)

    def loss():
        return nn.functional.cross_entropy(network(inputs), labels)

    if what == "measuring":
        measure_lr_scale(network, optimizer, loss, 100)
    else:
        loss().backward()
        net = MLRSNet(6)
        schedule = MetaMLRSNetLR(optimizer, net, network, loss, 10, num_classes=4, t_val=1, meta_point=what)
        schedule.step(loss())
    assert copied and sum(tensor.numel() for tensor in copied) < 10_000


def test_trial_steps_and_measuring_run_no_hooks():
    network, inputs = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer, seen = torch.optim.RMSprop(network.parameters(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))  # an average of the weights, for example

    def loss():
        return nn.functional.cross_entropy(network(inputs), torch.arange(8) % 4)

    measure_lr_scale(network, optimizer, loss, 100)
    loss().backward()
    update_directions(optimizer)
    with preserved_optimizer(optimizer):
        bare_step(optimizer)
    assert not seen


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
def test_a_net_that_cannot_learn_since_the_meta_loss_overflows_says_so(on_accelerator, warned, monkeypatch):
    if on_accelerator:  # as if the tensors lay there
        monkeypatch.setattr(mlr_snet, "on_host", torch.Tensor.detach)
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


# ---------------------------------------------------------------------------------------------- meta gradients


class Checkpointed(nn.Module):
    """The network behind a reentrant checkpoint, whose gradients autograd cannot hand out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x = x.requires_grad_()
        return torch.utils.checkpoint.checkpoint(self.network, x, use_reentrant=True)


@pytest.mark.parametrize("kind", ["checkpoint", "copy", "one layer"])
def test_a_meta_gradient_that_does_not_arrive_is_an_error_that_names_the_parameters(kind):
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    other = copy.deepcopy(network)
    losses = {
        "checkpoint": lambda: loss_on(Checkpointed(network), 99),
        "copy": lambda: loss_on(other, 99),
        "one layer": lambda: network[5].weight.square().sum(),
    }
    before = snapshot(*network.state_dict().values(), *(p.grad for p in network.parameters()))
    with pytest.raises(RuntimeError, match="got none from meta_loss|checkpoint"):
        meta_schedule(network, optimizer, losses[kind]).step(1.0)
    assert same(before, [*network.state_dict().values(), *(p.grad for p in network.parameters())])


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


# ---------------------------------------------------------------------------------------------- gradients in .grad


@pytest.mark.parametrize("scale", [2.0**16, 2.0**12, 2.0**20])
def test_gradients_that_are_still_scaled_are_refused(scale):
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    for parameter in network.parameters():
        parameter.grad.mul_(scale)
    with pytest.raises(RuntimeError, match="scaler.unscale_"):
        meta_schedule(network, optimizer).step(1.0)


@pytest.mark.parametrize("how", ["unscale_", "attach", "attach fused"])
def test_under_a_grad_scaler_the_rates_are_those_without_one(how):
    def run(scaler):
        torch.manual_seed(0)
        network = small_network()
        optimizer = SGD(network.parameters(), lr=1.0, fused=how == "attach fused")
        schedule = MLRSNetLR(optimizer, "paper", 8, num_classes=4)
        if how != "attach fused":
            schedule = meta_schedule(network, optimizer, num_steps=8)
        last = [torch.tensor(0.0)]
        if scaler and how != "unscale_":
            schedule.attach(lambda: last[0])
        for seed in range(8):
            last[0] = loss = loss_on(network, seed)
            optimizer.zero_grad()
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler and how == "unscale_":
                scaler.unscale_(optimizer)
            if not scaler or how == "unscale_":
                schedule.step(loss)
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
        return float(schedule.get_last_lr()[0])

    scaled, plain = run(torch.amp.GradScaler("cpu", init_scale=2.0**10)), run(None)
    assert scaled == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW])
def test_a_step_before_the_first_rate_is_warned_of(kind):
    network = small_network()
    optimizer = kind(network.parameters(), lr=0.1)
    schedule = MLRSNetLR(optimizer, "paper", 8, gamma=0.1)
    loss_on(network, 0).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="between backward\\(\\) and optimizer.step\\(\\)"):
        schedule.step(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        schedule.step(1.0)


def test_a_call_for_every_micro_batch_is_warned_of_once():
    network = small_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    schedule = MLRSNetLR(optimizer, "paper", 80, gamma=0.1)
    with pytest.warns(UserWarning, match="^0 optimizer steps lie between two calls") as caught:
        for _ in range(2):
            for batch in range(4):
                (loss_on(network, batch) / 4).backward()
                schedule.step(1.0)
            optimizer.step()
    assert len(caught) == 1


def test_a_call_for_every_epoch_is_warned_of_once():
    network = small_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    schedule = MLRSNetLR(optimizer, "paper", 80, gamma=0.1)
    with pytest.warns(UserWarning, match="^4 optimizer steps lie between two calls") as caught:
        for _ in range(3):
            for batch in range(4):
                optimizer.zero_grad()
                loss_on(network, batch).backward()
                if batch == 3:
                    schedule.step(1.0)
                optimizer.step()
    assert [str(warning.message)[:16] for warning in caught] == ["optimizer.step()", "4 optimizer step"]


@pytest.mark.parametrize(("kind", "expected"), [(SGD, 0), (torch.optim.AdamW, 1), (torch.optim.RMSprop, 1)])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_resumed_run_whose_optimizer_begins_anew_is_warned_of(kind, expected, is_loaded):
    def run(schedule, optimizer, network, steps):
        for batch in range(steps):
            optimizer.zero_grad()
            loss_on(network, batch).backward()
            schedule.step(1.0)
            optimizer.step()

    def built():
        network = small_network()
        optimizer = kind(network.parameters(), lr=0.1)
        return MLRSNetLR(optimizer, "paper", 8, gamma=0.01), optimizer, network

    first, second = built(), built()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*first, 3)
        second[0].load_state_dict(first[0].state_dict())
        if is_loaded:
            second[1].load_state_dict(first[1].state_dict())
        run(*second, 3)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (0 if is_loaded else expected)
    assert all("load the optimizer's state_dict(), too" in message for message in messages)


def test_an_optimizer_that_takes_no_rate_is_refused():
    with pytest.raises(TypeError, match="Rprop keeps step sizes of its own"):
        MLRSNetLR(torch.optim.Rprop(small_network().parameters()), "paper", 8, gamma=0.1)


def test_the_optimizer_of_another_network_is_warned_of():
    schedule = MLRSNetLR(SGD(small_network().parameters(), lr=0.1), "paper", 8, gamma=0.1)
    loss_on(small_network(), 0).backward()
    with pytest.warns(UserWarning, match="the optimizer of the network that trains"):
        schedule.step(1.0)


def test_meta_batches_that_end_are_named():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    batches = iter([])
    schedule = meta_schedule(network, optimizer, lambda: loss_on(network, next(batches)), gamma=0.1)
    with pytest.raises(RuntimeError, match="meta_loss has no more batches: start its loader over"):
        schedule.step(1.0)


def test_an_attached_schedule_that_gets_no_loss_for_a_step_is_in_order():
    network = small_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    losses = iter([None, 1.0, None, 1.0, 1.0])
    MLRSNetLR(optimizer, "paper", 8, gamma=0.1).attach(lambda: next(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(5):
            loss_on(network, batch).backward()
            optimizer.step()


def test_attach_and_step_together_are_refused():
    network = small_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    schedule = MLRSNetLR(optimizer, "paper", 8, gamma=0.1)
    handle = schedule.attach(lambda: 2.0)
    with pytest.raises(RuntimeError, match="leave out one"):
        schedule.step(1.0)
    handle.remove()
    schedule.step(1.0)
    assert schedule.steps_taken == 1


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


# ---------------------------------------------------------------------------------------------- measuring in real loops


def regression(seed):
    """An easy problem: 442 rows, batch 16, targets that are not normalised."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(442, 10, generator=generator)
    targets = 150 + 50 * inputs[:, :3].sum(1) + 40 * torch.randn(442, generator=generator)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def next_loss():
        rows = torch.randint(442, (16,), generator=generator)
        return (network(inputs[rows]).squeeze(1) - (targets[rows] - 150) / 90).square().mean()

    return network, next_loss


@pytest.mark.parametrize("kind", [SGD, torch.optim.Adam])
def test_an_easy_regression_is_measured(kind):
    refused = []
    for seed in range(5):
        network, next_loss = regression(seed)
        refused.append(measure_lr_scale(network, kind(network.parameters()), next_loss, 440).refusal)
    assert refused == [""] * 5


@pytest.mark.parametrize("budget", [150, 200, 400])
def test_the_steps_of_measuring_are_an_argument(budget):
    network, next_loss = regression(0)
    measured = measure_lr_scale(network, SGD(network.parameters(), lr=1.0), next_loss, 440, budget=budget)
    assert budget - 3 < measured.num_steps <= budget


@pytest.mark.parametrize("end", ["none", "none for ever", "stop", "float"])
def test_a_stream_that_ends_starts_over_or_is_named(end):
    network, next_loss = regression(0)
    count = itertools.count(1)

    def ending():
        if next(count) % 28:
            return next_loss()
        if end == "stop":
            raise StopIteration
        if end == "float":
            return 1.0
        if end == "none for ever":
            next(count)
            return None if next(count) else None
        return None

    optimizer = SGD(network.parameters(), lr=1.0)
    if end == "none":
        assert measure_lr_scale(network, optimizer, ending, 440).scale > 0
        return
    broken = ending if end != "none for ever" else lambda: None
    with pytest.raises((ValueError, TypeError), match="start the loader over|as a tensor, with its graph"):
        measure_lr_scale(network, optimizer, broken, 440)


def test_micro_batches_are_measured_as_their_sum():
    network, next_loss = regression(0)
    state = copy.deepcopy(network.state_dict())
    optimizer = SGD(network.parameters(), lr=1.0)
    inputs, targets = torch.randn(64, 10), torch.randn(64)

    def part(rows):
        return (network(inputs[rows]).squeeze(1) - targets[rows]).square().sum() / 64

    whole = measure_lr_scale(network, optimizer, lambda: part(slice(0, 64)), 440)
    several = measure_lr_scale(network, optimizer, lambda: (part(slice(a, a + 16)) for a in range(0, 64, 16)), 440)
    assert several.scale == pytest.approx(whole.scale, rel=1e-3)
    assert same(state.values(), network.state_dict().values())


# ---------------------------------------------------------------------------------------------- what public code did


@pytest.mark.parametrize("scale", [128.0, 1024.0, 65536.0])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_scaled_gradients_show_against_the_averages_of_the_optimizer(kind, scale):
    makers = {"momentum": lambda p: SGD(p, lr=1e-3, momentum=0.9), "adam": lambda p: torch.optim.AdamW(p, lr=1e-3)}
    network, optimizer = trained(makers[kind], steps=8)
    loss_on(network, 8).backward()
    meta_schedule(network, optimizer, gamma=1e-3).step(1.0)  # unscaled, no matter how often
    for parameter in network.parameters():
        parameter.grad.mul_(10 * scale)
    with pytest.raises(RuntimeError, match="scaler.unscale_"):
        meta_schedule(network, optimizer, gamma=1e-3).step(1.0)


def test_a_decay_without_an_average_is_refused():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="average_decay belongs to meta_point='average'"):
        meta_schedule(network, optimizer, average_decay=0.9)


def test_a_meta_loss_that_changes_the_mode_leaves_it_as_it_was():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    network[1].eval()
    meta_schedule(network, optimizer, lambda: loss_on(network.eval(), 99)).step(1.0)
    assert network.training and network[0].training and not network[1].training


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


@pytest.mark.parametrize("kind", [lambda p: SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_a_state_that_was_not_loaded_is_warned_of(kind):
    network, optimizer = trained(kind)
    with pytest.warns(UserWarning, match="load the schedule's state_dict"):
        MLRSNetLR(optimizer, "paper", 8, gamma=0.1).step(1.0)


def test_a_state_that_an_optimizer_is_born_with_is_no_training(recwarn):
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.Adagrad([weight], lr=0.1)
    MLRSNetLR(optimizer, MLRSNet(), 10, gamma=0.1).step(1.0)
    assert not recwarn.list


def test_weights_in_place_of_a_net_are_named():
    weights = MLRSNet().state_dict()
    with pytest.raises(TypeError, match="nets hold str: give MLRSNets"):
        MLRSNetLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), weights, 10, gamma=0.1)


def test_a_guessed_scale_warns_where_it_is_read():
    network = nn.Linear(4, 4)
    measured = measure_lr_scale(
        network, SGD(network.parameters(), lr=1.0), lambda: 0 * network.weight.sum() + torch.rand(()), 440
    )
    with pytest.warns(UserWarning, match="is a guess"):
        assert measured.gamma == 2 * measured.scale


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_does_not_stop_the_run(bad):
    schedule = MLRSNetLR(one_weight_sgd(), "paper", 8, gamma=0.1)
    first, second = rates(schedule, [bad, 2.0])
    assert 0 < first < 0.1 and 0 < second < 0.1

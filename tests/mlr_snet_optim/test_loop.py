"""Loops that are out of order are told, attached schedules act once a step, and scaled gradients show."""

import copy
import warnings
from functools import partial

import pytest
import torch
from test_directions import Calling
from test_mlr_snet import loss_on, small_network, trained
from test_restoring import loss_of
from test_schedulers import meta_schedule, same, snapshot
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules
from mlr_snet_optim.loop import unwrapped


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
@pytest.mark.parametrize("kind", [SGD, partial(SGD, momentum=0.9), torch.optim.AdamW])
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


def test_the_optimizer_of_another_network_is_warned_of():
    schedule = MLRSNetLR(SGD(small_network().parameters(), lr=0.1), "paper", 8, gamma=0.1)
    loss_on(small_network(), 0).backward()
    with pytest.warns(UserWarning, match="the optimizer of the network that trains"):
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


@pytest.mark.parametrize(("rates", "is_warned"), [((0.1, 0.1), True), ((0.1, 0.05), False)])
def test_a_layer_decay_of_timm_that_nobody_applies_is_warned_of(rates, is_warned, recwarn):
    network = small_network()
    one, other = list(network.parameters())[:2]
    groups = [{"params": [one], "lr": rates[0]}, {"params": [other], "lr": rates[1], "lr_scale": 0.5}]
    optimizer = SGD(groups, lr=0.1)
    loss_on(network, 0).backward()
    MLRSNetLR(optimizer, "recommended", 8, gamma=0.1).step(1.0)
    assert any("lr_scale" in str(warning.message) for warning in recwarn) == is_warned


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
    optimizer = SGD([weight], lr=0.1)
    assert not optimizer.state[weight]  # made by looking, as schedule-free's train() does
    MLRSNetLR(optimizer, MLRSNet(), 10, gamma=0.1).step(1.0)
    assert not recwarn.list


def test_a_schedule_that_is_attached_twice_is_refused():
    network = small_network()
    schedule = MLRSNetLR(SGD(network.parameters(), lr=0.1), "paper", 8, gamma=0.1)
    handle = schedule.attach(lambda: 1.0)
    with pytest.raises(RuntimeError, match="attached already: remove"):
        schedule.attach(lambda: 1.0)
    handle.remove()
    schedule.attach(lambda: 1.0)


def test_an_attached_schedule_that_acts_twice_in_a_step_is_warned_of():
    network = small_network()
    AdamW(network.parameters())
    optimizer = Calling(network.parameters(), lr=0.1)
    MLRSNetLR(optimizer, "paper", 8, gamma=0.1).attach(lambda: 1.0)
    loss_on(network, 0).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(UserWarning, match="0 optimizer steps lie between two calls"):
            optimizer.step()


def test_only_the_wrappers_that_change_no_update_are_unwrapped():
    class Slow:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    wrapper = Slow(inner)
    assert unwrapped(inner) is inner and unwrapped(wrapper) is wrapper


def test_a_closure_that_is_evaluated_several_times_advances_an_attached_schedule_once():
    class Twice(Optimizer):
        def step(self, closure=None):
            closure()
            return closure()

    network = nn.Linear(4, 1)
    optimizer = Twice(network.parameters(), {"lr": 0.1})
    schedule = MLRSNetLR(optimizer, "recommended", 10, gamma=0.2)
    schedule.attach(lambda: 1.0)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert schedule.steps_taken == 1


def test_lbfgs_is_not_attached_to_since_it_reads_its_rate_first():
    schedule = MLRSNetLR(torch.optim.LBFGS(nn.Linear(4, 1).parameters()), "recommended", 10, gamma=0.2)
    with pytest.raises(TypeError, match=r"call step\(loss\) before optimizer.step\(closure\)"):
        schedule.attach(lambda: 1.0)


class TinyMoments(Optimizer):
    """Keeps averages of tiny multiples of its gradients, as Prodigy does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.999)})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            average = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
            average.lerp_(1e-6 * weight.grad, 0.1)
            weight.sub_(weight.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("make", [TinyMoments, lambda parameters: Adam(parameters, betas=(0.999, 0.999))])
def test_averages_that_are_small_are_no_sign_of_scaled_gradients(make):
    network = nn.Linear(4, 1)
    optimizer = make(network.parameters())
    schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, lambda: loss_of(network, 1.0), 10, t_val=2, gamma=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        schedule.step(loss)
        optimizer.step()

"""What the lookahead, trial steps and the measurement may not change, in networks and optimizers of all kinds."""

import copy
import warnings

import pytest
import torch
from test_mlr_snet import loss_on, small_network
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from mlr_snet import Average, MetaMLRSNetLR, MLRSNet, MLRSNetLR, hypergradient, set_lr, unwrapped, update_directions
from mlr_snet_scale import measure_lr_scale

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS[:, :1].sin()


class Centred(nn.Module):
    """Rebinds its buffer in the forward pass, as some code does in place of filling it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.linear(inputs - self.mean)


class Pair(nn.Module):
    """Moves a second encoder along with the first one in the forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1).requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        self.second.weight.lerp_(self.first.weight, 0.1)

    def forward(self, inputs):
        self.follow()
        return self.first(inputs) + self.second(inputs)


class Replacing(Pair):
    @torch.no_grad()
    def follow(self):
        self.second.weight = nn.Parameter(self.second.weight.lerp(self.first.weight, 0.1), requires_grad=False)


class Reassigning(Pair):
    @torch.no_grad()
    def follow(self):
        self.second.weight.data = self.second.weight.lerp(self.first.weight, 0.1)


def loss_of(network, shift=0.0):
    return functional.mse_loss(network(INPUTS + shift), TARGETS)


def act(how, network, optimizer):
    """Run what must leave the network as it was."""
    if how == "lookahead":
        loss_of(network).backward()
        hypergradient(network, optimizer, 0.1, lambda: loss_of(network, 5.0))
    elif how == "average":
        with Average(network, 0.9).averaged_weights():
            loss_of(network, 5.0)
    else:
        measure_lr_scale(network, optimizer, lambda: loss_of(network, 3.0), 100)


@pytest.mark.parametrize("how", ["lookahead", "average", "measuring"])
def test_a_buffer_that_the_forward_pass_rebinds_is_restored(how):
    network = Centred()
    optimizer = SGD(network.parameters(), lr=0.1)
    loss_of(network)
    buffer, value = network.mean, network.mean.clone()
    if how == "lookahead":
        value = 0.9 * value + 0.1 * INPUTS.mean(0)  # by the training loss
    act(how, network, optimizer)
    assert torch.equal(network.mean, value)
    assert how == "lookahead" or network.mean is buffer


@pytest.mark.parametrize("how", ["lookahead", "average", "measuring"])
def test_a_buffer_whose_elements_share_their_memory_is_left_alone(how):
    network = nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))
    network.register_buffer("weights", torch.ones(1).expand(5))
    network.register_buffer("row", torch.arange(3.0).expand(1, 3))  # nothing is shared here
    act(how, network, SGD(network.parameters(), lr=0.1))
    assert network.weights.tolist() == [1.0] * 5 and network.row.tolist() == [[0.0, 1.0, 2.0]]


@pytest.mark.parametrize("how", ["lookahead", "measuring"])
def test_what_an_optimizer_keeps_beside_tensors_stays_the_same_object(how):
    class Noted(SGD):  # not SGD itself, so that it takes trial steps
        pass

    network = nn.Linear(4, 1)
    optimizer = Noted(network.parameters(), lr=0.1)
    note = optimizer.param_groups[0]["note"] = object()
    optimizer.state["calls"] = 3
    act(how, network, optimizer)
    assert optimizer.param_groups[0]["note"] is note and optimizer.state["calls"] == 3
    MLRSNetLR(optimizer, "paper", 8, gamma=0.1).step(1.0)


@pytest.mark.parametrize("how", ["lookahead", "average", "measuring"])
@pytest.mark.parametrize("kind", [Pair, Replacing, Reassigning])
def test_a_forward_pass_that_moves_parameters_itself_is_refused(how, kind):
    network = kind()
    with pytest.raises(RuntimeError, match=r"changes parameters without a gradient \(second.weight\)"):
        act(how, network, SGD(network.parameters(), lr=0.1))


def test_hooks_of_the_user_on_parameters_act_on_the_meta_gradient():
    def slope(has_hook):
        torch.manual_seed(0)
        network = nn.Linear(4, 1)
        loss_of(network).backward()
        if has_hook:
            network.weight.register_hook(lambda gradient: 0 * gradient)
            network.bias.register_hook(lambda gradient: 0 * gradient)
        return hypergradient(network, SGD(network.parameters(), lr=0.1), 0.1, lambda: loss_of(network, 5.0))

    assert slope(True) == 0 and slope(False) != 0


class Calling(AdamW):
    """Calls the step of its parent class, which runs the hooks as well."""

    def step(self, closure=None):
        return super().step(closure)


def test_trial_steps_run_no_hooks_where_a_step_calls_that_of_its_parent():
    network, seen = nn.Linear(4, 1), []
    AdamW(network.parameters())  # from the first instance on its step runs hooks
    optimizer = Calling(network.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    act("lookahead", network, optimizer)
    act("measuring", network, optimizer)
    assert not seen
    optimizer.step()
    assert "pre" in seen and "post" in seen


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


class Rebinding(Optimizer):
    """Momentum whose state is a new dict in every step, and whose weight decay changes the gradient in place."""

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            weight.grad.add_(weight, alpha=0.1)
            velocity = 0.9 * self.state[weight].get("velocity", 0.0) + weight.grad
            self.state[weight] = {"velocity": velocity}
            weight.sub_(velocity, alpha=self.param_groups[0]["lr"])


def test_trial_steps_leave_gradients_and_a_state_that_is_rebound():
    network = nn.Linear(4, 1)
    optimizer = Rebinding(network.parameters(), lr=0.1)
    loss_of(network).backward()
    optimizer.step()
    gradients = [weight.grad.clone() for weight in network.parameters()]
    states = {weight: (state, state["velocity"].clone()) for weight, state in optimizer.state.items()}
    update = update_directions(optimizer)
    measure_lr_scale(network, optimizer, lambda: loss_of(network), 100)
    for weight, gradient in zip(network.parameters(), gradients, strict=True):
        state, velocity = states[weight]
        assert torch.equal(weight.grad, gradient)
        assert optimizer.state[weight] is state and torch.equal(state["velocity"], velocity)
        expected = 0.9 * velocity + gradient + 0.1 * weight
        assert torch.allclose(update[weight](weight), expected, atol=1e-6)


def test_trial_steps_of_16_bits_are_refused():
    network = nn.Linear(4, 1).bfloat16()
    network(INPUTS.bfloat16()).sum().backward()
    with pytest.raises(TypeError, match="Calling with parameters of 16 bits"):
        update_directions(Calling(network.parameters()))
    update_directions(AdamW(network.parameters()))


def test_a_frozen_parameter_that_keeps_its_gradient_is_restored_after_trial_steps():
    network = nn.Linear(4, 1)
    optimizer = Calling(network.parameters(), lr=0.1)
    loss_of(network).backward()
    network.bias.requires_grad_(False)
    before = network.bias.clone()
    update_directions(optimizer)
    assert torch.equal(network.bias, before)


def test_an_average_of_16_bits_follows_its_weights():
    network = nn.Linear(4, 1).bfloat16()
    nn.init.ones_(network.weight)
    average = Average(network, 0.999)
    nn.init.constant_(network.weight, 2.0)
    for _ in range(5000):
        average.update()
    with average.averaged_weights():
        assert network.weight.dtype == torch.bfloat16 and network.weight.float().mean() > 1.95


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


def test_the_net_is_not_rounded_by_the_autocast_of_its_caller():
    def rates(context):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule, rates = MLRSNetLR(optimizer, "paper", 30, gamma=0.1), []
        with context:
            for step in range(30):
                schedule.step(2.0 - step / 30)
                rates += schedule.get_last_lr()
        return rates

    expected = rates(torch.enable_grad())
    assert rates(torch.autocast("cpu", torch.bfloat16)) == expected and len(set(expected)) == 30


def test_a_training_loss_that_is_not_finite_does_not_move_the_net():
    network = small_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    net = MLRSNet(6)
    schedule = MetaMLRSNetLR(optimizer, net, network, lambda: loss_on(network, 9), 10, gamma=0.1, t_val=1)
    loss_on(network, 0).backward()
    before = [weight.clone() for weight in net.parameters()]
    schedule.step(float("inf"))
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))
    schedule.step(1.0)
    assert not all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))


def test_a_state_of_other_parameter_groups_is_refused():
    def built(groups):
        network = small_network()
        optimizer = SGD([{"params": [weight], "lr": 0.1} for weight in network.parameters()])
        return MLRSNetLR(optimizer, "paper", 8, gamma=0.1, groups=groups)

    with pytest.raises(ValueError, match=r"of the parameter groups \[0, 1, 2, 3, 4, 5\], this one has \[0\]"):
        built([0]).load_state_dict(built(None).state_dict())
    built([0]).load_state_dict(built([0]).state_dict())


def test_only_the_wrappers_that_change_no_update_are_unwrapped():
    class Slow:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    wrapper = Slow(inner)
    assert unwrapped(inner) is inner and unwrapped(wrapper) is wrapper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_rounded_to_its_own_precision_only(dtype):
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5, dtype=dtype))
    set_lr(optimizer, 0.1)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1, dtype=dtype))


class Wrapping(Optimizer):
    """Leaves the update to an optimizer of its own, as Lookahead does, and every third time returns to slow weights."""

    def __init__(self, parameters):
        self.inner = Adam(parameters, lr=0.1)
        super().__init__(self.inner.param_groups, {})
        self.inner.param_groups = self.param_groups
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.calls += 1
        for weight in self.param_groups[0]["params"]:
            slow = self.state[weight].setdefault("slow", weight.clone())
            if self.calls % 3 == 0:
                weight.copy_(slow.lerp_(weight, 0.5))


@pytest.mark.parametrize("num_steps", [0, 4])
@pytest.mark.parametrize("how", ["lookahead", "measuring"])
def test_the_optimizer_inside_an_optimizer_is_restored(how, num_steps):
    def trained():
        torch.manual_seed(0)
        network = nn.Linear(4, 1)
        optimizer = Wrapping(network.parameters())
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss_of(network).backward()
            optimizer.step()
        return network, optimizer

    (network, optimizer), (expected, twin) = trained(), trained()
    act(how, network, optimizer)
    for other, one in ((network, optimizer), (expected, twin)):
        for _ in range(4):
            one.zero_grad()
            loss_of(other).backward()
            one.step()
    assert torch.equal(network.weight, expected.weight)
    assert optimizer.inner.state[network.weight]["step"] == num_steps + 4


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_rate_that_groups_share_in_one_tensor_is_set_for_the_driven_ones_only(kind):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = kind([{"params": part.parameters()} for part in network], lr=torch.tensor(0.001))
    schedule = MLRSNetLR(optimizer, "recommended", 100, gamma=0.2, groups=[0])
    loss_of(network).backward()
    schedule.step(1.0)
    driven, other = schedule.get_last_lr()
    assert driven > 0.05 and other == 0.001


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_net_learns_under_another_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        network = nn.Linear(4, 1)
        data = INPUTS.to(dtype)
        optimizer = SGD(network.parameters(), lr=0.1)
        net = MLRSNet()
        before = net.layer3.bias.clone()
        schedule = MetaMLRSNetLR(optimizer, net, network, lambda: network(data).square().mean(), 10, t_val=1, gamma=0.2)
        network(data).square().mean().backward()
        schedule.step(1.0)
        assert not torch.equal(net.layer3.bias, before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copy_of_network_optimizer_and_schedule_learns_on():
    network = nn.Linear(4, 1)
    optimizer = SGD(network.parameters(), lr=0.1)
    schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, Loss(network), 10, t_val=1, gamma=0.2)
    network, optimizer, schedule = copy.deepcopy((network, optimizer, schedule))
    loss_of(network).backward()
    schedule.step(1.0)
    assert schedule.steps_taken == 1


class Loss:
    def __init__(self, network):
        self.network = network

    def __call__(self):
        return loss_of(self.network, 1.0)


class SharpnessAware(Optimizer):
    """The usual two steps of SAM around a base optimizer."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["old"] = weight.clone()
            weight.add_(weight.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for weight in self.param_groups[0]["params"]:
            weight.copy_(self.state[weight]["old"])
        self.base_optimizer.step()
        self.zero_grad()


@pytest.mark.filterwarnings("error")
def test_a_schedule_drives_the_base_optimizer_of_sam():
    network = nn.Linear(4, 1)
    optimizer = SharpnessAware(network.parameters())
    schedule = MLRSNetLR(optimizer.base_optimizer, "recommended", 10, gamma=0.2, cooldown=0.2)
    for _ in range(10):
        loss = loss_of(network)
        loss.backward()
        schedule.step(loss)
        optimizer.first_step()
        loss_of(network).backward()
        optimizer.second_step()
    assert schedule.steps_taken == 10 and 0 < schedule.get_last_lr()[0] < 0.06


@pytest.mark.parametrize("how", ["lookahead", "measuring"])
def test_gradients_in_the_buckets_of_ddp_are_refused(how):
    network = nn.Linear(4, 1)
    optimizer = SGD(network.parameters(), lr=0.1)
    bucket = torch.ones(4)
    network.weight.grad = bucket.view(1, 4)
    network.bias.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="without gradient_as_bucket_view"):
        if how == "lookahead":
            hypergradient(network, optimizer, 0.1, lambda: loss_of(network))
        else:
            act(how, network, optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_16_bits_do_not_round_the_hypergradient_to_0(dtype):
    def slope(kind):
        torch.manual_seed(0)
        network, data = nn.Linear(4, 1).to(kind), INPUTS.to(kind)
        optimizer = SGD(network.parameters(), lr=0.1)
        (1e-4 * network(data).square().mean()).backward()
        return float(hypergradient(network, optimizer, 0.1, lambda: 1e-4 * network(data).square().mean()))

    assert slope(dtype) == pytest.approx(slope(torch.float64), rel=0.05)

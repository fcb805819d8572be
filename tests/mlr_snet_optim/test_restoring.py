"""What the lookahead, trial steps and the measurement may not change, in networks and optimizers of all kinds."""

import copy

import pytest
import torch
from test_mlr_snet import loss_on, small_network, trained
from test_schedulers import meta_schedule, same, snapshot
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, hypergradient
from mlr_snet_optim import average, restoring
from mlr_snet_optim.average import Average
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
def test_gradients_in_the_buckets_of_ddp_are_refused_and_views_without_ranks_are_not(how, monkeypatch):
    network = nn.Linear(4, 1)
    optimizer = SGD(network.parameters(), lr=0.1)
    bucket = torch.ones(4)
    network.weight.grad = bucket.view(1, 4)
    network.bias.grad = torch.ones(1)

    def use():
        if how == "lookahead":
            hypergradient(network, optimizer, 0.1, lambda: loss_of(network))
        else:
            act(how, network, optimizer)

    use()
    assert network.weight.grad.data_ptr() == bucket.data_ptr() and torch.equal(bucket, torch.ones(4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="without gradient_as_bucket_view"):
        use()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_of_16_bits_do_not_round_the_hypergradient_to_0(dtype):
    def slope(kind):
        torch.manual_seed(0)
        network, data = nn.Linear(4, 1).to(kind), INPUTS.to(kind)
        optimizer = SGD(network.parameters(), lr=0.1)
        (1e-4 * network(data).square().mean()).backward()
        return float(hypergradient(network, optimizer, 0.1, lambda: 1e-4 * network(data).square().mean()))

    assert slope(dtype) == pytest.approx(slope(torch.float64), rel=0.05)


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
    frozen = nn.Linear(100, 100).requires_grad_(False)
    head = nn.Linear(100, 4)
    network = nn.Sequential(frozen, head)
    inputs, labels = torch.randn(8, 100), torch.arange(8) % 4
    optimizer = SGD(network.parameters(), lr=1.0)
    copied, copy_all = [], restoring.copy_all

    def copy_and_tell(sources, targets):
        copied.extend(sources)
        copy_all(sources, targets)

    for module in (restoring, average):
        monkeypatch.setattr(module, "copy_all", copy_and_tell)

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


def test_a_meta_loss_that_changes_the_mode_leaves_it_as_it_was():
    network, optimizer = trained(lambda p: SGD(p, lr=0.1))
    network[1].eval()
    meta_schedule(network, optimizer, lambda: loss_on(network.eval(), 99)).step(1.0)
    assert network.training and network[0].training and not network[1].training


def test_a_network_of_torchscript_is_restored_and_one_of_fsdp1_is_refused():
    network = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = SGD(network.parameters(), lr=0.1)
    before = copy.deepcopy(network.state_dict())
    act("measuring", network, optimizer)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    sharded = type("FullyShardedDataParallel", (nn.Linear,), {})(4, 1)
    with pytest.raises(TypeError, match="fully_shard"):
        act("lookahead", sharded, SGD(sharded.parameters(), lr=0.1))

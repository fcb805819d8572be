"""Update directions of every optimizer of torch.optim, in closed form or by trial steps, and of others, in float64."""

import copy

import pytest
import torch
from test_restoring import INPUTS, act, loss_of
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from mlr_snet_optim.directions import NOT_AFFINE, bare_step, update_directions
from mlr_snet_optim.rates import set_lr
from mlr_snet_optim.restoring import preserved_optimizer
from mlr_snet_scale import measure_lr_scale

SGD_OPTIONS = [
    {}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"momentum": 0.5, "maximize": True},
]


ADAM_OPTIONS = [{}, {"weight_decay": 0.1}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}]


DECOUPLED = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}]


OPTIONS = {
    "SGD": SGD_OPTIONS, "Adam": ADAM_OPTIONS, "AdamW": ADAM_OPTIONS, "NAdam": DECOUPLED, "RAdam": DECOUPLED,
    "Adamax": [{}, {"weight_decay": 0.1}, {"maximize": True}],
    "RMSprop": [{}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"centered": True, "momentum": 0.5}, {"maximize": True}],
    "Adagrad": [{}, {"weight_decay": 0.1, "lr_decay": 0.1}, {"initial_accumulator_value": 0.5}, {"maximize": True}],
    "Adadelta": [{}, {"weight_decay": 0.1}, {"maximize": True}],
    "Muon": [{}, {"weight_decay": 0.1}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
}


FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # on the CPU


STEPS = 8  # RAdam changes its form at the sixth


def parameters(name):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (5, 3)] if name == "Muon" else [(4, 6), (3,), ()]
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in shapes]


def give_gradients(weights, step):
    generator = torch.Generator().manual_seed(100 + step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=generator)


def largest_error(optimizer, weights):
    """Between the direction and what the optimizer's own step then does, relative to the step, over some steps."""
    errors = []
    for step in range(STEPS):
        give_gradients(weights, step)
        before = [weight.detach().clone() for weight in weights]
        update = update_directions(optimizer)
        expected = [update[weight](weight) for weight in weights]
        for weight, value in zip(weights, before, strict=True):
            assert torch.equal(weight, value)
        lr = 0.01 * (1 + step)
        set_lr(optimizer, lr)
        optimizer.step()
        for weight, value, direction in zip(weights, before, expected, strict=True):
            moved = value - weight.detach()
            errors.append((moved - lr * direction).norm() / moved.norm())
    return max(errors).item()


CASES = [
    (name, kind, options)
    for name, many in OPTIONS.items() if hasattr(torch.optim, name)
    for options in many
    for kind in ("for-loop", "foreach", "fused")
    if (kind != "fused" or name in FUSED) and (kind == "for-loop" or name != "Muon")
]


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_the_direction_is_what_the_next_step_subtracts_per_unit_of_rate(name, kind, options):
    weights = parameters(name)
    forms = {} if name == "Muon" else {"foreach": kind == "foreach"}
    if kind == "fused":
        forms = {"fused": True}
    optimizer = getattr(torch.optim, name)(weights, lr=0.1, **options, **forms)
    tolerance = 1e-2 if name == "Muon" else 1e-10  # Muon rounds to bfloat16 inside its step
    assert largest_error(optimizer, weights) < tolerance


def test_every_optimizer_of_torch_is_tested_here_or_refused_with_a_reason():
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    assert {kind.__name__ for kind in kinds} <= {*OPTIONS, *(kind.__name__ for kind in NOT_AFFINE), "Optimizer"}


@pytest.mark.parametrize("kind", NOT_AFFINE)
def test_an_optimizer_that_is_not_affine_is_refused_with_a_reason_and_what_works(kind):
    weights = parameters(kind.__name__)
    give_gradients(weights, 0)
    with pytest.raises(TypeError, match=f"{kind.__name__} .* so its update is not affine .* use SGD"):
        update_directions(kind(weights))


class Lion(Optimizer):
    """An optimizer that the file does not know: the sign of a noisy mean, and decoupled weight decay."""

    def __init__(self, weights, lr=0.1, power=1.0):
        super().__init__(weights, {"lr": lr, "power": power, "steps": 0})
        self.num_calls, self.total = 0, torch.zeros(())

    @torch.no_grad()
    def step(self):
        self.num_calls += 1
        self.total += 1
        for group in self.param_groups:
            group["steps"] += 1
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                self.state[weight].setdefault("history", [torch.zeros(2)])[0].add_(1)
                self.state[weight].setdefault("table", {"count": torch.zeros(2)})["count"].add_(1)
                mean.lerp_(weight.grad + 0.1 * torch.randn_like(weight), 0.1)
                weight.sub_(mean.sign() + 0.1 * weight, alpha=group["lr"] ** group["power"])


def test_an_unknown_optimizer_is_measured_by_trial_steps_that_are_undone():
    torch.manual_seed(0)
    weights = parameters("Lion")
    optimizer = Lion(weights)
    assert largest_error(optimizer, weights) < 1e-10
    before, generator = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    give_gradients(weights, 0)
    update_directions(optimizer)
    assert torch.equal(generator, torch.get_rng_state())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, values in before["state"].items():
        now = after["state"][index]
        assert torch.equal(values["mean"], now["mean"])
        assert torch.equal(values["history"][0], now["history"][0]) and values["history"][0][0] == STEPS
        assert torch.equal(values["table"]["count"], now["table"]["count"])
    assert optimizer.num_calls == optimizer.total == STEPS


def test_the_first_measurement_leaves_no_state_behind():
    weights = parameters("Lion")
    optimizer = Lion(weights)
    give_gradients(weights, 0)
    update_directions(optimizer)
    assert not optimizer.state and optimizer.param_groups[0]["steps"] == 0


def test_an_unknown_optimizer_that_is_not_affine_is_refused():
    weights = parameters("Lion")
    give_gradients(weights, 0)
    with pytest.raises(TypeError, match="Lion: half the learning rate does not move the weights half as far"):
        update_directions(Lion(weights, power=2.0))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        update_directions(torch.optim.SGD(embedding.parameters(), lr=0.1))


def test_trial_steps_and_measuring_run_no_hooks():
    network, inputs = nn.Linear(4, 4), torch.randn(8, 4)
    optimizer, seen = torch.optim.RMSprop(network.parameters(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))  # an average of the weights, for example
    of_all = register_optimizer_step_post_hook(lambda *_: seen.append("all"))

    def loss():
        return nn.functional.cross_entropy(network(inputs), torch.arange(8) % 4)

    measure_lr_scale(network, optimizer, loss, 100)
    loss().backward()
    update_directions(optimizer)
    with preserved_optimizer(optimizer):
        bare_step(optimizer)
    assert not seen
    optimizer.step()
    of_all.remove()
    assert seen == ["pre", "post", "all"]


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


def test_adam_with_parameters_of_float16_is_refused_and_sgd_is_not():
    network = nn.Linear(4, 1).half()
    network(INPUTS.half()).sum().backward()
    update_directions(torch.optim.SGD(network.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="float16"):
        update_directions(AdamW(network.parameters()))


class Counting(torch.optim.Optimizer):
    """Gradient descent with numbers of its own, of which one is None at first and one is made in the first step."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.norm = None

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
            self.norm = parameter.grad.norm()
        self.num_steps = getattr(self, "num_steps", 0) + 1


def test_trial_steps_and_measuring_leave_no_numbers_in_an_optimizer_that_had_none():
    network = nn.Linear(4, 1)
    optimizer = Counting(network.parameters())
    act("lookahead", network, optimizer)
    act("measuring", network, optimizer)
    assert optimizer.norm is None and not hasattr(optimizer, "num_steps")


def test_a_frozen_parameter_that_keeps_its_gradient_is_restored_after_trial_steps():
    network = nn.Linear(4, 1)
    optimizer = Calling(network.parameters(), lr=0.1)
    loss_of(network).backward()
    network.bias.requires_grad_(False)
    before = network.bias.clone()
    update_directions(optimizer)
    assert torch.equal(network.bias, before)

"""measure_lr_scale: its equations, its oracle on a quadratic, and that it restores everything bit for bit."""

import copy
import itertools
import math
import random
import statistics
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from test_schedulers import same
from torch import nn
from torch.nn import functional

import mlr_snet_scale
from mlr_snet import MLRSNet, MLRSNetLR, lr_scale
from mlr_snet_scale import RANGE_STEPS, guessed_scale, measure_lr_scale, run_over_trial, smoothed, usual_lr

OPTIMIZERS = [
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
]


class Quadratic:
    """½·Σ λ (w − ξ)², with curvatures from λ_max/10 to λ_max and another ξ of the given size in every step."""

    def __init__(self, largest, noise=0.0):
        self.network = nn.Linear(5, 1, bias=False).double()
        nn.init.ones_(self.network.weight)
        self.curvatures = torch.linspace(largest / 10, largest, 5, dtype=torch.float64)
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def loss(self):
        xi = self.noise * torch.randn(5, generator=self.generator, dtype=torch.float64)
        return 0.5 * (self.curvatures * (self.network.weight - xi).square()).sum()

    def measure(self, num_steps=1000, kind=torch.optim.SGD, **options):
        optimizer = kind(self.network.parameters(), lr=1.0)
        return measure_lr_scale(self.network, optimizer, self.loss, num_steps, **options)


@pytest.mark.parametrize("largest", [0.1, 0.5, 1.0, 5.0, 50.0, 200.0])
def test_on_a_quadratic_the_scale_of_sgd_is_near_the_limit_of_stability(largest):
    limit = 2 / largest
    assert 0.1 * limit < Quadratic(largest, noise=0.1).measure().scale < limit


def test_lower_peaks_are_tried_and_the_guess_falls_where_the_lowest_peak_blows_up():
    measured = Quadratic(200.0, noise=0.1).measure()
    peaks = [trial.rates[0] for trial in measured.trials[1:]]
    assert peaks == pytest.approx([0.5 / 0.7 / 6 / 3**number for number in range(4)])  # 0.5 is the usual rate
    assert expected_scale(measured, 0.5 / 27, 0.7) == pytest.approx(measured.scale)


def test_a_first_batch_that_is_easier_than_the_others_does_not_end_a_range_test():
    losses = [2.2718, 2.2969, 2.2999, 2.2964, 2.3093, 2.2988, 2.3104, 2.2995, 2.3086, 2.3031, 2.2955, 2.2964, 2.2948,
              2.2941, 2.3001, 2.2980, 2.2976, 2.2903, 2.2969, 2.3004, 2.2907, 2.3005, 2.2914, 2.2984]  # of a real one
    assert len(smoothed(losses)) == len(losses)


def test_a_range_test_ends_once_it_has_blown_up_and_leaves_its_steps_to_the_cosines():
    range_test, *cosines = Quadratic(50.0, noise=0.1).measure().trials
    steps, last = len(range_test.rates), smoothed(range_test.losses)
    assert steps < RANGE_STEPS and steps - 10 <= len(last) < steps
    assert [len(trial.rates) for trial in cosines] == [(180 - steps) // 4] * 4


def test_a_spike_ends_a_range_test_though_the_loss_recovers():
    noise = [0.01 * (-1) ** step for step in range(120)]
    falling = [2.3 - 0.02 * max(step - 30, 0) for step in range(80)]
    losses = [level + error for level, error in zip([*falling, *[2.2] * 5, *[0.5] * 35], noise, strict=True)]
    assert 80 < len(smoothed(losses)) < 85


def test_noise_does_not_end_a_range_test():
    generator = torch.Generator().manual_seed(0)
    falling = [2.3 - 0.005 * max(step - 30, 0) for step in range(120)]
    losses = [level + 0.3 * torch.randn((), generator=generator).item() for level in falling]
    assert len(smoothed(losses)) == 120


@pytest.mark.parametrize("largest", [1000.0, 5000.0])
def test_a_loss_that_grows_at_every_trial_rate_is_refused_and_the_guess_is_below_the_rise(largest):
    measured = Quadratic(largest, noise=0.1).measure()
    (range_test,) = measured.trials
    assert "falls clearly at no learning rate" in measured.refusal
    assert measured.scale == pytest.approx(0.7 * range_test.rates[len(smoothed(range_test.losses)) - 1])


def noisy_loss(network, generator):
    def next_loss():
        inputs = torch.randn(128, 6, generator=generator)
        return nn.functional.cross_entropy(network(inputs), (inputs.sum(1) > 0).long())

    return next_loss


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def expected_scale(measured, guess, c):
    """The equation of the docstring, from the trials."""
    range_test, *cosines = measured.trials
    averages, average = [], 0.0
    for step, loss in enumerate(range_test.losses, 1):
        average = 0.8 * average + 0.2 * loss
        averages.append(average / (1 - 0.8**step))
    lr_range = range_test.rates[averages.index(min(averages[20 : len(smoothed(range_test.losses))]))]
    means = {}
    for trial in cosines:
        half = trial.losses[len(trial.losses) // 2 :]
        means[trial.rates[0]] = sum(half) / len(half) if math.isfinite(half[-1]) else math.inf
    return statistics.median([guess, c * lr_range, c * min(means, key=means.get)])


@pytest.mark.parametrize(("kind", "options", "task", "usual", "c", "share"), [
    (torch.optim.SGD, {}, {}, 0.5, 0.7, None),
    (torch.optim.SGD, {}, {"num_classes": 2}, 0.5, 0.7, 1),
    (torch.optim.SGD, {"momentum": 0.9}, {"num_classes": 2}, 0.05, 0.6, 0.15),
    (torch.optim.SGD, {"momentum": 0.9}, {"num_classes": 2, "perplexity": True}, 0.05, 0.6, 0.15),
    (torch.optim.AdamW, {}, {"num_classes": 2}, 0.005, 0.4, None),
])
def test_the_scale_and_the_trial_rates_follow_the_equations(kind, options, task, usual, c, share):
    network = small_network()
    optimizer = kind(network.parameters(), lr=1.0, **options)
    next_loss = noisy_loss(network, torch.Generator().manual_seed(0))
    measured = measure_lr_scale(network, optimizer, next_loss, 1000, **task)
    range_test, *cosines = measured.trials
    assert range_test.kind == "range test" and [trial.kind for trial in cosines] == ["cosine"] * 4
    assert usual_lr(optimizer) == pytest.approx(usual) and run_over_trial(optimizer) == c
    expected = [usual / 1000 * 1e5 ** (step / (RANGE_STEPS - 1)) for step in range(len(range_test.rates))]
    assert range_test.rates == pytest.approx(expected) and len(expected) >= 60  # it ends where it blew up
    guess, start = usual, sum(range_test.losses[:20]) / 20
    if share:
        guess = share * lr_scale(math.exp(start) if task.get("perplexity") else start, 2) / 2
    peaks = [trial.rates[0] for trial in cosines]
    assert peaks == pytest.approx([guess / c * times for times in (1 / 6, 1 / 2, 3 / 2, 9 / 2)])
    for trial in cosines:
        steps = len(trial.rates)
        cosine = [math.cos(math.pi * step / steps / 2) ** 2 for step in range(steps)]
        assert trial.rates == pytest.approx([trial.rates[0] * share for share in cosine])
    assert measured.scale == pytest.approx(expected_scale(measured, guess, c)) and not measured.refusal


@pytest.mark.parametrize("loss", [0.0, -1.0, 101.0, 1e6, math.inf])
@pytest.mark.parametrize("perplexity", [False, True])
def test_where_the_formula_refuses_the_loss_the_guess_is_the_usual_rate(loss, perplexity):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    assert guessed_scale(optimizer, loss, 10, perplexity) == usual_lr(optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS[1:])
def test_the_formula_is_for_sgd_only(kind):
    optimizer = kind([nn.Parameter(torch.zeros(1))])
    assert guessed_scale(optimizer, 2.3, 10) == usual_lr(optimizer)


def test_the_papers_scale_of_an_untrained_language_model_is_found_from_its_perplexity():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    vocabulary = 6397
    assert guessed_scale(optimizer, math.log(vocabulary), vocabulary, perplexity=True) == pytest.approx(
        math.sqrt(vocabulary) * math.log(vocabulary**2) / vocabulary**0.25 / 8)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop])
def test_optimizers_without_such_a_scale_are_refused(kind):
    network = small_network()
    with pytest.raises(TypeError, match=f"the LR scale of {kind.__name__} cannot be measured"):
        measure_lr_scale(network, kind(network.parameters()), noisy_loss(network, None), 100)


def test_bad_numbers_of_classes_are_refused():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for num_classes in (0, -1, 2.5):
        with pytest.raises(ValueError, match="num_classes"):
            measure_lr_scale(network, optimizer, noisy_loss(network, None), 100, num_classes=num_classes)


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 180), (3600, 180), (20_000, 1000)])
def test_measuring_takes_180_steps_or_5_percent_of_the_run(num_steps, expected):
    assert expected - 4 < Quadratic(1.0).measure(num_steps=num_steps).num_steps <= expected


@pytest.mark.parametrize(("steps", "message"), [
    ({"num_steps": 0}, "num_steps 0: .* at least 1"), ({"num_steps": 9e3}, "num_steps 9000.0: give a whole number"),
    ({"num_steps": 100, "budget": 139}, "budget 139: .* at least 140"),
])
def test_steps_that_are_too_few_or_no_whole_number_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        Quadratic(1.0).measure(**steps)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("is_fresh", [True, False])
def test_everything_is_restored_bit_for_bit(kind, is_fresh):
    network = small_network()
    weights = [parameter for parameter in network.parameters() if kind.__name__ != "Muon" or parameter.dim() == 2]
    optimizer = kind(weights, lr=torch.tensor(0.01) if kind is torch.optim.SGD else 0.01)
    next_loss = noisy_loss(network, None)
    if not is_fresh:
        next_loss().backward()
        optimizer.step()
    next_loss().backward()
    network.eval()

    def everything():
        gradients = [parameter.grad for parameter in network.parameters()]
        generators = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
        return copy.deepcopy([network.state_dict(), optimizer.state_dict(), gradients, generators, network.training])

    before, rate = everything(), optimizer.param_groups[0]["lr"]
    assert measure_lr_scale(network, optimizer, next_loss, 100).scale > 0
    assert identical(before, everything())
    assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("mode", ["train", "part in eval", "eval"])
def test_trials_run_in_the_modes_of_the_training_and_leave_them(mode):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    network.train(mode != "eval")
    if mode == "part in eval":
        network[1].eval()
    expected, seen = {module: module.training or mode == "eval" for module in network.modules()}, []
    before = {module: module.training for module in network.modules()}

    def next_loss():
        seen.append({module: module.training for module in network.modules()})
        return functional.cross_entropy(network(torch.randn(16, 4)), torch.randint(3, (16,)))

    measure_lr_scale(network, torch.optim.SGD(network.parameters(), lr=0.1), next_loss, 100)
    assert all(modes == expected for modes in seen)
    assert {module: module.training for module in network.modules()} == before


def test_groups_that_are_left_out_train_at_their_own_rates():
    quadratic, other = Quadratic(5.0, noise=0.1), nn.Parameter(torch.ones((), dtype=torch.float64))
    seen = []

    def next_loss():
        seen.append(other.item())
        return quadratic.loss() + other

    groups = [{"params": quadratic.network.parameters(), "lr": 0.01}, {"params": [other], "lr": 3.0}]
    optimizer = torch.optim.SGD(groups)
    measured = measure_lr_scale(quadratic.network, optimizer, next_loss, 1000, groups=[0])
    trial = measured.trials[0]
    assert seen[: len(trial.rates)] == [1.0 - 3.0 * step for step in range(len(trial.rates))]
    alone = Quadratic(5.0, noise=0.1).measure().trials[0]
    both = zip(alone.losses, trial.losses, seen, strict=False)
    assert all(one + offset == pytest.approx(loss) for one, loss, offset in both)
    assert trial.rates == alone.rates and other == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 3.0]


def test_inside_an_autocast_region_the_trials_are_those_of_separate_ones():
    def measured(around, inside):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        inputs, labels = torch.randn(64, 4), torch.randint(3, (64,))

        def next_loss():
            with inside():
                return functional.cross_entropy(network(inputs), labels)

        with around():
            next_loss().backward()
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            return measure_lr_scale(network, optimizer, next_loss, 100), float(next_loss())

    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert measured(autocast, nullcontext) == measured(nullcontext, autocast)


def identical(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return one == other


class Stream:
    """Batches in order, with a position that can be restored."""

    def __init__(self, network):
        self.network, self.position, self.asked = network, 7, []

    def __call__(self):
        self.asked.append(self.position)
        next_loss = noisy_loss(self.network, torch.Generator().manual_seed(self.position))
        self.position += 1
        return next_loss()

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_every_trial_sees_the_same_batches_and_the_stream_is_restored():
    network = small_network()
    stream = Stream(network)
    measured = measure_lr_scale(network, torch.optim.Adam(network.parameters()), stream, 100)
    assert stream.position == 7 and len(measured.trials) == 5
    assert stream.asked == [7 + step for trial in measured.trials for step in range(len(trial.rates))]


def test_a_loss_that_falls_at_no_rate_is_refused_and_the_scale_is_the_guess():
    network, refused = small_network(), 0
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for seed in range(20):
        torch.manual_seed(seed)
        measured = measure_lr_scale(network, optimizer, lambda: 0 * network[0].weight.sum() + torch.rand(()), 100)
        if measured.refusal:
            refused += 1
            assert "falls clearly at no learning rate" in measured.refusal and len(measured.trials) == 1
            assert measured.scale <= 0.5
    assert refused >= 18  # three standard errors, in a hundred means that overlap


def test_a_fall_within_the_noise_is_refused_and_the_guess_is_the_papers(monkeypatch):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    monkeypatch.setattr(mlr_snet_scale, "CLEARLY", 100)
    next_loss = noisy_loss(network, torch.Generator().manual_seed(0))
    measured = measure_lr_scale(network, optimizer, next_loss, 100, num_classes=2)
    start = sum(measured.trials[0].losses[:20]) / 20
    assert measured.refusal and measured.scale == pytest.approx(lr_scale(start, 2) / 2)


def test_the_best_peak_at_the_end_of_the_trials_is_told_of_optimizers_that_are_not_calibrated():
    def measured(kind):
        network = small_network()
        next_loss = noisy_loss(network, torch.Generator().manual_seed(0))
        return measure_lr_scale(network, kind(network.parameters(), lr=1.0), next_loss, 100)

    assert not measured(torch.optim.SGD).refusal
    assert "largest peak" in measured(torch.optim.ASGD).refusal
    falling = Quadratic(8000.0, noise=0.1).measure(kind=torch.optim.ASGD)
    peaks = [trial.rates[0] for trial in falling.trials[1:]]
    assert peaks == sorted(peaks, reverse=True) and not falling.refusal  # the smallest may be the best


def test_groups_that_share_the_tensor_of_their_rate_train_at_their_own_while_the_others_are_measured():
    network = small_network()
    rate = torch.tensor(1e-9)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:-1]}, {"params": parameters[-1:]}], lr=rate)
    seen, noisy = [], noisy_loss(network, torch.Generator().manual_seed(0))

    def next_loss():
        seen.append(parameters[-1].detach().clone())
        return noisy()

    measure_lr_scale(network, optimizer, next_loss, 100, groups=[0])
    assert max(float((value - seen[0]).abs().max()) for value in seen) < 1e-6
    assert optimizer.param_groups[0]["lr"] is rate and optimizer.param_groups[1]["lr"] is rate


def test_a_loss_that_is_not_finite_is_refused():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="at rates near zero"):
        measure_lr_scale(network, optimizer, lambda: math.nan * network[0].weight.sum(), 100)


def test_clipping_is_part_of_the_measurement():
    free, clipped = (Quadratic(1.0, noise=0.1).measure(max_norm=norm) for norm in (None, 1e-2))
    assert clipped.scale > 3 * free.scale


def test_auto_refuses_an_optimizer_that_the_papers_formula_was_not_made_for():
    weight = nn.Parameter(torch.zeros(1))
    for optimizer in (torch.optim.SGD([weight], lr=1.0, momentum=0.9), torch.optim.AdamW([weight])):
        with pytest.raises(ValueError, match="measure_lr_scale"):
            MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10)
        assert MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10, gamma="paper").chosen_gamma == "paper"


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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_easy_regression_is_measured(kind):
    refused = []
    for seed in range(5):
        network, next_loss = regression(seed)
        refused.append(measure_lr_scale(network, kind(network.parameters()), next_loss, 440).refusal)
    assert refused == [""] * 5


@pytest.mark.parametrize("budget", [150, 200, 400])
def test_the_steps_of_measuring_are_an_argument(budget):
    network, next_loss = regression(0)
    measured = measure_lr_scale(network, torch.optim.SGD(network.parameters(), lr=1.0), next_loss, 440, budget=budget)
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

    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    if end == "none":
        assert measure_lr_scale(network, optimizer, ending, 440).scale > 0
        return
    broken = ending if end != "none for ever" else lambda: None
    with pytest.raises((ValueError, TypeError), match="start the loader over|as a tensor, with its graph"):
        measure_lr_scale(network, optimizer, broken, 440)


def test_micro_batches_are_measured_as_their_sum():
    network, next_loss = regression(0)
    state = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    inputs, targets = torch.randn(64, 10), torch.randn(64)

    def part(rows):
        return (network(inputs[rows]).squeeze(1) - targets[rows]).square().sum() / 64

    whole = measure_lr_scale(network, optimizer, lambda: part(slice(0, 64)), 440)
    several = measure_lr_scale(network, optimizer, lambda: (part(slice(a, a + 16)) for a in range(0, 64, 16)), 440)
    assert several.scale == pytest.approx(whole.scale, rel=1e-3)
    assert same(state.values(), network.state_dict().values())


def test_a_guessed_scale_warns_where_it_is_read():
    network = nn.Linear(4, 4)
    measured = measure_lr_scale(
        network, torch.optim.SGD(network.parameters(), lr=1.0), lambda: 0 * network.weight.sum() + torch.rand(()), 440
    )
    with pytest.warns(UserWarning, match="is a guess"):
        assert measured.gamma == 2 * measured.scale

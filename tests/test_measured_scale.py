"""measure_lr_scale: its equations, its oracle on a quadratic, and that it restores everything bit for bit."""

import copy
import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from torch import nn

import mlr_snet_scale
from mlr_snet import MLRSNet, MLRSNetLR
from mlr_snet_scale import RANGE_STEPS, Trial, guessed_scale, measure_lr_scale, usual_lr

OPTIMIZERS = [
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
]


class Quadratic:
    """½·Σ λ w², with curvatures from λ_max/10 to λ_max."""

    def __init__(self, largest):
        self.network = nn.Linear(5, 1, bias=False).double()
        nn.init.ones_(self.network.weight)
        self.curvatures = torch.linspace(largest / 10, largest, 5, dtype=torch.float64)

    def loss(self):
        return 0.5 * (self.curvatures * self.network.weight.square()).sum()


@pytest.mark.parametrize("largest", [0.1, 0.5, 1.0, 5.0, 50.0, 200.0])
def test_on_a_quadratic_the_scale_of_sgd_is_near_the_limit_of_stability(largest):
    problem = Quadratic(largest)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    measured = measure_lr_scale(problem.network, optimizer, problem.loss, 1000)
    limit = 2 / largest
    assert 0.15 * limit < measured.scale < limit


def test_lower_peaks_are_tried_where_the_lowest_blows_up():
    problem = Quadratic(50.0)  # without noise, the loss of a range test is lowest far beyond the limit of stability
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    measured = measure_lr_scale(problem.network, optimizer, problem.loss, 1000)
    low, *others = [trial.rates[0] for trial in measured.trials[1:]]
    assert others == pytest.approx([low / 4, low / 16])
    assert 0.2 * 2 / 50 < measured.scale < 2 / 50


def test_without_noise_the_best_peak_alone_counts():
    problem = Quadratic(1.0)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    measured = measure_lr_scale(problem.network, optimizer, problem.loss, 1000)
    best = min(measured.trials[1:], key=lambda trial: sum(trial.losses[-(len(trial.losses) // 3) :]))
    assert measured.scale == pytest.approx(0.7 * best.rates[0], rel=1e-3)


def test_a_range_test_ends_once_it_has_blown_up_and_leaves_its_steps_to_the_cosines():
    problem = Quadratic(200.0)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    range_test, *cosines = measure_lr_scale(problem.network, optimizer, problem.loss, 1000).trials
    steps = len(range_test.rates)
    assert steps < RANGE_STEPS and range_test.losses[-1] > range_test.losses[0]
    assert [len(trial.rates) for trial in cosines] == [(150 - steps) // 3] * 3


def test_a_loss_that_grows_at_every_trial_rate_is_refused():
    problem = Quadratic(5000.0)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    assert "falls" in measure_lr_scale(problem.network, optimizer, problem.loss, 1000).refusal


def noisy_loss(network, generator):
    def next_loss():
        inputs = torch.randn(128, 6, generator=generator)
        return nn.functional.cross_entropy(network(inputs), (inputs.sum(1) > 0).long())

    return next_loss


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


@pytest.mark.parametrize(("kind", "options", "expected_usual", "factor"), [
    (torch.optim.SGD, {}, 0.5, 0.7),
    (torch.optim.SGD, {"momentum": 0.9}, 0.05, 0.6),
    (torch.optim.AdamW, {}, 0.005, 0.5),
])
def test_the_trial_rates_follow_the_equations(kind, options, expected_usual, factor):
    network = small_network()
    optimizer = kind(network.parameters(), lr=1.0, **options)
    measured = measure_lr_scale(network, optimizer, noisy_loss(network, torch.Generator().manual_seed(0)), 1000)
    range_test, *cosines = measured.trials
    assert range_test.kind == "range test" and [trial.kind for trial in cosines] == ["cosine"] * 3
    usual = usual_lr(optimizer)
    assert usual == pytest.approx(expected_usual)
    expected = [usual / 1000 * 1e5 ** (step / (RANGE_STEPS - 1)) for step in range(len(range_test.rates))]
    assert range_test.rates == pytest.approx(expected) and len(expected) >= RANGE_STEPS - 10  # it ends where it blew up
    averages, average = [], 0.0
    for step, loss in enumerate(range_test.losses, 1):
        average = 0.8 * average + 0.2 * loss
        averages.append(average / (1 - 0.8**step))
    lr_range = factor * range_test.rates[averages.index(min(averages))]
    peaks = [trial.rates[0] for trial in cosines]
    low, high = sorted((usual, lr_range))
    assert [factor * peak for peak in peaks] == pytest.approx([low, math.sqrt(low * high), high])
    for trial in cosines:
        steps = len(trial.rates)
        cosine = [math.cos(math.pi * step / steps / 2) ** 2 for step in range(steps)]
        assert trial.rates == pytest.approx([trial.rates[0] * share for share in cosine])
    third = len(cosines[0].losses) // 3
    last = [sum(trial.losses[-third:]) / third for trial in cosines]
    differences = [after - before for before, after in itertools.pairwise(range_test.losses[:20])]
    error = statistics.stdev(differences) / math.sqrt(2) * math.sqrt(2 / third)  # of a difference of two means
    weights = [math.exp(-(loss - min(last)) / (2 * error)) for loss in last]
    product = math.prod(peak**weight for peak, weight in zip(peaks, weights, strict=True))
    assert measured.scale == pytest.approx(factor * product ** (1 / sum(weights)))


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 150), (3000, 150), (20_000, 1000)])
def test_measuring_takes_150_steps_or_5_percent_of_the_run(num_steps, expected):
    problem = Quadratic(1.0)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    measured = measure_lr_scale(problem.network, optimizer, problem.loss, num_steps)
    assert expected - 3 < measured.num_steps <= expected


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
    measure_lr_scale(network, torch.optim.Adam(network.parameters()), stream, 100)
    assert stream.position == 7
    assert stream.asked == [*range(7, 127), *range(7, 17), *range(7, 17), *range(7, 17)]


def test_a_loss_that_falls_at_no_rate_is_refused():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    torch.manual_seed(0)
    measured = measure_lr_scale(network, optimizer, lambda: 0 * network[0].weight.sum() + torch.rand(()), 100)
    assert "falls at no learning rate" in measured.refusal and len(measured.trials) == 1
    assert measured.scale == guessed_scale(optimizer, measured.trials[0])


def test_a_fall_within_the_noise_is_refused_and_the_trials_are_told(monkeypatch):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    monkeypatch.setattr(mlr_snet_scale, "CLEARLY", 100)
    measured = measure_lr_scale(network, optimizer, noisy_loss(network, torch.Generator().manual_seed(0)), 100)
    assert "falls clearly at none of the peak learning rates" in measured.refusal
    assert [trial.kind for trial in measured.trials] == ["range test", *["cosine"] * 3]


def test_the_guess_is_the_usual_rate_unless_the_loss_rises_before():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    rates = [0.0005 * 1.1**step for step in range(100)]
    level = [2.3 + 0.01 * (-1) ** step for step in range(100)]
    rising = level[:60] + [9.0] * 40
    assert guessed_scale(optimizer, Trial("range test", rates, level)) == pytest.approx(0.5)
    assert guessed_scale(optimizer, Trial("range test", rates, rising)) == pytest.approx(0.7 * rates[60])


def test_a_loss_that_is_not_finite_is_refused():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="at rates near zero"):
        measure_lr_scale(network, optimizer, lambda: math.nan * network[0].weight.sum(), 100)


def test_clipping_is_part_of_the_measurement():
    problem = Quadratic(1.0)
    optimizer = torch.optim.SGD(problem.network.parameters(), lr=1.0)
    free, clipped = (
        measure_lr_scale(problem.network, optimizer, problem.loss, 100, max_norm=norm).scale for norm in (None, 1e-2)
    )
    assert clipped > 3 * free


def test_auto_refuses_an_optimizer_that_the_papers_formula_was_not_made_for():
    weight = nn.Parameter(torch.zeros(1))
    for optimizer in (torch.optim.SGD([weight], lr=1.0, momentum=0.9), torch.optim.AdamW([weight])):
        with pytest.raises(ValueError, match="measure_lr_scale"):
            MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10)
        assert MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10, gamma="paper").chosen_gamma == "paper"

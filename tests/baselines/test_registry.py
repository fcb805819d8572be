"""The registry, and what every rival has in common."""

import io
import sys

import pytest
import torch
from points import STEPS, Points, drive, small_network
from torch import nn

from baselines import SCHEDULES, build_baseline, default_lr
from data.meta_stream import MetaStream


@pytest.mark.parametrize(("schedule", "optimizer", "lr"), [
    ("cosine", "sgd", 0.1), ("wsd", "adamw", 1e-3), ("greedy", "adam", 1e-3), ("val", "sgd", 20.0),
    ("val", "adam", 1e-3),
    ("schedule-free", "sgd", 0.5), ("schedule-free", "adamw", 0.0025), ("schedule-free-radam", "adamw", 0.0025),
    ("prodigy", "adam", 1.0), ("dadaptation", "sgd", 1.0), ("dadaptation", "adamw", 1.0),
])
def test_every_baseline_has_a_usual_rate(schedule, optimizer, lr):
    assert default_lr(schedule, optimizer) == lr


class Short:
    steps_per_epoch = 2


@pytest.mark.parametrize(("schedule", "optimizer", "module"), [
    ("schedule-free", "sgd", "schedulefree"), ("schedule-free-radam", "adamw", "schedulefree"),
    ("prodigy", "adam", "prodigyopt"), ("dadaptation", "adamw", "dadaptation"),
    ("greedy", "sgd", "transformers.optimization"),
])
def test_a_package_that_is_missing_is_named(schedule, optimizer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"is missing: pip install {module.split('.')[0]}$"):
        build_baseline(schedule, optimizer, nn.Linear(1, 1), Short(), 2)


def test_a_package_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.optimization", sys)  # a module without GreedyLR
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with pytest.raises(ValueError, match="transformers has no GreedyLR: pip install --upgrade transformers"):
        build_baseline("greedy", "sgd", nn.Linear(1, 1), Short(), 2)


def test_the_state_of_another_schedule_is_refused():
    network = small_network()
    _, fixed = build_baseline("fixed", "sgd", network, Points(), 2)
    _, hd = build_baseline("hd", "sgd", network, Points(), 2)
    with pytest.raises(ValueError, match="not the state of a HD: missing or unknown last_directions, lr"):
        hd.load_state_dict(fixed.state_dict())


PACKAGES = {"schedule-free": "schedulefree", "schedule-free-radam": "schedulefree", "prodigy": "prodigyopt",
            "prodigy-cosine": "prodigyopt",
            "dadaptation": "dadaptation", "dadaptation-cosine": "dadaptation", "greedy": "transformers"}


@pytest.fixture(params=[(name, kind) for name, rival in SCHEDULES.items() for kind in rival.usual_lr])
def rival(request):
    """A baseline's name, and the name of an optimizer that it works with."""
    name, kind = request.param
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"needs the package {PACKAGES[name]}")
    return name, kind


def start(name, kind, num_epochs=2, lr=0.05, task=None, **options):
    """Network, stream of meta losses, optimizer and schedule."""
    network, task = small_network(), task or Points()
    stream = MetaStream(task, network)
    return network, stream, *build_baseline(name, kind, network, task, num_epochs, lr, meta_loss=stream, **options)


def rates(name, kind, steps=STEPS, **options):
    network, _, _, schedule = start(name, kind, **options)
    return drive(schedule, network, steps)[0]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_rival_continues_from_its_state_as_if_never_stopped(rival):
    network, _, _, schedule = start(*rival)
    whole, _ = drive(schedule, network)
    one, first_stream, first_optimizer, first = start(*rival)
    begun, _ = drive(first, one, 3)
    other, second_stream, second_optimizer, second = start(*rival)
    other.load_state_dict(one.state_dict())
    second_optimizer.load_state_dict(through_a_file(first_optimizer.state_dict()))
    second.load_state_dict(through_a_file(first.state_dict()))
    second_stream.load_state_dict(first_stream.state_dict())
    rest, _ = drive(second, other, 3, start=3)
    assert begun + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), network.parameters(), strict=True))


def test_the_rates_of_a_rival_depend_on_the_length_of_the_run_where_its_class_says_so(rival):
    short, long = rates(*rival, num_epochs=20, steps=60), rates(*rival, num_epochs=40, steps=60)
    assert (short != long) == SCHEDULES[rival[0]].knows_length


def test_a_rival_reads_held_out_data_where_its_class_says_so(rival):
    reads = []

    class Counting(Points):
        def meta_batches(self, start):
            reads.append("a batch")
            return super().meta_batches(start)

        def validate(self, network):
            reads.append("all")
            return super().validate(network)

    rates(*rival, task=Counting())
    assert bool(reads) == SCHEDULES[rival[0]].needs_validation


def test_a_rival_replaces_the_gradient_where_its_class_says_so(rival):
    network, _, _, schedule = start(*rival)
    drive(schedule, network, 1)
    loss, _, _ = Points().loss(network, Points.points(1), None)
    schedule.optimizer.zero_grad()
    loss.backward(retain_graph=schedule.second_order)
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    schedule.step(loss)
    pairs = zip(network.parameters(), gradients, strict=True)
    is_kept = all(torch.equal(parameter.grad, gradient) for parameter, gradient in pairs)
    assert is_kept != SCHEDULES[rival[0]].own_direction


def test_a_rival_starts_from_the_rate_that_it_is_given_unless_its_class_says_that_it_has_none(rival):
    assert (rates(*rival, lr=0.05) == rates(*rival, lr=0.06)) == (SCHEDULES[rival[0]].rate == "none")


def test_a_rival_depends_on_beta_where_its_class_says_so(rival):
    assert (rates(*rival, beta=1e-3) != rates(*rival, beta=2e-3)) == SCHEDULES[rival[0]].has_beta


@pytest.mark.parametrize(("name", "kind", "momentum"), [
    ("rtho", "adam", 0.0), ("l4mom", "sgd", 0.9), ("l4adam", "adam", 0.0), ("schedule-free", "adam", 0.0),
    ("prodigy", "sgd", 0.0), ("schedule-free-radam", "sgd", 0.0), ("schedule-free-radam", "adam", 0.0),
])
def test_a_rival_on_an_optimizer_that_it_cannot_drive_is_refused(name, kind, momentum):
    network = small_network()
    with pytest.raises(ValueError, match="works with the optimizer|use SGD without momentum"):
        build_baseline(name, kind, network, Points(), 2, momentum=momentum, meta_loss=MetaStream(Points(), network))


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="schedule 'cosin': choose from fixed, .*cosine"):
        build_baseline("cosin", "sgd", small_network(), Points(), 2)


def test_rtho_without_a_validation_loss_is_refused():
    with pytest.raises(ValueError, match="rtho needs meta_loss"):
        build_baseline("rtho", "sgd", small_network(), Points(), 2)

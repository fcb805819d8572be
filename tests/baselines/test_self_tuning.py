"""The self-tuning optimizers, against their packages used directly."""

import sys
from types import SimpleNamespace

import pytest
import torch
from points import STEPS, Points, drive, small_network
from torch.optim.lr_scheduler import CosineAnnealingLR

from baselines import build_baseline


@pytest.mark.parametrize(("name", "kind", "package", "make"), [
    ("schedule-free", "sgd", "schedulefree", lambda m, p: m.SGDScheduleFree(p, lr=0.05, momentum=0.9)),
    ("schedule-free", "adamw", "schedulefree", lambda m, p: m.AdamWScheduleFree(p, lr=0.05)),
    ("schedule-free-radam", "adamw", "schedulefree", lambda m, p: m.RAdamScheduleFree(p, lr=0.05)),
    ("prodigy", "adamw", "prodigyopt", lambda m, p: m.Prodigy(p, lr=0.05)),
    ("prodigy-cosine", "adamw", "prodigyopt", lambda m, p: m.Prodigy(p, lr=0.05)),
    ("dadaptation-cosine", "adamw", "dadaptation", lambda m, p: m.DAdaptAdam(p, lr=0.05, decouple=True)),
    ("dadaptation", "sgd", "dadaptation", lambda m, p: m.DAdaptSGD(p, lr=0.05)),
    ("dadaptation", "adam", "dadaptation", lambda m, p: m.DAdaptAdam(p, lr=0.05)),
    ("dadaptation", "adamw", "dadaptation", lambda m, p: m.DAdaptAdam(p, lr=0.05, decouple=True)),
])
def test_a_packaged_rival_equals_its_package_used_directly(name, kind, package, make):
    module = pytest.importorskip(package, reason=f"needs the package {package}")
    network = small_network()
    _, schedule = build_baseline(name, kind, network, Points(), 2, 0.05)
    drive(schedule, network)
    other = small_network()
    optimizer = make(module, other.parameters())
    cosine = CosineAnnealingLR(optimizer, STEPS) if name.endswith("cosine") else None
    if hasattr(optimizer, "train"):
        optimizer.train()
    for number in range(STEPS):
        optimizer.zero_grad()
        Points().loss(other, Points.points(number), None)[0].backward()
        optimizer.step()
        if cosine:
            cosine.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_schedule_free_warms_up_over_a_twentieth_of_the_run():
    pytest.importorskip("schedulefree", reason="needs the package schedulefree")
    network = small_network()
    _, schedule = build_baseline("schedule-free", "sgd", network, Points(), 40, 0.5)  # of 120 steps
    rates, _ = drive(schedule, network, 9)
    assert rates[1:] == pytest.approx([0.5 * min(1, step / 6) for step in range(1, 9)])  # before a step the last rate


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_dadaptation_reports_the_rate_in_effect(kind):
    pytest.importorskip("dadaptation", reason="needs the package dadaptation")
    network = small_network()
    optimizer, schedule = build_baseline("dadaptation", kind, network, Points(), 2, 1.0)
    _, weights = drive(schedule, network, 2)
    group = optimizer.param_groups[0]
    rate = group["d"] / group["g0_norm"] if kind == "sgd" else group["d"]
    assert schedule.get_last_lr() == [rate] and rate > 0


@pytest.mark.parametrize(("name", "package"), [
    ("schedule-free", "schedulefree"), ("schedule-free-radam", "schedulefree"), ("prodigy", "prodigyopt"),
    ("dadaptation", "dadaptation"),
])
def test_a_packaged_rival_does_not_announce_its_options(name, package, capsys):
    pytest.importorskip(package, reason=f"needs the package {package}")
    build_baseline(name, "adamw", small_network(), Points(), 2, weight_decay=0.01)
    assert capsys.readouterr().out == ""


def test_a_dadaptation_that_does_not_tell_its_rate_is_refused(monkeypatch):
    class OfVersion2(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            self.defaults["g0_norm"] = 0.0

    monkeypatch.setitem(sys.modules, "dadaptation", SimpleNamespace(DAdaptSGD=OfVersion2))
    with pytest.raises(ValueError, match="older than version 3: pip install --upgrade dadaptation"):
        build_baseline("dadaptation", "sgd", small_network(), Points(), 2)

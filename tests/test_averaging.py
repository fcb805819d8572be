"""The running average of the weights, and the meta gradient at it."""

import csv
import json
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_mlr_snet import OPTIMIZERS, batch, loss_on, small_network, trained, written_out_direction
from test_scripts import META_TEST, META_TRAIN, SMALL, call, kill_and_resume, results, run, same
from torch import nn
from torch.func import functional_call

from data.images import Batch
from mlr_snet import hypergradient
from mlr_snet_optim.average import Average
from training.averaging import fresh_statistics

AVERAGED = [*SMALL, "--num-meta", "100", "--t-val", "2", "--meta-point", "average", "--average"]


def shifted_average(network, decay=0.9):
    """An average that has drifted away from the network's weights."""
    average = Average(network, decay)
    with torch.no_grad():
        for weight in average.weights:
            weight.add_(0.1 * torch.randn(weight.shape, dtype=weight.dtype))
    return average


def test_a_short_last_batch_does_not_spoil_the_statistics_of_batchnorm():
    network = nn.BatchNorm1d(3)
    batches = [Batch(torch.randn(size, 3) + shift, None, size) for size, shift in ((8, 0), (8, 0), (3, 9))]
    task = SimpleNamespace(train_batches=lambda start: iter(batches), steps_per_epoch=3, autocast=nullcontext)
    with fresh_statistics(network, task):
        expected = torch.cat([batch.inputs for batch in batches[:2]]).mean(0)
        assert torch.allclose(network.running_mean, expected, atol=1e-6)
    assert not network.running_mean.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_at_the_average_equals_autograd_through_the_averaging_step(name):
    network, optimizer = trained(OPTIMIZERS[name])
    average = shifted_average(network)
    slope = hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99), average=average)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    group, ahead = optimizer.param_groups[0], {}
    for (key, parameter), mean in zip(network.named_parameters(), average.weights, strict=True):
        direction = written_out_direction(name, group, optimizer.state[parameter], parameter, parameter.grad).detach()
        ahead[key] = 0.9 * mean + 0.1 * (parameter.detach() - lr * direction)
    images, labels = batch(99)
    buffers = {key: value.clone() for key, value in network.named_buffers()}
    nn.functional.cross_entropy(functional_call(network, {**ahead, **buffers}, (images,)), labels).backward()
    assert (1 - 0.9) * slope.item() == pytest.approx(lr.grad.item(), rel=1e-8)


def test_the_meta_point_leaves_the_network_as_it_was_to_the_bit():
    network, optimizer = trained(OPTIMIZERS["momentum"])
    before = [tensor.clone() for tensor in network.state_dict().values()]
    hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99), average=shifted_average(network))
    assert all(torch.equal(a, b) for a, b in zip(before, network.state_dict().values(), strict=True))


@pytest.mark.parametrize("width", [1, 3])
def test_the_average_of_another_network_is_refused(width):
    average = Average(nn.Linear(4, 5), 0.9)
    with pytest.raises(ValueError, match="the average of another network"):
        average.load_state_dict(Average(nn.Linear(4, width), 0.9).state_dict())


def test_the_average_is_the_exponential_one_from_the_first_weights_on():
    network = small_network()
    average, weight = Average(network, 0.8), network[0].weight
    expected, live = weight.detach().clone(), None
    for _ in range(5):
        average.update()
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        live = weight.detach().clone()
        expected = 0.8 * expected + 0.2 * live
    with average.averaged_weights():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, live)


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.9), (1000, 0.98), (10**6, 0.999)])
def test_the_automatic_decay_reaches_back_a_twentieth_of_the_run_within_its_limits(steps, decay):
    assert Average.decay_for(steps) == pytest.approx(decay)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "average"
    done = run(META_TRAIN, *AVERAGED, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_killed_run_with_an_average_resumes_to_the_same_end(reference, tmp_path):
    kill_and_resume(AVERAGED, tmp_path / "killed", signal.SIGKILL)
    same(results(reference), results(tmp_path / "killed"))
    one, other = (torch.load(folder / "network_average.pth") for folder in (reference, tmp_path / "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_decay_of_0_is_not_taken_for_auto(tmp_path, capsys):
    words = [*SMALL[:-4], "--num-epoch", "1", "--schedule", "fixed", "--average", "--average-decay", "0"]
    assert call(capsys, META_TEST, *words, "--out", tmp_path).returncode == 0
    assert json.loads((tmp_path / "args.json").read_text())["arguments"]["average_decay"] == 0


def test_both_networks_can_be_begun_from(reference, tmp_path, capsys):
    last = list(csv.DictReader((reference / "metrics.csv").open()))[-1]
    for file, column in (("network.pth", "test_acc"), ("network_average.pth", "test_acc_average")):
        out = tmp_path / file
        flags = ["--schedule", "fixed", "--lr", "1e-12", "--num-epoch", "1", "--wd", "0", "--num-meta", "100"]
        done = call(capsys, META_TEST, *SMALL, *flags, "--average", "--init", reference / file, "--out", out)
        assert done.returncode == 0, done.stderr
        row = next(csv.DictReader((out / "metrics.csv").open()))
        # the weights stand still; the statistics of BatchNorm are measured on other batches
        assert float(row["test_acc_average"]) == pytest.approx(float(last[column]), abs=15)


def test_the_average_of_a_schedule_free_run_mixes_in_the_weights_that_train(tmp_path, monkeypatch, capsys):
    pytest.importorskip("schedulefree", reason="needs the package schedulefree")
    mixed, mix_in = [], Average.mix_in
    monkeypatch.setattr(Average, "mix_in", lambda self: (mixed.append(self.parameters[0].clone()), mix_in(self)))
    words = [*SMALL[:-4], "--num-epoch", "1", "--schedule", "schedule-free", "--average", "--test-every", "1"]
    assert call(capsys, META_TEST, *words, "--out", tmp_path).returncode == 0
    training = torch.load(tmp_path / "checkpoint.pth")["parts"]["network"]
    assert torch.equal(mixed[-1], next(iter(training.values())))


@pytest.mark.parametrize("arguments", [["--average-decay", "0.9"], ["--init", "none.pth"], ["--average-decay", "1"]])
def test_arguments_of_the_average_that_cannot_be_are_one_line_and_status_2(tmp_path, capsys, arguments):
    done = call(capsys, META_TEST, *SMALL, *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2 and "error:" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr

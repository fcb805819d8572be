"""Regression on images, and training batches in micro-batches."""

import itertools
import math
import signal
from pathlib import Path

import pytest
import torch
from test_scripts import META_TEST, META_TRAIN, call, kill_and_resume, results, same

from data import build_task
from data.regression import NOISE, turned
from data.sampling import generator_for
from models import build_network

CPU = torch.device("cpu")
SIZES = ["--dataset", "digits", "--limit-train", "128", "--limit-test", "60", "--batch-size", "32", "--num-epoch", "2",
         "--device", "cpu"]
REGRESSION = {"angle": ["--network", "resnet8", "--predict", "angle"],
              "noise": ["--network", "denoiser", "--predict", "noise"]}


def task_of(**options):
    return build_task("digits", Path(), batch_size=64, device=CPU, **options)


class Constant(torch.nn.Module):
    """Predicts zero."""

    def __init__(self, task):
        super().__init__()
        self.shape = (task.num_outputs, 8, 8) if task.num_outputs == 3 else (1,)

    def forward(self, images):
        return images.new_zeros(len(images), *self.shape)


@pytest.mark.parametrize("predict", REGRESSION)
def test_targets_have_mean_0_and_variance_1_so_that_a_constant_explains_nothing(predict):
    task = task_of(predict=predict)
    targets = torch.cat([batch.targets for batch in itertools.islice(task.train_batches(0), task.steps_per_epoch)])
    assert len(targets) == 1437 and abs(targets.mean()) < 0.05 and abs(targets.std() - 1) < 0.02
    loss, accuracy, _ = task.loss(Constant(task), next(task.train_batches(0)), None)
    assert float(loss + accuracy / 100) == pytest.approx(1)
    result = task.evaluate(Constant(task))
    assert result["test_r2"] == pytest.approx(100 * (1 - result["test_loss"]), abs=1e-3) and abs(result["test_r2"]) < 10


@pytest.mark.parametrize("predict", REGRESSION)
def test_a_pair_depends_on_the_seed_and_the_step_only(predict):
    batches = list(itertools.islice(task_of(predict=predict).train_batches(0), 30))
    for other, start in ((task_of(predict=predict), 25), (task_of(predict=predict, seed=1), 0)):
        is_same = [torch.equal(mine.targets, its.targets) and torch.equal(mine.inputs, its.inputs)
                   for mine, its in zip(batches[start:], other.train_batches(start), strict=False)]
        assert all(is_same) if start else not any(is_same)
    assert not torch.equal(batches[0].targets, batches[1].targets)


def test_the_noise_of_a_pair_is_what_was_added():
    clean, pair = (next(task_of(predict=predict).train_batches(0)) for predict in ("class", "noise"))
    torch.testing.assert_close(pair.inputs - NOISE * pair.targets, clean.inputs)


def test_a_bar_is_turned_by_the_angle_of_its_target():
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, :] = 1  # a horizontal bar
    for seed in range(5):
        inputs, target = turned(image, 1, slice(0, 1), generator_for(seed))
        angle = target.item() / math.sqrt(3) * math.pi / 4
        rows, columns = inputs[0, 0].nonzero(as_tuple=True)
        weights = inputs[0, 0][rows, columns]
        slope = ((columns - 4.0) * (rows - 4.0) * weights).sum() / ((columns - 4.0) ** 2 * weights).sum()
        assert math.atan(slope) == pytest.approx(-angle, abs=0.12)


@pytest.mark.parametrize("predict", REGRESSION)
@pytest.mark.parametrize("script", [META_TRAIN, META_TEST], ids=["meta-train", "meta-test"])
def test_both_scripts_train_without_classes(capsys, tmp_path, script, predict):
    words = [*SIZES, *REGRESSION[predict], "--optimizer", "adamw", "--average"]
    words += ["--num-meta", "64", "--t-val", "2"] if script == META_TRAIN else ["--nets", "recommended"]
    done = call(capsys, script, *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    header = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[0]
    assert header == "epoch,lr,train_loss,train_r2,test_loss,test_r2,test_r2_average,seconds"
    assert (tmp_path / "run" / "run.png").stat().st_size > 5_000


@pytest.mark.parametrize(("words", "line"), [
    (["--network", "resnet8", "--predict", "noise"], "--network denoiser and --predict noise belong together"),
    (["--network", "denoiser"], "--network denoiser and --predict noise belong together"),
    ([*REGRESSION["angle"], "--label-noise", "0.2"], "the network predicts the angle; leave it out"),
    ([*REGRESSION["angle"], "--gamma", "paper"], "num_classes is missing"),
    (["--network", "lstm2", "--dataset", "pydoc", "--predict", "angle"], "does not apply"),
    (["--network", "lstm2", "--dataset", "pydoc", "--accumulate", "2"], "does not apply"),
    (["--network", "resnet8", "--accumulate", "0"], "at least 1"),
    (["--network", "resnet8", "--batch-size", "16", "--accumulate", "9"], "--accumulate 9: at most 8"),
])
def test_what_does_not_go_together_is_one_line(capsys, tmp_path, words, line):
    done = call(capsys, META_TEST, "--dataset", "digits", *words, "--out", tmp_path / "run")
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(("size", "accumulate", "sizes"), [
    (64, 4, [16] * 4), (64, 3, [22, 21, 21]), (64, 32, [2] * 32), (64, 1, [64]), (3, 2, [3]), (5, 2, [3, 2]),
])
def test_a_batch_is_cut_into_parts_of_at_least_two_images(size, accumulate, sizes):
    task = task_of(accumulate=accumulate, label_noise=0.3)
    batch = next(task.train_batches(0))
    batch = type(batch)(batch.inputs[:size], batch.targets[:size], size, batch.true_targets[:size])
    parts = task.micro_batches(batch)
    assert [len(part.targets) for part in parts] == sizes and {part.size for part in parts} == {size}
    for name in ("inputs", "targets", "true_targets"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_losses_accuracies_and_gradients_of_the_parts_add_up_to_those_of_the_batch():
    network = build_network("convnet", 10).double()
    found = []
    for accumulate in (1, 5):
        task = task_of(accumulate=accumulate)
        batch = next(task.train_batches(0))
        batch = batch._replace(inputs=batch.inputs.double())
        network.zero_grad()
        results = [task.loss(network, part, None) for part in task.micro_batches(batch)]
        for loss, _, _ in results:
            loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        found.append((sum(loss for loss, _, _ in results), sum(accuracy for _, accuracy, _ in results), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)  # the loss is computed in single precision


def test_an_evaluation_takes_at_most_four_times_the_images_of_a_training_pass():
    network, sizes = build_network("convnet", 10), []
    network.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    loss = task_of(accumulate=16).evaluate(network)["test_loss"]
    assert max(sizes) == 16
    assert task_of().evaluate(network)["test_loss"] == pytest.approx(loss, rel=1e-5) and max(sizes) == 256


@pytest.mark.parametrize("words", [
    pytest.param([META_TEST, "--schedule", "cosine", "--lr", "measured"], marks=pytest.mark.slow, id="measured"),
    pytest.param([META_TEST, "--schedule", "rtho", "--num-meta", "32"], id="rtho"),
    pytest.param([META_TRAIN, "--num-meta", "32", "--t-val", "2"], id="learning"),
])
def test_a_network_without_batchnorm_trains_as_with_whole_batches(capsys, tmp_path, words):
    script, *words = words
    rows = []
    for accumulate in (1, 4):
        out = tmp_path / str(accumulate)
        done = call(capsys, script, *SIZES, *words, "--network", "convnet", "--accumulate", accumulate, "--out", out)
        assert done.returncode == 0, done.stderr
        rows.append([float(value) for row in results(out)[0][1:] for value in row.split(",")])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


@pytest.mark.slow
def test_a_killed_regression_in_micro_batches_resumes_to_the_same_end(capsys, tmp_path):
    words = [*SIZES, *REGRESSION["angle"], "--accumulate", "3", "--num-meta", "64", "--t-val", "2"]
    assert call(capsys, META_TRAIN, *words, "--out", tmp_path / "whole").returncode == 0
    kill_and_resume(words, tmp_path / "killed", signal.SIGKILL)
    same(results(tmp_path / "whole"), results(tmp_path / "killed"))


def test_an_image_that_does_not_count_gives_no_gradient():
    outputs = torch.ones(3, 2, requires_grad=True)
    targets = torch.tensor([[0.0, 0.0], [float("nan")] * 2, [2.0, 2.0]])
    task_of(predict="angle").sums(outputs, targets)[0].backward()
    assert outputs.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]

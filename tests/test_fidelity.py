"""What the paper's code does, written out: the net's two forms, γ over the training set, and its command lines."""

import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import META_TEST, META_TRAIN, ROOT, call
from torch import nn

from data import build_task
from data.meta_stream import epoch_changes, schedule_arguments
from data.text import TextData, TextTask
from mlr_snet import MLRSNet, MLRSNetLR, load_schedule, load_schedules, train
from models import build_network

CPU = torch.device("cpu")


def settled(net, loss):
    state = net.initial_state()
    for _ in range(200):
        fraction, state = net(torch.tensor(loss), state)
    return fraction.item()


def test_the_form_for_images_has_perceptrons_of_half_the_size_and_torchs_initialisation():
    torch.manual_seed(0)
    net = MLRSNet()
    assert net.layer1.fc_h2h[0].weight.shape == (25, 50) and sum(p.numel() for p in net.parameters()) == 11_776
    for linear in (*net.layer1.fc_i2h[::2], *net.layer1.fc_h2h[::2], net.layer3):
        bound = linear.in_features**-0.5
        assert 0.8 * bound < linear.weight.abs().max() <= bound


def test_the_form_for_text_has_perceptrons_of_the_full_size_and_weights_up_to_a_tenth():
    torch.manual_seed(0)
    net = MLRSNet(form="text")
    assert net.layer1.fc_h2h[0].weight.shape == (50, 50) and sum(p.numel() for p in net.parameters()) == 23_101
    for linear in (*net.layer1.fc_i2h[::2], *net.layer1.fc_h2h[::2]):
        assert 0.08 < linear.weight.abs().max() <= 0.1


def test_an_untrained_net_for_images_reads_the_loss():
    moved = []
    for seed in range(20):
        torch.manual_seed(seed)
        net = MLRSNet()
        moved.append(abs(settled(net, 4.0) - settled(net, 0.01)))
    assert np.mean(moved) == pytest.approx(0.024, rel=0.5)


@pytest.mark.parametrize("form", ["images", "text"])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(50, 1), (20, 3), (7, 1)])
def test_a_file_tells_its_form_by_its_shapes(tmp_path, form, hidden_size, num_layers):
    net = MLRSNet(hidden_size, num_layers, form)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = load_schedule(tmp_path / "net.pth")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_nets_of_two_forms_can_share_a_run():
    nets = [MLRSNet(), MLRSNet(form="text")]
    schedule = MLRSNetLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), nets, 4, num_classes=10)
    for _ in range(4):
        schedule.step(2.0)
    assert schedule.phase == 1


def authors_gamma(level, num_classes):
    return abs(level**0.5 * np.log(level * num_classes) / num_classes**0.25) / 4


@torch.no_grad()
def authors_image_loss(network, task):
    """The mean over the batches of the training set of the batch's mean loss, in eval mode."""
    network.eval()
    total = 0.0
    for batch in itertools.islice(task.train_batches(0), task.steps_per_epoch):
        total += nn.functional.cross_entropy(network(batch.inputs), batch.targets).item()
    network.train()
    return total / task.steps_per_epoch


@torch.no_grad()
def authors_perplexity(network, task):
    """exp of the mean loss over the pieces of the training text, the hidden state carried on, in eval mode."""
    network.eval()
    total, hidden = 0.0, None
    for batch in itertools.islice(task.train_batches(0), task.steps_per_epoch):
        logits, hidden = network(batch.inputs, hidden)
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    network.train()
    return math.exp(total / task.steps_per_epoch)


def images():
    # digits are not augmented, and whole batches make the authors' mean over batches one over images
    task = build_task("digits", Path(), seed=0, batch_size=32, num_meta=20, limit_train=128, limit_test=50, device=CPU)
    torch.manual_seed(0)
    return task, build_network("resnet8", 10), authors_image_loss


def text():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(30, (number,), generator=generator) for number in (4 * 7 * 5 + 1, 90, 98)]
    task = TextTask(TextData(*ids, [str(n) for n in range(30)]), batch_size=4, seq_len=7, device=CPU,
                    evaluation_columns=3)
    torch.manual_seed(0)
    return task, build_network("lstm2", 30, embed_size=8, dropout=0.5), authors_perplexity


@pytest.mark.parametrize("make", [images, text])
def test_gamma_is_the_authors_at_the_start_and_at_every_change_of_nets(make):
    task, network, authors_level = make()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = MLRSNetLR(
        optimizer, load_schedules("paper"), **schedule_arguments(task, 6), changes=epoch_changes(task, 6, 3),
        scale_loss=partial(task.scale_loss, network),
    )
    assert schedule.changes == [2 * task.steps_per_epoch, 4 * task.steps_per_epoch]
    steps = train(network, task, optimizer, schedule, 6)
    for number in range(6 * task.steps_per_epoch):
        if number in (0, *schedule.changes):
            expected = authors_gamma(authors_level(network, task), task.num_classes)
        next(steps)
        assert schedule.gamma == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("classes", "loss", "gamma"), [(10, 3.0, 0.828), (100, 5.2, 1.127), (10, 0.01, None)])
def test_the_formula_is_the_authors_wherever_its_logarithm_is_above_1(classes, loss, gamma):
    from mlr_snet import lr_scale

    assert lr_scale(loss, classes) == pytest.approx(authors_gamma(loss, classes))
    if gamma:
        assert lr_scale(loss, classes) == pytest.approx(gamma, abs=0.001)


@pytest.mark.parametrize(("flags", "dataset", "network"), [
    (["--dataset", "ptb"], "ptb", "lstm2"), (["--network", "lstm3"], "ptb", "lstm3"), ([], "cifar10", "resnet"),
    (["--network", "wideresnet", "--dataset", "cifar100", "--lr", "1e-3"], "cifar100", "wideresnet"),
    ("--dataset ptb --batch_size 20 --seq_len 10 --optim sgd --max_epoch 3 --clip 0.5 --embed_size 64 --t_val 5 "
     "--dropout 0.2 --wd 1e-6 --momentum 0".split(), "ptb", "lstm2"),
])
def test_the_authors_command_lines_work(flags, dataset, network, tmp_path):
    from test_help import load

    args = load(META_TRAIN).parse_args([*flags, "--out", str(tmp_path / "run")])
    assert (args.dataset, args.network) == (dataset, network)
    if "--clip" in flags:
        assert args.clip == 0.5 and args.num_epoch == 3 and args.embed_size == 64


@pytest.mark.parametrize(("flags", "instead"), [
    (["--hidden_size", "512"], "--embed-size"), (["--num_layers", "2"], "--network lstm2 or lstm3"),
    (["--model", "lstm"], "--network lstm2"), (["--dataset", "digits", "--clip", "0.25"], "--clip does not apply"),
])
@pytest.mark.parametrize("script", [META_TRAIN, META_TEST])
def test_flags_of_theirs_that_mean_something_else_are_refused_with_the_one_to_use(
    script, flags, instead, tmp_path, capsys
):
    network = ["--network", "resnet8"] if "digits" in flags else []
    done = call(capsys, script, *network, *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and instead in done.stderr.splitlines()[-1]


def test_the_shipped_sets_are_in_the_form_for_images():
    for path in sorted((ROOT / "meta-test").glob("*.pth")):
        assert load_schedule(path).layer1.fc_h2h[0].weight.shape == (25, 50)


def test_meta_train_learns_a_net_of_the_form_of_its_modality(tmp_path, capsys):
    text = "--dataset pydoc --embed-size 8 --limit-train 2000 --limit-test 400 --batch-size 4"
    small = "--network resnet8 --dataset digits --limit-train 32 --limit-test 20 --num-meta 20"
    for flags, width in ((text, 50), (small, 25)):
        out = tmp_path / str(width)
        done = call(capsys, META_TRAIN, *flags.split(), "--num-epoch", "1", "--t-val", "1", "--out", out)
        assert done.returncode == 0, done.stderr
        assert load_schedule(out / "mlr_snet_1.pth").layer1.fc_h2h[0].weight.shape == (width, 50)

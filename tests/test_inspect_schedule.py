"""What inspect-schedule.py says of the shipped nets, and of a net made by hand that does react to the loss."""

import json
import sys

import pytest
import torch
from test_help import load
from test_scripts import META_TEST, ROOT, SMALL, call

from mlr_snet import MLRSNet

INSPECT = ROOT / "meta-test" / "inspect-schedule.py"
SHORT = ["--num-epoch", "12", "--steps-per-epoch", "10"]


@pytest.fixture
def reacting_net(tmp_path):
    """A net without memory whose fraction grows with the loss: sigmoid(4·tanh(tanh(loss)) − 2)."""
    net = MLRSNet(hidden_size=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        cell = net.layer1
        cell.fc_i2h[0].weight.fill_(1.0)  # the one unit between: ReLU(loss)
        input_gate, forget_gate, candidate, output_gate = cell.fc_i2h[2].bias.view(4, 2)
        input_gate.fill_(20.0)
        forget_gate.fill_(-20.0)
        output_gate.fill_(20.0)
        cell.fc_i2h[2].weight.view(4, 2)[2].fill_(1.0)
        net.layer3.weight.fill_(2.0)
        net.layer3.bias.fill_(-2.0)
    torch.save(net.state_dict(), tmp_path / "reacting.pth")
    return tmp_path / "reacting.pth"


def reaction_percent(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("reaction")]
    return float(line.split()[4])


def inspect(capsys, *arguments):
    done = call(capsys, INSPECT, *arguments)
    return done, done.stdout


def test_the_shipped_nets_hardly_react_and_the_hand_made_one_does(tmp_path, capsys, reacting_net):
    done, printed = inspect(capsys, *SHORT, "--out", tmp_path / "shipped.png")
    assert done.returncode == 0 and reaction_percent(printed) < 5
    done, printed = inspect(capsys, *SHORT, "--nets", reacting_net, "--out", tmp_path / "hand.png")
    assert done.returncode == 0 and reaction_percent(printed) > 95
    assert (tmp_path / "shipped.png").stat().st_size > 10_000


def test_the_settled_fractions_of_the_hand_made_net_are_those_of_its_equation(tmp_path, capsys, reacting_net):
    _, printed = inspect(capsys, *SHORT, "--nets", reacting_net, "--out", tmp_path / "hand.png")
    (line,) = [line for line in printed.splitlines() if line.startswith("reacting.pth")]
    at_4, at_001 = (torch.sigmoid(4 * torch.tensor(loss).tanh().tanh() - 2).item() for loss in (4.0, 0.01))
    assert [float(word) for word in line.split()[1:3]] == pytest.approx([at_4, at_001], abs=6e-4)


def test_the_losses_of_a_run_are_read_and_another_file_is_refused(tmp_path, capsys):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,lr,train_loss\n1,0.1,2.0\n2,0.1,1.0\n3,0.1,0.5\n")
    done, printed = inspect(capsys, "--losses", tmp_path, "--steps-per-epoch", "5", "--out", tmp_path / "run.png")
    assert done.returncode == 0 and "learning rate" in printed
    for text in ("epoch,lr\n1,0.1\n", "epoch,lr,train_loss\n1,0.1,2.0\n2,0.1\n",
                 "epoch,lr,train_loss\n1,0.1,2.0\n1,0.1,2.0\n",  # two runs
                 "epoch,lr,train_loss,train_r2\n1,0.1,2.0,5\n",  # a regression, without a number for γ
                 "epoch,lr,train_loss,train_ppl\n1,0.1,2.0,7.4\n"):  # a text
        metrics.write_text(text)
        done, _ = inspect(capsys, "--losses", metrics, "--out", tmp_path / "run.png")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "metrics.csv" in done.stderr
    done, _ = inspect(capsys, "--out", tmp_path / "run.pdf")
    assert done.returncode == 2 and "ends in .png" in done.stderr


@pytest.mark.parametrize("more", [["--gamma", "0.05"], ["--momentum", "0.9"]])
def test_the_rates_along_a_run_are_those_of_the_run(tmp_path, capsys, more):
    words = [*SMALL, "--num-epoch", "6", "--nets", "paper", "--warmup", "0.2", "--cooldown", "0.5", *more]
    assert call(capsys, META_TEST, *words, "--out", tmp_path).returncode == 0
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    _, printed = inspect(capsys, "--losses", tmp_path, "--out", tmp_path / "run.png")
    (line,) = [line for line in printed.splitlines() if line.startswith("along the run")]
    last = float(line.split(" = ")[-1])
    steps = json.loads((tmp_path / "cost.json").read_text())["steps_per_epoch"]
    share = 2 / (steps + 1)  # of the last step's cool-down in the mean of the last epoch's
    assert last == pytest.approx(share * float(rows[-1].split(",")[1]), rel=0.05)


def test_the_rates_along_a_run_that_was_stopped_are_those_of_its_plan(tmp_path, capsys):
    words = [*SMALL, "--num-epoch", "6", "--nets", "recommended", "--cooldown", "0.5", "--gamma", "0.3"]
    assert call(capsys, META_TEST, *words, "--out", tmp_path).returncode == 0
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    (tmp_path / "metrics.csv").write_text("\n".join(rows[:4]) + "\n")  # half of the run, before its cool-down
    _, printed = inspect(capsys, "--nets", "recommended", "--losses", tmp_path, "--out", tmp_path / "run.png")
    (line,) = [line for line in printed.splitlines() if line.startswith("along the run")]
    assert float(line.split(" = ")[-1]) == pytest.approx(float(rows[3].split(",")[1]), rel=0.01)


@pytest.mark.parametrize("name", ["", "metrics.csv"])
def test_the_length_of_an_epoch_is_that_of_the_run(name, tmp_path, capsys, monkeypatch):
    script = load(INSPECT)
    monkeypatch.setattr(script, "follow", lambda nets, losses, args: sys.exit(len(losses)))
    (tmp_path / "metrics.csv").write_text("epoch,lr,train_loss\n1,0.1,2.0\n")
    for cost, steps in ((None, 20), ('{"steps_per_epoch": 36}', 36)):
        if cost:
            (tmp_path / "cost.json").write_text(cost)
        with pytest.raises(SystemExit) as exit:
            script.main(["--losses", str(tmp_path / name)])
        assert exit.value.code == steps


@pytest.mark.parametrize("words", [["--perplexity"], ["--gamma", "1e300"], ["--decay", "1e300", "1e290"]])
def test_what_the_schedule_could_not_follow_is_refused(capsys, words):
    done, _ = inspect(capsys, *words)
    assert done.returncode == 2 and words[0] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("file", "content"), [
    ("cost.json", "{"), ("cost.json", "{}"), ("args.json", '{"arguments": {}}'),
    ("args.json", '{"arguments": {"warmup": 0.0, "cooldown": 0.0, "gamma": "measured"}}'),
])
def test_what_is_damaged_beside_the_losses_is_one_line_with_its_folder(tmp_path, capsys, file, content):
    (tmp_path / "metrics.csv").write_text("epoch,lr,train_loss\n1,0.1,2.0\n")
    (tmp_path / file).write_text(content)
    done, _ = inspect(capsys, "--losses", tmp_path)
    assert done.returncode == 2 and f"{tmp_path}: a damaged cost.json, args.json" in done.stderr.splitlines()[-1]


def test_a_run_of_one_step_shows_no_reaction(tmp_path, capsys):
    words = ["--nets", "recommended", "--num-epoch", "1", "--steps-per-epoch", "1", "--out", tmp_path / "one.png"]
    _, printed = inspect(capsys, *words)
    assert reaction_percent(printed) == 0

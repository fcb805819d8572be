"""checkpoint.pth: of this run, or refused in one line."""

import signal

import pytest
import torch
from faults import TEXT, TRAIN, tree
from test_scripts import META_TRAIN, call

from utils import checksum


def stopped(words, folder, monkeypatch, capsys):
    """A run of meta-train in the folder, stopped after its third step."""
    with monkeypatch.context() as patch:
        seen = iter([0, 0, signal.SIGTERM])
        patch.setattr("training.trainer.StopSignal.seen", lambda self: next(seen))
        done = call(capsys, META_TRAIN, *words, "--out", folder)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    return folder


def forge(folder, change):
    """Change the state in the folder's checkpoint, and its checksum with it."""
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    del state["checksum"]
    change(state)
    torch.save({**state, "checksum": checksum(state)}, folder / "checkpoint.pth")


def part(name, change):
    return lambda state: change(state["parts"][name])


WRONG = {
    "no network": lambda state: state["parts"].pop("network"),
    "another network": part("network", lambda network: network.popitem()),
    "an LSTM of another size": part("schedule", lambda schedule: schedule.update(state=torch.zeros(3))),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_are_not_those_of_the_run_are_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    folder = stopped([*TRAIN, "--momentum", "0.9", "--gamma", "0.1"], tmp_path, monkeypatch, capsys)
    forge(folder, WRONG[name])
    before = tree(folder)
    done = call(capsys, META_TRAIN, "--resume", "--out", folder)
    assert done.returncode == 2 and "not a checkpoint of this run" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and tree(folder) == before


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    for words in ([*TRAIN, "--momentum", "0.9", "--gamma", "0.1"], [*TEXT, "--num-epoch", "1", "--t-val", "1"]):
        folder = stopped(words, tmp_path / words[3], monkeypatch, capsys)
        forge(folder, lambda state: None)
        assert call(capsys, META_TRAIN, "--resume", "--out", folder).returncode == 0


def test_the_optimizers_own_rate_in_a_checkpoint_does_not_matter(tmp_path, monkeypatch, capsys):
    words = [*TRAIN, "--momentum", "0.9", "--gamma", "0.1"]
    networks = []
    for rate in (0.0, 7.0):
        folder = stopped(words, tmp_path / str(rate), monkeypatch, capsys)
        forge(folder, part("optimizer", lambda optimizer, rate=rate: optimizer["param_groups"][0].update(lr=rate)))
        assert call(capsys, META_TRAIN, "--resume", "--out", folder).returncode == 0
        networks.append(torch.load(folder / "network.pth"))
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())

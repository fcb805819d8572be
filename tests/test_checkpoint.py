"""checkpoint.pth: whole, or refused in one line, also where its checksum is right and its entries are wrong."""

import shutil
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


SMALL = torch.zeros(2, 2)


def remember(optimizer, name, value):
    for memory in optimizer["state"].values():
        memory[name] = value


def part(name, change):
    return lambda state: change(state["parts"][name])


WRONG = {
    **{f"no {name}": lambda state, name=name: state.pop(name)
       for name in ("step", "rng", "parts", "hidden", "data", "arguments")},
    **{f"step {value}": lambda state, value=value: state.update(step=value)
       for value in ("three", -1, 10**6, 3.0, True, 1, None)},
    "empty rng": lambda state: state.update(rng=[]), "rng of a word": lambda state: state.update(rng=["a"]),
    "short rng": lambda state: state.update(rng=[(torch.zeros(3, dtype=torch.uint8), None)]),
    "a list of parts": lambda state: state.update(parts=[]),
    "no network": lambda state: state["parts"].pop("network"),
    "another part": lambda state: state["parts"].update(more={}),
    "a list of arguments": lambda state: state.update(arguments=["a"]),
    "hidden states of images": lambda state: state.update(hidden=(torch.zeros(2, 3),)),
    "a number as hidden states": lambda state: state.update(hidden=5),
    "double precision": part("network", lambda network: network.update({k: v.double() for k, v in network.items()})),
    "momentum of another shape": part("optimizer", lambda optimizer: remember(optimizer, "momentum_buffer", SMALL)),
    "momentum of words": part("optimizer", lambda optimizer: remember(optimizer, "momentum_buffer", "a")),
    "no option momentum": part("optimizer", lambda optimizer: optimizer["param_groups"][0].pop("momentum")),
    "another momentum": part("optimizer", lambda optimizer: optimizer["param_groups"][0].update(momentum=0.5)),
    "another weight decay": part("optimizer", lambda optimizer: optimizer["param_groups"][0].update(weight_decay=0.1)),
    "no momentum": part("optimizer", lambda optimizer: optimizer.update(state={})),
    "other betas of Adam": part(
        "schedule", lambda schedule: schedule["adam"]["param_groups"][0].update(betas=(0.5, 0.9))
    ),
    "rows of words": part("metrics", lambda metrics: metrics.update(rows=["a"])),
    "no rows": part("metrics", lambda metrics: metrics.update(rows=[])),
    "a row without the LR": part("metrics", lambda metrics: metrics["rows"][0].pop("lr")),
    "a row of another epoch": part("metrics", lambda metrics: metrics["rows"][0].update(epoch=7)),
    "no totals": part("metrics", lambda metrics: metrics.update(totals={})),
    "a word in the totals": part("metrics", lambda metrics: metrics["totals"].update(size="a")),
    "another cost": part("cost", lambda cost: cost.pop("forward_passes")),
    "a word as cost": part("cost", lambda cost: cost.update(forward_passes="many")),
    "a word as γ": part("schedule", lambda schedule: schedule.update(gamma="big")),
    "a schedule of another step": part("schedule", lambda schedule: schedule.update(steps_taken=77)),
    "an LSTM of another size": part("schedule", lambda schedule: schedule.update(state=torch.zeros(3))),
    "no Adam": part("schedule", lambda schedule: schedule.update(adam={})),
    "an Adam of another size": part("schedule", lambda schedule: remember(schedule["adam"], "exp_avg", SMALL)),
    "a word as place in the meta set": part("meta_stream", lambda stream: stream.update(index="x")),
    "meta hidden states of images": part("meta_stream", lambda stream: stream.update(hidden=(torch.zeros(1),))),
}
WRONG_OF_TEXT = {
    "no hidden states": lambda state: state.update(hidden=None),
    "one column": lambda state: state.update(hidden=tuple(value[:, :1] for value in state["hidden"])),
    "words": lambda state: state.update(hidden=["a", "b"]),
    "one state": lambda state: state.update(hidden=state["hidden"][:1]),
    "one meta column": part(
        "meta_stream", lambda stream: stream.update(hidden=tuple(value[:, :1] for value in stream["hidden"]))
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped")


def refused(words, folders, tmp_path, change, monkeypatch, capsys):
    """Whether a resumed run refuses the changed checkpoint in one line and leaves the folder as it is."""
    whole = folders / words[3]
    if not whole.exists():
        stopped(words, whole, monkeypatch, capsys)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    forge(folder, change)
    before = tree(folder)
    done = call(capsys, META_TRAIN, "--resume", "--out", folder)
    after = {path: content for path, content in tree(folder).items() if "tfevents" not in path.name}
    return done.returncode in (1, 2) and len(done.stderr.splitlines()) == 1 and "checkpoint" in done.stderr and (
        after.items() <= before.items()
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_under_a_right_checksum_is_refused_in_one_line(name, folders, tmp_path, monkeypatch, capsys):
    words = [*TRAIN, "--momentum", "0.9", "--gamma", "0.1"]
    assert refused(words, folders, tmp_path, WRONG[name], monkeypatch, capsys)


@pytest.mark.parametrize("name", WRONG_OF_TEXT)
def test_wrong_hidden_states_are_refused_in_one_line(name, folders, tmp_path, monkeypatch, capsys):
    words = [*TEXT, "--num-epoch", "1", "--t-val", "1"]
    assert refused(words, folders, tmp_path, WRONG_OF_TEXT[name], monkeypatch, capsys)


def test_a_stopped_run_goes_on(folders, tmp_path, monkeypatch, capsys):
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

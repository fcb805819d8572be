"""What can go wrong: bad input, damaged files, a full disk, and kills at any moment, alone and under torchrun.

The short form runs by default, the campaign of kills with --slow.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distributed import start
from test_scripts import META_TEST, META_TRAIN, call, results, same

from baselines import SCHEDULES
from mlr_snet import MLRSNet
from training.folder import FolderLock
from utils import write_atomically

TINY = ["--network", "resnet8", "--dataset", "digits", "--limit-train", "64", "--limit-test", "20",
        "--batch-size", "32", "--device", "cpu"]
TRAIN = [*TINY, "--num-epoch", "2", "--num-meta", "20", "--t-val", "1"]
TEXT = ["--network", "lstm2", "--dataset", "pydoc", "--embed-size", "8", "--batch-size", "4", "--limit-train", "2000",
        "--limit-test", "700", "--device", "cpu"]

# ---------------------------------------------------------------------------------------------- bad input

NOT_NUMBERS = ["abc", "nan", "", "inf", "-1", "1e400", "0x10"]
BAD_NUMBERS = [
    (script, [flag, value], "argument --")
    for script, flags in {
        META_TRAIN: ["--num-epoch", "--batch-size", "--limit-train", "--limit-test", "--num-meta", "--image-size",
                     "--hidden-size", "--num-layers", "--t-val", "--seed", "--momentum", "--wd", "--gamma"],
        META_TEST: ["--lr", "--beta", "--average-decay", "--workers"],
    }.items()
    for flag, value in itertools.product(flags, NOT_NUMBERS)
]
OUT_OF_RANGE = [
    (META_TRAIN, ["--num-epoch", "0"], "at least 1"), (META_TRAIN, ["--batch-size", "0"], "at least 1"),
    (META_TRAIN, ["--batch-size", "1.5"], "not a number"),
    (META_TRAIN, ["--seed", "9" * 20], "at most 92233720368547758"),
    (META_TRAIN, ["--seed", "9" * 5000], "not a number"),
    (META_TRAIN, ["--batch-size", "9" * 12], "at most 2147483647"),
    (META_TRAIN, ["--hidden-size", "1"], "at least 2"), (META_TRAIN, ["--num-layers", "1000"], "at most 100"),
    (META_TRAIN, ["--gamma", "0"], "above 0"), (META_TRAIN, ["--gamma", "automatic"], "not a number"),
    (META_TRAIN, ["--lr", "0"], "above 0"), (META_TRAIN, ["--momentum", "1.1"], "at most 1"),
    (META_TEST, ["--average", "--average-decay", "1"], "at most 0.9999999"),
    (META_TRAIN, ["--t-val", "often"], "not a number"),
    (META_TRAIN, ["--num-meta", "1437"], "images that can be set aside"),
    (META_TRAIN, ["--limit-train", "5000"], "--limit-train 5000"),
    (META_TRAIN, ["--limit-test", "361"], "--limit-test 361"), (META_TRAIN, ["--image-size", "30000"], "memory"),
    (META_TRAIN, ["--hidden-size", "1000000"], "weights of MLR-SNet need"),
]
CHOICES = [
    (META_TRAIN, ["--network", "nonsense"], "invalid choice"),
    (META_TRAIN, ["--dataset", "nonsense"], "invalid choice"),
    (META_TRAIN, ["--optimizer", "lion"], "invalid choice"), (META_TEST, ["--schedule", "nonsense"], "invalid choice"),
    (META_TRAIN, ["--precision", "fp8"], "invalid choice"), (META_TRAIN, ["--meta-point", "here"], "invalid choice"),
    (META_TRAIN, ["--tokens", "byte"], "invalid choice"), (META_TRAIN, ["--nonsense"], "unrecognized arguments"),
    (META_TRAIN, ["--num-epo", "2"], "unrecognized arguments"), (META_TRAIN, ["--seed"], "expected one argument"),
    (META_TEST, ["--nets"], "expected at least one argument"), (META_TRAIN, ["extra"], "unrecognized arguments"),
    (META_TRAIN, ["--device", "nonsense"], "--device nonsense"), (META_TRAIN, ["--device", ""], "not available"),
    (META_TRAIN, ["--device", "meta"], "--device meta"), (META_TRAIN, ["--device", "cuda:99"], "not available"),
]
TOGETHER = [
    (META_TRAIN, ["--network", "lstm2"], "not for images"), (META_TRAIN, ["--dataset", "pydoc"], "not for text"),
    (META_TRAIN, ["--seq-len", "5"], "does not apply"), (META_TRAIN, ["--dropout", "0.1"], "does not apply"),
    (META_TRAIN, ["--tokens", "char"], "does not apply"), (META_TRAIN, ["--embed-size", "8"], "does not apply"),
    (META_TRAIN, ["--workers", "2"], "--workers"), (META_TRAIN, ["--average-decay", "0.9"], "--average-decay"),
    (META_TRAIN, ["--optimizer", "adam", "--momentum", "0.9"], "--momentum"),
    (META_TRAIN, [*TEXT, "--num-meta", "10"], "does not apply"),
    (META_TRAIN, [*TEXT, "--image-size", "8"], "does not apply"),
    (META_TRAIN, [*TEXT, "--seq-len", "100000"], "lower --batch-size or --seq-len"),
    (META_TRAIN, [*TEXT, "--embed-size", "200000000"], "weights of lstm2 need"),
    (META_TRAIN, [*TEXT, "--dropout", "2"], "at most 1"),
    (META_TEST, ["--lr", "0.1"], "leave --lr out"), (META_TEST, ["--beta", "0.1"], "no --beta"),
    (META_TEST, ["--schedule", "l4mom", "--lr", "0.1"], "leave --lr out"),
    (META_TEST, ["--schedule", "fixed", "--beta", "0.1"], "no --beta"),
    (META_TEST, ["--schedule", "fixed", "--gamma", "0.1"], "--gamma belongs"),
    (META_TEST, ["--schedule", "fixed", "--gamma", "auto"], "--gamma belongs"),
    (META_TEST, ["--schedule", "cosine", "--nets", "shipped"], "--nets belongs"),
    (META_TEST, ["--schedule", "val"], "--num-meta"), (META_TEST, ["--schedule", "rtho"], "--num-meta"),
    (META_TEST, ["--schedule", "rtho", "--num-meta", "20", "--optimizer", "adam"], "--optimizer sgd, not adam"),
    (META_TEST, ["--schedule", "l4mom", "--momentum", "0.9"], "use --momentum 0"),
    (META_TEST, ["--schedule", "prodigy"], "works with --optimizer adam or adamw, not sgd"),
    (META_TEST, ["--schedule", "prodigy", "--lr", "measured"], "finds its rate itself"),
    (META_TRAIN, ["--corruption", "nonsense"], "nonsense"), (META_TRAIN, ["--severity", "9"], "at most 5"),
    (META_TRAIN, ["--label-noise", "2"], "at most 1"), (META_TRAIN, ["--noise-kind", "some"], "invalid choice"),
]
FILES = [  # RUN: a finished run of meta-train; BAD: a folder of damaged files
    (META_TEST, ["--nets", "/etc/passwd"], "/etc/passwd"), (META_TEST, ["--nets", "missing.pth"], "no such file"),
    (META_TEST, ["--nets", "."], "args.json"), (META_TEST, ["--nets", "RUN/checkpoint.pth"], "not an MLR-SNet"),
    (META_TEST, ["--nets", "RUN/network.pth"], "not an MLR-SNet"),
    (META_TEST, ["--nets", "RUN/args.json"], "args.json"),
    (META_TEST, ["--nets", "RUN/mlr_snet_1.pth", "missing.pth"], "no such file"),
    (META_TEST, ["--nets", "RUN/mlr_snet_1.pth", "BAD/h20.pth"], "different sizes"),
    (META_TEST, ["--nets", "BAD/empty"], "BAD/empty"), (META_TEST, ["--nets", "BAD/cut.pth"], "not a readable file"),
    (META_TEST, ["--nets", "BAD/nan.pth"], "not finite"), (META_TEST, ["--nets", "BAD/list"], "args.json"),
    (META_TEST, ["--init", "missing.pth"], "--init"), (META_TEST, ["--init", "/etc/passwd"], "--init"),
    (META_TEST, ["--init", "RUN/mlr_snet_1.pth"], "no weights of this network"),
    (META_TEST, ["--init", "RUN"], "--init"),
    (META_TRAIN, ["--out", ""], "empty path"), (META_TRAIN, ["--out", "/" + "x" * 300], "File name too long"),
    (META_TRAIN, ["--out", "/proc/run"], "/proc/run"), (META_TRAIN, ["--out", "BAD/empty"], "is a file"),
    (META_TRAIN, ["--out", "RUN"], "--resume"), (META_TEST, ["--out", "RUN"], "--resume"),
    (META_TRAIN, ["--out", "BAD/orphan"], "holds another run"),
    (META_TRAIN, ["--dataset", "folder", "--data-root", "missing"], "missing"),
    (META_TRAIN, ["--dataset", "imagenet", "--data-root", "missing"], "missing"),
    (META_TRAIN, ["--dataset", "text", "--data-root", "missing", "--network", "lstm2"], "missing/train.txt"),
]
RESUMED = [
    (META_TRAIN, ["--out", "BAD/nothing"], "no run in"), (META_TEST, ["--out", "RUN"], "holds a run of meta-train.py"),
    (META_TRAIN, ["--out", "BAD/orphan"], "args.json is missing beside checkpoint.pth"),
    (META_TRAIN, ["--out", "BAD/text"], "no run's arguments"),
    (META_TRAIN, ["--out", "BAD/list"], "no run's arguments"),
    (META_TRAIN, ["--out", "BAD/null"], "no run's arguments"), (META_TRAIN, ["--out", "BAD/flat"], "not a table"),
    (META_TRAIN, ["--out", "BAD/word"], "batch-size"), (META_TRAIN, ["--out", "BAD/fewer"], "another version"),
    (META_TRAIN, ["--out", "BAD/more"], "another version"), (META_TRAIN, ["--out", "BAD/network"], "invalid choice"),
    (META_TRAIN, ["--out", "BAD/old"], "another version"), (META_TRAIN, ["--out", "BAD/flip"], "damaged"),
    (META_TRAIN, ["--out", "BAD/short"], "damaged"), (META_TRAIN, ["--out", "BAD/foreign"], "--seed is 5"),
    (META_TRAIN, ["--out", "BAD/edited"], "--wd is 0.0005"), (META_TRAIN, ["--out", "BAD/lost"], "missing beside"),
    (META_TRAIN, ["--out", "RUN", "--seed", "0"], "--seed 5"), (META_TRAIN, ["--out", "RUN", "--wd", "0.1"], "--wd"),
    (META_TRAIN, ["--out", "RUN", "--momentum", "0.9"], "--momentum"),
    (META_TRAIN, ["--out", "RUN", "--num-epoch", "9"], "--num-epoch 2"),
    (META_TRAIN, ["--out", "RUN", "--average"], "--average"),
    (META_TRAIN, ["--out", "RUN", "--network", "resnet"], "--network"),
    (META_TRAIN, ["--out", "RUN", "--optimizer", "adam"], "--optimizer sgd"),
    (META_TRAIN, ["--out", "RUN", "--init", "RUN/network.pth"], "--init"),
]
NEW = [*BAD_NUMBERS, *OUT_OF_RANGE, *CHOICES, *TOGETHER, *FILES]
INPUTS = [(script, [*TINY, *words], message) for script, words, message in NEW]
INPUTS += [(script, ["--resume", *words], message) for script, words, message in RESUMED]


def tree(*folders):
    """The content of every file, apart from the lock's."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")))
    return {path: path.read_bytes() for path in paths if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of meta-train, with seed 5."""
    folder = tmp_path_factory.mktemp("faults") / "finished"
    process = fork(META_TRAIN, [*TRAIN, "--seed", "5", "--out", folder])
    process.join(timeout=120)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def damaged(finished):
    """Runs and files with one thing wrong each, by name."""
    folder = finished.parent / "damaged"
    folder.mkdir()
    record = json.loads((finished / "args.json").read_text())
    arguments = record["arguments"]

    def run(name, **changes):
        """A copy of the run with args.json as it would be with these changes."""
        shutil.copytree(finished, folder / name)
        text = json.dumps({**record, "arguments": {**arguments, **changes}})
        (folder / name / "args.json").write_text(text)
        return folder / name

    for name, content in {
        "text": "not JSON", "list": "[1, 2]", "null": "null", "flat": '{"arguments": 5}',
    }.items():
        (run(name) / "args.json").write_text(content)
    run("word", batch_size="many")
    run("network", network="nonsense")
    run("more", colour="red")
    run("edited", wd=0.1)
    run("foreign", seed=0)
    (run("orphan") / "args.json").unlink()
    (run("lost") / "checkpoint.pth").unlink()
    state = torch.load(finished / "checkpoint.pth", weights_only=True)
    next(iter(state["parts"]["network"].values())).mul_(1 + 1e-6)
    torch.save(state, run("flip") / "checkpoint.pth")
    del state["format"]
    torch.save(state, run("old") / "checkpoint.pth")
    content = (finished / "checkpoint.pth").read_bytes()
    (run("short") / "checkpoint.pth").write_bytes(content[: len(content) // 2])
    del arguments["wd"]
    run("fewer")
    (folder / "nothing").mkdir()
    net = torch.load(finished / "mlr_snet_1.pth", weights_only=True)
    (folder / "empty").write_bytes(b"")
    (folder / "cut.pth").write_bytes((finished / "mlr_snet_1.pth").read_bytes()[:5000])
    torch.save(MLRSNet(20).state_dict(), folder / "h20.pth")
    net["layer3.bias"][:] = float("nan")
    torch.save(net, folder / "nan.pth")
    return folder


@pytest.mark.parametrize(("script", "words", "message"), INPUTS)
def test_bad_input_is_one_line_and_status_2_and_overwrites_nothing(
    script, words, message, finished, damaged, tmp_path, capsys, monkeypatch
):
    def real(text):
        return text.replace("RUN", str(finished)).replace("BAD", str(damaged))

    monkeypatch.chdir(tmp_path)
    words = [real(word) for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "run")]
    before = tree(finished, damaged)
    done = call(capsys, script, *words)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "error:" in last and real(message) in last and "Traceback" not in done.stderr
    assert tree(finished, damaged) == before and not list(tmp_path.iterdir())


def test_the_table_of_bad_input_is_long():
    assert len(INPUTS) >= 200


@pytest.mark.parametrize("place", range(20))
def test_a_flipped_bit_in_the_checkpoint_is_detected_or_harmless(finished, tmp_path, capsys, place):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    content = bytearray((folder / "checkpoint.pth").read_bytes())
    position = random.Random(place).randrange(len(content))
    content[position] ^= 1 << place % 8
    (folder / "checkpoint.pth").write_bytes(content)
    before = tree(folder)
    done = call(capsys, META_TRAIN, "--resume", "--out", folder)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:  # the bit lies in the container's padding
        same(results(finished), results(folder))
        weights, expected = (torch.load(path / "network.pth", weights_only=True) for path in (folder, finished))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    else:
        assert done.returncode == 2 and "damaged" in done.stderr and tree(folder) == before


def test_resuming_on_other_data_is_refused(tmp_path, capsys):
    words = "one two three four five six seven eight nine ten\n"
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(words * 40)
    flags = ["--network", "lstm2", "--dataset", "text", "--data-root", tmp_path, "--embed-size", "8",
             "--num-epoch", "1", "--batch-size", "2", "--seq-len", "10", "--device", "cpu"]
    assert call(capsys, META_TRAIN, *flags, "--out", tmp_path / "run").returncode == 0
    (tmp_path / "train.txt").write_text(words * 30)
    before = tree(tmp_path)
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path / "run")
    assert done.returncode == 2 and "fingerprint" in done.stderr and tree(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_and_its_holder_named(finished, tmp_path, capsys, resume):
    folder = finished if resume else tmp_path / "run"
    with FolderLock(folder):
        done = call(capsys, META_TRAIN, *(["--resume"] if resume else TRAIN), "--out", folder)
    assert done.returncode == 2 and f"in use by process {os.getpid()} (" in done.stderr


# ---------------------------------------------------------------------------------------------- files of the user


@pytest.mark.parametrize("name", [
    "mlr_snet_200.pth", "network.pth", "network_average.pth", "run.png", "cost.json", "lr_scale.json", "notes.txt",
    "events.out.tfevents.1", ".hidden", "network.pth.tmp",
])
def test_a_new_run_refuses_a_folder_in_which_files_lie(name, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("the user's")
    done = call(capsys, META_TRAIN, *TRAIN, "--gamma", "measured", "--average", "--out", out)
    assert done.returncode == 2 and name in done.stderr and "give a new folder" in done.stderr
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "the user's")]


def test_the_folder_of_the_shipped_nets_is_refused(tmp_path, capsys):
    shutil.copytree(META_TEST.parent, tmp_path / "meta-test", ignore=shutil.ignore_patterns("result"))
    before = tree(tmp_path)
    done = call(capsys, META_TRAIN, *TRAIN, "--out", tmp_path / "meta-test")
    assert done.returncode == 2 and tree(tmp_path) == before
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path / "meta-test")
    assert done.returncode == 2 and "no run in" in done.stderr and tree(tmp_path) == before


@pytest.mark.parametrize("name", ["run.png", "cost.json", "notes.txt"])
def test_a_resumed_run_without_a_checkpoint_overwrites_nothing(finished, tmp_path, capsys, name):
    shutil.copy(finished / "args.json", tmp_path)
    (tmp_path / name).write_text("the user's")
    before = tree(tmp_path)
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path)
    assert done.returncode == 2 and f"missing beside {name}" in done.stderr and tree(tmp_path) == before


LOCKS = {
    "symbolic link": lambda lock, precious: lock.symlink_to(precious),
    "hard link": lambda lock, precious: lock.hardlink_to(precious),
    "file": lambda lock, precious: lock.write_text("notes"),
    "process id of another program": lambda lock, precious: lock.write_text("12\n"),
    "folder": lambda lock, precious: lock.mkdir(),
    "pipe": lambda lock, precious: os.mkfifo(lock),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_is_not_ours_is_refused_and_kept(kind, tmp_path):
    precious, lock = tmp_path / "precious", tmp_path / "run" / ".lock"
    precious.write_text("the user's")
    lock.parent.mkdir()
    LOCKS[kind](lock, precious)
    before = lock.read_bytes() if lock.is_file() else None
    with pytest.raises((ValueError, OSError), match=r"\.lock.*give another --out"):
        FolderLock(lock.parent).acquire()
    assert precious.read_text() == "the user's" and (lock.read_bytes() if lock.is_file() else None) == before


@pytest.mark.parametrize("words", [[], ["a command", "of two\nlines"], ["not UTF-8: \udcff"]])
def test_a_lock_of_ours_is_taken_again(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        with FolderLock(tmp_path):
            assert (tmp_path / ".lock").read_bytes().startswith(f"{os.getpid()} ".encode())


@pytest.mark.parametrize("name", ["checkpoint.pth.tmp", "metrics.csv.tmp", "run.png.tmp", "network.pth", "run.png"])
def test_a_resumed_run_writes_through_no_link(finished, tmp_path, capsys, name):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("the user's")
    shutil.copytree(finished, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    done = call(capsys, META_TRAIN, "--resume", "--out", folder)
    assert done.returncode == 0 and precious.read_text() == "the user's", done.stderr
    assert (folder / name).is_symlink() == name.endswith(".tmp")


def test_a_temporary_file_is_never_one_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda number: "0")
    (tmp_path / "precious").write_text("the user's")
    (tmp_path / ".mlr-snet-0.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="could not be written"):
        write_atomically(tmp_path / "file", b"ours")
    assert (tmp_path / "precious").read_text() == "the user's" and not (tmp_path / "file").exists()


def test_a_run_removes_what_a_killed_one_left_half_written_and_nothing_else(finished, tmp_path, capsys):
    new, resumed = tmp_path / "new", tmp_path / "resumed"
    new.mkdir()
    shutil.copytree(finished, resumed)
    for folder in (new, resumed):
        (folder / ".lock").write_text("1 meta-train.py")
        (folder / ".mlr-snet-0123456789abcdef.tmp").write_text("half of it")
    (resumed / "notes.tmp").write_text("the user's")
    assert call(capsys, META_TRAIN, *TRAIN, "--out", new).returncode == 0
    assert call(capsys, META_TRAIN, "--resume", "--out", resumed).returncode == 0
    assert [path.name for path in (*new.glob("*.tmp"), *resumed.glob("*.tmp"))] == ["notes.tmp"]


# ---------------------------------------------------------------------------------------------- divergence, full disk


@pytest.mark.parametrize("words", [
    ["--schedule", "fixed", "--lr", "1e39"], ["--gamma", "1e300"],
    ["--schedule", "hd", "--beta", "1e300"],
    ["--schedule", "fixed", "--lr", "1e30"], ["--schedule", "fixed", "--optimizer", "adamw", "--lr", "1e39"],
    ["--schedule", "fixed", "--lr", "1e30", "--num-epoch", "1", "--batch-size", "64"],  # in its last step
])
def test_a_run_that_diverges_says_so_in_one_line_and_names_a_good_checkpoint(tmp_path, capsys, words):
    done = call(capsys, META_TEST, *TINY, "--num-epoch", "2", *words, "--out", tmp_path / "run")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    good = f"last good checkpoint: the checkpoint of step {state['step']}"
    assert done.stderr.startswith("diverged: ") and good in done.stderr
    assert all(value.isfinite().all() for value in state["parts"]["network"].values())
    assert (tmp_path / "run" / "metrics.csv").exists() == (state["step"] > 0)


def limited(script, words, limit, log):
    """Run the script with files of at most `limit` bytes, its errors in `log`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_here(script, words, log)


@pytest.mark.parametrize("limit", [0, 300, 20_000, 400_000])
def test_a_full_disk_ends_a_run_in_one_line_and_harms_nothing(finished, tmp_path, limit):
    log = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    folder = tmp_path / "run"
    words = [str(word) for word in [*TRAIN, "--out", folder]]
    process = context().Process(target=limited, args=(META_TRAIN, words, limit, log[1]))
    process.start()
    process.join(timeout=120)
    printed = log[0].recv()
    assert process.exitcode in (1, 2) and len(printed.splitlines()) == 1 and "could not be written" in printed, printed
    assert not list(folder.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------- kills


def context():
    """Starts processes by forking one that has imported what the scripts need, which spares seconds each."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["test_faults", "trainer", "baselines", "sklearn.datasets", "sklearn.model_selection",
                                 "matplotlib.pyplot", "pydoc_data.topics"])
    return made


def run_here(script, words, log=None):
    """The script's main() in this process, which ends with its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = module.main(words)
        except SystemExit as exit:
            status = exit.code
    if log is not None:
        log.send(printed.getvalue())
    sys.exit(status)


def fork(script, words):
    process = context().Process(target=run_here, args=(script, [str(word) for word in words]))
    process.start()
    return process


def wait_for(path, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not path.exists() and process_lives(process) and time.monotonic() < deadline:
        time.sleep(0.002)


def process_lives(process):
    return process.is_alive() if hasattr(process, "is_alive") else process.poll() is None


IMAGES = [*TINY, "--num-epoch", "4", "--num-meta", "20"]
WORDS = [*TEXT, "--num-epoch", "3"]
PACKAGES = {"schedule-free": "schedulefree", "schedule-free-radam": "schedulefree", "prodigy": "prodigyopt",
            "dadaptation": "dadaptation", "greedy": "transformers"}
ON_ADAMW = ("prodigy", "dadaptation", "schedule-free-radam")
BASELINES = {
    name: ["--optimizer", "adamw"] if name in ON_ADAMW else []
    for name in SCHEDULES if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name])
}
RUNS = [
    *[(META_TRAIN, [*data, "--t-val", "2", *point]) for data in (IMAGES, WORDS)
      for point in ([], ["--meta-point", "average", "--average"])],
    (META_TRAIN, [*IMAGES, "--t-val", "1", "--optimizer", "adam", "--gamma", "0.01"]),
    *[(META_TEST, data) for data in (IMAGES, WORDS)],
    (META_TEST, [*IMAGES, "--momentum", "0.9", "--gamma", "measured"]),
    *[(META_TEST, [*data, "--schedule", name, *flags]) for data in (IMAGES, WORDS)
      for name, flags in BASELINES.items()],
]


def killed_to_the_end(script, words, folder, number, generator):
    """Kill the run `number` times at random moments, resuming it each time, and let it end; the kills that hit."""
    hits = 0
    arguments = [*words, "--out", folder]
    for _ in range(number):
        process = fork(script, arguments)
        wait_for(folder / "checkpoint.pth", process)
        time.sleep(generator.uniform(0.0, 0.5))
        kill = generator.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if process.is_alive():
            os.kill(process.pid, kill)
        process.join(timeout=60)
        hits += process.exitcode != 0
        assert process.exitcode in (0, -kill, 128 + kill) or kill == signal.SIGINT  # also before the script has begun
        arguments = ["--resume", "--out", folder]
    process = fork(script, arguments)
    process.join(timeout=120)
    assert process.exitcode == 0
    return hits


def equal_ends(one, other):
    same(results(one), results(other))
    weights, expected = (torch.load(folder / "network.pth", weights_only=True) for folder in (one, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def campaign(runs, number, folder):
    """Kill every run `number` times and compare its end with that of an unbroken one; the kills that hit."""
    generator, hits = random.Random(0), 0
    for index, (script, words) in enumerate(runs):
        whole, broken = folder / f"whole{index}", folder / f"broken{index}"
        process = fork(script, [*words, "--out", whole])
        process.join(timeout=120)
        assert process.exitcode == 0, words
        hits += killed_to_the_end(script, words, broken, number, generator)
        equal_ends(whole, broken)
    return hits


def test_killed_runs_end_as_unbroken_ones(tmp_path):
    assert campaign([RUNS[0], RUNS[2]], 2, tmp_path) > 0


@pytest.mark.slow
def test_runs_of_every_schedule_that_are_killed_100_times_end_as_unbroken_ones(tmp_path):
    hits = campaign(RUNS, 3, tmp_path)
    print(f"{hits} kills of {len(RUNS)} runs in a single process")
    assert hits >= 100


def test_init_survives_a_death_before_the_first_epoch_ends(finished, tmp_path):
    flags = [*TRAIN, "--num-epoch", "1", "--init", finished / "network.pth"]
    whole = fork(META_TRAIN, [*flags, "--out", tmp_path / "whole"])
    whole.join(timeout=120)
    broken = fork(META_TRAIN, [*flags, "--out", tmp_path / "broken"])
    wait_for(tmp_path / "broken" / "checkpoint.pth", broken)
    broken.kill()
    broken.join(timeout=60)
    again = fork(META_TRAIN, ["--resume", "--out", tmp_path / "broken"])
    again.join(timeout=120)
    assert whole.exitcode == again.exitcode == 0
    equal_ends(tmp_path / "whole", tmp_path / "broken")


def ranks_of(process):
    """The process ids of the ranks that torchrun has started."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def end_of_ranks(script, words, folder, kills, generator):
    """Run under torchrun to the end, killed on the way; the kills that hit. 0 and 1 kill a rank, signals torchrun."""
    hits, arguments = 0, [*words, "--out", folder]
    for how in kills:
        process = start(script, *arguments)
        before = (folder / "checkpoint.pth").stat().st_mtime_ns if (folder / "checkpoint.pth").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            path = folder / "checkpoint.pth"
            if path.exists() and path.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.3))
        ranks = []
        if process.poll() is None:
            ranks = ranks_of(process)
            if how in (0, 1) and len(ranks) == 2:
                os.kill(ranks[how], signal.SIGKILL)
            elif how not in (0, 1):
                os.kill(process.pid, how)
        output = process.communicate(timeout=120)[0]
        if process.returncode:
            hits += 1
        deadline = time.monotonic() + 30
        while any(lives(rank) for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(lives(rank) for rank in ranks), "a rank stayed behind"
        if not (folder / "args.json").exists():
            continue
        assert "Error: " not in output or "ChildFailedError" in output, output
        arguments = ["--resume", "--out", folder]
    process = start(script, *arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return hits


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


LINUX = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in Linux's /proc")
LONGER = ["--num-epoch", "12"]


@LINUX
def test_ranks_that_are_killed_end_as_unbroken_ones(tmp_path):
    words = [*WORDS, *LONGER, "--t-val", "2"]
    assert end_of_ranks(META_TRAIN, words, tmp_path / "whole", [], random.Random(0)) == 0
    assert end_of_ranks(META_TRAIN, words, tmp_path / "broken", [0], random.Random(1)) > 0
    equal_ends(tmp_path / "whole", tmp_path / "broken")


@LINUX
@pytest.mark.slow
def test_ranks_that_are_killed_30_times_end_as_unbroken_ones(tmp_path):
    generator, hits = random.Random(2), 0
    runs = [(META_TRAIN, [*IMAGES, *LONGER, "--t-val", "2"]), (META_TRAIN, [*WORDS, *LONGER, "--t-val", "2"]),
            (META_TEST, [*IMAGES, *LONGER, "--schedule", "rtho"]), (META_TEST, [*WORDS, *LONGER])]
    for index, (script, words) in enumerate(runs):
        kills = [0, 1, signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 2
        generator.shuffle(kills)
        end_of_ranks(script, words, tmp_path / f"whole{index}", [], generator)
        hits += end_of_ranks(script, words, tmp_path / f"broken{index}", kills, generator)
        equal_ends(tmp_path / f"whole{index}", tmp_path / f"broken{index}")
    print(f"{hits} kills under torchrun")
    assert hits >= 30

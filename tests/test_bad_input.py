"""Bad input and damaged files: one line, exit status 2, and nothing is overwritten."""

import itertools
import json
import os
import random
import shutil

import pytest
import torch
from faults import TEXT, TINY, TRAIN, tree
from test_scripts import META_TEST, META_TRAIN, call, results, same

from mlr_snet import MLRSNet
from training.folder import FolderLock

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
    (META_TRAIN, ["--lr", "0"], "above 0"), (META_TRAIN, ["--momentum", "1.1"], "below 1"),
    (META_TEST, ["--average", "--average-decay", "1"], "at least 0, below 1"),
    (META_TEST, ["--momentum", "1"], "at least 0, below 1"),
    (META_TRAIN, ["--t-val", "often"], "not a number"),
    (META_TRAIN, ["--num-meta", "1437"], "images that can be set aside"),
    (META_TRAIN, ["--limit-train", "5000"], "--limit-train 5000"),
    (META_TRAIN, ["--num-meta", "1430"], "holds out all"),
    (META_TRAIN, ["--network", "densenet121", "--image-size", "4"], "--image-size 4: does not fit"),
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
    (META_TRAIN, [*TEXT, "--dropout", "1"], "below 1"),
    (META_TEST, ["--lr", "0.1"], "leave --lr out"), (META_TEST, ["--beta", "0.1"], "no --beta"),
    (META_TEST, ["--schedule", "l4mom", "--lr", "0.1"], "leave --lr out"),
    (META_TEST, ["--schedule", "fixed", "--beta", "0.1"], "no --beta"),
    (META_TEST, ["--schedule", "fixed", "--gamma", "0.1"], "--gamma belongs"),
    (META_TEST, ["--schedule", "fixed", "--gamma", "auto"], "--gamma belongs"),
    (META_TEST, ["--schedule", "cosine", "--nets", "shipped"], "--nets belongs"),
    (META_TEST, ["--schedule", "val"], "--num-meta"), (META_TEST, ["--schedule", "rtho"], "--num-meta"),
    (META_TEST, ["--schedule", "val", "--num-meta", "200"], "give --lr"),
    (META_TEST, ["--schedule", "rtho", "--num-meta", "20", "--optimizer", "adam"], "--optimizer sgd, not adam"),
    (META_TEST, ["--schedule", "l4mom", "--momentum", "0.9"], "use --momentum 0"),
    (META_TEST, ["--schedule", "rtho", "--num-meta", "20", "--compile"], "leave --compile out"),
    (META_TEST, ["--schedule", "prodigy"], "works with --optimizer adam or adamw, not sgd"),
    (META_TEST, ["--schedule", "prodigy", "--lr", "measured"], "finds its rate itself"),
    (META_TEST, ["--warmup", "0.7", "--cooldown", "0.7"], "together at most 1"),
    (META_TRAIN, ["--corruption", "nonsense"], "nonsense"), (META_TRAIN, ["--severity", "9"], "at most 5"),
    (META_TRAIN, ["--label-noise", "2"], "at most 1"), (META_TRAIN, ["--noise-kind", "some"], "invalid choice"),
]
FILES = [  # RUN: a finished run of meta-train; BAD: a folder of damaged files
    (META_TEST, ["--nets", "/etc/passwd"], "/etc/passwd"), (META_TEST, ["--nets", "missing.pth"], "no such file"),
    (META_TEST, ["--nets", "."], "no nets of meta-train.py"),
    (META_TEST, ["--nets", "recomended"], "recommended or paper"),
    (META_TEST, ["--nets", "RUN/checkpoint.pth"], "not an MLR-SNet"),
    (META_TEST, ["--nets", "RUN/network.pth"], "not an MLR-SNet"),
    (META_TEST, ["--nets", "RUN/args.json"], "args.json"),
    (META_TEST, ["--nets", "RUN/mlr_snet_1.pth", "missing.pth"], "no such file"),
    (META_TEST, ["--nets", "RUN/mlr_snet_1.pth", "BAD/h20.pth"], "different sizes"),
    (META_TEST, ["--nets", "BAD/empty"], "BAD/empty"), (META_TEST, ["--nets", "BAD/cut.pth"], "not a readable file"),
    (META_TEST, ["--nets", "BAD/nan.pth"], "not finite"), (META_TEST, ["--nets", "BAD/list"], "args.json"),
    (META_TEST, ["--nets", "BAD/deep"], "no run's --num-epoch"),
    (META_TEST, ["--nets", "BAD/endless"], "no run's --num-epoch"),
    (META_TEST, ["--resume", "--out", "BAD/empty"], "give its folder as --out"),
    (META_TEST, ["--init", "missing.pth"], "--init"), (META_TEST, ["--init", "/etc/passwd"], "--init"),
    (META_TEST, ["--init", "RUN/mlr_snet_1.pth"], "no weights of this network"),
    (META_TEST, ["--init", "RUN"], "--init"),
    (META_TRAIN, ["--out", ""], "empty path"), (META_TRAIN, ["--out", "/" + "x" * 300], "File name too long"),
    (META_TRAIN, ["--out", "/proc/run"], "/proc/run"), (META_TRAIN, ["--out", "BAD/empty"], "not a folder"),
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
    (META_TRAIN, ["--out", "BAD/null"], "no run's arguments"),
    (META_TRAIN, ["--out", "BAD/deep"], "no run's arguments"),
    (META_TRAIN, ["--out", "BAD/bare"], "no run's threads"),
    (META_TRAIN, ["--out", "BAD/word"], "batch-size"), (META_TRAIN, ["--out", "BAD/fewer"], "another version"),
    (META_TRAIN, ["--out", "BAD/more"], "another version"), (META_TRAIN, ["--out", "BAD/network"], "not for images"),
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


@pytest.fixture(scope="session")
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

    for name, content in {"text": "not JSON", "list": "[1, 2]", "null": "null"}.items():
        (run(name) / "args.json").write_text(content)
    (run("deep") / "args.json").write_text("[" * 100_000)
    (run("bare") / "args.json").write_text(json.dumps(record | {"hardware": {}}))
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
    del arguments["num_epoch"]
    run("endless")
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


def test_resuming_on_other_data_is_refused_and_on_the_same_elsewhere_allowed(tmp_path, capsys):
    words = "one two three four five six seven eight nine ten\n"
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(words * 40)
    flags = ["--network", "lstm2", "--dataset", "text", "--data-root", tmp_path, "--embed-size", "8",
             "--num-epoch", "1", "--batch-size", "2", "--seq-len", "10", "--device", "cpu", "--t-val", "5"]
    assert call(capsys, META_TRAIN, *flags, "--out", tmp_path / "run").returncode == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    for split in ("train", "valid", "test"):
        (moved / f"{split}.txt").write_text((tmp_path / f"{split}.txt").read_text())
    assert call(capsys, META_TRAIN, "--resume", "--data-root", moved, "--out", tmp_path / "run").returncode == 0
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

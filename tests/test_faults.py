"""What ends a run: divergence, a full disk, and kills at any moment, alone and under torchrun.

The short form runs by default, the campaign of kills with --slow.
"""

import importlib.util
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import TEXT, TINY, TRAIN, context, fork, run_here, wait_for
from test_distributed import start
from test_scripts import META_TEST, META_TRAIN, call, results, same

from baselines import SCHEDULES

# ---------------------------------------------------------------------------------------------- divergence, full disk


def test_a_lookahead_that_is_far_too_long_is_a_divergence(tmp_path, capsys):
    done = call(capsys, META_TRAIN, *TRAIN, "--gamma", "1000", "--out", tmp_path / "run")
    assert done.returncode == 1 and done.stderr.startswith("diverged: the next step moves weights")


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


def with_few_files(script, words, spare, log):
    """Run the script where so many more files than now may be open."""
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1 + spare
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    run_here(script, words, log)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the open files in Linux's /proc")
@pytest.mark.parametrize("spare", range(6))
def test_a_run_for_which_no_more_files_can_be_opened_ends_in_lines(spare, tmp_path):
    log = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    words = [str(word) for word in [*TRAIN, "--out", tmp_path / "run"]]
    process = context().Process(target=with_few_files, args=(META_TRAIN, words, spare, log[1]))
    process.start()
    process.join(timeout=120)
    assert log[0].poll(), "a traceback"
    printed = log[0].recv().splitlines()
    assert all(line.startswith("warning: ") or "error: " in line for line in printed), printed
    assert process.exitcode in ((1, 2) if any("error: " in line for line in printed) else (0,))


# ---------------------------------------------------------------------------------------------- kills


IMAGES = [*TINY, "--num-epoch", "4", "--num-meta", "20"]
WORDS = [*TEXT, "--num-epoch", "3"]
PACKAGES = {"schedule-free": "schedulefree", "schedule-free-radam": "schedulefree", "prodigy": "prodigyopt",
            "prodigy-cosine": "prodigyopt",
            "dadaptation": "dadaptation", "dadaptation-cosine": "dadaptation", "greedy": "transformers"}
ON_ADAMW = ("prodigy", "prodigy-cosine", "dadaptation", "dadaptation-cosine", "schedule-free-radam")
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


def end_of_ranks(script, words, folder, kills, generator, number=2):
    """Run on so many ranks to the end, killed on the way; the kills that hit. 0 and 1 kill a rank, signals torchrun."""
    hits, arguments = 0, [*words, "--out", folder]
    for how in kills:
        process = start(script, *arguments, ranks=number)
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
            if how in (0, 1) and len(ranks) == number:
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
    process = start(script, *arguments, ranks=number)
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
@pytest.mark.slow
def test_ranks_that_are_killed_end_as_unbroken_ones(tmp_path):
    words = [*WORDS, *LONGER, "--t-val", "2"]
    assert end_of_ranks(META_TRAIN, words, tmp_path / "whole", [], random.Random(0)) == 0
    assert end_of_ranks(META_TRAIN, words, tmp_path / "broken", [0], random.Random(1)) > 0
    equal_ends(tmp_path / "whole", tmp_path / "broken")


@LINUX
@pytest.mark.slow
def test_ranks_that_are_killed_30_times_end_as_unbroken_ones(tmp_path):
    generator, hits = random.Random(2), 0
    runs = [(META_TRAIN, [*IMAGES, *LONGER, "--t-val", "2"], 2), (META_TRAIN, [*WORDS, *LONGER, "--t-val", "2"], 3),
            (META_TEST, [*IMAGES, *LONGER, "--schedule", "rtho"], 3), (META_TEST, [*WORDS, *LONGER], 2)]
    for index, (script, words, number) in enumerate(runs):
        kills = [0, 1, signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 2
        generator.shuffle(kills)
        end_of_ranks(script, words, tmp_path / f"whole{index}", [], generator, number)
        hits += end_of_ranks(script, words, tmp_path / f"broken{index}", kills, generator, number)
        equal_ends(tmp_path / f"whole{index}", tmp_path / f"broken{index}")
    print(f"{hits} kills under torchrun")
    assert hits >= 30

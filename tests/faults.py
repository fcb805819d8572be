"""What the tests of faults share: tiny runs, and ways to start one and to look at its end."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import shlex
import signal
import subprocess
import sys
import time

import torch
from test_scripts import ONE_THREAD, results

TINY = ["--network", "resnet8", "--dataset", "digits", "--limit-train", "64", "--limit-test", "20",
        "--batch-size", "32", "--device", "cpu"]
TRAIN = [*TINY, "--num-epoch", "2", "--num-meta", "20", "--t-val", "1"]
TEXT = ["--network", "lstm2", "--dataset", "pydoc", "--embed-size", "8", "--batch-size", "4", "--limit-train", "2000",
        "--limit-test", "700", "--device", "cpu"]


def tree(*folders):
    """The content of every file, apart from the lock's."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")))
    return {path: path.read_bytes() for path in paths if path.is_file() and path.name != ".lock"}


def shell(before, script, words, after="", **environment):
    """The script under bash: `before` it the shell's own settings, `after` it where its output goes."""
    command = f"set -o pipefail; {before} {shlex.join(map(str, [sys.executable, script, *words]))} {after}"
    environment = {**ONE_THREAD, "MLR_SNET_CACHE": "", **environment}
    return subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, env=environment)


def is_whole(folder):
    """Whether the run in the folder has come to its end."""
    rows = json.loads((folder / "args.json").read_text())["arguments"]["num_epoch"]
    return len(results(folder)[0]) == rows + 1 and (folder / "network.pth").exists()


def context():
    """Starts processes by forking one that has imported what the scripts need, which spares seconds each."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["faults", "training.trainer", "baselines", "torch.utils.tensorboard",
                                 "sklearn.datasets", "sklearn.model_selection", "matplotlib.figure",
                                 "pydoc_data.topics"])
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

"""The runs of a table: what each is, and how they are run side by side and taken up again."""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import ROOT, read_text, write_atomically

ADAM = ("--optimizer", "adam")
METHODS: dict[str, tuple[str, ...]] = {  # the script and its arguments
    "ours (train)": ("meta-train",),
    "ours (transfer)": ("meta-test", "--schedule", "mlr-snet"),
    # Learned without momentum; 0.9 makes a step ten times as long, and γ begins at 0.67 where there are ten classes.
    "ours (transfer) gamma 0.067": ("meta-test", "--schedule", "mlr-snet", "--gamma", "0.067"),
    "ours (transfer) average": ("meta-test", "--schedule", "mlr-snet", "--nets", "average"),
    "fixed": ("meta-test", "--schedule", "fixed"),
    "fixed 0.4": ("meta-test", "--schedule", "fixed", "--lr", "0.4"),
    "fixed 5": ("meta-test", "--schedule", "fixed", "--lr", "5"),
    "multistep": ("meta-test", "--schedule", "multistep"),
    "exponential": ("meta-test", "--schedule", "exponential"),
    "cosine": ("meta-test", "--schedule", "cosine"),
    "cosine 0.5": ("meta-test", "--schedule", "cosine", "--lr", "0.5"),
    "sgdr": ("meta-test", "--schedule", "sgdr"),
    "onecycle": ("meta-test", "--schedule", "onecycle"),
    "adam": ("meta-test", "--schedule", "fixed", *ADAM),
    "sgd+val": ("meta-test", "--schedule", "val"),
    "adam+val": ("meta-test", "--schedule", "val", *ADAM),
    "hd": ("meta-test", "--schedule", "hd"),
    "hd-adam": ("meta-test", "--schedule", "hd", *ADAM),
    "rtho": ("meta-test", "--schedule", "rtho"),
    "l4mom": ("meta-test", "--schedule", "l4mom"),
    "l4adam": ("meta-test", "--schedule", "l4adam"),
    "schedule-free": ("meta-test", "--schedule", "schedule-free"),
    "schedule-free-adamw": ("meta-test", "--schedule", "schedule-free", "--optimizer", "adamw"),
    "prodigy": ("meta-test", "--schedule", "prodigy", *ADAM),
    **{f"{point} {t_val}": ("meta-train", "--meta-point", point, "--t-val", str(t_val))
       for point in ("lookahead", "average") for t_val in (3, 10, 30, 100)},
    # Twice the γ that the loss gives: of ten classes, and of some hundred characters.
    **{f"average 10 gamma {gamma}": ("meta-train", "--meta-point", "average", "--t-val", "10", "--gamma", gamma)
       for gamma in ("1.34", "17")},
}
KNOWS_ITS_LENGTH = (
    "ours (train)", "ours (transfer)", "ours (transfer) gamma 0.067", "multistep", "cosine", "cosine 0.5", "onecycle",
)


@dataclass(frozen=True)
class Cell:
    """A method on one line of the table with one seed: a run, or the first epochs of one that longer lines share."""

    group: str
    method: str
    seed: int
    arguments: tuple[tuple[str, str], ...]  # of the run: flag and value, "" for a flag without one
    num_epochs: int  # that count here

    @property
    def is_whole(self) -> bool:
        """Whether all epochs of the run count here."""
        return self.num_epochs == int(dict(self.arguments)["num-epoch"])

    @property
    def command(self) -> list[str]:
        script, *own = METHODS[self.method]
        flags = [word for flag, value in self.arguments for word in ([f"--{flag}", value] if value else [f"--{flag}"])]
        return [str(ROOT / script / f"{script}.py"), *flags, *own, "--seed", str(self.seed)]

    @property
    def name(self) -> str:
        """The folder of the run."""
        key = hashlib.sha256(json.dumps([METHODS[self.method], self.arguments]).encode()).hexdigest()[:8]
        pair = [dict(self.arguments)[flag] for flag in ("network", "dataset")]
        method = self.method.replace("(", "").replace(")", "").split()
        return "_".join([*pair, *method, key, str(self.seed)])


class Race:
    """Runs cells side by side, each in its own folder; what is done stays done, what was stopped goes on."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.cells, self.folder, self.jobs = cells, folder, jobs
        self.threads = max(1, (os.cpu_count() or 1) // jobs)  # processes that fight for the cores are far slower
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped = False

    def run(self) -> None:
        """Run what is not done. ValueError with the script's own line where a cell cannot run."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._stop)
        runs = list({cell.name: cell for cell in self.cells if cell.is_whole}.values())  # each once
        bar = tqdm(total=sum(cell.num_epochs for cell in runs), unit="epoch", disable=None)
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self._run, cell) for cell in runs]
            while wait(waiting, timeout=10).not_done:  # it reads all runs, and the cores are wanted
                bar.update(sum(len(self.rows(cell)) for cell in runs) - bar.n)
        bar.close()
        for future in waiting:
            future.result()

    def _run(self, cell: Cell) -> None:
        out = self.folder / cell.name
        if self.stopped or (out / "status.json").exists():
            return
        command = [sys.executable, *cell.command]
        if (out / "args.json").exists():
            command = [*command[:2], "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        process = subprocess.Popen(
            [*command, "--out", str(out)], env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches the cells through _stop alone
        )
        self.processes.append(process)
        errors = (process.communicate()[1].strip().splitlines() or [""])[-1]
        if process.returncode == 0 or errors.startswith("diverged"):
            status = {"status": "diverged" if errors.startswith("diverged") else "done", "message": errors}
            write_atomically(out / "status.json", json.dumps(status).encode())
        elif not self.stopped:
            self._stop()
            raise ValueError(f"{cell.name}: {errors or f'exit status {process.returncode}'}")

    def _stop(self, number: int = 0, frame: Any = None) -> None:
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # it writes a checkpoint

    def rows(self, cell: Cell) -> list[dict[str, float]]:
        """metrics.csv so far, up to the last epoch that counts."""
        return self._all_rows(cell)[: cell.num_epochs]

    def _all_rows(self, cell: Cell) -> list[dict[str, float]]:
        lines = csv.DictReader(io.StringIO(read_text(self.folder / cell.name / "metrics.csv")))
        return [{name: float(value) for name, value in line.items()} for line in lines]

    def cost(self, cell: Cell) -> dict[str, float]:
        """cost.json, with the passes of the epochs that count."""
        cost = self.record(cell, "cost.json")
        share = cell.num_epochs / len(self._all_rows(cell))
        return {name: value * share if name.endswith("_passes") else value for name, value in cost.items()}

    def record(self, cell: Cell, name: str) -> dict[str, Any]:
        """A JSON file of a cell's folder."""
        return json.loads((self.folder / cell.name / name).read_text())

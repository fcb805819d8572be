"""Runs the cells of a table: side by side on this machine, or as jobs of a cluster. A done cell is not run again, and
a stopped one resumes.
"""

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from runs import rows_of
from tqdm import tqdm

from training.folder import FolderLock
from utils import first_line, read_text, write_atomically

# Runs are forked from a process that has imported what takes a script seconds to import.
WARM = ("torch", "torchvision", "torch.utils.tensorboard", "matplotlib.figure", "sklearn.model_selection")
PROCESSES: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
PROCESSES.set_forkserver_preload(list(WARM))


def run_script(command: list[str], threads: int, errors: str, folder: str, environment: dict[str, str]) -> None:
    """Be the script that the command names: in this folder, with stderr in a file and without other output."""
    if hasattr(os, "setsid"):
        os.setsid()  # a Ctrl-C reaches the run through CellRun.stop() only
    for descriptor, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


class CellRun:
    """Runs one cell to its end. Two never run at once: each run locks its folder, and a locked folder is waited for."""

    def __init__(self, name: str, command: list[str], folder: Path, threads: int):
        self.name, self.command, self.folder, self.threads = name, command, folder, threads
        self.process: Any = None
        self.stopped = False

    @property
    def is_done(self) -> bool:
        """Whether it ran to its end or diverged, and its files are its own and complete."""
        try:
            status = json.loads(read_text(self.folder / "status.json") or "{}")
            return status["cell"] == self.name and status["epochs"] == len(rows_of(self.folder))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    def __call__(self) -> str:
        """Run the cell, from where it was stopped; return "", or in one line why it cannot run."""
        while self._wait_for_others():
            if self._is_of_another():
                return f"{self.name}: {self.folder} holds another run; move it away, so that this one can be made"
            code, lines = self._start()
            for line in lines:
                if line.startswith("warning: "):
                    _tell(line)
            diverged = [line for line in lines if line.startswith("diverged")]
            if code == 0 or diverged:
                status = {"cell": self.name, "status": "diverged" if diverged else "done",
                          "message": "\n".join(diverged), "epochs": len(rows_of(self.folder))}
                write_atomically(self.folder / "status.json", json.dumps(status).encode())
            elif not self.stopped and not self._holder():  # a holder was faster, and is waited for
                reason = lines[-1] if lines else f"exit status {code}"
                if code < 0:
                    reason = f"ended by {signal.Signals(-code).name}; the same command resumes"
                return f"{self.name}: {reason} (command: {shlex.join(['python', *self.command])})"
        return ""

    def stop(self) -> None:
        """End the run at its next checkpoint."""
        self.stopped = True
        if self.process and self.process.is_alive():
            self.process.terminate()

    def checkpoint(self) -> Any:
        """Called by submitit in a job near its time limit: stop at a checkpoint, and return what the next job runs."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.process:  # the signal handler that calls this has interrupted process.join()
            multiprocessing.connection.wait([self.process.sentinel])
        return DelayedSubmission(CellRun(self.name, self.command, self.folder, self.threads))

    def _is_of_another(self) -> bool:
        """Whether the folder holds a run with other flags, as far as its args.json tells."""
        try:
            started = json.loads(read_text(self.folder / "args.json") or "{}").get("command")
            return started is not None and sorted(started[1 : len(self.command)]) != sorted(self.command[1:])
        except (ValueError, AttributeError, TypeError):
            return False  # damaged: the run says so

    def _wait_for_others(self) -> bool:
        """Wait while another process has the folder, such as a run that outlived its table; whether to run now."""
        said = ""
        while not self.stopped and not self.is_done:
            holder = self._holder()
            if not holder:
                return True
            if holder != said:
                tqdm.write(f"waiting: {holder}", file=sys.stderr)
                said = holder
            time.sleep(1)
        return False

    def _holder(self) -> str:
        """Who has the folder, in a sentence; "" where nobody does."""
        try:
            with FolderLock(self.folder):
                return ""
        except ValueError as error:
            return str(error).split("; wait for it")[0]

    def _start(self) -> tuple[int, list[str]]:
        """Run the script to its end; its exit status and what it wrote to stderr."""
        words = ["--resume"] if (self.folder / "args.json").exists() else self.command[1:]
        command = [self.command[0], *words, "--out", str(self.folder)]
        environment = {"OMP_NUM_THREADS": str(self.threads), **os.environ}  # which may set it, too
        threads = int(environment["OMP_NUM_THREADS"].split(",")[0])
        with tempfile.TemporaryDirectory() as place:
            errors = Path(place, "stderr")  # a pipe would break a run that outlives this process
            self.process = PROCESSES.Process(
                target=run_script, args=(command, threads, str(errors), os.getcwd(), environment)
            )
            self.process.start()
            if self.stopped:  # while it was being started
                self.process.terminate()
            try:
                self.process.join()
            finally:
                if self.process.is_alive():  # a job of a cluster was cancelled
                    self.process.terminate()
            return self.process.exitcode, read_text(errors).strip().splitlines()


@functools.cache
def _tell(line: str) -> None:
    """Show a line that runs have in common once."""
    tqdm.write(line, file=sys.stderr)


class Race:
    """The runs of a table's cells, each in a folder of its own."""

    def __init__(self, cells: list[Cell], folder: Path):
        self.cells, self.folder = cells, folder
        self.runs: list[CellRun] = []
        self.jobs: dict[Any, CellRun] = {}  # of a cluster
        self.stopped = False

    def run_here(self, jobs: int) -> None:
        """Run what is not done, so many at a time. ValueError with the script's own line where a cell cannot run."""
        threads = max(1, (os.cpu_count() or 1) // jobs)  # processes that compete for the cores are far slower
        self._prepare(threads)
        with ThreadPoolExecutor(jobs) as pool:
            self._follow({pool.submit(run): run for run in self.runs})

    def run_on(self, executor: Any, threads: int) -> None:
        """The same as jobs of submitit's executor, one for every run, with so many CPU threads each."""
        self._prepare(threads)
        for run in self.runs:
            if not self.stopped and not run.is_done:
                try:
                    self.jobs[executor.submit(run)] = run
                except RuntimeError as error:  # submitit's, with what Slurm says
                    self._stop()
                    raise ValueError(f"--slurm: {first_line(error)}") from None
        if self.stopped:  # while a job was being submitted
            self._stop()
        self._follow(self.jobs.copy())

    def _prepare(self, threads: int) -> None:
        """Describe each run once, and let signals stop them."""
        self.runs = [CellRun(cell.name, cell.command, self.folder / cell.name, threads) for cell in self.cells]
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._stop)

    def _follow(self, jobs: dict[Any, CellRun]) -> None:
        """Show the progress until all jobs have ended: a bar, or without a terminal a line for every run that ends.

        The first that cannot run stops the others.
        """
        bar = tqdm(total=sum(cell.num_epochs for cell in self.cells), unit="epoch", disable=None)
        failure, polls = "", 0
        while jobs:
            for job in [job for job in jobs if job.done()]:
                run = jobs.pop(job)
                if self.stopped:
                    continue
                failure = self._failure_of(job)
                if failure:
                    self._stop()
                elif bar.disable:
                    print(f"{len(self.runs) - len(jobs)} of {len(self.runs)} runs: {run.name}", file=sys.stderr)
            if polls % 50 == 0:  # reading all metrics takes time that the runs need
                bar.update(sum(_epochs_in(self.folder / cell.name) for cell in self.cells) - bar.n)
            polls += 1
            time.sleep(0.2)
        bar.close()
        if failure:
            raise ValueError(failure)

    def _failure_of(self, job: Any) -> str:
        """Why a job that ended could not run its cell, in one line; "" where it could."""
        try:
            return job.result()
        except OSError as error:  # a full disk, for example
            return str(error)
        except RuntimeError as error:  # submitit's, where the job itself failed
            return f"{str(error).splitlines()[0]}; see {job.paths.stderr}; the same command resumes"

    def _stop(self, number: int = 0, frame: Any = None) -> None:
        self.stopped = True
        for run in self.runs:
            run.stop()
        for job in self.jobs:
            job.cancel(check=False)


def _epochs_in(folder: Path) -> int:
    """How many a run has finished; 0 where its metrics are damaged, which collect() tells."""
    try:
        return len(rows_of(folder))
    except (ValueError, TypeError):
        return 0

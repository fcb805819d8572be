"""Runs the cells of a table: side by side on this machine, or as jobs of a cluster. A done cell is not run again, and
a stopped one resumes.
"""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from cells import Cell
from tqdm import tqdm

from utils import FolderLock, read_text, write_atomically


class CellRun:
    """Runs one cell to its end. Two never run at once: each run locks its folder, and a locked folder is waited for."""

    def __init__(self, name: str, command: list[str], folder: Path, threads: int):
        self.name, self.command, self.folder, self.threads = name, command, folder, threads
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __call__(self) -> str:
        """Run the cell, from where it was stopped; return "", or in one line why it cannot run."""
        while self._wait_for_others():
            code, lines = self._start()
            diverged = [line for line in lines if line.startswith("diverged")]
            if code == 0 or diverged:
                status = {"status": "diverged" if diverged else "done", "message": "\n".join(diverged)}
                write_atomically(self.folder / "status.json", json.dumps(status).encode())
            elif not self.stopped and not self._holder():  # a holder was faster, and is waited for
                reason = lines[-1] if lines else f"exit status {code}"
                return f"{self.name}: {reason} (command: {shlex.join(['python', *self.command])})"
        return ""

    def stop(self) -> None:
        """End the run at its next checkpoint."""
        self.stopped = True
        if self.process and self.process.poll() is None:
            self.process.terminate()

    def _wait_for_others(self) -> bool:
        """Wait while another process has the folder, such as a run that outlived its table; whether to run now."""
        said = ""
        while not self.stopped and not (self.folder / "status.json").exists():
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
        if not self.folder.exists():
            return ""
        try:
            with FolderLock(self.folder):
                return ""
        except ValueError as error:
            return str(error).split("; wait for it")[0]

    def _start(self) -> tuple[int, list[str]]:
        """Run the script to its end; its exit status and what it wrote to stderr."""
        command = [sys.executable, *self.command]
        if (self.folder / "args.json").exists():
            command = [*command[:2], "--resume"]
        with tempfile.TemporaryFile("w+") as errors:  # a pipe would break a run that outlives this process
            self.process = subprocess.Popen(
                [*command, "--out", str(self.folder)], stdout=subprocess.DEVNULL, stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # a Ctrl-C reaches the run through stop() alone
            )
            if self.stopped:  # while it was being started
                self.process.terminate()
            code = self.process.wait()
            errors.seek(0)
            return code, errors.read().strip().splitlines()


class Race:
    """The runs of a table's cells, each in a folder of its own, and what lies in those folders."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.cells, self.folder, self.jobs = cells, folder, jobs
        self.runs: list[CellRun] = []
        self.stopped = False

    def run(self) -> None:
        """Run what is not done. ValueError with the script's own line and command where a cell cannot run."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._stop)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)  # processes that compete for the cores are far slower
        whole = list({cell.name: cell for cell in self.cells if cell.is_whole}.values())  # each once
        self.runs = [CellRun(cell.name, cell.command, self.folder / cell.name, threads) for cell in whole]
        bar = tqdm(total=sum(cell.num_epochs for cell in whole), unit="epoch", disable=None)
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self._run, run) for run in self.runs]
            while wait(waiting, timeout=10).not_done:  # reading all runs takes time that they need
                bar.update(sum(len(self.rows(cell)) for cell in whole) - bar.n)
        bar.close()
        for future in waiting:
            if future.result():
                raise ValueError(future.result())

    def _run(self, run: CellRun) -> str:
        """Run one cell; one that cannot run stops the others."""
        reason = run()
        if reason:
            self._stop()
        return reason

    def _stop(self, number: int = 0, frame: Any = None) -> None:
        self.stopped = True
        for run in self.runs:
            run.stop()

    def rows(self, cell: Cell) -> list[dict[str, float]]:
        """metrics.csv so far, up to the last epoch that counts."""
        return self._all_rows(cell)[: cell.num_epochs]

    def _all_rows(self, cell: Cell) -> list[dict[str, float]]:
        rows = []
        for line in csv.DictReader(io.StringIO(read_text(self.folder / cell.name / "metrics.csv"))):
            rows.append({name: float(value) for name, value in line.items()})
        return rows

    def cost(self, cell: Cell) -> dict[str, float]:
        """cost.json, with the passes of the epochs that count."""
        cost = self.record(cell, "cost.json")
        share = cell.num_epochs / len(self._all_rows(cell))
        for name in cost:
            if name.endswith("_passes"):
                cost[name] *= share
        return cost

    def record(self, cell: Cell, name: str) -> dict[str, Any]:
        """A JSON file of a cell's folder."""
        return json.loads((self.folder / cell.name / name).read_text())

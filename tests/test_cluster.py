"""Runs of a table as jobs of a Slurm cluster; submitit's local executor stands in for one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from cluster import build_executor
from race import CellRun, Race
from test_tables import SCRIPT, wait_for


@pytest.mark.parametrize(("options", "message"), [
    ({"cluster": "moon"}, "cluster=moon: choose slurm, or local"),
    ({"cluster": "local", "partitoin": "x"}, "partitoin"),
    ({"cluster": "local", "cpus_per_task": "x"}, "cpus_per_task"),
])
def test_bad_slurm_options_are_one_line(tmp_path, options, message):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=message):
        build_executor(tmp_path, options)


def test_slurm_options_reach_the_batch_script(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name, text in (("srun", ""), ("sbatch", "echo Submitted batch job 7")):  # stand in for a cluster's commands
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    executor = build_executor(tmp_path / "jobs", {"partition": "short", "gpus_per_node": "1", "timeout_min": "30"})
    executor.submit(CellRun("name", ["script.py"], tmp_path / "run", threads=1))
    (script,) = (tmp_path / "jobs").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    for line in ("--partition=short", "--gpus-per-node=1", "--time=30", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in lines


def test_a_job_that_slurm_refuses_ends_the_table_with_its_words_and_cancels_the_others(tmp_path):
    job = Mock()
    submit = Mock(side_effect=[job, RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit\nmore")])

    race = Race([], tmp_path)
    race._prepare = lambda threads: None
    race.runs = [CellRun(name, ["script.py"], tmp_path / name, threads=1) for name in ("first", "second")]
    with pytest.raises(ValueError, match="--slurm: sbatch: error: QOSMaxSubmitJobPerUserLimit$"):
        race.run_on(Mock(submit=submit), threads=1)
    job.cancel.assert_called_once()


@pytest.mark.slow
def test_a_job_near_its_time_limit_stops_at_a_checkpoint_and_a_new_one_resumes(tmp_path):
    pytest.importorskip("submitit")
    arguments = ["--table", "cifar10-resnet", "--preset", "smoke", "--seeds", "1", "--only", "fixed"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--set", "num-epoch=8", "--out", str(tmp_path), "--slurm",
         "--slurm-option", "cluster=local"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    runs = tmp_path / "cifar10-resnet-smoke" / "runs"
    wait_for(lambda: list(runs.glob("*/metrics.csv")))
    (run,) = runs.iterdir()
    (log,) = (tmp_path / "cifar10-resnet-smoke" / "jobs").glob("*_log.out")
    controller = log.name.split("_")[0]
    job = int(Path(f"/proc/{controller}/task/{controller}/children").read_text())
    os.kill(job, signal.SIGUSR2)  # as Slurm does near the time limit
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    epochs = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, 9)]
    assert "Requeued" in log.read_text()

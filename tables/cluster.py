"""Jobs of a Slurm cluster for the cells of a table, through the package submitit."""

import os
from pathlib import Path
from typing import Any

from utils import ROOT

DEFAULTS = {"timeout_min": "240", "cluster": "slurm"}
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "name")  # submitit's for any cluster
MOST_TIMEOUTS = 100  # after so many time limits a job is given up


def build_executor(folder: Path, options: dict[str, str]) -> Any:
    """submitit's executor, with its pickles and logs in `folder`, which every node must see.

    Options are Slurm's, such as partition, or those in SHARED; "cluster": "local" runs the jobs on this machine.
    ValueError where submitit or Slurm is not available, or an option is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--slurm needs the package submitit: pip install submitit, or use --jobs") from None
    options = DEFAULTS | options
    cluster = options.pop("cluster")
    if cluster not in ("slurm", "local"):
        raise ValueError(f"--slurm-option cluster={cluster}: choose slurm, or local to run the jobs on this machine")
    parameters = {}
    for name, value in options.items():
        parameters[name if name in SHARED else f"slurm_{name}"] = _number(value)
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(**parameters)
    except Exception as error:  # submitit raises several kinds, each with a sentence for the user
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from None
    # The jobs inherit the environment and must find the modules that the pickled cells come from.
    paths = [str(ROOT / "tables"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return executor


def _number(text: str) -> int | str:
    """The whole number that an option's value is, where it is one and would be written so."""
    return int(text) if text.isdecimal() and str(int(text)) == text else text

"""Runs a script as it is under torchrun, and keeps what every rank would write: rank k's nets go to OUT/rank<k>.

    run_on_ranks.py [--apart | --rank1 WORDS] SCRIPT ARGUMENTS

--apart: every rank draws from a random stream of its own. --rank1: rank 1 gets these arguments, too.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

RANK = int(os.environ["RANK"])
apart = sys.argv[1] == "--apart"
if sys.argv[1] == "--rank1":
    sys.argv = sys.argv[3:] + (sys.argv[2].split() if RANK == 1 else [])
else:
    sys.argv = sys.argv[2:] if apart else sys.argv[1:]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils

write, seed = utils.write_atomically, torch.manual_seed


def write_own(path, content):
    """What rank 0 writes stays; the nets of another rank go to a folder of its own."""
    if RANK and path.name.startswith("mlr_snet"):
        folder = path.parent / f"rank{RANK}"
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(content)
    write(path, content)


utils.write_atomically = write_own
if apart:
    torch.manual_seed = lambda number: seed(number + RANK)
runpy.run_path(sys.argv[0], run_name="__main__")

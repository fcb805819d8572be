"""Two ranks: a network that FSDP2 shards learns, averages and measures as a whole one; and runs of each rank's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_scripts import ONE_THREAD

from mlr_snet import lr_scale

SCRIPT = Path(__file__).with_name("sharded_on_ranks.py")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each of two ranks ends with."""
    folder = tmp_path_factory.mktemp("sharded")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, folder]
    done = subprocess.run(list(map(str, launch)), capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    if "'Stream' object has no attribute 'record_event'" in done.stderr:
        pytest.skip(f"FSDP2 of torch {torch.__version__} does not run on the CPU")
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("meta_point", ["lookahead", "average"])
def test_learning_on_a_sharded_network_equals_learning_on_a_whole_one(ends, kind, meta_point):
    run = f"{kind} {meta_point}"
    for end in ends:
        torch.testing.assert_close(end[f"{run} True"], end[f"{run} False"], rtol=1e-10, atol=0)
    assert torch.equal(ends[0][f"{run} True"], ends[1][f"{run} True"])


def test_the_scale_of_a_sharded_network_is_that_of_a_whole_one(ends):
    for end in ends:
        torch.testing.assert_close(end["measured True"], end["measured False"], rtol=1e-10, atol=0)


def test_runs_of_a_rank_of_its_own_are_not_averaged(ends):
    own, together = zip(*(end["independent"].view(2, 4) for end in ends), strict=True)
    for number, gammas in enumerate(zip(own, together, strict=True)):
        by_loss, by_scale_loss, given, measured = (kind.tolist() for kind in torch.stack(gammas).unbind(1))
        assert by_loss == by_scale_loss == pytest.approx([lr_scale(2.0 + number, 10), lr_scale(2.5, 10)])
        assert given == [2.0 + number, 2.5]
        assert measured[0] != measured[1]
    assert torch.equal(*together) and own[0][3] > own[1][3]

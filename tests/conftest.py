"""Long tests are skipped unless asked for, and those of a GPU where there is none."""

import os

import pytest
import torch

import mlr_snet
from mlr_snet_optim import directions, rates

torch.set_num_threads(1)  # pytest runs a process per core


def pytest_configure(config):
    os.environ["MLR_SNET_CACHE"] = ""  # tests leave the user's cache alone


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def stay_on_device(monkeypatch):
    """A function that leaves rates and fractions in tensors from now on, as if these lay on an accelerator."""

    def patch():
        for module in (mlr_snet, directions, rates):
            monkeypatch.setattr(module, "on_host", torch.Tensor.detach)

    return patch


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of meta-train, with seed 5. Tests copy it."""
    from faults import TRAIN, fork
    from test_scripts import META_TRAIN

    folder = tmp_path_factory.mktemp("faults") / "finished"
    process = fork(META_TRAIN, [*TRAIN, "--seed", "5", "--out", folder])
    process.join(timeout=120)
    assert process.exitcode == 0
    return folder

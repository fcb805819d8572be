"""The wheel: what it holds, what it needs, and that it works among modules of the same names as the scripts'."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NETS = {"mlr_snet_1.pth", "mlr_snet_100.pth", "mlr_snet_200.pth", "mlr_snet_average.pth", "provenance.json"}

# Ten lines: learn a schedule, then train under the shipped ones, beside modules named as the scripts' own.
SCRIPT = """
import torch, utils, training, data, models, mlr_snet
assert utils.MINE and training.MINE and data.MINE and models.MINE
network, points = torch.nn.Linear(3, 1), torch.randn(8, 3)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
loss_on, run = lambda: network(points).square().mean(), {"num_steps": 6, "num_classes": 2}
learning = mlr_snet.MetaMLRSNetLR(optimizer, mlr_snet.MLRSNet(), network, loss_on, **run, t_val=2)
using = mlr_snet.MLRSNetLR(optimizer, mlr_snet.load_schedules() + mlr_snet.load_schedules("paper"), **run)
for schedule in [learning] * 6 + [using] * 6:
    optimizer.zero_grad(); loss_on().backward(); schedule.step(loss_on()); optimizer.step()
print(mlr_snet.__file__, learning.steps_taken, using.steps_taken)
"""


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of the sdist and of the wheel that is built from it."""
    for tool in ("build", "hatchling"):
        # a folder named build would do as a module, so look for a real one
        spec = importlib.util.find_spec(tool)
        if spec is None or spec.origin is None:
            pytest.skip(f"{tool} is not installed: pip install build hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def test_the_wheel_holds_the_modules_and_the_nets_and_nothing_else_at_the_top_level(dist):
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    modules = ("mlr_snet", "mlr_snet_scale", "mlr_snet_lightning", "mlr_snet_transformers")
    assert top == {*(f"{module}.py" for module in modules), "mlr_snet_nets", "mlr_snet_optim"}
    assert {name.partition("/")[2] for name in names if name.startswith("mlr_snet_nets/")} == NETS
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_wheel_is_made_of_and_no_scripts(dist):
    names = {name.partition("/")[2] for name in tarfile.open(next(dist.glob("*.tar.gz"))).getnames()}
    assert {f"meta-test/{name}" for name in NETS} == {name for name in names if name.startswith("meta-test/")}
    assert {name.partition("/")[0] for name in names if name} == {
        ".gitignore", "LICENSE", "PKG-INFO", "README.md", "integrations", "meta-test", "mlr_snet.py", "mlr_snet_optim",
        "mlr_snet_scale.py", "pyproject.toml",
    }


def test_both_pass_twine_check(dist):
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine is not installed: pip install twine")
    run("-m", "twine", "check", "--strict", *dist.iterdir())


def test_an_installed_wheel_trains_and_learns_beside_modules_of_the_scripts_names(dist, tmp_path):
    site, project = tmp_path / "site", tmp_path / "project"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, next(dist.glob("*.whl")))
    for folder in ("data", "models", "training"):
        (project / folder).mkdir(parents=True)
    for module in ("utils.py", "training/__init__.py", "data/__init__.py", "models/__init__.py"):
        (project / module).write_text("MINE = True\n")
    (project / "script.py").write_text(SCRIPT)
    out = run("script.py", cwd=project, env=os.environ | {"PYTHONPATH": str(site)})
    assert out.split() == [str(site / "mlr_snet.py"), "6", "6"]


def test_the_wheel_needs_torch_alone_in_the_version_of_requirements_txt():
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert [name.partition(">")[0] for name in PROJECT["dependencies"]] == ["torch"]
    assert PROJECT["dependencies"][0] in requirements

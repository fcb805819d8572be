"""mlr_snet.py on its own: a copy, among foreign modules of the same names, through torch.hub; and the README."""

import csv
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules, train

ROOT = Path(__file__).resolve().parents[1]
USE_AND_LEARN = """
import sys
import time
import torch
before = set(sys.modules)
start = time.process_time()
from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR
seconds = time.process_time() - start
foreign = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert foreign <= {"torch", "mlr_snet", "mlr_snet_optim"}, foreign
assert seconds < 0.1, seconds
torch.manual_seed(0)
network = torch.nn.Linear(3, 2)
points = torch.randn(20, 3)
labels = (points.sum(1) > 0).long()

def loss_on(part):
    return torch.nn.functional.cross_entropy(network(points[part]), labels[part])

optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
run = {"num_steps": 30, "num_classes": 2}
net = MLRSNet()
before = [parameter.clone() for parameter in net.parameters()]
learning = MetaMLRSNetLR(optimizer, net, network, lambda: loss_on(slice(10, 20)), **run, t_val=2)
for schedule in (learning, MLRSNetLR(optimizer, [net], **run)):
    first = loss_on(slice(10)).item()
    for step in range(30):
        loss = loss_on(slice(10))
        optimizer.zero_grad()
        loss.backward()
        schedule.step(loss)
        optimizer.step()
    assert loss < first
assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
"""
FOREIGN = """
import utils, data, models, training
assert utils.MINE and data.MINE and models.MINE and training.MINE
"""
HUB = f"""
import sys
import torch
schedule = torch.hub.load({str(ROOT)!r}, "mlr_snet_lr", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
                          6, num_classes=10, source="local")
schedule.step(2.3)
assert 0 < schedule.get_last_lr()[0] < schedule.gamma
net = torch.hub.load({str(ROOT)!r}, "mlr_snet", source="local")
assert sum(parameter.numel() for parameter in net.parameters()) == 11776
"""


def run_in(folder, code):
    (folder / "main.py").write_text(code)
    done = subprocess.run([sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path):
    """A folder of somebody's own project, whose modules have the names of this repository's."""
    (tmp_path / "utils.py").write_text("MINE = True\n")
    for name in ("data", "models", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    return tmp_path


def copy_to(folder):
    """What a project copies that does not install the wheel."""
    shutil.copy(ROOT / "mlr_snet.py", folder)
    shutil.copytree(ROOT / "mlr_snet_optim", folder / "mlr_snet_optim", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_copy_works_beside_foreign_modules_of_the_same_names(project):
    copy_to(project)
    run_in(project, FOREIGN + USE_AND_LEARN)


def test_torch_hub_works_in_a_project_with_foreign_modules_of_the_same_names(project):
    run_in(project, FOREIGN + HUB)


def test_a_lone_copy_says_that_the_shipped_nets_are_elsewhere(tmp_path):
    copy_to(tmp_path)
    run_in(tmp_path, """
import mlr_snet
try:
    mlr_snet.load_schedules()
except ValueError as error:
    assert "shipped nets are not beside" in str(error)
""")


class Batches:
    """The task of the README's loops: two training batches and three held-out ones of random images."""

    num_classes, perplexity, steps_per_epoch, clip = 10, False, 2, None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(20, 1, 2, 2, generator=generator), torch.arange(20) % 10) for _ in range(5)]
        self.loader, self.held_out = batches[:2], batches[2:]

    def train_batches(self, start):
        for pair in itertools.islice(itertools.cycle(self.loader), start, None):
            yield SimpleNamespace(pair=pair, size=20)

    def meta_batches(self, start):
        for pair in itertools.islice(itertools.cycle(self.held_out), start, None):
            yield SimpleNamespace(pair=pair)

    def micro_batches(self, batch):
        return [batch]

    def loss(self, network, batch, hidden):
        images, labels = batch.pair
        return functional.cross_entropy(network(images), labels), torch.tensor(0.0), hidden


def network_and_optimizer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    return network, torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=1e-3)


def blocks_of_the_readme():
    """The Python of the section on a loop of one's own: using and learning."""
    section = (ROOT / "README.md").read_text().split("## In your own loop")[1].split("In [Hugging Face")[0]
    return [part.split("```")[0] for part in section.split("```python\n")[1:]]


def test_the_numbers_and_the_lines_of_lightning_in_the_readme_are_those_of_the_pages():
    text, page = (ROOT / "README.md").read_text(), (ROOT / "tables/results/untuned-desk/README.md").read_text()
    table = text.split("|---|---|---|---|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    of_page = [line.strip("| ").split(" | ") for line in page.splitlines()]
    regrets = {row[0]: row[1:3] + row[4:6] + row[9:] for row in of_page}
    assert rows == [[row[0], *regrets[row[0]]] for row in rows]
    added = [line[1:] for line in (ROOT / "integrations/README.md").read_text().splitlines() if line.startswith("+")]
    assert set(text.split("twice your peak rate:\n```python\n")[1].split("\n```")[0].splitlines()) <= set(added)


def test_the_counts_below_the_picture_in_the_readme_are_those_of_the_regrets():
    below = (ROOT / "README.md").read_text().split("regret.png)\n")[1].split("\n\n")[0]
    with open(ROOT / "tables/results/untuned-desk/regret.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weights"] == "live"]
    counts = []
    for method in ("MLR-SNet (recommended)", "wsd (measured)"):
        regrets = [float(row["regret"]) for row in rows if row["method"] == method]
        counts.append([sum(regret <= 1 for regret in regrets), len(regrets), sum(regret < 0 for regret in regrets)])
    (close, total, ahead), (close_wsd, _, ahead_wsd) = counts
    assert [int(number) for number in re.findall(r"\d+", below)] == [close, total, ahead, close_wsd, ahead_wsd]


@pytest.mark.parametrize("kind", ["use", "learn"])
def test_the_loops_in_the_readme_are_bit_identical_to_that_of_the_scripts(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the last example saves a file
    using, learning = blocks_of_the_readme()
    code = using
    if kind == "learn":
        before, loop = using[: using.index("schedule =")], using[using.index("for epoch") :]
        code = before + learning.replace("...  #", loop + "#")
    task = Batches()
    network, optimizer = network_and_optimizer()
    names = {"torch": torch, "functional": functional, "network": network, "optimizer": optimizer,
             "loader": task.loader, "held_out": task.held_out}
    exec(code, names)
    mine = names["schedule"]

    other, optimizer = network_and_optimizer()
    arguments = schedule_arguments(task, 90) | {"gamma": mine.gamma, "cooldown": 0.2}
    if kind == "learn":
        net = MLRSNet()
        schedule = MetaMLRSNetLR(optimizer, net, other, MetaStream(task, other), **arguments, meta_point="average")
    else:
        schedule = MLRSNetLR(optimizer, load_schedules(), **arguments, warmup=0.05)
    steps = list(train(other, task, optimizer, schedule, 90))
    assert len(steps) == mine.steps_taken == 180
    assert mine.get_last_lr() == schedule.get_last_lr()
    for one, two in [(network, other), *zip(mine.nets, schedule.nets, strict=True)]:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    if kind == "learn":
        saved = torch.load("schedule.pth", weights_only=True)
        assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())

"""The problem, the slopes and the table of convergence.py."""

import pytest
import torch
from studies import convergence
from writing import read_csv, read_jsonl


def test_the_gradient_is_that_of_the_loss_and_the_smoothness_bounds_it():
    problem = convergence.Problem()
    w = torch.randn(3, convergence.DIMENSION, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(problem.loss(w).sum(), w)
    torch.testing.assert_close(problem.gradient(w.detach()), expected)
    hessian = torch.autograd.functional.hessian(lambda one: problem.loss(one[None]).sum(), w[0].detach())
    assert torch.linalg.eigvalsh(hessian).abs().max() <= problem.smoothness


def test_a_power_law_has_its_exponent_as_slope():
    assert convergence.slope([10, 20, 40, 80], [7 * n**-0.5 for n in (10, 20, 40, 80)]) == pytest.approx(-0.5)


def test_the_interval_of_a_slope_covers_it_and_shrinks_to_it_without_noise():
    runs = [torch.full((3, 10), float(length) ** -0.5) for length in (10, 20, 40)]
    assert convergence.slope_with_interval([10, 20, 40], runs) == pytest.approx((-0.5, -0.5, -0.5), abs=1e-5)


def test_the_smoke_preset_writes_a_page_and_a_picture_with_every_schedule(tmp_path, capsys):
    assert convergence.main(["--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "convergence-smoke"
    assert all(name in (folder / "README.md").read_text() for name in convergence.SCHEDULES)
    assert (folder / "table.png").stat().st_size > 5_000
    values = {(row["schedule"], row["steps"]) for row in read_csv(folder / "metrics.csv")}
    assert values == {(name, steps) for name in convergence.SCHEDULES for steps in ("50", "100", "200")}
    _, *slopes = read_jsonl(folder / "runs.jsonl")
    assert all(slope["low"] <= slope["slope"] <= slope["high"] for slope in slopes)

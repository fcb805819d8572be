"""The problem, the slopes and the table of convergence.py."""

import convergence
import pytest
import torch


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


def test_the_smoke_preset_writes_a_table_and_a_picture_for_every_schedule(tmp_path, capsys):
    assert convergence.main(["--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "convergence-smoke" / "table.md").read_text()
    assert all(name in table for name in convergence.schedules(2))
    assert (tmp_path / "convergence-smoke" / "table.png").stat().st_size > 10_000
    header, *rows = (tmp_path / "convergence-smoke" / "table.csv").read_text().splitlines()
    assert header == "schedule,50,100,200,slope,slope_low,slope_high" and len(rows) == len(convergence.schedules(2))

"""Lightning's LR finder, against the one in its Trainer."""

import sys

import pytest
import torch
from torch import nn

from baselines.lr_finder import finder_rates, lightning_lr_finder, suggestion


@pytest.mark.parametrize("high", [1.0, 1000.0])  # without and with a divergence
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightnings_suggestion_is_that_of_its_trainer(high, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="needs the package lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.lr, self.losses = nn.Linear(3, 1), 0.1, []

        def training_step(self, batch, index):
            loss = (self.layer(batch) - batch.sin().sum(1, keepdim=True)).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    torch.manual_seed(0)
    model, batches = Model(), torch.utils.data.DataLoader(torch.randn(400, 3), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )
    finder = lightning.tuner.Tuner(trainer).lr_find(model, batches, max_lr=high)
    rates = finder_rates(high)
    assert finder.results["lr"] == rates[: len(finder.results["lr"])]
    assert suggestion(rates, model.losses) == finder.suggestion()
    after_a_divergence = [0.0] * (len(rates) - len(model.losses))
    assert suggestion(rates, model.losses + after_a_divergence) == finder.suggestion()


def test_the_finder_trains_at_its_rates_and_leaves_the_network_as_it_was():
    pytest.importorskip("lightning.pytorch", reason="needs the package lightning")
    torch.manual_seed(0)
    network, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    before = [parameter.clone() for parameter in network.parameters()]

    def next_loss():
        return (network(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean()

    found = lightning_lr_finder(network, torch.optim.SGD(network.parameters(), lr=0.1), next_loss, 1000)
    (range_test,) = found.trials
    assert (range_test.rates, found.num_steps) == (finder_rates(), 100)
    assert range_test.losses[-1] < range_test.losses[0]
    assert found.scale == suggestion(finder_rates(), range_test.losses)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_too_few_losses_for_a_suggestion_are_refused():
    pytest.importorskip("lightning.pytorch", reason="needs the package lightning")
    with pytest.raises(ValueError, match="no suggestion: too few finite losses in 5 steps"):
        suggestion(finder_rates(), [1.0] * 5)


def test_lightning_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.tuner.lr_finder", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match="the package lightning is missing: pip install lightning"):
        lightning_lr_finder(None, None, None, 100)  # before it needs a network

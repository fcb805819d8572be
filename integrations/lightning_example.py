"""MLR-SNet in Lightning. Add "learn" to learn a schedule."""

import lightning.pytorch as lightning
import torch
from example_data import build_network, main
from mlr_snet_lightning import MLRSNetCallback
from torch.nn import functional


class Digits(lightning.LightningModule):
    def __init__(self, network, optimizer):
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return self.optimizer  # and no scheduler


def train(network, optimizer, make_schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    callback = MLRSNetCallback(make_schedule)
    trainer = lightning.Trainer(
        max_epochs=num_epochs, accumulate_grad_batches=accumulation, gradient_clip_val=clip, callbacks=[callback],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(network, optimizer), loader, ckpt_path=checkpoint if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)
    return callback.schedule


if __name__ == "__main__":
    network = build_network()
    main(train, network, torch.optim.SGD(network.parameters(), lr=0.1), num_classes=10)

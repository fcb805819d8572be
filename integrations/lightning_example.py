"""MLR-SNet in Lightning. Add "learn" to learn a schedule."""

import sys
from functools import partial

import lightning.pytorch as lightning
import torch
from example_data import accuracy, build_network, meta_loss_of, train_loader
from mlr_snet_lightning import MLRSNetCallback
from torch.nn import functional

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = build_network()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    module = Digits()
    make_schedule = partial(MLRSNetLR, nets=load_schedules(), num_classes=10)
    if "learn" in sys.argv:
        network = module.network
        make_schedule = partial(
            MetaMLRSNetLR, net=MLRSNet(), network=network, meta_loss=meta_loss_of(network), num_classes=10, t_val=10
        )
    callback = MLRSNetCallback(make_schedule)
    trainer = lightning.Trainer(
        max_epochs=4, accumulate_grad_batches=2, gradient_clip_val=0.5, callbacks=[callback], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, train_loader())
    print(f"rate {callback.schedule.get_last_lr()[0]:.4f}, test accuracy {accuracy(module.network):.1f} %")

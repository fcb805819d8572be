"""MLR-SNet in the train step of an ignite Engine. Add "learn" to learn a schedule."""

import sys
import tempfile
from pathlib import Path

import torch
from example_data import accuracy, build_network, meta_loss_of, train_loader
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules


def train(network, optimizer, schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    losses = []

    def train_step(engine, batch):
        images, labels = batch
        loss = functional.cross_entropy(network(images), labels) / accumulation
        loss.backward()
        losses.append(loss.detach())
        if engine.state.iteration % accumulation == 0:
            clip_grad_norm_(network.parameters(), clip)
            schedule.step(sum(losses))
            optimizer.step()
            optimizer.zero_grad()
            losses.clear()

    trainer = Engine(train_step)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    if checkpoint.exists():
        Checkpoint.load_objects(parts, checkpoint)
    saver = DiskSaver(checkpoint.parent, require_empty=False)
    trainer.add_event_handler(Events.COMPLETED, Checkpoint(parts, saver, filename_pattern=checkpoint.name))
    trainer.run(loader, num_epochs)


if __name__ == "__main__":
    network, loader = build_network(), train_loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    run = {"num_classes": 10, "num_epochs": 4, "steps_per_epoch": len(loader) // 2}
    if "learn" in sys.argv:
        schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, meta_loss_of(network), **run, t_val=10)
    else:
        schedule = MLRSNetLR(optimizer, load_schedules(), **run)
    with tempfile.TemporaryDirectory() as folder:
        train(network, optimizer, schedule, loader, 4, Path(folder) / "checkpoint.pt")
    print(f"rate {schedule.get_last_lr()[0]:.4f}, test accuracy {accuracy(network):.1f} %")

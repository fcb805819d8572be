"""MLR-SNet in a loop of Accelerate. Add "learn" to learn a schedule; accelerate launch runs it on several ranks."""

import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from example_data import accuracy, build_network, meta_loss_of, train_loader
from torch.nn import functional

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules


def train(network, optimizer, schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)  # not the schedule
    accelerator.register_for_checkpointing(schedule)
    if checkpoint.exists():
        accelerator.load_state(checkpoint)
    losses = []
    for _ in range(num_epochs):
        for images, labels in loader:
            with accelerator.accumulate(network):
                loss = functional.cross_entropy(network(images), labels)
                accelerator.backward(loss)  # divides by the accumulation
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(network.parameters(), clip)
                    if norm.isfinite():  # otherwise fp16 skips this step, and so must the schedule
                        schedule.step(sum(losses) / len(losses))  # it averages over the ranks itself
                    losses = []
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(checkpoint)


if __name__ == "__main__":
    network, loader = build_network(), train_loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    run = {"num_classes": 10, "num_epochs": 4, "steps_per_epoch": len(loader) // 2}
    if "learn" in sys.argv:
        schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, meta_loss_of(network), **run, t_val=10)
    else:
        schedule = MLRSNetLR(optimizer, load_schedules(), **run)
    with tempfile.TemporaryDirectory() as folder:
        train(network, optimizer, schedule, loader, 4, Path(folder) / "checkpoint")
    print(f"rate {schedule.get_last_lr()[0]:.4f}, test accuracy {accuracy(network):.1f} %")

"""MLR-SNet in a plain loop with gradient accumulation, fp16's GradScaler and clipping.

    python plain_example.py         use the shipped schedules
    python plain_example.py learn   learn a schedule
"""

import sys
import tempfile
from pathlib import Path

import torch
from example_data import accuracy, build_network, meta_loss_of, train_loader
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules


def train(network, optimizer, schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    scaler = torch.amp.GradScaler("cpu")
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    losses = []
    for _ in range(num_epochs):
        for images, labels in loader:
            loss = functional.cross_entropy(network(images), labels) / accumulation
            scaler.scale(loss).backward()
            losses.append(loss.detach())
            if len(losses) < accumulation:
                continue
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(network.parameters(), clip)
            if norm.isfinite():  # otherwise the scaler skips this step, and so must the schedule
                schedule.step(sum(losses))  # the mean over the micro-batches; over the ranks it averages itself
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses = []
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)


if __name__ == "__main__":
    network, loader = build_network(), train_loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    run = {"num_classes": 10, "num_epochs": 4, "steps_per_epoch": len(loader) // 2}
    if "learn" in sys.argv:
        schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, meta_loss_of(network), **run, t_val=10)
    else:
        schedule = MLRSNetLR(optimizer, load_schedules(), **run)
    with tempfile.TemporaryDirectory() as folder:
        train(network, optimizer, schedule, loader, 4, Path(folder) / "checkpoint.pth")
    print(f"rate {schedule.get_last_lr()[0]:.4f}, test accuracy {accuracy(network):.1f} %")

"""MLR-SNet with a network, an optimizer and the loss scaler of timm. Add "learn" to learn a schedule.

timm's scaler runs backward(), clipping and the optimizer's step in one call. So the schedule attaches to the optimizer.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from example_data import accuracy, meta_loss_of, train_loader
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch.nn import functional

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules


def train(network, optimizer, schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    scaler = NativeScaler(device="cpu")
    # timm's CheckpointSaver keeps no state of a scheduler
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    losses = []
    handle = schedule.attach(lambda: sum(losses))
    for _ in range(num_epochs):
        for images, labels in loader:
            loss = functional.cross_entropy(network(images), labels) / accumulation
            losses.append(loss.detach())
            is_last = len(losses) == accumulation
            scaler(loss, optimizer, clip_grad=clip, parameters=network.parameters(), need_update=is_last)
            if is_last:
                optimizer.zero_grad()
                losses.clear()
    handle.remove()
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)


if __name__ == "__main__":
    network, loader = timm.create_model("test_resnet", in_chans=1, num_classes=10), train_loader()
    optimizer = create_optimizer_v2(network, "sgd", lr=0.1, weight_decay=5e-4)
    # the shipped nets were learned without momentum: a tenth of γ
    run = {"num_classes": 10, "num_epochs": 4, "steps_per_epoch": len(loader) // 2, "gamma": 0.067}
    if "learn" in sys.argv:
        schedule = MetaMLRSNetLR(optimizer, MLRSNet(), network, meta_loss_of(network), **run, t_val=10)
    else:
        schedule = MLRSNetLR(optimizer, load_schedules(), **run)
    with tempfile.TemporaryDirectory() as folder:
        train(network, optimizer, schedule, loader, 4, Path(folder) / "checkpoint.pth")
    print(f"rate {schedule.get_last_lr()[0]:.4f}, test accuracy {accuracy(network):.1f} %")

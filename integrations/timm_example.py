"""MLR-SNet with a network, an optimizer and the loss scaler of timm. Add "learn" to learn a schedule.

timm's scaler runs backward(), clipping and the optimizer's step in one call. So the schedule attaches to the optimizer.
"""

import timm
import torch
from example_data import main
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch.nn import functional


def train(network, optimizer, make_schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    schedule = make_schedule(optimizer=optimizer, num_steps=num_epochs * len(loader) // accumulation)
    scaler = NativeScaler(device="cpu")
    # timm's CheckpointSaver keeps no state of a scheduler
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
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
    return schedule


if __name__ == "__main__":
    network = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = create_optimizer_v2(network, "sgd", lr=0.1, weight_decay=5e-4)  # momentum 0.9
    main(train, network, optimizer, gamma=0.1)  # twice the peak rate: 0.05 is usual with momentum

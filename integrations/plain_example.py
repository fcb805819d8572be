"""MLR-SNet in a plain loop with gradient accumulation, fp16's GradScaler and clipping.

    python plain_example.py         use the shipped schedule
    python plain_example.py learn   learn a schedule
"""

import torch
from example_data import build_network, main
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_


def train(network, optimizer, make_schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    schedule = make_schedule(optimizer=optimizer, num_steps=num_epochs * len(loader) // accumulation)
    scaler = torch.amp.GradScaler("cpu")
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
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
    return schedule


if __name__ == "__main__":
    network = build_network()
    main(train, network, torch.optim.SGD(network.parameters(), lr=0.1), num_classes=10)

"""MLR-SNet in a loop of Accelerate. Add "learn" to learn a schedule; accelerate launch runs it on several ranks."""

import math

import torch
from accelerate import Accelerator
from example_data import build_network, main
from torch.nn import functional


def train(network, optimizer, make_schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)  # not the schedule
    num_steps = num_epochs * math.ceil(len(loader) / accumulation)  # of the prepared loader, which the ranks share
    schedule = make_schedule(optimizer=optimizer, num_steps=num_steps)
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
    return schedule


if __name__ == "__main__":
    network = build_network()
    main(train, network, torch.optim.SGD(network.parameters(), lr=0.1), num_classes=10)

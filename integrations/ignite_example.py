"""MLR-SNet in the train step of an ignite Engine. Add "learn" to learn a schedule."""

import torch
from example_data import build_network, main
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_


def train(network, optimizer, make_schedule, loader, num_epochs, checkpoint, accumulation=2, clip=0.5):
    """Train, from the checkpoint on if there is one, and leave one at the end."""
    schedule = make_schedule(optimizer=optimizer, num_steps=num_epochs * len(loader) // accumulation)
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
    return schedule


if __name__ == "__main__":
    network = build_network()
    main(train, network, torch.optim.SGD(network.parameters(), lr=0.1), num_classes=10)

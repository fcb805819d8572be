"""The training steps that the benchmark compares: plain SGD, this project's meta step, and a textbook lookahead."""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from baselines import build_baseline
from data import build_task
from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, lr_scale, train
from models import build_network
from utils import autocast, build_optimizer

LR, WEIGHT_DECAY = 0.1, 5e-4  # of the network's SGD, which has no momentum
ENDLESS = 10**6  # epochs or steps: more than any measurement takes

Step = Callable[[], Any]  # takes one step of a variant
Loss = Callable[[Any], Tensor]  # of a network, or of what is called like one


@dataclass(frozen=True)
class Setting:
    """What every measurement works with."""

    args: argparse.Namespace
    device: torch.device
    task: Any


def build_images(args: argparse.Namespace, device: torch.device, precision: str = "fp32") -> Any:
    """The task: one batch of meta images, and whole batches to train on, so that all steps do the same work."""
    place = {"seed": args.seed, "image_size": args.image_size, "device": device}
    total = build_task(args.dataset, args.data_root, batch_size=1, **place).steps_per_epoch
    batches = total // args.batch_size
    if batches < 2:
        raise ValueError(f"--batch-size {args.batch_size}: {args.dataset} has fewer than two such batches; "
                         f"give at most {total // 2}")
    return build_task(
        args.dataset, args.data_root, batch_size=args.batch_size, num_meta=args.batch_size,
        limit_train=(batches - 1) * args.batch_size, autocast=autocast(device, precision), **place,
    )


def new_network(setting: Setting, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(setting.args.seed)
    args = setting.args
    network = build_network(args.network, setting.task.num_classes, image_size=args.image_size)
    return network.to(setting.device).to(memory_format=memory_format)


def plain_step(setting: Setting, network: nn.Module | None = None, task: Any = None) -> Step:
    """SGD at a fixed rate, in the project's loop."""
    network, task = network or new_network(setting), task or setting.task
    optimizer, schedule = build_baseline("fixed", "sgd", network, task, ENDLESS, LR, 0.0, WEIGHT_DECAY)
    return partial(next, train(network, task, optimizer, schedule, ENDLESS))


def learned_step(setting: Setting, t_val: int | None, at_average: bool = False) -> Step:
    """SGD at the rates of an MLR-SNet that learns every t_val-th step (None: never), in the project's loop.

    With at_average the schedule keeps a running average of the weights, and the meta gradient is taken there.
    """
    network, task = new_network(setting), setting.task
    optimizer = build_optimizer("sgd", network.parameters(), LR, 0.0, WEIGHT_DECAY)
    net = MLRSNet().to(setting.device)
    if t_val is None:
        schedule = MLRSNetLR(optimizer, net, **schedule_arguments(task, ENDLESS))
    else:
        schedule = MetaMLRSNetLR(
            optimizer, net, network, MetaStream(task, network), **schedule_arguments(task, ENDLESS), t_val=t_val,
            meta_point="average" if at_average else "lookahead",
        )
    return partial(next, train(network, task, optimizer, schedule, ENDLESS))


def loss_of(task: Any, batch: Any, network: Any) -> Tensor:
    return task.loss(network, batch, None)[0]


def textbook_gradient(
    network: nn.Module, net: MLRSNet, state: Tensor, scale: float, train_loss: Loss, meta_loss: Loss, decay: float,
    to_all: bool = False,
) -> None:
    """∂L_meta(ŵ)/∂θ into the .grad of net, by autograd through ŵ = w − γ·A(ℓ; θ)·(∂ℓ/∂w + decay·w).

    Leaves the network, its gradients and its buffers as they are. With to_all autograd goes back to the weights as
    well, as a plain backward() does: second-order passes whose results nobody reads.
    """
    weights = {name: parameter.detach().requires_grad_() for name, parameter in network.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def at(point: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda inputs: functional_call(network, {**point, **buffers}, (inputs,))

    loss = train_loss(at(weights))
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    fraction, _ = net(loss.detach(), state)
    lr = scale * fraction
    ahead = {
        name: weight - lr * (gradient + decay * weight)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    meta_loss(at(ahead)).backward(inputs=None if to_all else list(net.parameters()))


def textbook_step(setting: Setting, to_all: bool) -> Step:
    """A meta step by textbook_gradient, then the real step from passes of its own, as in the authors' meta_train.py."""
    network, task = new_network(setting), setting.task
    optimizer = build_optimizer("sgd", network.parameters(), LR, 0.0, WEIGHT_DECAY)
    net = MLRSNet().to(setting.device)
    scale = lr_scale(math.log(task.num_classes), task.num_classes)  # at the loss of a network that knows nothing
    schedule = MetaMLRSNetLR(
        optimizer, net, network, MetaStream(task, network), **schedule_arguments(task, ENDLESS), gamma=scale,
        t_val=ENDLESS,  # never learns by itself
    )

    def steps() -> Iterator[None]:
        for batch, meta_batch in zip(task.train_batches(0), task.meta_batches(0), strict=False):
            train_loss, meta_loss = partial(loss_of, task, batch), partial(loss_of, task, meta_batch)
            schedule.adam.zero_grad()
            textbook_gradient(network, net, schedule.state, scale, train_loss, meta_loss, WEIGHT_DECAY, to_all)
            schedule.adam.step()
            optimizer.zero_grad()
            loss = train_loss(network)
            loss.backward()
            schedule.step(loss.detach())
            optimizer.step()
            yield

    return partial(next, steps())


STEPS: dict[str, Callable[[Setting], Step]] = {
    "plain SGD": plain_step,
    "meta step": partial(learned_step, t_val=1),
    "textbook lookahead, plain backward()": partial(textbook_step, to_all=True),
    "textbook lookahead, back to θ alone": partial(textbook_step, to_all=False),
}

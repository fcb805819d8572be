"""What a run is built of, from its flags: the process, the task and the network."""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import TEXTS, build_task
from data.images import ImageTask
from data.text import TextTask
from models import build_network
from training.command_line import agree, end_with_launcher
from training.folder import restore_surroundings
from utils import (
    autocast,
    built_within_memory,
    choose_algorithms,
    first_line,
    init_distributed,
    pick_device,
    plain,
    world_size,
)

# What build_task takes from the flags of one modality
IMAGE_OPTIONS = ("seed", "num_meta", "image_size", "workers", "skip_bad_images", "corruption", "severity",
                 "label_noise", "noise_kind", "predict", "accumulate")
TEXT_OPTIONS = ("seq_len", "tokens", "clip")


def start(args: argparse.Namespace) -> torch.device:
    """Settle the process: its device, its ranks and its algorithms; those of the run that it resumes.

    ValueError for a device that is not available. Ends all ranks where their arguments differ.
    """
    device = pick_device(args.device)
    end_with_launcher()
    device = init_distributed(device)
    flags = {f"--{name.replace('_', '-')}": plain(value) for name, value in vars(args).items()}
    del flags["--data-root"]  # every machine may have its own
    agree(torch=torch.__version__, **flags)
    choose_algorithms(args.deterministic)
    if args.resume:
        restore_surroundings(args.out, device)
    return device


def task_of(args: argparse.Namespace, device: torch.device) -> ImageTask | TextTask:
    """The task. ValueError for data that are not available. Ends all ranks where their data differ."""
    names = TEXT_OPTIONS if args.dataset in TEXTS else IMAGE_OPTIONS
    task = build_task(
        args.dataset, args.data_root, batch_size=args.batch_size, limit_train=args.limit_train,
        limit_test=args.limit_test, device=device, autocast=autocast(device, args.precision),
        **{name: getattr(args, name) for name in names},
    )
    if world_size() > 1:
        agree(data=task.fingerprint())
    return task


def network_of(args: argparse.Namespace, task: ImageTask | TextTask, device: torch.device) -> nn.Module:
    """The network on its device. ValueError for sizes that do not fit.

    Every rank draws the network, and after it MLR-SNet, from the same random stream.
    """
    if isinstance(task, TextTask):
        sizes = {"embed_size": args.embed_size, "dropout": args.dropout, "seq_len": args.seq_len}
    else:
        sizes = {"image_size": task.image_size}
    torch.manual_seed(args.seed)
    network = built_within_memory(partial(build_network, args.network, task.num_outputs, **sizes), args.network)
    if isinstance(task, ImageTask):
        check_size(network, task.image_size)
    network = network.to(device).to(memory_format=torch.channels_last)
    if args.init and not (args.out / "checkpoint.pth").exists():
        load_weights(network, args.init)
    if args.compile:
        network.compile()
    return network


@torch.no_grad()
def check_size(network: nn.Module, image_size: int) -> None:
    """ValueError for images that are too small for the network, on the CPU. Leaves it in training mode."""
    try:
        network.eval()(torch.zeros(1, 3, image_size, image_size))
    except RuntimeError as error:
        raise ValueError(f"image_size {image_size}: does not fit the network ({first_line(error)})") from None
    network.train()


def load_weights(network: nn.Module, path: Path) -> None:
    """Start from the weights in a run's network.pth. ValueError for another file."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a foreign file fails in many ways; each ends in this one line
        raise ValueError(f"init {path}: no weights of this network ({type(error).__name__})") from error

"""torch.hub entry points: the net, and the scheduler around an optimizer."""

from collections.abc import Sequence
from pathlib import Path

from torch.optim import Optimizer

import mlr_snet as _mlr_snet

dependencies = ["torch"]


def mlr_snet(path: str | Path | None = None, hidden_size: int = 50, num_layers: int = 1) -> _mlr_snet.MLRSNet:
    """The net: learned weights from a .pth file (its sizes are the file's), or fresh ones without a path."""
    return _mlr_snet.load_schedule(path) if path else _mlr_snet.MLRSNet(hidden_size, num_layers)


def mlr_snet_lr(
    optimizer: Optimizer,
    num_steps: int,
    nets: str | Sequence[_mlr_snet.MLRSNet] = "recommended",
    **options: object,
) -> _mlr_snet.MLRSNetLR:
    """MLRSNetLR with its options; nets is the name of a shipped set, or a list of nets of mlr_snet()."""
    return _mlr_snet.MLRSNetLR(optimizer, nets, num_steps, **options)  # type: ignore

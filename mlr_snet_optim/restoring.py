"""Restores, bit for bit, what a trial step moves: weights, buffers, gradients and an optimizer's state."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def preserved(tensors: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Restores the tensors bit for bit on exit; yields their copies by tensor.

    Clears autocast's cache of cast weights, since the weights have moved: where a caller's whole step lies in one
    autocast region, the network would otherwise run with stale ones.
    """
    copies = {tensor: torch.empty_like(tensor, requires_grad=False) for tensor in tensors if not _is_expanded(tensor)}
    copy_all(copies.keys(), copies.values())
    try:
        yield copies
    finally:
        copy_all(copies.values(), copies.keys())
        torch.clear_autocast_cache()


@torch.no_grad()
def copy_all(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    """Each source into its target: one call per dtype and device, since an accelerator's host pays per call."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        ones, others = kinds.setdefault((source.dtype, source.device), ([], []))
        ones.append(own_part(source))
        others.append(own_part(target))
    for ones, others in kinds.values():
        torch._foreach_copy_(others, ones)


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sets every .grad to None inside the block, and restores it afterwards.

    Among ranks, RuntimeError where one is a view: of DDP's buckets, which a backward pass through DDP would overwrite.
    """
    gradients = {parameter: parameter.grad for parameter in parameters}
    has_views = any(gradient is not None and gradient._is_view() for gradient in gradients.values())
    if has_views and dist.is_available() and dist.is_initialized():
        raise RuntimeError("gradients are views of DDP's buckets: build DDP without gradient_as_bucket_view=True")
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def preserved_modules(network: nn.Module, moving: Iterable[Tensor]) -> Iterator[None]:
    """Restores which of the network's modules are in training mode, and which tensors their buffers are.

    RuntimeError where the block changes or replaces a parameter outside `moving`, as a forward pass that updates a
    momentum encoder does. TypeError for FSDP1, known by its name, since to import it takes long.
    """
    modules = [(module, module.training, dict(module._buffers)) for module in network.modules()]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module, _, _ in modules):
        raise TypeError("FullyShardedDataParallel is not supported here: shard by torch's fully_shard")
    copied = set(moving)

    def others() -> dict[str, Any]:
        return {name: (id(parameter), own_part(parameter).data_ptr(), parameter._version)
                for name, parameter in network.named_parameters() if parameter not in copied}

    before = others()
    try:
        yield
    finally:
        for module, is_training, buffers in modules:
            module.training = is_training
            for name, buffer in buffers.items():  # one by one: a ScriptModule's have no update()
                module._buffers[name] = buffer
    after = others()
    changed = [name for name, place in before.items() if after.get(name) != place]
    if changed:
        raise RuntimeError(
            f"the loss changes parameters without a gradient ({', '.join(changed[:5])}): change them in the training "
            "loop only, or make them buffers, which are restored"
        )


@contextmanager
def preserved_optimizer(optimizer: Optimizer) -> Iterator[dict[Tensor, Tensor]]:
    """Restores weights, gradients, optimizer state, options and random generators bit for bit; yields copies by tensor.

    Also restores the optimizer's attributes that are None, numbers, tensors or optimizers, such as the one that it
    wraps, and removes new ones.
    Inside, a fused optimizer does not divide its gradients by the scale of a GradScaler that is stepping it.
    """
    scaling: dict[str, Any] = {name: vars(optimizer).pop(name) for name in ("grad_scale", "found_inf")
                        if name in vars(optimizer)}
    optimizers = [optimizer]
    for one in optimizers:
        optimizers += [own for own in vars(one).values() if isinstance(own, Optimizer) and own not in optimizers]
    gradients = [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]
    # One that was frozen and keeps its gradient still moves.
    weights = [weight for weight in parameters_of(optimizer) if weight.requires_grad or weight.grad is not None]
    own = [set(vars(one)) for one in optimizers]
    attributes = [
        {name: value for name, value in vars(one).items() if value is None or isinstance(value, (int, float, Tensor))}
        for one in optimizers
    ]
    entries = [entry for one in optimizers for entry in (*one.state.values(), *one.param_groups)
               if isinstance(entry, dict)]
    tensors = [value for entry in (*entries, *attributes) for value in entry.values() if isinstance(value, Tensor)]
    before = [{name: value if _stays(value) else copy.deepcopy(value) for name, value in entry.items()}
              for entry in entries]
    states = [dict(one.state) for one in optimizers]
    devices = {weight.device for weight in weights if weight.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind), preserved([*weights, *gradients, *tensors]) as copies:
        try:
            yield copies
        finally:
            for one, names, state, numbers in zip(optimizers, own, states, attributes, strict=True):
                for name in vars(one).keys() - names:
                    delattr(one, name)
                one.state.clear()
                one.state.update(state)
                vars(one).update(numbers)
            for entry, values in zip(entries, before, strict=True):
                for name in entry.keys() - values.keys():
                    del entry[name]
                entry.update(values)
            vars(optimizer).update(scaling)


def _stays(value: Any) -> bool:
    """Whether the object itself is kept, as a tensor is, whose numbers are restored, and a group's parameters."""
    if isinstance(value, list):
        return any(isinstance(item, nn.Parameter) for item in value)
    return not isinstance(value, (dict, set, tuple))


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share their memory, so that torch refuses to write the tensor."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return any(size > 1 and not stride for size, stride in zip(tensor.shape, strides, strict=False))


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, as FSDP2 makes


def own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A 0-d result over all shards."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]

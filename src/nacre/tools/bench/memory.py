"""What a step needs: the most memory that it holds at once, and what autograd keeps of a forward for the backward."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def peak_bytes(step: Callable[[], object]) -> int | None:
    """How far a step raises the memory of this process at most; None where the system does not tell.

    Memory that the process has freed before and kept is not seen: a step that is not the first of its size in its
    process needs less new memory than it uses.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # has Linux forget the peak so far
        before = _status("VmRSS")
    except OSError:
        return None
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        label, _, value = line.partition(":")
        if label == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """What a forward keeps for the backward: each storage once, and no parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in storages.values())

"""Lets a recorder see the calls of modules, for the length of one run."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from nacre.tools.cost.layers import SPECS
from nacre.tools.cost.recorder import Recorder
from nacre.tools.cost.stage import is_real, known

_LOOPS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Lets the recorder see the calls of modules in this thread, for the run of the block."""
    thread = threading.get_ident()
    patched: list[tuple[type, str, Any]] = []

    def patch(owner: Any, name: str, function: Any) -> None:
        patched.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, function)

    original_call = nn.Module.__dict__["__call__"]

    def call(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if recorder.in_layer or threading.get_ident() != thread:
            return original_call(module, *arguments, **keywords)
        frame = recorder.enter(module, arguments, keywords)
        result = None
        try:
            result = original_call(module, *arguments, **keywords)
        finally:
            recorder.leave(frame, result)
        return result

    def watched(original: Any) -> Any:
        def forward(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            if recorder.in_layer or threading.get_ident() != thread:
                return original(module, *arguments, **keywords)
            if recorder.calls_now(module):
                return recorder.billed(module, arguments, keywords, original)
            frame = recorder.enter(module, arguments, keywords)  # somebody calls forward itself
            result = None
            try:
                result = recorder.billed(module, arguments, keywords, original)
            finally:
                recorder.leave(frame, result)
            return result

        return forward

    def reads_sizes(original: Any) -> Any:
        """Torch's loop over the steps of packed sequences, whose numbers of sequences it reads out of memory."""

        def forward(*arguments: Any) -> Any:
            return original(*(known(one) if isinstance(one, torch.Tensor) else one for one in arguments))

        return forward

    def with_lengths(*arguments: Any, **keywords: Any) -> Any:
        """Torch calls another operator, which keeps the lengths too, where it finds them in tensors and is watched."""
        log_probs, targets, *lengths = arguments[:4]
        return ctc_loss(log_probs, targets, *map(_numbers, lengths), *arguments[4:], **keywords)

    ctc_loss = torch.ctc_loss
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole encoder layer would hide its work
        patch(nn.Module, "__call__", call)
        for kind in SPECS:
            if "forward" in kind.__dict__:
                patch(kind, "forward", watched(kind.__dict__["forward"]))
        patch(torch, "ctc_loss", with_lengths)
        for name in _LOOPS:
            setattr(torch._VF, name, reads_sizes(getattr(torch._VF, name)))
        yield
    finally:
        for name in _LOOPS:
            vars(torch._VF).pop(name, None)
        for owner, name, original in reversed(patched):
            setattr(owner, name, original)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _numbers(lengths: Any) -> Any:
    """A tensor's numbers, where it has values."""
    if not isinstance(lengths, torch.Tensor):
        return lengths
    values = known(lengths)
    if not is_real([values]):
        return lengths
    with _disable_current_modes():
        return values.tolist()

"""Lets a recorder see the calls of modules, for the length of one run."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nacre.tools.cost.layers import SPECS
from nacre.tools.cost.recorder import Recorder


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Lets the recorder see the calls of modules in this thread, for the run of the block."""
    thread = threading.get_ident()
    patched: list[tuple[type, str, Any]] = []

    def patch(owner: type, name: str, function: Any) -> None:
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

    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole encoder layer would hide its work
        patch(nn.Module, "__call__", call)
        for kind in SPECS:
            if "forward" in kind.__dict__:
                patch(kind, "forward", watched(kind.__dict__["forward"]))
        yield
    finally:
        for owner, name, original in reversed(patched):
            setattr(owner, name, original)
        torch.backends.mha.set_fastpath_enabled(fast_path)

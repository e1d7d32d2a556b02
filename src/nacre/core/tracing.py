"""What torch's two compilers of source and of graphs see of a layer: a layer of torch.nn."""

from typing import Any

import torch
import torch.fx

# Of any type, since a type checker holds that no input declared as a Tensor could be one. Layers ask first whether it
# is just a Tensor: isinstance looks the class of one up, which takes long beside a small layer.
Proxy: Any = torch.fx.Proxy


def traced(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands for the output of ``module`` in the graph of torch.fx's tracer.

    The tracer takes a module for a whole by the name of its package, and only torch.nn's at that; the inside of
    another one it records with the values of today: a dropout that once trained would go on dropping after ``eval()``.

    Args:
        module: a layer of nacre. Of somebody's subclass of one, and of a layer that is traced by itself, the operations
            of torch.nn's layer are recorded, as torch.fx records those of torch.nn.
        args: what its forward takes; the first is the tracer's placeholder.
        kwargs: the same by name.
    """
    tracer = args[0].tracer
    if module is tracer.root or not type(module).__module__.startswith("nacre."):
        return _torchs_class(module).forward(module, *args, **kwargs)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def as_torchs_layer(module: torch.nn.Module) -> torch.nn.Module:
    """Makes a layer torch.nn's, in place, for ``torch.jit.script``, which compiles the source of those alone.

    It is a layer's ``__prepare_scriptable__``, and does what ``nacre.convert(module, to="torch")`` does: whatever the
    compiler were given in the layer's place, it would leave in the model. Somebody's subclass stays as it is.
    """
    if type(module).__module__.startswith("nacre."):
        module.__class__ = _torchs_class(module)
    return module


def _torchs_class(module: torch.nn.Module) -> Any:
    kinds = type(module).__mro__
    own = next(place for place, kind in enumerate(kinds) if kind.__module__.startswith("nacre."))
    return next(kind for kind in kinds[own:] if kind.__module__.startswith("torch.nn."))

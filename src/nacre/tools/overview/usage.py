"""Where layers are used: in which blocks and applications, found by building them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nacre.applications import APPLICATIONS, ApplicationSpec
from nacre.applications.data import TextData
from nacre.blocks import BLOCKS
from nacre.core.spec import LayerSpec
from nacre.layers import LAYERS


@dataclass(frozen=True)
class Usage:
    """The blocks and the applications that use a layer, by name."""

    blocks: tuple[str, ...]
    applications: tuple[str, ...]


def usage() -> dict[str, Usage]:
    """Where each layer and block is used.

    Example:
        >>> usage()["conv2d"]
        Usage(blocks=(), applications=('cnn', 'vit'))
    """
    blocks = {name: _parts(spec) for name, spec in BLOCKS.items()}
    applications = {name: _modules(spec) for name, spec in APPLICATIONS.items()}
    return {
        name: Usage(
            tuple(block for block, parts in blocks.items() if name in parts),
            tuple(application for application, modules in applications.items() if name in modules),
        )
        for name in (*LAYERS, *BLOCKS)
    }


def _parts(spec: LayerSpec) -> set[str]:
    """The layers and blocks among a block's modules and in its bill, with any arguments of its small cases."""
    found: set[str] = set()
    for case in {str(case.arguments): case for case in spec.cases if not case.bench}.values():
        inputs, keywords = case.make()
        block = spec.layer(**case.arguments).train(case.training)
        found |= _among(block) | set(_names(spec.sizes(block, *inputs, **keywords).get("parts", ())))
    return found - {spec.name}


def _names(parts: tuple[tuple[str, dict[str, Any]], ...]) -> Iterator[str]:
    """The names of parts, and of the parts that they are made of."""
    for name, sizes in parts:
        yield name
        yield from _names(sizes.get("parts", ()))


def _modules(spec: ApplicationSpec) -> set[str]:
    """The layers and blocks among an application's modules, of its usual sizes."""
    data = (65,) if spec.reads is TextData else ((28, 28), 10)
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        model = spec.model(*data, **spec.sizes())
    return _among(model)


def _among(model: torch.nn.Module) -> set[str]:
    names = {one.layer: one.name for one in (*LAYERS.values(), *BLOCKS.values())}
    return {names[type(module)] for module in model.modules() if type(module) in names}

"""What a block costs: the sum of its parts."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nacre.blocks.fused import FUNCTIONS, activation_name, runs_unseen
from nacre.core.cost import Cost
from nacre.layers import LAYERS
from nacre.layers.dropout import Dropout
from nacre.layers.dropout.cost import residual_cost as residual_dropout_cost
from nacre.layers.layer_norm import LayerNorm
from nacre.layers.layer_norm.cost import residual_cost as residual_dropout_layer_norm_cost
from nacre.layers.linear import Linear
from nacre.layers.linear.feed_forward import ACTIVATIONS

Part = tuple[str, dict[str, Any]]
Layer = tuple[str, dict[str, Any], bool]  # also whether it may run in one pass with its neighbours

_COSTS: dict[str, Callable[..., Cost]] = {
    **{name: spec.cost for name, spec in LAYERS.items()},
    "feed_forward": lambda **own: feed_forward_cost(**own),
    "residual_dropout": residual_dropout_cost,
    "residual_dropout_layer_norm": residual_dropout_layer_norm_cost,
}
_NAMES = {kind: spec.name for spec in LAYERS.values() for kind in (spec.layer, spec.replaces) if kind is not None}

# those sizes of a LayerNorm which it has in one pass with an addition as well
LAYER_NORM_SIZES = ("rows", "features", "weight", "bias", "weight_gradient", "bias_gradient")

# activations which keep their output, the tensor that the following linear layer keeps as its input
_KEEP_OUTPUT = ("relu", "tanh", "sigmoid")


def parts_of(block: torch.nn.Module, *inputs: Any, **keywords: Any) -> tuple[Part, ...]:
    """Name and sizes of every layer that a call of the block runs, in order, found without computing anything.

    A residual addition that runs in one pass with the layers beside it is one part with them: ``residual_dropout`` or
    ``residual_dropout_layer_norm``.
    """
    found: list[tuple[str, dict[str, Any], torch.nn.Module]] = []

    def note(layer: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        name = _NAMES[type(layer)]
        found.append((name, LAYERS[name].sizes(layer, *given, **named), layer))

    joining = {
        part
        for part in block.modules()
        if activation_name(part) or any(runs_unseen(part, kind) for kind in (Dropout, LayerNorm, Linear))
    }
    hooks = [
        layer.register_forward_pre_hook(note, with_kwargs=True) for layer in block.modules() if type(layer) in _NAMES
    ]
    try:
        arguments, named = tree_map_only(Tensor, _shape_of, (inputs, keywords))
        parameters = {name: _shape_of(parameter) for name, parameter in block.named_parameters()}
        with torch.enable_grad():
            torch.func.functional_call(block, parameters, arguments, named)
    finally:
        for hook in hooks:
            hook.remove()
    layers = _with_function([(name, own, layer in joining) for name, own, layer in found], block)
    if inputs[0].device.type == "cpu":
        layers = _fed_forward(layers)
    return _joined(layers, block, inputs[0].requires_grad)


def _with_function(found: list[Layer], block: torch.nn.Module) -> list[Layer]:
    """The layers, and where the block's activation is a function and no module, that one after the first linear map."""
    function = getattr(block, "activation", None)
    if isinstance(function, torch.nn.Module) or function not in FUNCTIONS:
        return found
    place = 1 + next(index for index, (name, _, _) in enumerate(found) if name == "linear")
    first = found[place - 1][1]
    activation = {
        "elements": first["rows"] * first["out_features"],
        "itemsize": first["itemsize"],
        "input_gradient": max(first[f"{kind}_gradient"] for kind in ("input", "weight", "bias")),
    }
    return [*found[:place], (FUNCTIONS[function][0], activation, True), *found[place:]]


def _fed_forward(found: list[Layer]) -> list[Layer]:
    """The layers, with two linear maps and what stands between them put together where they run as one."""
    together: list[Layer] = []
    while found:
        names = [name for name, _, _ in found[:4]]
        inner = 2 + (names[2:3] == ["dropout"])
        run = found[: inner + 1]
        known = names[0] == "linear" and names[inner : inner + 1] == ["linear"] and names[1] in ACTIVATIONS
        if len(run) > inner and known and all(joins for _, _, joins in run) and run[0][1]["itemsize"] >= 4:
            together.append(("feed_forward", {"parts": tuple((name, own) for name, own, _ in run)}, False))
            found = found[inner + 1 :]
        else:
            together.append(found[0])
            found = found[1:]
    return together


def feed_forward_cost(parts: tuple[Part, ...]) -> Cost:
    """The sum of the layers, but for what they would hand on through memory.

    The hidden features are written, kept and read once more. What follows from them until the second map is made anew
    in the backward, in the caches, with the random words that its gradient needs as well. The input is kept beside the
    hidden features, though the first map may need no gradient.
    """
    first, activation, *dropped, second = (LAYERS[name].cost(**own) for name, own in parts)
    (_, one), (_, inner), *_, (_, two) = parts
    values, inputs = inner["elements"] * one["itemsize"], one["rows"] * one["in_features"] * one["itemsize"]
    recorded = max(one[f"{kind}_gradient"] for kind in ("input", "weight", "bias"))
    drops = int(len(parts) == 4 and parts[2][1]["active"])
    saved = max(recorded, two["weight_gradient"], two["bias_gradient"])
    again = activation.elementwise_flops + 2 * inner["elements"] * drops
    return sum((*dropped, activation, second), first) + Cost(
        backward_elementwise_flops=again * two["weight_gradient"],
        bytes=-sum((part.bytes for part in dropped), activation.bytes) - values,
        backward_bytes=-sum((part.backward_bytes for part in dropped), activation.backward_bytes)
        + (1 - recorded - two["input_gradient"] - two["weight_gradient"]) * values
        + 8 * drops,
        saved_bytes=-sum((part.saved_bytes for part in (*dropped, activation, second)), 0)
        + (values + 8 * drops) * saved
        + inputs * (saved - recorded),
    )


def _joined(found: list[Layer], block: torch.nn.Module, gradient: bool) -> tuple[Part, ...]:
    """The parts, with dropout and normalisation that run in one pass with the addition between them put together.

    Args:
        found: name and sizes of every layer, and whether it may run in one pass with its neighbours.
        block: what the layers are parts of.
        gradient: whether the stream that the first branch is added to has a gradient.
    """
    trained = any(parameter.requires_grad for parameter in block.parameters())
    parts: list[Part] = []
    layers = iter(pairwise([*found, ("", {}, False)]))
    for (name, own, joins), (following, others, also) in layers:
        if name == "dropout" and joins and (following == "" or following == "layer_norm"):
            shared = {
                "drops": own["active"],
                "residual_gradient": gradient,
                "branch_gradient": own["input_gradient"],
                "itemsize": own["itemsize"],
            }
            gradient = gradient or trained
            if following == "layer_norm" and also:
                norm = {size: others[size] for size in LAYER_NORM_SIZES}
                sum_gradient = getattr(block, "norm_first", True) and gradient
                parts.append(("residual_dropout_layer_norm", {**norm, **shared, "sum_gradient": sum_gradient}))
                next(layers, None)
            else:
                parts.append(("residual_dropout", {"elements": own["elements"], **shared}))
        else:
            parts.append((name, own))
    return tuple(parts)


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


def sizes(block: torch.nn.Module, input: Tensor, *others: Any, **keywords: Any) -> dict[str, Any]:
    """The sizes of every part, and those of the additions around them, from a call of the block."""
    return {
        "parts": parts_of(block, input, *others, **keywords),
        "elements": input.numel(),
        "itemsize": input.element_size(),
        "input_gradient": input.requires_grad,
        "parameter_gradient": any(parameter.requires_grad for parameter in block.parameters()),
    }


# sizes of parts which count features, and those which every part of a block shares
_WIDTHS = ("features", "in_features", "out_features", "embed_dim", "kdim", "vdim")
_SHARED = {"batch": "B", "queries": "T", "keys": "T", "num_heads": "H"}


def letters_of(sizes: Mapping[str, Any], rows: str, width: Callable[[int], str]) -> dict[str, Any]:
    """The letters of a block's sizes.

    Args:
        sizes: the sizes of a call.
        rows: letters for the number of rows of features, ``"B T"`` for tokens.
        width: letters for a number of features.
    """
    count = max(_rows_of(sizes["parts"]), 1)

    def name(size: str, value: Any) -> str | None:
        if size == "rows":
            return rows
        if size == "elements":
            return f"{rows} {width(value // count)}"
        if size in _WIDTHS:
            return width(value)
        return "M" if size == "mask_bytes" and value else _SHARED.get(size)

    def letters(own: Mapping[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {size: name(size, value) for size, value in own.items() if size != "parts"}
        if "parts" in own:
            named["parts"] = tuple(letters(inner) for _, inner in own["parts"])
        return {size: given for size, given in named.items() if given is not None}

    return {"parts": letters(sizes)["parts"], "elements": name("elements", sizes["elements"])}


def _rows_of(parts: tuple[Part, ...]) -> int:
    """How many rows of features the first part that counts them has."""
    for _, own in parts:
        if rows := own.get("rows") or _rows_of(own.get("parts", ())):
            return rows
    return 0


def sum_of_parts(
    additions: int,
    parts: tuple[Part, ...],
    elements: int,
    itemsize: int,
    input_gradient: bool,
    parameter_gradient: bool,
) -> Cost:
    """The sum of the parts and of ``additions`` residual additions, but for those that run inside a part.

    An addition reads two tensors and writes one. Where its two terms both lead back to the block's input their
    gradients are added, one more operation an element; a part that reads the sum's own gradient adds it itself. A
    tensor that two parts keep counts once.
    """
    inside = sum(name.startswith("residual_") for name, _ in parts)
    added_inside = sum(own.get("sum_gradient", False) for _, own in parts)
    joined = input_gradient + (additions - 1) * max(input_gradient, parameter_gradient) - added_inside
    working = [part for part in parts if part[1].get("active", True)]
    total = Cost(
        elementwise_flops=(additions - inside) * elements,
        backward_elementwise_flops=joined * elements,
        bytes=(additions - inside) * 3 * itemsize * elements,
        backward_bytes=joined * 3 * itemsize * elements,
        saved_bytes=-sum(_kept_twice(*pair) for pair in pairwise(working)),
    )
    for name, own in parts:
        total = total + _COSTS[name](**own)
    return total


def _kept_twice(part: Part, following: Part) -> int:
    name, own = part
    if name in _KEEP_OUTPUT and following[0] == "linear":
        return LAYERS[name].cost(**own).saved_bytes
    return 0

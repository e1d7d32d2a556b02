"""What LSTM and GRU share: the forms of input and states that torch.nn takes, and the levels and directions."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nacre.core import check
from nacre.core.choice import FLOATS, torch_instead, unserved
from nacre.core.dispatch import recordable
from nacre.core.op import Op, call
from nacre.core.random import new_seed


def forward(
    layer: torch.nn.RNNBase, op: Op, torchs: Callable[..., Any], input: Tensor | PackedSequence, hx: Any
) -> tuple[Any, Any]:
    """The output in the form of the input, and the final states in the form of the initial ones.

    Args:
        layer: the layer.
        op: that of one level in one direction.
        torchs: the forward of the torch.nn class, for calls that are left to it.
        input: the layer's input.
        hx: the layer's initial states.
    """
    _update_weights(layer)
    if hx is None and not torch.compiler.is_compiling() and _is_plain(input, layer):
        return _forward_plain(layer, op, input)
    data = input.data if isinstance(input, PackedSequence) else input
    if reason := unserved(data, *layer._flat_weights):
        return torch_instead(op.name, reason, torchs, input, hx)
    hx = _as_taken(layer, hx)
    if isinstance(input, PackedSequence):
        return _forward_packed(layer, op, input, hx)
    if input.dim() not in (2, 3):
        raise check.error(
            ValueError,
            f"{layer.mode} takes an input of 2 dimensions (time, features) or 3 with a batch",
            f"an input of shape {check.shape(input)}",
        )
    batched = input.dim() == 3
    batch_dim = 0 if layer.batch_first else 1
    if hx is not None:
        _check_dimensions(layer, _states(hx), batched)
    if not batched:
        input = input.unsqueeze(batch_dim)
        hx = None if hx is None else _in_form(layer, [state.unsqueeze(1) for state in _states(hx)])
    if hx is None:
        hx = _zero_states(layer, input, input.shape[batch_dim])
    layer.check_forward_args(input, hx, None)
    steps = recordable(input).transpose(0, 1) if layer.batch_first else input
    if steps.shape[0] == 0:
        raise check.error(
            RuntimeError, f"{layer.mode} takes sequences of one step or more", f"an input of shape {check.shape(input)}"
        )
    output, states = _run(layer, op, steps, None, _states(layer.permute_hidden(hx, None)))
    output = output.transpose(0, 1) if layer.batch_first else output
    if not batched:
        output, states = output.squeeze(batch_dim), [state.squeeze(1) for state in states]
    return output, layer.permute_hidden(_in_form(layer, states), None)


def _forward_plain(layer: torch.nn.RNNBase, op: Op, input: Tensor) -> tuple[Any, Any]:
    steps = recordable(input).transpose(0, 1) if layer.batch_first else input
    places = layer.num_layers * (2 if layer.bidirectional else 1)
    zeros = [input.new_zeros(steps.shape[1], width) for width in _state_widths(layer)]
    output, states = _run_levels(layer, op, steps, None, [zeros] * places)
    return output.transpose(0, 1) if layer.batch_first else output, _in_form(layer, states)


def _forward_packed(layer: torch.nn.RNNBase, op: Op, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if hx is None:
        hx = _zero_states(layer, data, batch_sizes[0].item())
    else:
        # the caller's states are in the order of the sequences as they were before packing sorted them
        hx = layer.permute_hidden(hx, sorted_indices)
    if layer.mode == "LSTM":
        # the dtypes are one, or RuntimeError; check_input has ValueError for it, as torch.nn.GRU does
        check.same_dtype("lstm", weight_ih_l0=layer._flat_weights[0], input=data)
    if torch.compiler.is_compiling():
        layer.check_input(data, batch_sizes)  # batch_sizes are data, which a trace does not know
    else:
        layer.check_forward_args(data, hx, batch_sizes)
        _check_batch_sizes(data, batch_sizes)
    output, states = _run(layer, op, data, batch_sizes, _states(hx))
    packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return packed, layer.permute_hidden(_in_form(layer, states), unsorted_indices)


def _run(
    layer: torch.nn.RNNBase, op: Op, values: Tensor, batch_sizes: Tensor | None, states: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Every level reads the outputs of all directions of the level below it."""
    _check_weights(layer)
    check.same_device(op.name, input=values, **_named(states), weights=layer._flat_weights[0])
    _check_dtypes(layer, op, values, states)
    states = _as_autocast_holds(layer, values, batch_sizes, states)
    return _run_levels(layer, op, values, batch_sizes, list(zip(*(state.unbind(0) for state in states), strict=True)))


def _run_levels(
    layer: torch.nn.RNNBase, op: Op, values: Tensor, batch_sizes: Tensor | None, initial: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """The same where all is known to be good; ``initial`` has the states of every level and direction."""
    directions = 2 if layer.bidirectional else 1
    final = []
    for level in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            place = level * directions + direction
            output, *ends = op(values, batch_sizes, *initial[place], *_weights(layer, place), direction == 1)
            outputs.append(output)
            final.append(ends)
        values = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if layer.training and layer.dropout > 0 and level < layer.num_layers - 1:
            values = _dropout(values, layer.dropout)
    if len(final) == 1:
        return values, [end.unsqueeze(0) for end in final[0]]
    return values, [torch.stack(ends) for ends in zip(*final, strict=True)]


def _dropout(values: Tensor, p: float) -> Tensor:
    # like torch, p = 1 draws no random number
    device = values.device
    seed = new_seed(device) if p < 1 else torch.zeros((), dtype=torch.int64, device=device)
    return call("dropout", values, seed, p)


def _weights(layer: torch.nn.RNNBase, place: int) -> list[Tensor | None]:
    """The weights of one level and direction in the order of the op's arguments, None for what the layer has not."""
    count = 2 + 2 * layer.bias + (layer.proj_size > 0)
    weight_ih, weight_hh, *others = layer._flat_weights[place * count : (place + 1) * count]
    biases = others[:2] if layer.bias else [None, None]
    projection = [others[-1] if layer.proj_size > 0 else None] if layer.mode == "LSTM" else []
    return [weight_ih, weight_hh, *biases, *projection]


# ---- states: torch.nn.LSTM takes a tuple (h, c), torch.nn.GRU one tensor


def _as_taken(layer: torch.nn.RNNBase, hx: Any) -> Any:
    """``hx`` if it has the layer's form."""
    if hx is None:
        return None
    if layer.mode == "GRU":
        if not isinstance(hx, Tensor):
            raise check.error(
                AttributeError, "GRU takes its initial state as one tensor h_0", f"a {type(hx).__name__}", "Pass hx[0]."
            )
        return hx
    if isinstance(hx, Tensor) or len(hx) != 2:
        given = f"a tensor of shape {check.shape(hx)}" if isinstance(hx, Tensor) else f"{len(hx)} of them"
        kind = IndexError if len(hx) < 2 else TypeError if isinstance(hx, Tensor) else RuntimeError
        raise check.error(kind, "LSTM takes its two initial states as a tuple (h_0, c_0)", given)
    return tuple(hx)


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def _in_form(layer: torch.nn.RNNBase, states: list[Tensor]) -> Any:
    return tuple(states) if layer.mode == "LSTM" else states[0]


def _named(states: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("h_0", "c_0"), states, strict=False))


def _state_widths(layer: torch.nn.RNNBase) -> list[int]:
    width = layer.proj_size or layer.hidden_size
    return [width, layer.hidden_size] if layer.mode == "LSTM" else [width]


def _zero_states(layer: torch.nn.RNNBase, data: Tensor, batch: Any) -> Any:
    """Zeros for every level and direction, all in the memory of one."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    zeros = [data.new_zeros(1, batch, width) for width in _state_widths(layer)]
    return _in_form(layer, [state.expand(count, -1, -1) for state in zeros])


def _as_autocast_holds(
    layer: torch.nn.RNNBase, values: Tensor, batch_sizes: Tensor | None, states: list[Tensor]
) -> list[Tensor]:
    """The states in the dtype which torch gives them under autocast; results follow them.

    torch's fused layers (cuDNN's, and oneDNN's LSTM on a CPU) have states of the autocast dtype. Its step-by-step
    layers lower the products alone: a state keeps its dtype, unless it is itself a product, the projected one.
    """
    device = values.device.type
    if not check.under_autocast(values):
        return states
    dtype = torch.get_autocast_dtype(device)
    fused = _is_one_dnns(layer, values, batch_sizes) if device == "cpu" else torch.backends.cudnn.enabled
    lowered = [fused or layer.proj_size > 0, fused]
    return [
        state.to(dtype) if lower and state.dtype is not torch.float64 else state
        for state, lower in zip(states, lowered, strict=False)
    ]


def _is_one_dnns(layer: torch.nn.RNNBase, values: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether torch runs the layer in oneDNN: an LSTM without projection, on sequences of one length."""
    enabled = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    one_length = batch_sizes is None or bool(batch_sizes[0] == batch_sizes[-1])
    return enabled and one_length and layer.mode == "LSTM" and layer.proj_size == 0 and values.numel() > 0


# ---- what a good call is


def _update_weights(layer: torch.nn.RNNBase) -> None:
    """Puts weights which were replaced into torch's list of them."""
    parameters = layer._parameters
    for name, weight in zip(layer._flat_weights_names, layer._flat_weights, strict=True):
        if parameters.get(name) is not weight:
            layer._update_flat_weights()
            return


def _is_plain(input: Any, layer: torch.nn.RNNBase) -> TypeGuard[Tensor]:
    """Whether a call without states is the usual one, in which every check would find all as it should be."""
    if type(input) is not Tensor or torch._C._is_any_autocast_enabled():
        return False
    dtype, device = input.dtype, input.device
    if input.is_nested or input.layout is not torch.strided or dtype not in FLOATS or input.dim() != 3:
        return False
    if input.shape[2] != layer.input_size or input.shape[1 if layer.batch_first else 0] == 0:
        return False
    for weight, shape in zip(layer._flat_weights, _shapes_of(layer), strict=True):
        if type(weight) is not torch.nn.Parameter or weight.layout is not torch.strided:
            return False
        if weight.dtype is not dtype or weight.shape != shape or weight.device != device:
            return False
    return True


def _check_dimensions(layer: torch.nn.RNNBase, states: list[Tensor], batched: bool) -> None:
    dimensions = 3 if batched else 2
    if any(state.dim() != dimensions for state in states):
        raise check.error(
            RuntimeError,
            f"for {'a batched' if batched else 'an unbatched'} input the initial states of {layer.mode} have"
            f" {dimensions} dimensions",
            ", ".join(f"{name} of shape {check.shape(state)}" for name, state in _named(states).items()),
        )


def _check_batch_sizes(data: Tensor, batch_sizes: Tensor) -> None:
    sizes = batch_sizes.tolist()
    whole = batch_sizes.dtype is torch.int64 and batch_sizes.dim() == 1 and min(sizes) >= 0
    if not whole or sizes != sorted(sizes, reverse=True) or sum(sizes) != data.shape[0]:
        raise check.error(
            RuntimeError,
            "the batch_sizes of a PackedSequence are int64, never grow, and sum to the rows of its data",
            f"{batch_sizes.dtype} {sizes} for {data.shape[0]} rows",
            "Pack with torch.nn.utils.rnn.pack_padded_sequence.",
        )


def _check_weights(layer: torch.nn.RNNBase) -> None:
    for name, weight, shape in zip(layer._flat_weights_names, layer._flat_weights, _shapes_of(layer), strict=True):
        if weight is not None and weight.shape != shape:
            raise check.error(RuntimeError, f"{name} of this {layer.mode} has the shape {shape}", check.shape(weight))


def _shapes_of(layer: torch.nn.RNNBase) -> list[tuple[int, ...]]:
    """The shapes of the weights, in the order of torch's list of them."""
    hidden, width = layer.hidden_size, layer.proj_size or layer.hidden_size
    sums = (4 if layer.mode == "LSTM" else 3) * hidden
    directions = 2 if layer.bidirectional else 1
    biases = [(sums,), (sums,)] if layer.bias else []
    projection = [(width, hidden)] if layer.proj_size else []
    shapes: list[tuple[int, ...]] = []
    for level in range(layer.num_layers):
        features = width * directions if level else layer.input_size
        shapes += [(sums, features), (sums, width), *biases, *projection] * directions
    return shapes


def _check_dtypes(layer: torch.nn.RNNBase, op: Op, values: Tensor, states: list[Tensor]) -> None:
    tensors = {**_named(states), **dict(zip(layer._flat_weights_names, layer._flat_weights, strict=True))}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype is not values.dtype:
            check.same_dtype(op.name, input=values, **{name: tensor})
            if torch.float64 in (values.dtype, tensor.dtype):
                raise check.error(
                    RuntimeError,
                    f"{op.name} takes all tensors in float64 or none, since autocast leaves float64 as it is",
                    f"input of dtype {values.dtype}, {name} of dtype {tensor.dtype}",
                )

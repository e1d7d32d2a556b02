"""What LSTM and GRU share: the forms of input and states that torch.nn takes, and the levels and directions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nacre.core import check
from nacre.core.op import Op, call
from nacre.core.random import new_seed


def forward(layer: torch.nn.RNNBase, op: Op, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
    """The output in the form of the input, and the final states in the form of the initial ones."""
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
    steps = input.transpose(0, 1) if layer.batch_first else input
    if steps.shape[0] == 0:
        raise check.error(
            RuntimeError, f"{layer.mode} takes sequences of one step or more", f"an input of shape {check.shape(input)}"
        )
    output, states = _run(layer, op, steps, None, _states(layer.permute_hidden(hx, None)))
    output = output.transpose(0, 1) if layer.batch_first else output
    if not batched:
        output, states = output.squeeze(batch_dim), [state.squeeze(1) for state in states]
    return output, layer.permute_hidden(_in_form(layer, states), None)


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
    directions = 2 if layer.bidirectional else 1
    initial = list(zip(*(state.unbind(0) for state in states), strict=True))
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


def _zero_states(layer: torch.nn.RNNBase, data: Tensor, batch: Any) -> Any:
    """Zeros for every level and direction, all in the memory of one."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    zeros = [torch.zeros(1, batch, width, dtype=data.dtype, device=data.device) for width in widths]
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
    directions = 2 if layer.bidirectional else 1
    gates = (4 if layer.mode == "LSTM" else 3) * layer.hidden_size
    width = layer.proj_size or layer.hidden_size
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    for place in range(layer.num_layers * directions):
        features = layer.input_size if place < directions else width * directions
        shapes = ((gates, features), (gates, width), (gates,), (gates,), (width, layer.hidden_size))
        for name, weight, shape in zip(names, _weights(layer, place), shapes, strict=False):
            if weight is not None and tuple(weight.shape) != shape:
                suffix = f"_l{place // directions}" + ("_reverse" if place % directions else "")
                raise check.error(
                    RuntimeError, f"{name}{suffix} of this {layer.mode} has the shape {shape}", check.shape(weight)
                )


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

"""What LSTM and GRU cost: the products of input and state with their weights, step by step.

A row is one step of one sequence: T B of them, or the sum of the batch sizes of a packed batch. A place is one level in
one direction. All numbers are sums over places, and levels above the first differ from it in the features they read
alone, so the features read by all levels together stand for them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N H (D + H)), saved O(N (D + H))"

INTEGER_BYTES = 8


def sizes(layer: torch.nn.RNNBase, input: Tensor | PackedSequence, hx: Any = None) -> dict[str, Any]:
    """The sizes of one call: rows, sequences, the layer's widths, and which gradients are asked for."""
    data, batch_sizes, sorted_indices = input[:3] if isinstance(input, PackedSequence) else (input, None, None)
    if batch_sizes is not None:
        batch, last_batch = int(batch_sizes[0]), int(batch_sizes[-1])
    else:
        batch = last_batch = 1 if data.dim() == 2 else data.shape[0 if layer.batch_first else 1]
    states = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    gradients = [state.requires_grad for state in states] + [False, False]
    return {
        "rows": data.numel() // layer.input_size,
        "batch": batch,
        "last_batch": last_batch,
        "input_size": layer.input_size,
        "hidden_size": layer.hidden_size,
        "proj_size": layer.proj_size,
        "projection": layer.proj_size > 0,
        "num_layers": layer.num_layers,
        "directions": 2 if layer.bidirectional else 1,
        "bias": layer.bias,
        "dropout": layer.training and layer.dropout > 0,
        "initial_states": bool(states),
        "packed_steps": 0 if batch_sizes is None else batch_sizes.numel(),
        "permuted": sorted_indices is not None,
        "itemsize": data.element_size(),
        "input_gradient": data.requires_grad,
        "h0_gradient": gradients[0],
        "c0_gradient": gradients[1],
        "parameter_gradient": any(parameter.requires_grad for parameter in layer.parameters()),
    }


def _names(sizes: Mapping[str, Any]) -> dict[str, str]:
    names = {"rows": "N", "input_size": "D", "hidden_size": "H", "batch": "B"}
    names["last_batch"] = "B_last" if sizes["packed_steps"] else "B"
    if sizes["projection"]:
        names["proj_size"] = "R"
    return names | {"packed_steps": "T"} if sizes["packed_steps"] else names


def _inputs(layer: torch.nn.RNNBase, size: int) -> tuple[Tensor]:
    weight = next(layer.parameters())
    return (weight.new_empty(size, size + 1, layer.input_size, device="meta", requires_grad=True),)


LETTERS = Letters(_names, _inputs, at_most={"B": ("N",), "B_last": ("B",), "T": ("N",), "R": ("H",)})


def lstm_cost(**sizes: Any) -> Cost:
    """The exact bill of an LSTM.

    Forward, for each of the H values of a row: adding the state's product to the 4 sums (4, with biases 8), the gates
    (4), the cell (3), its tanh and the state (2); both biases are added once for all rows (4 H).
    Backward: the cell's tanh (1), the slopes of the 4 sums (12) and of the cell (3), the state before projection (1),
    the cell's gradient (2), the sums' (4), what is passed to the cell before (1); the state's gradient (1 for each of
    its R values); the biases' sum (4).
    """
    return _cost(
        gates=4,
        cell=1,
        elementwise=13,
        elementwise_with_bias=4,
        bias_sum=4,
        backward_elementwise=24,
        backward_elementwise_recurrent=0,
        backward_elementwise_with_bias=4,
        **sizes,
    )


def gru_cost(**sizes: Any) -> Cost:
    """The exact bill of a GRU.

    Forward, for each of the H values of a row: the gates r and z (4), n (3), the state (3), the biases of the input's
    and of the state's sums (6).
    Backward: the slopes of the 4 sums (13), their gradients (4), the state's gradient (1) and, but where nothing is
    before, what is passed to the state before (2); the sums of both biases (6).
    """
    return _cost(
        gates=3,
        cell=0,
        elementwise=10,
        elementwise_with_bias=6,
        bias_sum=0,
        backward_elementwise=17,
        backward_elementwise_recurrent=2,
        backward_elementwise_with_bias=6,
        **sizes,
    )


def _cost(
    rows: int,
    batch: int,
    last_batch: int,
    input_size: int,
    hidden_size: int,
    gates: int,
    cell: int,
    elementwise: int,
    elementwise_with_bias: int,
    bias_sum: int,
    backward_elementwise: int,
    backward_elementwise_recurrent: int,
    backward_elementwise_with_bias: int,
    proj_size: int = 0,
    projection: bool = False,
    num_layers: int = 1,
    directions: int = 1,
    bias: bool = True,
    dropout: bool = False,
    initial_states: bool = False,
    packed_steps: int = 0,
    permuted: bool = False,
    itemsize: int = 4,
    input_gradient: bool = True,
    h0_gradient: bool = False,
    c0_gradient: bool = False,
    parameter_gradient: bool = True,
) -> Cost:
    """Products, of 2 FLOPs for each weight and row.

    Forward: input, state and projection. Backward: the input's gradient (of the first level only where it is asked
    for); the state's, which the step that the recurrence starts with has none of unless h_0 asks for it; each
    weight's; the projection's input's.

    Kept for a row and place: gates, and LSTM's cells or GRU's states (5 H together), and projected states; the input of
    each level; the initial states, of which zeros are kept once for all places; batch sizes, permutations and
    dropout's seeds.
    """
    places = num_layers * directions
    width = proj_size + hidden_size * (1 - projection)
    sums = gates * hidden_size
    features = input_size + (num_layers - 1) * directions * width
    input_weights = directions * sums * features
    state_weights = places * sums * width
    projection_weights = places * width * hidden_size * projection
    parameters = input_weights + state_weights + projection_weights + places * 2 * sums * bias

    recorded = 1 - (1 - input_gradient) * (1 - h0_gradient) * (1 - c0_gradient) * (1 - parameter_gradient)
    first_rows = num_layers * (batch + (directions - 1) * last_batch) * (1 - h0_gradient)
    frozen_weights = directions * sums * input_size * (1 - input_gradient)
    state_products = rows * state_weights - first_rows * sums * width
    weight_products = rows * (input_weights + state_weights + projection_weights) * parameter_gradient
    input_products = rows * (input_weights - frozen_weights + projection_weights)

    dropped = rows * directions * width * (num_layers - 1) * dropout
    values = rows * hidden_size * places
    states = batch * (width + cell * hidden_size)
    outputs = rows * directions * width
    initial_values = states * (1 + (places - 1) * initial_states)
    integers = packed_steps + batch * permuted * (1 + h0_gradient + c0_gradient - h0_gradient * c0_gradient)
    saved_bytes = recorded * (
        itemsize * (rows * features + 5 * values + rows * places * width * projection + initial_values)
        + INTEGER_BYTES * (integers + (num_layers - 1) * dropout)
    )
    return Cost(
        parameters=parameters,
        flops=2 * rows * (input_weights + state_weights + projection_weights),
        backward_flops=2 * recorded * (state_products + weight_products + input_products),
        elementwise_flops=values * (elementwise + elementwise_with_bias * bias)
        + places * hidden_size * bias_sum * bias
        + 4 * dropped,
        backward_elementwise_flops=recorded
        * (
            values * (backward_elementwise + backward_elementwise_with_bias * bias * parameter_gradient)
            + (rows * places - first_rows) * hidden_size * backward_elementwise_recurrent
            + rows * places * width
            + 4 * dropped
        ),
        bytes=itemsize * (rows * input_size + parameters + outputs + places * states * (1 + initial_states)),
        backward_bytes=saved_bytes
        + recorded
        * itemsize
        * (
            outputs
            + parameters * (1 + parameter_gradient)
            + rows * input_size * input_gradient
            + places * batch * (width * h0_gradient + hidden_size * c0_gradient)
        ),
        saved_bytes=saved_bytes,
    )

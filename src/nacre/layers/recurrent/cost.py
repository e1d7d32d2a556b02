"""What LSTM and GRU cost: the products of input and state with their weights, step by step.

A row is one step of one sequence: T B of them, or the sum of the batch sizes of a packed batch. A place is one level in
one direction. All numbers are sums over places, which differ in the features that they read, in the step that they
start with, and in the gradients which are asked of them.
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
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # of a place, in torch's order


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
        "frozen": _frozen(layer),
    }


def _frozen(layer: torch.nn.RNNBase) -> tuple[tuple[str, ...], ...]:
    """For each place the kinds of its parameters whose gradients are not asked for."""
    has = (True, True, layer.bias, layer.bias, layer.proj_size > 0)
    kinds = [kind for kind, one in zip(KINDS, has, strict=True) if one]
    return tuple(
        tuple(kind for kind, weight in zip(kinds, weights, strict=True) if not weight.requires_grad)
        for weights in layer.all_weights
    )


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
    return _cost(gates=4, cell=1, elementwise=13, backward_elementwise=24, passed_on=0, joint_bias=True, **sizes)


def gru_cost(**sizes: Any) -> Cost:
    """The exact bill of a GRU.

    Forward, for each of the H values of a row: the gates r and z (4), n (3), the state (3), the biases of the input's
    and of the state's sums (6).
    Backward: the slopes of the 4 sums (13), their gradients (4), the state's gradient (1) and, but where nothing is
    before, what is passed to the state before (2); the sums of both biases (6).
    """
    return _cost(gates=3, cell=0, elementwise=10, backward_elementwise=17, passed_on=2, joint_bias=False, **sizes)


def _cost(
    rows: int,
    batch: int,
    last_batch: int,
    input_size: int,
    hidden_size: int,
    gates: int,
    cell: int,
    elementwise: int,
    backward_elementwise: int,
    passed_on: int,
    joint_bias: bool,
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
    frozen: tuple[tuple[str, ...], ...] = (),
) -> Cost:
    """Products, of 2 FLOPs for each weight and row.

    Forward: input, state and projection. Backward: the input's gradient, where it is asked for or the level below has
    a backward; the state's, which the step that the recurrence starts with has none of unless h_0 asks for it; each
    weight's; the projection's input's.

    Kept for a row and place: gates, and LSTM's cells or GRU's states (5 H together), and projected states; the input of
    each level; the initial states, of which zeros are kept once for all places; batch sizes, permutations and
    dropout's seeds.

    ``elementwise``, ``backward_elementwise`` and ``passed_on`` (what is passed to the state before) are operations for
    each of the H values of a row, biases apart; ``joint_bias`` tells that the two biases are added to each other first
    and have one gradient. ``frozen`` names, for each place, the parameters whose gradients are not asked for.
    """
    width = proj_size + hidden_size * (1 - projection)
    sums, values = gates * hidden_size, rows * hidden_size
    states, outputs = batch * (width + cell * hidden_size), rows * directions * width
    state_gradients = batch * (width * h0_gradient + hidden_size * c0_gradient)
    exist = dict(zip(KINDS, (1, 1, bias, bias, projection), strict=True))

    def place(features: int, first_rows: int, gradient: int, without: tuple[str, ...]) -> tuple[Cost, int]:
        """The bill of a place that reads so many features, with a gradient or not, and whether it has a backward."""
        asked = {kind: exist[kind] * parameter_gradient * (kind not in without) for kind in KINDS}
        recorded = max(gradient, h0_gradient, c0_gradient, *asked.values())
        weights = {"weight_ih": sums * features, "weight_hh": sums * width, "weight_hr": width * hidden_size}
        numbers = {**weights, "bias_ih": sums, "bias_hh": sums}
        parameters = sum(numbers[kind] * exist[kind] for kind in KINDS)
        products = sum(weights[kind] * exist[kind] for kind in weights)
        passed_back = weights["weight_ih"] * gradient + weights["weight_hh"] + weights["weight_hr"] * projection
        if joint_bias:
            bias_additions, bias_sums = sums * (rows + 1), max(asked["bias_ih"], asked["bias_hh"])
        else:
            bias_additions, bias_sums = 2 * sums * rows, asked["bias_ih"] + asked["bias_hh"]
        kept = itemsize * (5 * values + rows * width * projection + states * initial_states)
        bill = Cost(
            parameters=parameters,
            flops=2 * rows * products,
            backward_flops=2 * rows * sum(weights[kind] * asked[kind] for kind in weights)
            + 2 * (rows * passed_back - first_rows * weights["weight_hh"]) * recorded,
            elementwise_flops=values * elementwise + bias_additions * bias,
            backward_elementwise_flops=rows * sums * bias_sums
            + (values * backward_elementwise + (rows - first_rows) * hidden_size * passed_on + rows * width) * recorded,
            bytes=itemsize * (parameters + states * (1 + initial_states)),
            backward_bytes=(kept + itemsize * (parameters + state_gradients)) * recorded
            + itemsize * sum(numbers[kind] * asked[kind] for kind in KINDS),
            saved_bytes=kept * recorded,
        )
        return bill, recorded

    total = Cost(bytes=itemsize * (rows * input_size + outputs))
    gradient: int = input_gradient  # whether what a level reads has one
    for level in range(num_layers):
        features, recorded = directions * width if level else input_size, 0
        for direction in range(directions):
            first_rows = (last_batch if direction else batch) * (1 - h0_gradient)
            without = frozen[level * directions + direction] if frozen else ()
            bill, of_place = place(features, first_rows, gradient, without)
            total, recorded = total + bill, max(recorded, of_place)
        drops = dropout * (level + 1 < num_layers)
        kept = (itemsize * rows * features + INTEGER_BYTES * drops) * recorded
        total += Cost(
            elementwise_flops=4 * outputs * drops,
            backward_elementwise_flops=4 * outputs * drops * recorded,
            backward_bytes=kept,
            saved_bytes=kept,
        )
        gradient = recorded
    integers = packed_steps + batch * permuted * (1 + h0_gradient + c0_gradient - h0_gradient * c0_gradient)
    kept = (itemsize * states * (1 - initial_states) + INTEGER_BYTES * integers) * gradient
    return total + Cost(
        backward_bytes=kept + itemsize * (outputs * gradient + rows * input_size * input_gradient),
        saved_bytes=kept,
    )

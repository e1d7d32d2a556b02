"""What the cross-entropy losses cost: a few operations a logit and, for the linear one, its products."""

from collections.abc import Mapping
from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N C), saved O(N C)"
LINEAR_COMPLEXITY = "time O(N D C), backward O(D (N + C)), saved O(D (N + C))"


def sizes(layer: torch.nn.CrossEntropyLoss, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """N tokens of C classes, from a call of the loss."""
    classes = input.shape[1 if input.dim() > 1 else 0]
    return {
        "tokens": input.numel() // classes if classes else 0,
        "classes": classes,
        **_target_sizes(layer, input, target),
        "input_gradient": input.requires_grad,
    }


def linear_sizes(layer: Any, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """N rows of D features, C classes at each of some places, from a call of the loss."""
    linear = layer.linear
    return {
        "rows": input.numel() // linear.in_features if linear.in_features else input.shape[0],
        "in_features": linear.in_features,
        "classes": layer.num_classes,
        "places": linear.out_features // layer.num_classes,
        "bias": linear.bias is not None,
        **_target_sizes(layer, input, target),
        "input_gradient": input.requires_grad,
        "linear_weight_gradient": linear.weight.requires_grad,
        "linear_bias_gradient": linear.bias is not None and linear.bias.requires_grad,
    }


def _target_sizes(layer: Any, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    probabilities = target.is_floating_point()
    return {
        "weight": layer.weight is not None,
        "probabilities": probabilities,
        "smoothing": layer.label_smoothing > 0,
        "reduced": layer.reduction != "none",
        "itemsize": input.element_size(),
        "target_itemsize": target.element_size() if probabilities else 8,
        "statistics_itemsize": max(4, input.element_size(), target.element_size() if probabilities else 0),
        "target_gradient": target.requires_grad,
    }


def _inputs(layer: torch.nn.CrossEntropyLoss, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    classes = size if layer.weight is None else layer.weight.numel()
    return (
        torch.empty(size, classes, device="meta", requires_grad=True),
        torch.empty(size, dtype=torch.int64, device="meta"),
    )


def _linear_inputs(layer: Any, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    places = (layer.linear.out_features // layer.num_classes,) if layer.linear.out_features > layer.num_classes else ()
    return (
        layer.linear.weight.new_empty(size, layer.linear.in_features, device="meta", requires_grad=True),
        torch.empty(size, *places, dtype=torch.int64, device="meta"),
    )


def _linear_names(sizes: Mapping[str, Any]) -> dict[str, str]:
    names = {"rows": "N", "in_features": "D", "classes": "C"}
    return names | {"places": "K"} if sizes["places"] > 1 else names


LETTERS = Letters(lambda sizes: {"tokens": "N", "classes": "C"}, _inputs)
LINEAR_LETTERS = Letters(_linear_names, _linear_inputs)


def cost(
    tokens: int,
    classes: int,
    weight: bool = False,
    probabilities: bool = False,
    smoothing: bool = False,
    reduced: bool = True,
    itemsize: int = 4,
    target_itemsize: int = 8,
    statistics_itemsize: int = 4,
    input_gradient: int = True,
    target_gradient: int = False,
) -> Cost:
    """The exact bill.

    Forward, a logit: comparison for m, subtraction, exponential, sum (4). Class indices, a token: log, two
    subtractions, sign and share (4), its class weight (1), and smoothed: log p, sum, class weight (3 + 1 a logit),
    share and sum (2 a token). Probabilities, a logit: log p, product, sum (4), class weight (1), smoothed target (2);
    a token: log and sign (2). The sum over the tokens is one each.
    Backward, a logit: log p (2); for the input the exponential, the sum of the target, product, subtraction and factor
    g (5), class weight (1), smoothed target (1, of probabilities 2); for probabilities themselves g log p (1) and class
    weight (1).
    """
    logits = tokens * classes
    recorded = 1 - (1 - input_gradient) * (1 - target_gradient)
    targets = target_itemsize * (logits * probabilities + tokens * (1 - probabilities))
    weights = itemsize * classes * weight
    statistics = 2 * tokens * statistics_itemsize
    losses = itemsize * (reduced + tokens * (1 - reduced))
    by_logit = 4 + probabilities * (4 + weight + 2 * smoothing) + (1 - probabilities) * smoothing * (3 + weight)
    by_token = reduced + 2 * probabilities + (1 - probabilities) * (4 + weight + 2 * smoothing)
    backward_by_logit = (
        2 * recorded + input_gradient * (5 + weight + smoothing * (1 + probabilities)) + target_gradient * (1 + weight)
    )
    return Cost(
        elementwise_flops=logits * by_logit + tokens * by_token,
        backward_elementwise_flops=logits * backward_by_logit,
        bytes=itemsize * logits + targets + weights + losses,
        backward_bytes=recorded * (itemsize * logits + targets + weights + statistics + losses)
        + itemsize * logits * input_gradient
        + targets * target_gradient,
        saved_bytes=recorded * (itemsize * logits + targets + weights + statistics),
    )


def linear_cost(
    rows: int,
    in_features: int,
    classes: int,
    places: int = 1,
    bias: bool = False,
    weight: bool = False,
    probabilities: bool = False,
    smoothing: bool = False,
    reduced: bool = True,
    itemsize: int = 4,
    target_itemsize: int = 8,
    statistics_itemsize: int = 4,
    input_gradient: bool = True,
    target_gradient: bool = False,
    linear_weight_gradient: bool = True,
    linear_bias_gradient: bool = True,
) -> Cost:
    """The exact bill.

    Forward: 2 D FLOPs for each of the N C logits of each place, one addition with a bias, and the loss of the logits.
    Backward: as many FLOPs for dx and for dW; the loss's own backward, whose gradient to the logits serves every other;
    one addition a logit for db.
    Of a sum or mean, in float32 or float64 and where only dx, dW and db are asked for, the forward does the backward's
    work as well: it forms these gradients and keeps them, and the backward multiplies each by one number. Otherwise the
    backward computes the logits once more.
    Logits are neither read nor written: as compulsory traffic counts what goes in and comes out of the whole, and kept
    are input, target, class weights, 2 numbers a token and the gradients that were formed.
    """
    tokens = rows * places
    logits, product = tokens * classes, 2 * rows * in_features * classes * places
    inputs, parameters = rows * in_features, classes * places * (in_features + bias)
    downstream = 1 - (1 - input_gradient) * (1 - linear_weight_gradient) * (1 - linear_bias_gradient)
    recorded = 1 - (1 - downstream) * (1 - target_gradient)
    formed = downstream * reduced * (1 - target_gradient) * int(itemsize >= 4)
    gradients = inputs * input_gradient + classes * places * (
        in_features * linear_weight_gradient + linear_bias_gradient
    )
    loss = cost(
        tokens,
        classes,
        weight,
        probabilities,
        smoothing,
        reduced,
        itemsize,
        target_itemsize,
        statistics_itemsize,
        downstream,
        target_gradient,
    )
    read = itemsize * (inputs - logits)  # the loss of given logits reads them; this one reads the input
    later = recorded * (1 - formed)  # what the backward computes itself
    products = product * (input_gradient + linear_weight_gradient)
    elementwise = loss.backward_elementwise_flops + logits * linear_bias_gradient
    return Cost(
        parameters=parameters,
        flops=product + products * formed,
        backward_flops=(product + products) * later,
        elementwise_flops=loss.elementwise_flops + logits * bias + elementwise * formed,
        backward_elementwise_flops=(elementwise + logits * bias) * later + gradients * formed,
        bytes=loss.bytes + read + itemsize * (parameters + gradients * formed),
        backward_bytes=(
            loss.backward_bytes + read + itemsize * parameters - itemsize * logits * downstream + itemsize * gradients
        )
        * later
        + itemsize * (1 + 2 * gradients) * formed,
        saved_bytes=loss.saved_bytes + read * recorded + itemsize * gradients * formed,
    )

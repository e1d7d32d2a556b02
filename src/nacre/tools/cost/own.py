"""What nacre's own operators cost, by the ``cost.py`` of the layer that each one serves."""

import math
from collections.abc import Mapping
from typing import Any

from nacre.core.cost import Cost
from nacre.layers import LAYERS
from nacre.tools.cost.products import attention_sizes

Given = Mapping[str, Any]


def counted(name: str, given: Given) -> tuple[int, int, int]:
    """FLOPs of products, FLOPs of single elements and multiply-adds of one product of ``nacre::name``."""
    backward = name.endswith("_backward")
    layer = name.removesuffix("_backward")
    if layer == "attention":
        return _attention_backward(given) if backward else _attention(given)
    bill, product = _BILLS[layer](layer, given)
    if backward:
        return bill.backward_flops, bill.backward_elementwise_flops, product
    return bill.flops, bill.elementwise_flops, product


def _needs(given: Given, count: int) -> tuple[bool, ...]:
    return tuple(given.get("needs") or [True] * count)


def _activation(layer: str, given: Given) -> tuple[Cost, int]:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    tanh = {"tanh": given["approximate"] == "tanh"} if layer == "gelu" else {}
    return LAYERS[layer].cost(elements=values.numel(), **tanh), 0


def _softmax(layer: str, given: Given) -> tuple[Cost, int]:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    features = values.shape[given["dim"]] if values.shape else 1
    return LAYERS[layer].cost(rows=values.numel() // max(features, 1), features=features), 0


def _dropout(layer: str, given: Given) -> tuple[Cost, int]:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    return LAYERS[layer].cost(elements=values.numel()), 0


def _layer_norm(layer: str, given: Given) -> tuple[Cost, int]:
    needs = _needs(given, 3)
    features = math.prod(given["normalized_shape"])
    bill = LAYERS[layer].cost(
        rows=given["input"].numel() // max(features, 1),
        features=features,
        weight=given["weight"] is not None,
        bias=given["bias"] is not None if "bias" in given else needs[2],
        input_gradient=needs[0],
    )
    return bill, 0


def _linear(layer: str, given: Given) -> tuple[Cost, int]:
    needs = _needs(given, 3)
    out_features, in_features = given["weight"].shape
    rows = math.prod(given["input"].shape[:-1])
    bill = LAYERS[layer].cost(
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bias=given.get("bias") is not None,
        input_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
    )
    return bill, rows * in_features * out_features


def _conv2d(layer: str, given: Given) -> tuple[Cost, int]:
    needs = _needs(given, 3)
    samples, in_channels, height, width = given["input"].shape
    out_channels, _, kernel_height, kernel_width = given["weight"].shape
    left, right, top, bottom = given["padding"]
    bill = LAYERS[layer].cost(
        samples=samples,
        in_channels=in_channels,
        out_channels=out_channels,
        height=height,
        width=width,
        kernel_height=kernel_height,
        kernel_width=kernel_width,
        stride=tuple(given["stride"]),
        padding=(top + bottom, left + right),
        dilation=tuple(given["dilation"]),
        groups=given["groups"],
        bias=given.get("bias") is not None,
        input_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
    )
    return bill, bill.flops // (2 * max(given["groups"], 1))


def _embedding(layer: str, given: Given) -> tuple[Cost, int]:
    width = given["weight"].shape[1] if "weight" in given else given["grad_output"].shape[-1]
    bill = LAYERS[layer].cost(
        tokens=given["indices"].numel(),
        num_embeddings=given["num_embeddings"],
        embedding_dim=width,
        padding=given["padding_idx"] >= 0,
        scale_grad_by_freq=given["scale_grad_by_freq"],
        sparse=given["sparse"],
    )
    return bill, 0


def _loss_sizes(given: Given) -> dict[str, Any]:
    return {
        "weight": given["weight"] is not None,
        "probabilities": given["target"].is_floating_point(),
        "smoothing": given["label_smoothing"] > 0,
        "reduced": given["reduction"] != "none",
    }


def _cross_entropy(layer: str, given: Given) -> tuple[Cost, int]:
    logits, needs = given["input"], _needs(given, 2)
    classes = logits.shape[1 if logits.dim() > 1 else 0]
    bill = LAYERS[layer].cost(
        tokens=logits.numel() // max(classes, 1),
        classes=classes,
        **_loss_sizes(given),
        input_gradient=needs[0],
        target_gradient=needs[1],
    )
    return bill, 0


def _linear_cross_entropy(layer: str, given: Given) -> tuple[Cost, int]:
    needs = _needs(given, 4)
    classes, *places, in_features = given["linear_weight"].shape
    rows = given["input"].numel() // max(in_features, 1)
    bill = LAYERS[layer].cost(
        rows=rows,
        in_features=in_features,
        classes=classes,
        places=math.prod(places),
        bias=given["linear_bias"] is not None,
        **_loss_sizes(given),
        input_gradient=needs[0],
        linear_weight_gradient=needs[1],
        linear_bias_gradient=needs[2],
        target_gradient=needs[3],
    )
    return bill, rows * given["linear_weight"].numel()


def _recurrent(layer: str, given: Given) -> tuple[Cost, int]:
    """One level in one direction: its rows are all steps of all sequences."""
    needs = _needs(given, 8)
    data, weight = given["input"], given["weight_ih"]
    packed, batch = given["batch_sizes"], given["h0"].shape[0]
    rows = math.prod(data.shape[:-1])
    projected = given.get("weight_hr")
    bill = LAYERS[layer].cost(
        rows=rows,
        batch=batch,
        last_batch=batch,
        input_size=weight.shape[1],
        hidden_size=weight.shape[0] // (4 if layer == "lstm" else 3),
        proj_size=0 if projected is None else projected.shape[0],
        projection=projected is not None,
        bias=given["bias_ih"] is not None,
        packed_steps=0 if packed is None else packed.numel(),
        input_gradient=needs[0],
        h0_gradient=needs[1],
        c0_gradient=layer == "lstm" and needs[2],
        parameter_gradient=any(needs[3 if layer == "lstm" else 2 :]),
    )
    return bill, rows * weight.numel()


def _attention(given: Given) -> tuple[int, int, int]:
    scores, rows, features, value_features = attention_sizes(*(given[name].shape for name in _QKV))
    elementwise = rows * features + scores * (5 + _masked(given)) + 2 * rows
    return 2 * scores * (features + value_features), elementwise, scores * features // max(_heads(given), 1)


def _attention_backward(given: Given) -> tuple[int, int, int]:
    """The scores once more, and one product each for dV, dW, dQ and dK, of those that are asked for."""
    scores, rows, features, value_features = attention_sizes(*(given[name].shape for name in _QKV))
    query, key, value, *masks = _needs(given, 5)
    of_scores = query or key or any(masks)
    weights = given["grad_weights"] is not None
    products = scores * (features + value * value_features + of_scores * value_features + (query + key) * features)
    elementwise = rows * features + scores * (2 + _masked(given)) + query * rows * features
    elementwise += of_scores * (scores * (5 + (given["dropout_p"] > 0) + weights) + rows) + sum(masks) * scores
    elementwise += key * given["key"].numel()
    return 2 * products, elementwise, scores * features // max(_heads(given), 1)


_QKV = ("query", "key", "value")


def _masked(given: Given) -> int:
    masks = sum(given[name] is not None for name in ("mask", "key_mask"))
    return masks + bool(given["is_causal"]) + (given["dropout_p"] > 0)


def _heads(given: Given) -> int:
    return math.prod(given["query"].shape[:-2])


_BILLS = {
    "gelu": _activation,
    "relu": _activation,
    "silu": _activation,
    "tanh": _activation,
    "sigmoid": _activation,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "dropout": _dropout,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "conv2d": _conv2d,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "lstm": _recurrent,
    "gru": _recurrent,
}

"""What nacre's own operators cost, by the ``cost.py`` of the layer that each one serves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nacre.blocks.parts import feed_forward_cost
from nacre.core.cost import Cost
from nacre.layers import LAYERS
from nacre.layers.dropout.cost import residual_cost as residual_dropout_cost
from nacre.layers.layer_norm.cost import residual_cost as residual_dropout_layer_norm_cost
from nacre.layers.recurrent.cost import KINDS
from nacre.tools.cost.products import Counted, attention_sizes

Given = Mapping[str, Any]


def counted(name: str, given: Given) -> Counted | None:
    """FLOPs of products and of single elements of ``nacre::name``, where known."""
    backward = name.endswith("_backward")
    layer = name.removesuffix("_backward")
    if layer == "attention":
        return _attention_backward(given) if backward else _attention(given)
    if layer not in _BILLS:
        return None
    bill = _BILLS[layer](layer, given)
    if backward:
        return bill.backward_flops, bill.backward_elementwise_flops
    return bill.flops, bill.elementwise_flops


def _needs(given: Given, count: int) -> tuple[bool, ...]:
    return tuple(given.get("needs") or [True] * count)


def _activation(layer: str, given: Given) -> Cost:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    tanh = {"tanh": given["approximate"] == "tanh"} if layer == "gelu" else {}
    return LAYERS[layer].cost(elements=values.numel(), **tanh)


def _softmax(layer: str, given: Given) -> Cost:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    features = values.shape[given["dim"]] if values.shape else 1
    return LAYERS[layer].cost(rows=values.numel() // max(features, 1), features=features)


def _dropout(layer: str, given: Given) -> Cost:
    values = given["grad_output"] if "grad_output" in given else given["input"]
    return LAYERS[layer].cost(elements=values.numel())


def _layer_norm(layer: str, given: Given) -> Cost:
    needs = _needs(given, 3)
    features = math.prod(given["normalized_shape"])
    return LAYERS[layer].cost(
        rows=given["input"].numel() // max(features, 1),
        features=features,
        weight=given["weight"] is not None,
        bias=given["bias"] is not None if "bias" in given else needs[2],
        input_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
    )


def _linear(layer: str, given: Given) -> Cost:
    needs = _needs(given, 3)
    out_features, in_features = given["weight"].shape
    rows = math.prod(given["input"].shape[:-1])
    return LAYERS[layer].cost(
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        bias=given.get("bias") is not None,
        input_gradient=needs[0],
        weight_gradient=needs[1],
        bias_gradient=needs[2],
    )


def _conv2d(layer: str, given: Given) -> Cost:
    needs = _needs(given, 3)
    samples, in_channels, height, width = given["input"].shape
    out_channels, _, kernel_height, kernel_width = given["weight"].shape
    left, right, top, bottom = given["padding"]
    return LAYERS[layer].cost(
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


def _embedding(layer: str, given: Given) -> Cost:
    width = given["weight"].shape[1] if "weight" in given else given["grad_output"].shape[-1]
    return LAYERS[layer].cost(
        tokens=given["indices"].numel(),
        num_embeddings=given["num_embeddings"],
        embedding_dim=width,
        padding=given["padding_idx"] >= 0,
        scale_grad_by_freq=given["scale_grad_by_freq"],
        sparse=given["sparse"],
    )


def _loss_sizes(given: Given) -> dict[str, Any]:
    return {
        "weight": given["weight"] is not None,
        "probabilities": given["target"].is_floating_point(),
        "smoothing": given["label_smoothing"] > 0,
        "reduced": given["reduction"] != "none",
    }


def _cross_entropy(layer: str, given: Given) -> Cost:
    logits, needs = given["input"], _needs(given, 2)
    classes = logits.shape[1 if logits.dim() > 1 else 0]
    return LAYERS[layer].cost(
        tokens=logits.numel() // max(classes, 1),
        classes=classes,
        **_loss_sizes(given),
        input_gradient=needs[0],
        target_gradient=needs[1],
    )


def _linear_cross_entropy(layer: str, given: Given) -> Cost:
    formed = any(given["formed"])
    needs = (*given["formed"], False) if formed else _needs(given, 4)
    classes, *places, in_features = given["linear_weight"].shape
    rows = given["input"].numel() // max(in_features, 1)
    return LAYERS[layer].cost(
        rows=rows,
        in_features=in_features,
        classes=classes,
        places=math.prod(places),
        bias=given["linear_bias"] is not None,
        **_loss_sizes(given),
        itemsize=4 if formed else 2,  # in half precision no gradients are formed on the way
        input_gradient=needs[0],
        linear_weight_gradient=needs[1],
        linear_bias_gradient=needs[2],
        target_gradient=needs[3],
    )


def _recurrent(layer: str, given: Given) -> Cost:
    """One level in one direction: its rows are all steps of all sequences."""
    needs = _needs(given, 8)
    data, weight = given["input"], given["weight_ih"]
    packed, batch = given["batch_sizes"], given["h0"].shape[0]
    rows = math.prod(data.shape[:-1])
    projected = given.get("weight_hr")
    parameters = needs[3 if layer == "lstm" else 2 :]
    return LAYERS[layer].cost(
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
        frozen=(tuple(kind for kind, needed in zip(KINDS, parameters, strict=False) if not needed),),
    )


def _attention(given: Given) -> Counted:
    query, key, value = _heads(given)
    scores, rows, features, value_features = attention_sizes(query, key, value)
    elementwise = rows * features + scores * (5 + _masked(given) + given["average_weights"])
    return 2 * scores * (features + value_features), elementwise


def _attention_backward(given: Given) -> Counted:
    """The scores once more, and one product each for dV, dW, dQ and dK, of those that are asked for."""
    query, key, value = _heads(given)
    scores, rows, features, value_features = attention_sizes(query, key, value)
    dq, dk, dv, *masks = _needs(given, 5)
    if given["key"] is None:  # one packed tensor holds all three
        dk = dv = dq
    of_scores = dq or dk or any(masks)
    weights = 0 if given["grad_weights"] is None else 1 + given["average_weights"]
    products = scores * (features + dv * value_features + of_scores * value_features + (dq + dk) * features)
    elementwise = rows * features + scores * (3 + _masked(given)) + dq * rows * features + dk * math.prod(key)
    elementwise += of_scores * scores * (4 + (given["dropout_p"] > 0) + weights) + sum(masks) * scores
    return 2 * products, elementwise


def _heads(given: Given) -> tuple[Sequence[int], ...]:
    """The shapes of query, key and value, (N, H, L, E) each, packed or not."""
    if given["key"] is not None:
        return tuple(given[name].shape for name in ("query", "key", "value"))
    length, batch, packed = given["query"].shape
    shape = (batch, given["packed_heads"], length, packed // (3 * max(given["packed_heads"], 1)))
    return shape, shape, shape


def _masked(given: Given) -> int:
    masks = sum(given[name] is not None for name in ("mask", "key_mask"))
    return masks + bool(given["is_causal"]) + (given["dropout_p"] > 0)


def _joined(layer: str, given: Given) -> Cost:
    """A residual addition in one pass with the dropout before it and the normalisation after it."""
    backward = "needs" in given
    needs, drops = _needs(given, 4), given["seed"] is not None
    if layer == "residual_dropout":  # the residual's gradient is the output's: the backward finds the branch's alone
        values = given["grad_output"] if backward else given["residual"]
        return residual_dropout_cost(values.numel(), drops=drops, branch_gradient=needs[0])
    features = math.prod(given["normalized_shape"])
    values = given["sum"] if backward else given["residual"]
    return residual_dropout_layer_norm_cost(
        rows=values.numel() // max(features, 1),
        features=features,
        weight=given["weight"] is not None,
        bias=given["bias"] is not None if "bias" in given else needs[-1],
        sum_gradient=given.get("grad_sum") is not None,
        drops=drops,
        residual_gradient=needs[0],
        branch_gradient=needs[1],
        weight_gradient=needs[2],
        bias_gradient=needs[3],
    )


def _feed_forward(layer: str, given: Given) -> Cost:
    """Two linear maps with what stands between them."""
    needs = _needs(given, 5)
    hidden_features, in_features = given["weight1"].shape
    rows = math.prod(given["input"].shape[:-1])
    inner = {"elements": rows * hidden_features, "input_gradient": any(needs[:3])}
    activation, _, tanh = given["activation"].partition("_")
    first = {
        "rows": rows,
        "in_features": in_features,
        "out_features": hidden_features,
        "bias": given["bias1"] is not None,
        "input_gradient": needs[0],
        "weight_gradient": needs[1],
        "bias_gradient": needs[2],
    }
    second = {
        "rows": rows,
        "in_features": hidden_features,
        "out_features": given["weight2"].shape[0],
        "bias": given["bias2"] is not None if "bias2" in given else needs[4],
        "input_gradient": any(needs[:3]),
        "weight_gradient": needs[3],
        "bias_gradient": needs[4],
    }
    between = [(activation, {**inner, "tanh": True} if tanh else inner)]
    if given["seed"] is not None:
        between.append(("dropout", {**inner, "active": True}))
    return feed_forward_cost((("linear", {**first, "itemsize": 4}), *between, ("linear", {**second, "itemsize": 4})))


_BILLS = {
    "feed_forward": _feed_forward,
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
    "residual_dropout": _joined,
    "residual_dropout_layer_norm": _joined,
}

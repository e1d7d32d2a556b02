"""Which operators take their time alike, and the sizes which decide about it.

Operators of one kind share one table of measured times. Its axes:

- products: ``(rows, inner, columns)``, and before them how many run side by side in a call;
- convolutions: ``(positions of the output, channels in, channels out)``, depthwise ones ``(planes, positions)``;
- attention: ``(heads of all sequences, tokens, features of a head)``;
- recurrence: ``(steps, sequences, hidden features)``;
- normalisation over features and softmax: ``(rows, features)``;
- batch normalisation, pooling and upsampling: ``(planes, positions of a plane)``;
- the gradient of an embedding: ``(values of the rows, values of the table)``;
- everything else: ``(bytes)``, read and written together.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Given = Mapping[str, Any]
Kind = tuple[str, tuple[int, ...]]

VIEW = "view"
"""The kind of what neither reads nor writes a value: it takes the time of a call."""


def kind_of(operator: str, given: Given, result: Any, size: int) -> Kind:
    """The kind of a call, and its sizes.

    Args:
        operator: its name with its namespace, without the mark of an operator in place.
        given: its arguments by name.
        result: what it returned.
        size: bytes that it reads and writes.
    """
    if not size:
        return VIEW, ()
    rule = _RULES.get(operator) or _RULES.get(operator.removesuffix("_backward"))
    if rule is None:
        return operator, (size,)
    kind, sizes = rule(given, result)
    return f"{operator}{kind}", tuple(max(one, 1) for one in sizes)


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else next(item for item in result if item is not None)


def _mm(given: Given, result: Any) -> Kind:
    left = given["mat1" if "mat1" in given else "self"]
    if left.layout is not torch.strided:
        return ", sparse", (left.shape[0], left.shape[1], result.shape[-1])
    return " of a transposed" * (left.stride(0) < left.stride(1)), (left.shape[0], left.shape[1], result.shape[-1])


def _bmm(given: Given, result: Any) -> Kind:
    left = given["batch1" if "batch1" in given else "self"]
    return "", (*left.shape, result.shape[-1])


def _linear(given: Given, result: Any) -> Kind:
    weight = given["weight" if "weight" in given else "weight1"]
    return "", (math.prod(given["input"].shape[:-1]), weight.shape[1], weight.shape[0])


def _linear_cross_entropy(given: Given, result: Any) -> Kind:
    weight = given["linear_weight"]
    return "", (given["input"].numel() // max(weight.shape[-1], 1), weight.shape[-1], weight.shape[0])


def _convolution(given: Given, result: Any) -> Kind:
    weight, groups, transposed = given["weight"], given["groups"], bool(given.get("transposed"))
    output = given["grad_output"] if "grad_output" in given else _first(result)
    values = given["input"] if transposed else output
    samples, _, *lengths = values.shape
    positions = samples * math.prod(lengths)
    inner, outer = weight.shape[1], weight.shape[0] // max(groups, 1)
    if transposed:
        overlapping = any(length > step for length, step in zip(weight.shape[2:], given["stride"], strict=False))
        return ", transposed" + ", overlapping" * overlapping, (positions, outer, inner)
    if groups > 1 and inner == 1:
        return ", depthwise", (samples * weight.shape[0], math.prod(lengths))
    area = math.prod(weight.shape[2:])
    return f", {'1x1' if area == 1 else '3x3' if area <= 9 else 'larger'}", (positions, inner, outer)


def _attention(given: Given, result: Any) -> Kind:
    query, key = given["query"].shape, given["key"]
    if key is None:  # nacre's takes one packed tensor of (L, N, 3 E) too
        tokens, batch, packed = query
        heads = given["packed_heads"]
        sizes = (batch * heads, tokens, packed // (3 * max(heads, 1)))
    else:
        sizes = (math.prod(query[:-2]), math.isqrt(query[-2] * key.shape[-2]), query[-1])
    return ", causal" * bool(given.get("is_causal")), sizes


def _recurrent(given: Given, result: Any) -> Kind:
    data = given["input"]
    hidden = given.get("weight_hh", given.get("weight1"))
    packed = given.get("batch_sizes")
    steps = packed.numel() if isinstance(packed, Tensor) else data.shape[0]
    rows = math.prod(data.shape[:-1])
    return "", (steps, rows // max(steps, 1), given.get("hidden_size") or hidden.shape[1])


def _rows(given: Given, result: Any) -> Kind:
    names = ("input", "self", "grad_output", "residual", "sum")
    values = next(given[name] for name in names if isinstance(given.get(name), Tensor))
    if "normalized_shape" in given:
        features = math.prod(given["normalized_shape"])
    else:
        features = values.shape[given["dim"]] if values.shape else 1
    return "", (values.numel() // max(features, 1), features)


def _classes(given: Given, result: Any) -> Kind:
    logits = given["input"]
    classes = logits.shape[1 if logits.dim() > 1 else 0]
    return "", (logits.numel() // max(classes, 1), classes)


def _planes(given: Given, result: Any) -> Kind:
    values = given.get("input", given.get("self"))
    if values is None:
        values = given["grad_output"]
    planes = math.prod(values.shape[:2])
    return "", (planes, values.numel() // max(planes, 1))


def _sum(given: Given, result: Any) -> Kind:
    """Over the rows, as a bias's gradient is, or another sum."""
    values, kept = given["self"], result.numel()
    rows = kept > 1 and values.shape[-1:] == result.shape[-1:]
    return (" over rows", (values.numel() // kept, kept)) if rows else ("", (values.numel() * values.element_size(),))


def _table(given: Given, result: Any) -> Kind:
    return "", (given["grad_output"].numel(), _first(result).numel())


def _clone(given: Given, result: Any) -> Kind:
    rearranged = not given["self"].is_contiguous() and result.is_contiguous()
    return ", rearranged" * rearranged, (2 * result.numel() * result.element_size(),)


_Rule = Callable[[Given, Any], Kind]

_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("aten::mm", "aten::addmm"), _mm),
    **dict.fromkeys(("aten::bmm", "aten::baddbmm"), _bmm),
    **dict.fromkeys(("nacre::linear", "nacre::feed_forward"), _linear),
    "nacre::linear_cross_entropy": _linear_cross_entropy,
    **dict.fromkeys(("aten::convolution", "nacre::conv2d"), _convolution),
    **dict.fromkeys(("aten::_scaled_dot_product_flash_attention_for_cpu", "nacre::attention"), _attention),
    **dict.fromkeys(("aten::mkldnn_rnn_layer", "nacre::lstm", "nacre::gru"), _recurrent),
    **dict.fromkeys(("aten::_softmax", "aten::_log_softmax", "aten::_softmax_backward_data"), _rows),
    "aten::_safe_softmax": _rows,
    **dict.fromkeys(("aten::_log_softmax_backward_data", "aten::native_layer_norm", "nacre::softmax"), _rows),
    **dict.fromkeys(("nacre::log_softmax", "nacre::layer_norm", "nacre::residual_dropout_layer_norm"), _rows),
    "nacre::cross_entropy": _classes,
    **dict.fromkeys(("aten::native_batch_norm", "aten::max_pool2d_with_indices", "aten::avg_pool2d"), _planes),
    **dict.fromkeys(("aten::upsample_nearest2d", "aten::upsample_bilinear2d"), _planes),
    "aten::sum": _sum,
    "aten::clone": _clone,
    **dict.fromkeys(("aten::embedding_dense_backward", "nacre::embedding_backward"), _table),
}

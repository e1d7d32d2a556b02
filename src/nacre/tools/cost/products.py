"""Matrix products among torch's operators: how many FLOPs each one does.

A rule takes the operator's arguments by name and its result, and returns the FLOPs (2 for a multiply-add) and those of
single elements.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nacre.tools.cost.stage import fake_tensor

Counted = tuple[int, int]
"""FLOPs of products, FLOPs of single elements."""

Rule = Callable[[Mapping[str, Any], Any], Counted | None]
"""None where the sizes do not decide."""


def _mm(given: Mapping[str, Any], result: Any) -> Counted | None:
    left, right = given["self"], given["mat2"]
    multiplied = _multiplied(left, right, result.numel() * left.shape[-1])
    return None if multiplied is None else (2 * multiplied, 0)


def _multiplied(left: Tensor, right: Tensor, dense: int) -> int | None:
    """Multiply-adds of a product: of a sparse matrix, one for each value that is there and each column or row."""
    for sparse, lines in ((left, right.shape[-1]), (right, left.shape[-2])):
        if sparse.layout is not torch.strided:
            values = sparse._nnz()
            return None if isinstance(sparse, fake_tensor()) and not values else values * lines
    return dense


def _sparse_addmm(given: Mapping[str, Any], result: Any) -> Counted | None:
    multiplied = _multiplied(given["mat1"], given["mat2"], result.numel() * given["mat1"].shape[-1])
    return None if multiplied is None else (2 * multiplied, result.numel() * (given["beta"] != 0))


def _grouped_mm(given: Mapping[str, Any], result: Any) -> Counted:
    """Each row times the matrix of its group; of two matrices, each group of columns times that of rows."""
    left, right = given["self"], given["mat2"]
    lines = right.shape[-1] if left.dim() == right.dim() == 2 else 0
    return 2 * (left.numel() * lines or result.numel() * left.shape[-1]), 0


def _mv(given: Mapping[str, Any], result: Any) -> Counted:
    return 2 * given["self"].numel(), 0


def _dot(given: Mapping[str, Any], result: Any) -> Counted:
    return 2 * given["self"].numel(), 0


def _plus(added: int, left: str, right: str) -> Rule:
    """A product added to a third tensor: one addition a value, unless ``beta`` is 0."""

    def rule(given: Mapping[str, Any], result: Any) -> Counted:
        inner, beta = given[left].shape[added], given.get("beta", 1)
        rows = 1 if given[right].dim() < 3 else given[right].shape[0]
        multiplied = result.numel() * inner * (rows if result.dim() == 2 and rows > 1 else 1)
        return 2 * multiplied, result.numel() * (beta != 0)

    return rule


def _trilinear(given: Mapping[str, Any], result: Any) -> Counted:
    """Two products one after the other, as torch takes them: the third factor comes when the first two are summed."""
    factors = [(given[f"i{place}"], given[f"expand{place}"]) for place in (1, 2, 3)]
    axes = range(factors[0][0].dim() + len(factors[0][1]))
    lengths = [_lengths(factor, expanded, axes) for factor, expanded in factors]
    summed = {axis for axis in given["sumdim"] if axis not in lengths[2]}
    flops = elementwise = 0
    between = {**lengths[0], **lengths[1]}
    for joined, over in ((between, summed), ({**between, **lengths[2]}, set(given["sumdim"]) - summed)):
        multiplied = math.prod(length for axis, length in joined.items() if joined is between or axis not in summed)
        flops, elementwise = (flops + 2 * multiplied, elementwise) if over else (flops, elementwise + multiplied)
    return flops, elementwise


def _lengths(factor: Any, expanded: Sequence[int], axes: Sequence[int]) -> dict[int, int]:
    """The lengths of the axes which a factor has, by their place among all."""
    present = [axis for axis in axes if axis not in expanded]
    return dict(zip(present, factor.shape, strict=True))


def _grid(given: Mapping[str, Any], result: Any) -> Counted:
    """Every place of the grid times the matrix."""
    inner = given["theta"].shape[-1]
    return 2 * result.numel() * inner, 0


def _windows(given: Mapping[str, Any], output: Any) -> int:
    """Multiply-adds of a convolution."""
    # every value of the output sums a window of the input; transposed, every value of the input fills one
    values = given["input"].numel() if given.get("transposed") else output.numel()
    return int(values * math.prod(given["weight"].shape[1:]))


def _convolution(given: Mapping[str, Any], result: Any) -> Counted:
    return 2 * _windows(given, result), result.numel() * (given["bias"] is not None)


def _convolution_backward(given: Mapping[str, Any], result: Any) -> Counted:
    multiplied = _windows(given, given["grad_output"])
    input_gradient, weight_gradient, bias_gradient = given["output_mask"]
    products = 2 * multiplied * (input_gradient + weight_gradient)
    return products, given["grad_output"].numel() * bias_gradient


def attention_sizes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[int, int, int, int]:
    """Scores of all heads, rows of scores, and the features of query and of value."""
    rows = math.prod(query[:-1])
    return rows * key[-2], rows, query[-1], value[-1]


def _attention(given: Mapping[str, Any], result: Any) -> Counted:
    scores, rows, features, value_features = attention_sizes(*(given[name].shape for name in ("query", "key", "value")))
    masked = sum(given.get(name) is not None for name in ("attn_mask", "attn_bias")) + bool(given.get("is_causal"))
    dropped = given.get("dropout_p", 0.0) > 0
    # scale of the query; maximum, subtract, exponential, sum, divide; logarithm and addition
    elementwise = rows * features + scores * (5 + masked + dropped) + 2 * rows
    return 2 * scores * (features + value_features), elementwise


def _attention_backward(given: Mapping[str, Any], result: Any) -> Counted:
    """The scores once more, and the products for dQ and dK over the features, for dV and dW over the values'."""
    scores, rows, features, value_features = attention_sizes(*(given[name].shape for name in ("query", "key", "value")))
    masked = sum(given.get(name) is not None for name in ("attn_mask", "attn_bias")) + bool(given.get("is_causal"))
    elementwise = scores * (7 + masked) + rows + 2 * rows * features
    return 2 * scores * (3 * features + 2 * value_features), elementwise


def _recurrent(given: Mapping[str, Any], result: Any) -> Counted:
    rows, hidden = math.prod(given["input"].shape[:-1]), given["hidden_size"]
    weights = given["weight0"].numel() + given["weight1"].numel()
    return 2 * rows * weights, 17 * rows * hidden


def _recurrent_backward(given: Mapping[str, Any], result: Any) -> Counted:
    rows, hidden = math.prod(given["input"].shape[:-1]), given["hidden_size"]
    weights = given["weight1"].numel() + given["weight2"].numel()
    return 4 * rows * weights, 28 * rows * hidden


PRODUCTS: dict[str, Rule] = {
    "mm": _mm,
    "bmm": _mm,
    "_int_mm": _mm,
    "_grouped_mm": _grouped_mm,
    "_sparse_addmm": _sparse_addmm,
    "mv": _mv,
    "dot": _dot,
    "vdot": _dot,
    "addmm": _plus(-1, "mat1", "mat2"),
    "_addmm_activation": _plus(-1, "mat1", "mat2"),
    "addmv": _plus(-1, "mat", "vec"),
    "baddbmm": _plus(-1, "batch1", "batch2"),
    "addbmm": _plus(-1, "batch1", "batch2"),
    "_trilinear": _trilinear,
    "affine_grid_generator": _grid,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": _recurrent_backward,
    **{
        f"_scaled_dot_product_{kind}": _attention
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    },
    **{
        f"_scaled_dot_product_{kind}_backward": _attention_backward
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    },
}
"""The operators of ``aten`` which multiply matrices, by their name."""

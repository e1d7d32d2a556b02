"""What torch's other operators do to single elements.

An operator without a rule of its own does one operation for each value that it returns (``pointwise``) or for each that
it reads (a reduction); one that only moves values does none, and a view does not even read them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nacre.layers import LAYERS

Rule = Callable[[Mapping[str, Any], Any], "int | None"]
"""None where the sizes do not decide."""


def first(result: Any) -> torch.Tensor:
    """The first of an operator's results."""
    return result if isinstance(result, torch.Tensor) else next(item for item in result if item is not None)


def _results(each: int) -> Rule:
    return lambda given, result: each * first(result).numel()


def _inputs(each: int) -> Rule:
    return lambda given, result: each * next(value.numel() for value in given.values() if _is_tensor(value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _layer(name: str, backward: bool, sizes: Callable[[Mapping[str, Any], Any], dict[str, Any]]) -> Rule:
    """An operator that computes what a layer of nacre does."""

    def rule(given: Mapping[str, Any], result: Any) -> int:
        bill = LAYERS[name].cost(**sizes(given, result))
        return bill.backward_elementwise_flops if backward else bill.elementwise_flops

    return rule


def _elements(given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    return {"elements": first(result).numel()}


def _gelu(given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    return {"elements": first(result).numel(), "tanh": given["approximate"] == "tanh"}


def _slices(given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    shape = first(result).shape
    features = shape[given["dim"]] if shape else 1
    return {"rows": first(result).numel() // max(features, 1), "features": features}


def _asked(given: Mapping[str, Any]) -> dict[str, bool]:
    """Which gradients a backward gives; of a forward all are taken to be asked for."""
    names = ("input_gradient", "weight_gradient", "bias_gradient")
    return dict(zip(names, given.get("output_mask", (True, True, True)), strict=True))


def _layer_norm(given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    features = math.prod(given["normalized_shape"])
    return {
        "rows": given["input"].numel() // max(features, 1),
        "features": features,
        "weight": given["weight"] is not None,
        "bias": given.get("bias") is not None,
        **_asked(given),
    }


def _group_norm(given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    rows = given["N"] * given["group"]
    return {
        "rows": rows,
        "features": given["input"].numel() // max(rows, 1),
        "weight": given["weight"] is not None,
        "bias": given.get("bias", given["weight"]) is not None,
        **_asked(given),
    }


def _batch_norm(given: Mapping[str, Any], result: Any) -> int:
    """Mean, variance and scale as LayerNorm, over the values of a channel; in evaluation subtract and scale."""
    values, channels = given["input"].numel(), given["input"].shape[1]
    affine = sum(given.get(name) is not None for name in ("weight", "bias"))
    training = given.get("training", given.get("train", False))
    return values * ((6 if training else 2) + affine) + (4 if training else 2) * channels


def _batch_norm_backward(given: Mapping[str, Any], result: Any) -> int:
    values, channels = given["input"].numel(), given["input"].shape[1]
    weight = given["weight"] is not None
    by_value = (2 + 7 * given["output_mask"][0] if given["train"] else 2) + weight + 2 * given["output_mask"][1]
    return values * (by_value + given["output_mask"][2]) + 2 * channels


def _rms_norm(given: Mapping[str, Any], result: Any) -> int:
    """Square, sum and scale, and the weight; division, eps and root for a row."""
    values = given["input"].numel()
    rows = values // max(math.prod(given["normalized_shape"]), 1)
    return values * (3 + (given["weight"] is not None)) + 3 * rows


def _rms_norm_backward(given: Mapping[str, Any], result: Any) -> int:
    values, weight = given["input"].numel(), given["weight"] is not None
    return values * (1 + given["output_mask"][0] * (5 + weight) + 2 * given["output_mask"][1])


def _loss_of_logits(given: Mapping[str, Any], result: Any) -> int:
    """1 - t, its product with the logit, log-sigmoid and subtraction; the weights' products; the sum."""
    weighted = (given["weight"] is not None) + 3 * (given["pos_weight"] is not None)
    return (4 + weighted + (given["reduction"] != 0)) * int(given["self"].numel())


def _sampled(given: Mapping[str, Any], result: Any) -> int:
    return (11, 0, 39)[given["interpolation_mode"]] * first(result).numel()


def _sampled_backward(given: Mapping[str, Any], result: Any) -> int | None:
    """Bilinear: 4 products are added to the input's gradient; 8 and their sums and factors make the grid's."""
    input_gradient, grid_gradient = given["output_mask"]
    if given["interpolation_mode"] != 0:
        return None
    return int(given["grad_output"].numel()) * (8 * input_gradient + 18 * grid_gradient)


def _searched(given: Mapping[str, Any], result: Any) -> int:
    """Halving n sorted values until one place is left: a comparison for each bit of n."""
    borders = given["sorted_sequence"] if "sorted_sequence" in given else given["boundaries"]
    return first(result).numel() * int(borders.shape[-1]).bit_length()


def _distances(given: Mapping[str, Any], result: Any) -> int:
    """Subtract, square and add for each feature; the root, or in the backward the slope, for each pair."""
    pairs = given["cdist"].numel() if "cdist" in given else first(result).numel()
    return pairs * (3 * int(given["x1"].shape[-1]) + 1)


def _pooled(given: Mapping[str, Any], result: Any) -> int:
    return first(result).numel() * math.prod(given["kernel_size"])


def _pooled_backward(given: Mapping[str, Any], result: Any) -> int:
    return given["grad_output"].numel() * math.prod(given["kernel_size"])


RULES: dict[str, Rule] = {
    "gelu": _layer("gelu", False, _gelu),
    "gelu_backward": _layer("gelu", True, _gelu),
    **{name: _layer(name, False, _elements) for name in ("relu", "silu", "tanh", "sigmoid")},
    **{f"{name}_backward": _layer(name, True, _elements) for name in ("silu", "tanh", "sigmoid")},
    "threshold_backward": _layer("relu", True, _elements),
    "_softmax": _layer("softmax", False, _slices),
    "_safe_softmax": _layer("softmax", False, _slices),
    "_log_softmax": _layer("log_softmax", False, _slices),
    "_softmax_backward_data": _layer("softmax", True, _slices),
    "_log_softmax_backward_data": _layer("log_softmax", True, _slices),
    "native_dropout": _results(4),
    "native_dropout_backward": _results(2),
    "native_layer_norm": _layer("layer_norm", False, _layer_norm),
    "native_layer_norm_backward": _layer("layer_norm", True, _layer_norm),
    "native_group_norm": _layer("layer_norm", False, _group_norm),
    "native_group_norm_backward": _layer("layer_norm", True, _group_norm),
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_batch_norm_with_update": _batch_norm,
    "_batch_norm_no_update": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
    "max_pool2d_with_indices": _pooled,
    "max_pool3d_with_indices": _pooled,
    "avg_pool2d": _pooled,
    "avg_pool3d": _pooled,
    "avg_pool2d_backward": _pooled_backward,
    "avg_pool3d_backward": _pooled_backward,
    "max_pool2d_with_indices_backward": lambda given, result: given["grad_output"].numel(),
    "max_pool3d_with_indices_backward": lambda given, result: given["grad_output"].numel(),
    "_adaptive_avg_pool2d": _inputs(1),
    "_adaptive_avg_pool2d_backward": _results(1),
    "_adaptive_avg_pool3d": _inputs(1),
    "_adaptive_avg_pool3d_backward": _results(1),
    "adaptive_max_pool2d": _inputs(1),
    "adaptive_max_pool3d": _inputs(1),
    "adaptive_max_pool2d_backward": _inputs(1),
    "adaptive_max_pool3d_backward": _inputs(1),
    "fractional_max_pool2d": _pooled,
    "fractional_max_pool3d": _pooled,
    "fractional_max_pool2d_backward": _inputs(1),
    "fractional_max_pool3d_backward": _inputs(1),
    "embedding_dense_backward": lambda given, result: given["grad_output"].numel(),
    "_embedding_bag": lambda given, result: given["indices"].numel() * given["weight"].shape[1],
    "_embedding_bag_backward": lambda given, result: given["indices"].numel() * given["grad"].shape[1],
    "_embedding_bag_dense_backward": lambda given, result: given["indices"].numel() * given["grad"].shape[1],
    "_embedding_bag_per_sample_weights_backward": lambda given, result: (
        2 * given["indices"].numel() * given["grad"].shape[1]
    ),
    "_prelu_kernel": _results(2),
    "_prelu_kernel_backward": _results(3),
    "nll_loss_forward": lambda given, result: 2 * given["target"].numel(),
    "nll_loss2d_forward": lambda given, result: 2 * given["target"].numel(),
    "nll_loss_backward": lambda given, result: given["target"].numel(),
    "nll_loss2d_backward": lambda given, result: given["target"].numel(),
    "mse_loss": _inputs(3),
    "mse_loss_backward": _results(3),
    "smooth_l1_loss": _inputs(4),
    "smooth_l1_loss_backward": _results(4),
    "huber_loss": _inputs(4),
    "huber_loss_backward": _results(4),
    "binary_cross_entropy": _inputs(7),
    "binary_cross_entropy_with_logits": _loss_of_logits,
    "soft_margin_loss": lambda given, result: (4 + (given["reduction"] != 0)) * given["self"].numel(),
    "soft_margin_loss_backward": _results(6),
    "_cdist_forward": _distances,
    "_cdist_backward": _distances,
    "dist": _inputs(3),
    "renorm": _inputs(3),
    "addr": _results(2),
    "linalg_cross": _results(3),
    "trace": lambda given, result: min(given["self"].shape),
    "searchsorted": _searched,
    "bucketize": _searched,
    "scatter_reduce": lambda given, result: given["src"].numel(),
    "binary_cross_entropy_backward": _results(5),
    "var": _inputs(4),
    "std": _inputs(4),
    "var_mean": _inputs(4),
    "std_mean": _inputs(4),
    "logsumexp": _inputs(4),
    "linalg_vector_norm": _inputs(2),
    "norm": _inputs(2),
    "_thnn_fused_lstm_cell": _results(17),
    "_thnn_fused_lstm_cell_backward_impl": _results(7),
    "_thnn_fused_gru_cell": _results(16),
    "_thnn_fused_gru_cell_backward": _results(4),
    "index_put": lambda given, result: given["values"].numel() * bool(given.get("accumulate")),
    "_index_put_impl": lambda given, result: given["values"].numel() * bool(given.get("accumulate")),
    "_unsafe_index_put": lambda given, result: given["values"].numel() * bool(given.get("accumulate")),
    "index_add": lambda given, result: given["source"].numel(),
    "scatter_add": lambda given, result: given["src"].numel(),
    "upsample_bilinear2d": _results(11),
    "upsample_bilinear2d_backward": _inputs(8),
    "upsample_bicubic2d": _results(39),
    "upsample_linear1d": _results(3),
    "upsample_linear1d_backward": _inputs(4),
    "upsample_trilinear3d": _results(31),
    "upsample_trilinear3d_backward": _inputs(16),
    "upsample_bicubic2d_backward": _inputs(32),
    "grid_sampler_2d": _sampled,
    "grid_sampler_2d_backward": _sampled_backward,
    "_weight_norm_interface": _inputs(3),
    "_weight_norm_interface_backward": _inputs(6),
    "lerp": _results(3),
    "addcmul": _results(3),
    "addcdiv": _results(3),
}
"""Operators whose work on an element is more than one operation, by their name."""

PER_INPUT = frozenset(
    ("sum nansum mean amax amin aminmax max min any all prod argmax argmin count_nonzero cumsum cumprod logcumsumexp"
     " cummax cummin histc bincount upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward"
    ).split()
)  # fmt: skip
"""Reductions and running sums: one operation for each value that they read."""

PER_RESULT = frozenset(
    ("bernoulli uniform normal normal_functional rand randn rand_like randn_like exponential"
     " log_normal geometric cauchy rsub masked_fill tril triu _fused_dropout glu_backward"
     " leaky_relu_backward hardtanh_backward hardswish_backward hardsigmoid_backward elu_backward softplus_backward"
     " log_sigmoid_forward log_sigmoid_backward mish_backward glu native_dropout_backward logit_backward add"
     " masked_scale isfinite hardswish softshrink_backward hardshrink_backward rrelu_with_noise"
     " rrelu_with_noise_backward"
     " floor_divide __rshift__ __lshift__ isin bitwise_not").split()
)  # fmt: skip
"""One operation for each value that they return; most such operators say so themselves."""

MOVES = frozenset(
    ("clone copy _to_copy cat stack index_select gather index _unsafe_index index_copy slice_scatter select_scatter"
     " select_backward slice_backward diagonal_backward diagonal_scatter as_strided_scatter scatter constant_pad_nd pad"
     " reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
     " reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward"
     " replication_pad2d_backward replication_pad3d_backward roll"
     " flip repeat repeat_interleave embedding unfold_backward im2col col2im pixel_shuffle pixel_unshuffle"
     " channel_shuffle native_channel_shuffle upsample_nearest1d upsample_nearest2d upsample_nearest3d"
     " max_unpool2d max_unpool3d index_fill masked_select nonzero"
     " _pack_padded_sequence _pack_padded_sequence_backward expand_copy view_copy resize fill zero zeros ones full"
     " zeros_like ones_like full_like new_zeros new_ones new_full arange linspace eye scalar_tensor diag_embed"
     " tril_indices triu_indices random randint randint_like randperm complex view_as_real_copy set_data rot90"
     " _local_scalar_dense item lift_fresh_copy"
     " _nested_tensor_from_mask split_with_sizes_copy unbind_copy block_diag meshgrid lift_fresh").split()
)  # fmt: skip
"""They move or set values and compute none."""

FREE = frozenset(
    ("empty empty_strided empty_like new_empty new_empty_strided empty_permuted detach alias view _unsafe_view reshape"
     " _reshape_alias lift device sym_size sym_stride sym_numel sym_storage_offset is_contiguous is_same_size stride"
     " size transpose unsqueeze squeeze t swapaxes swapdims as_strided unsafe_split unsafe_split_with_sizes"
     " record_stream _version set is_pinned _linalg_check_errors").split()
)  # fmt: skip
"""They neither read nor write a value."""

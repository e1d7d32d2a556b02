"""The rules of a linear map before a cross entropy, and of the options that set its chunks."""

from typing import Any

import torch
from torch import Tensor

from nacre.core import check


def validate_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Raises RuntimeError unless the linear map fits the input."""
    shape = check.shape
    if input.dim() not in (1, 2):
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {input.dim()} in the shape {shape(input)}. "
            "Flatten the leading dimensions of input and target into one."
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()} in the shape "
            f"{shape(linear_weight)}. It is (classes, in_features)."
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), got "
            f"{input.shape[-1]} and {linear_weight.shape[-1]}, respectively, in the shapes {shape(input)} and "
            f"{shape(linear_weight)}."
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {shape(linear_bias)} beside a "
            f"linear_weight of shape {shape(linear_weight)}."
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {shape(linear_weight)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {shape(input)}. Did you mean input.unsqueeze(0)?"
        )


def chosen_chunk(options: Any, input: Tensor, linear_weight: Tensor) -> int | None:
    """The rows of a chunk which the options ask for; None where they leave it to nacre.

    Raises:
        ValueError: ``batch_chunk_size`` and ``chunking_method`` ask for different chunks.
        RuntimeError: no sums can be kept in ``acc_dtype``.
    """
    if options is None:
        return None
    half = input.dtype in (torch.float16, torch.bfloat16)
    if options.acc_dtype not in (None, input.dtype, *((torch.float32,) if half else ())):
        rule = "acc_dtype is the dtype of the input, or float32 for a float16 or bfloat16 input"
        raise check.error(RuntimeError, rule, f"acc_dtype = {options.acc_dtype} and an input of dtype {input.dtype}")
    if options.chunking_method == "auto":
        return options.batch_chunk_size
    if options.chunking_method is None:
        return options.batch_chunk_size or max(1, input.shape[0])
    rows, features = input.shape
    wanted = -(-rows // -(-linear_weight.shape[0] // features))
    parts = int(options.chunking_method.partition(":")[2] or 1)
    chunk = max(1, min((1 << (wanted - 1).bit_length()) // parts, rows))
    if options.batch_chunk_size not in (None, chunk):
        rule = f"chunking_method {options.chunking_method!r} makes chunks of {chunk} rows here"
        raise check.error(ValueError, rule, f"batch_chunk_size = {options.batch_chunk_size}", "Pass only one of them.")
    return chunk

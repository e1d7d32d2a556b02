"""The rules of a target and its class weights, which both losses share."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nacre.core import check
from nacre.core.choice import FLOATS
from nacre.core.dispatch import PLAIN


def reduction_name(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """``"none"``, ``"mean"`` or ``"sum"``, from torch's present and legacy arguments.

    Raises:
        ValueError: no such reduction.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return ("none", "mean", "sum")[torch.nn._reduction.get_enum(reduction)]


def plain(input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> bool:
    """Whether this is what nearly every call is: rows of logits and a class index each, as they should be."""
    return (
        weight is None
        and type(input) in PLAIN
        and type(target) in PLAIN
        and input.dim() == 2
        and input.dtype in FLOATS
        and target.dtype is torch.int64
        and target.shape == input.shape[:1]
        and input.shape[1] > 0
        and input.device == target.device
        and input.layout is target.layout is torch.strided
        and not (input.is_nested or target.is_nested)
        and label_smoothing <= 1
    )


def validated(
    name: str,
    logits: tuple[int, ...],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The target in the form that the ops take, checked against logits of the given shape.

    Raises:
        ValueError: the batch sizes differ.
        RuntimeError: another shape, dtype or device does not fit.
    """
    if label_smoothing > 1:
        rule = "label_smoothing must be between 0.0 and 1.0, the share of the target spread over all classes"
        raise check.error(RuntimeError, rule, f"label_smoothing = {label_smoothing}")
    check.same_device(name, input=input, target=target, weight=weight)
    probabilities = tuple(target.shape) == tuple(logits)
    if probabilities:
        _check_probabilities(target, ignore_index)
    else:
        target = _class_indices(logits, target, label_smoothing)
    if weight is not None:
        _check_weight(name, logits[1 if len(logits) > 1 else 0], input, weight, probabilities)
    return target


def _check_probabilities(target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise check.error(
            RuntimeError,
            "Expected floating point type for target with class probabilities, which is what a target of the shape of "
            "the logits holds",
            f"a target of shape {check.shape(target)} and dtype {target.dtype}",
            "A target of class indices has that shape without the dimension of the classes.",
        )
    if ignore_index >= 0:
        raise check.error(
            RuntimeError,
            "ignore_index is not supported for floating point target, which has no class to ignore",
            f"ignore_index = {ignore_index} and a target of dtype {target.dtype}",
        )


def _class_indices(logits: tuple[int, ...], target: Tensor, label_smoothing: float) -> Tensor:
    tokens = (*logits[:1], *logits[2:]) if len(logits) > 1 else ()
    if len(logits) == 1 and target.dim() == 1:
        if target.shape[0] != 1:
            raise check.error(
                ValueError, "logits of one dimension, the classes, take one index", _shapes(logits, target)
            )
        if not label_smoothing > 0:
            target = target[0]
    if len(logits) > 1 and (target.dim() == 0 or target.shape[0] != logits[0]):
        batch = target.shape[0] if target.dim() > 0 else 0
        rule = f"Expected input batch_size ({logits[0]}) to match target batch_size ({batch})"
        raise check.error(ValueError, rule, _shapes(logits, target))
    if tuple(target.shape) != tokens:
        rule = f"Expected target size {tokens} for class indices, or {tuple(logits)} for class probabilities"
        raise check.error(RuntimeError, rule, _shapes(logits, target))
    if target.dtype is torch.uint8 and len(logits) <= 2:
        return target.long()
    if target.dtype is not torch.int64:
        rule = "expected target dtype to be Long or Byte for class indices, Long for logits of 3 or more dimensions"
        raise check.error(RuntimeError, rule, f"a target of dtype {target.dtype}", "Convert it with .long().")
    return target


def _shapes(logits: tuple[int, ...], target: Tensor) -> str:
    return f"logits of shape {tuple(logits)} and a target of shape {check.shape(target)}"


def _check_weight(name: str, classes: int, input: Tensor, weight: Tensor, probabilities: bool) -> None:
    if tuple(weight.shape) != (classes,):
        rule = f"weight tensor should be defined either for all {classes} classes or no classes"
        raise check.error(RuntimeError, rule, f"a weight of shape {check.shape(weight)}")
    if probabilities:
        return
    check.same_dtype(name, input=input, weight=weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise check.error(
            RuntimeError,
            f"{name} is not differentiable with respect to the class weights where the target holds class indices",
            "a weight which requires its gradient",
            "Pass weight.detach().",
        )


def explain_bad_index(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same formula, in which a class index out of range raises what torch's loss raises for it.

    The lookup of the target's logit finds the bad index, so that good ones are not searched beforehand.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
    """

    @functools.wraps(forward)
    def explaining(*arguments: Any) -> Any:
        try:
            return forward(*arguments)
        except RuntimeError as error:
            found = re.search(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)", str(error))
            if found is None:
                raise
            index, classes = map(int, found.groups())
            raise check.error(
                IndexError,
                f"Target {index} is out of bounds: a target is the index of a class, or ignore_index",
                f"{index} where the classes are 0 to {classes - 1}",
            ) from None

    return explaining

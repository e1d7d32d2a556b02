"""The cross-entropy loss of a linear map, which never holds every logit, and its functional form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from nacre.core import check
from nacre.core.choice import cpp_kernel, torch_instead, unserved
from nacre.core.flop_counter import count_flops
from nacre.core.op import Op
from nacre.core.tracing import Proxy, traced
from nacre.layers.cross_entropy import formula, linear_formula, targets
from nacre.layers.cross_entropy.linear_base import BASE
from nacre.layers.cross_entropy.linear_checks import chosen_chunk, validate_linear


def _fake(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    reduction: str, *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.promote_types(formula.loss_dtype(input, target, weight), torch.float32)
    rows, places = input.shape[0], linear_weight.shape[1:-1]
    loss = input.new_empty((rows, *places) if reduction == "none" else (), dtype=dtype)
    statistics = [input.new_empty((rows, 1, *places), dtype=dtype) for _ in range(2)]
    owners = zip((input, linear_weight, linear_bias), settings[-1], strict=True)
    formed = [of.new_empty(of.shape) if of is not None and form else input.new_empty(0) for of, form in owners]
    return loss, *statistics, *formed


def _fake_backward(
    grad: Tensor, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor,
    weight: Tensor | None, *settings: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    owners = zip((input, linear_weight, linear_bias, target, weight), settings[-1], strict=True)
    return tuple(None if of is None or not needed else of.new_empty(of.shape) for of, needed in owners)


def _last_backward(grad: Tensor, saved: Sequence[Any], needs: list[bool]) -> tuple[Tensor | None, ...] | None:
    """Multiplies the gradients that the forward formed where they lie: they are as large as the parameters."""
    if not linear_formula.are_formed(needs, saved[_FORMED]):
        return None
    formed = [gradient if need else None for gradient, need in zip(saved[-3:], needs, strict=False)]
    if grad.device.type != "cpu" or grad.item() != 1:  # on other devices, asking would wait for them
        for gradient in formed:
            if gradient is not None:
                gradient.mul_(grad)
    return (*formed, None, None)


_SAVED = (
    *("input", "linear_weight", "linear_bias", "target", "weight", "reduction", "ignore_index", "label_smoothing"),
    *("chunk", "formed", "maximum", "log_sum", "formed_input", "formed_linear_weight", "formed_linear_bias"),
)
_FORMED = _SAVED.index("formed")

_op = Op(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " str reduction, SymInt ignore_index, float label_smoothing, int? chunk, bool[] formed)"
    " -> (Tensor loss, Tensor maximum, Tensor log_sum,"
    " Tensor formed_input, Tensor formed_linear_weight, Tensor formed_linear_bias)",
    forward=targets.explain_bad_index(linear_formula.forward),
    backward=linear_formula.backward,
    last_backward=_last_backward,
    saved=_SAVED,
    gradients=("input", "linear_weight", "linear_bias", "target", "weight"),
    autocast={"cpu": "lower", "cuda": "lower"},
    autocast_keeps=("target", "weight"),
    kernels=[
        cpp_kernel(
            {
                "class indices": lambda _, w, b, target, *__: not target.is_floating_point(),
                "one place": lambda _, linear_weight, *__: linear_weight.dim() == 2,
                "class weights of the rows' dtype, without a gradient": lambda input, w, b, y, weight, *_: (
                    weight is None or (weight.dtype is input.dtype and not weight.requires_grad)
                ),
            },
            dtypes=(torch.float32, torch.float64),
        )
    ],
    fake=_fake,
    fake_backward=_fake_backward,
)
count_flops(_op)


class LinearCrossEntropyLoss(BASE):
    r"""The last linear map of a classifier and its cross entropy in one: for vocabularies whose logits would not fit.

    .. math:: z = W x + b, \qquad \ell = -\sum_c w_c\, t_c \log \frac{e^{z_c}}{\sum_k e^{z_k}}

    The logits z exist for one chunk of rows at a time, forward and backward. Targets, class weights w, label smoothing
    and reductions are those of :class:`nacre.CrossEntropyLoss`.

    Args:
        in_features: size of each input row, D.
        num_classes: C, the number of classes.
        out_features: sizes (d_1, ..., d_K) of the places with a distribution of their own. Default: one place, ().
        bias: add a learned bias to the logits. Default: False.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        weight: of each class, shape (C,). Default: 1 for every class.
        ignore_index: the target whose tokens count for nothing; class indices only. Default: None, which means -100.
        label_smoothing: the share of each target that is spread evenly over all classes, 0 to 1. Default: 0.
        options: a ``torch.nn.LinearCrossEntropyOptions``. Its ``batch_chunk_size`` and ``chunking_method`` set the rows
            of a chunk; with ``"auto"``, as with None, a chunk has as many logits as the input has elements, and 256
            rows at least. The other fields change nothing: sums over chunks are always kept in float32 or better,
            and the backward can always be run again. Default: None.

    Shape:
        - input: (in_features,) or (N, in_features)
        - target: class indices of shape (), (N,) or (N, d_1, ..., d_K); or probabilities of shape (C,), (N, C) or
          (N, C, d_1, ..., d_K)
        - output: a scalar; with ``reduction="none"`` the shape of class indices

    Numerics:
        float16 and bfloat16 logits are rounded once, as a linear layer's; everything after them is computed in float32.
        The largest logit is subtracted first, so logits of any size are safe. Gradients are formed for a gradient of
        the loss of 1 and then multiplied by the real one.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: the batch sizes of input and target differ, there is no such reduction, or two options disagree.
        RuntimeError: another shape, dtype or device does not fit, or ``label_smoothing`` is outside 0 to 1.

    Cost:
        C D parameters (and C with a bias) for each place, O(N D C) time. The forward forms the gradients of input and
        parameters as well, so that no logit is computed twice; kept for the backward are these, the input, the target
        and 2 numbers a token. Without ``torch.no_grad`` an evaluation pays for them too. With ``reduction="none"``,
        gradients to targets or class weights, half precision or autocast no gradients are formed or kept, and the
        backward computes the logits again.

    Paper:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.

    Example:
        >>> import torch, nacre
        >>> loss = nacre.LinearCrossEntropyLoss(8, 1000)
        >>> loss(torch.zeros(3, 8), torch.tensor([1, 20, 300]))  # log(1000), as no class is preferred
        tensor(6.9078, grad_fn=<...>)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input, target)
        places = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*places, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(places),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """The cross entropy between linear logits and targets; see :class:`nacre.LinearCrossEntropyLoss`.

    Args:
        input: rows of shape (in_features,) or (N, in_features).
        linear_weight: of shape (C, in_features) or (C, d_1, ..., d_K, in_features).
        target: class indices of shape (), (N,) or (N, d_1, ..., d_K), or probabilities in the shape of the logits.
        linear_bias: of shape (C,) or (C, d_1, ..., d_K). Default: none.
        weight: of each class, shape (C,). Default: 1 for every class.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        ignore_index: the target whose tokens count for nothing; class indices only. Default: None, which means -100.
        label_smoothing: the share of each target that is spread evenly over all classes, 0 to 1. Default: 0.
        options: a ``torch.nn.LinearCrossEntropyOptions``. Default: None.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: the batch sizes of input and target differ, there is no such reduction, or two options disagree.
        RuntimeError: another shape, dtype or device does not fit.

    Example:
        >>> import torch, nacre
        >>> x, w = torch.ones(2, 3), torch.zeros(4, 3)
        >>> nacre.functional.linear_cross_entropy(x, w, torch.tensor([0, 3]))
        tensor(1.3863)
    """
    reduction = targets.reduction_name(reduction)
    validate_linear(input, linear_weight, linear_bias)
    batched, logits = input.dim() == 2, (*input.shape[:-1], *linear_weight.shape[:-1])
    if ignore_index is not None and tuple(target.shape) == logits:
        rule = "ignore_index cannot be specified when target contains probabilities"
        raise check.error(RuntimeError, rule, f"ignore_index = {ignore_index} and a target of the shape of the logits")
    ignore_index = -100 if ignore_index is None else ignore_index
    if reason := _unserved(input, linear_weight, linear_bias, target, weight, options):
        return torch_instead(
            "linear_cross_entropy",
            reason,
            _with_torch,
            *(input, linear_weight, linear_bias, target, weight),
            *(reduction, ignore_index, label_smoothing, options),
        )
    check.same_dtype("linear_cross_entropy", input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    check.same_device("linear_cross_entropy", input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    target = targets.validated("linear_cross_entropy", logits, input, target, weight, ignore_index, label_smoothing)
    rows, classes = (input, target) if batched else (input.unsqueeze(0), target.unsqueeze(0))
    chunk = chosen_chunk(options, rows, linear_weight)
    smoothing = max(label_smoothing, 0.0)
    formed = _gradients_to_form(rows, linear_weight, linear_bias, classes, weight, reduction)
    loss = _op(rows, linear_weight, linear_bias, classes, weight, reduction, ignore_index, smoothing, chunk, formed)
    if not check.under_autocast(input):
        loss = loss.to(formula.loss_dtype(input, target, weight))
    return loss if batched or reduction != "none" else loss.squeeze(0)


def _gradients_to_form(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
) -> list[bool]:
    """Which gradients the forward forms: those that will be needed, where one number is all that they wait for.

    Not in half precision: there 1 / N may be rounded to nothing before a large gradient of the loss would save it.
    """
    later = (
        reduction == "none"
        or not torch.is_grad_enabled()
        or input.itemsize < 4
        or check.under_autocast(input)
        or target.requires_grad
        or (weight is not None and weight.requires_grad)
        or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    )
    return [not later and of is not None and of.requires_grad for of in (input, linear_weight, linear_bias)]


def _unserved(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Any,
) -> str:
    if linear_weight.shape[0] == 0:
        return "no classes"
    if is_tracing():
        return "torch.jit.trace, which records no list of bools"
    if options is not None and input.dtype != linear_weight.dtype:
        return "tensors of two dtypes under options"
    return unserved(input, linear_weight, linear_bias, weight, target if target.is_floating_point() else None)


def _with_torch(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    options: Any,
) -> Tensor:
    if options is not None:
        return torch.nn.functional.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
    return torch.nn.functional.cross_entropy(
        logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1]), target, weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip

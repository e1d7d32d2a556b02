"""How to write a layer of your own, and how to know that its gradients are right.

Three layers, each written twice. The plain version is a module whose forward consists of torch operations: autograd
works out the gradients. The hand-written version is a ``torch.autograd.Function`` which says itself what the gradients
are, as every layer of nacre does: it can save memory or call a fast kernel, and it can be wrong. ``nacre.gradcheck``
compares it with finite differences and with autograd of the plain version. At the end two mistakes are planted, and
found.

Run it with ``python examples/custom_layer.py``.
"""

import torch
from torch import Tensor, nn

import nacre

# ---------------------------------------------------------------------------------------------------------- Linear


class PlainLinear(nn.Module):
    """y = x W' + b, with autograd's gradients."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class LinearFunction(torch.autograd.Function):
    """The same with its gradients written down. With g = dL/dy, one row for each row of x:

    dx = g W        dW = g' x        db = sum of the rows of g
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.t() + bias

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Keep what the backward needs. Inputs are best: they are in memory anyway, and autograd can differentiate
        # a backward that starts from them once more.
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        # One gradient for each argument of forward, in the same order and of the same shape.
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.sum(0)


class HandWrittenLinear(PlainLinear):
    def forward(self, x: Tensor) -> Tensor:
        return LinearFunction.apply(x, self.weight, self.bias)


# ------------------------------------------------------------------------------------------------------- LayerNorm


class PlainLayerNorm(nn.Module):
    """y = n w + b, where n is each row of x shifted to mean 0 and scaled to variance 1."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.eps)[0] * self.weight + self.bias


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each row of x with mean 0 and variance 1, and the factor which scaled it."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale


class LayerNormFunction(torch.autograd.Function):
    """x enters its row's mean and variance too, so the gradient has three terms. With h = g w = dL/dn:

    dx = scale (h - mean(h) - n mean(h n))        dw = sum of g n        db = sum of g
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return normalise(x, eps)[0] * weight + bias

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, scale = normalise(x, ctx.eps)
        h = grad * weight
        grad_x = scale * (h - h.mean(-1, keepdim=True) - n * (h * n).mean(-1, keepdim=True))
        rows = tuple(range(grad.dim() - 1))
        return grad_x, (grad * n).sum(rows), grad.sum(rows), None  # eps is a number and has no gradient


class HandWrittenLayerNorm(PlainLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps)


# --------------------------------------------------------------------------------------------------------- Dropout


class PlainDropout(nn.Module):
    """Zeroes each element with probability p while training, and scales the others to keep the mean."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x * draw_mask(x, self.p) if self.training else x


def draw_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p). Drawn from torch's generator, which the check sets back each time."""
    return (torch.rand_like(x) >= p) / (1 - p)


class DropoutFunction(torch.autograd.Function):
    """y = x m with a random mask m, so dx = g m: the very mask of the forward, which has to be kept."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        # forward and setup_context may be one function where something drawn inside must be saved
        mask = draw_mask(x, p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class HandWrittenDropout(PlainDropout):
    def forward(self, x: Tensor) -> Tensor:
        return DropoutFunction.apply(x, self.p) if self.training else x


# --------------------------------------------------------------------------------------------- two planted mistakes


class DoubledLinearFunction(LinearFunction):
    """The weight's gradient is twice what it should be."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        grad_x, grad_weight, grad_bias = LinearFunction.backward(ctx, grad)
        return grad_x, 2 * grad_weight, grad_bias


class DoubledLinear(PlainLinear):
    def forward(self, x: Tensor) -> Tensor:
        return DoubledLinearFunction.apply(x, self.weight, self.bias)


class ForgetfulLayerNormFunction(LayerNormFunction):
    """The term mean(h) is forgotten: x_i also moves the mean of its row."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, scale = normalise(x, ctx.eps)
        h = grad * weight
        _, *others = LayerNormFunction.backward(ctx, grad)
        return scale * (h - n * (h * n).mean(-1, keepdim=True)), *others


class ForgetfulLayerNorm(PlainLayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return ForgetfulLayerNormFunction.apply(x, self.weight, self.bias, self.eps)


# ------------------------------------------------------------------------------------------------------- the check


def check_right_layers() -> list[nacre.GradientReport]:
    """The six layers: each plain one on its own, each hand-written one beside the plain one as well."""
    torch.manual_seed(0)
    rows = torch.randn(6, 4)
    pairs = [
        (PlainLinear(4, 3), HandWrittenLinear(4, 3)),
        (PlainLayerNorm(4), HandWrittenLayerNorm(4)),
        (PlainDropout(0.5), HandWrittenDropout(0.5)),
    ]
    reports = []
    for plain, hand_written in pairs:
        move_from_start(hand_written)
        reports.append(nacre.gradcheck(plain, rows))
        # the reference takes over the parameters of the layer that is checked
        reports.append(nacre.gradcheck(hand_written, rows, reference=plain, second_order=True))
    return reports


def check_wrong_layers() -> list[nacre.GradientReport]:
    """The two layers with a planted mistake."""
    torch.manual_seed(0)
    rows = torch.randn(6, 4)
    norm = ForgetfulLayerNorm(4)
    move_from_start(norm)
    return [nacre.gradcheck(DoubledLinear(4, 3), rows), nacre.gradcheck(norm, rows)]


def move_from_start(layer: nn.Module) -> None:
    """A weight that is still 1, or a bias that is still 0, would hide a forgotten factor."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def main() -> int:
    right, wrong = check_right_layers(), check_wrong_layers()
    print("Each layer in one line:\n")
    for report in right:
        print(report.summary())
    print("\nWhat a whole report looks like:\n")
    print(nacre.gradcheck(LinearFunction, torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)))
    print("\nAnd the two planted mistakes:\n")
    for report in wrong:
        print(f"{report}\n")
    return 0 if all(right) and not any(wrong) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Linear: each row of D values becomes a row of E values, every one a weighted sum of all D.

Forward, for a row x (D), a weight W (E, D) and a bias b (E):

    y_j = sum_i W_ji x_i + b_j        y = x W' + b

Backward, with g = dL/dy. Because dy_j / dx_i = W_ji, dy_j / dW_ji = x_i and dy_j / db_j = 1:

    dL/dx_i  = sum_j g_j W_ji         dx = g W
    dL/dW_ji = g_j x_i                dW = g' x, summed over rows
    dL/db_j  = g_j                    db = sum over rows of g

With the rows stacked into matrices X (N, D) and G (N, E), the sums over rows become the products G' X and 1' G. Leading
dimensions of any number are rows one after the other.
"""

import torch
from torch import Tensor


def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    x = rows(input)
    y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return y.reshape(*input.shape[:-1], weight.shape[0]), (input, weight)


def backward(grad: Tensor, saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, weight = saved
    g = rows(grad)
    grad_input = torch.mm(g, weight).reshape(input.shape) if needs[0] else None
    grad_weight = torch.mm(g.t(), rows(input)) if needs[1] else None
    grad_bias = g.sum(0) if needs[2] else None
    return grad_input, grad_weight, grad_bias


def rows(tensor: Tensor) -> Tensor:
    """(N, D) of a tensor of shape (*, D); a single row where there are no leading dimensions."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)

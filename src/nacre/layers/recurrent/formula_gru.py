"""GRU: a state which gates reset and renew; one layer in one direction.

Forward, at step t with s the step before it (* multiplies element by element, ^T transposes):

    a = W_ih x_t + b_ih        b = W_hh h_s + b_hh        three parts each: a = (a_r, a_z, a_n), b = (b_r, b_z, b_n)
    r = sigmoid(a_r + b_r)     z = sigmoid(a_z + b_z)     n = tanh(a_n + r * b_n)
    h_t = (1 - z) * n + z * h_s

W_ih x_t needs no state: it is one product for the whole sequence.

Backward, from the last step to the first. A step receives dh_t, the gradient of its output and what step t + 1 passed
to its state. Each sum's gradient is dh_t times a slope which is known for all steps beforehand:

    da_z = db_z = dh_t * (h_s - n) z (1 - z)      da_n = dh_t * (1 - z) (1 - n^2)
    da_r = db_r = dh_t * (1 - z) (1 - n^2) b_n r (1 - r)      db_n = dh_t * (1 - z) (1 - n^2) r

The step passes on dh_s = dh_t * z + W_hh^T db. The other gradients are sums over all steps, and each of them is one
product for the whole sequence:

    dx = W_ih^T da      dW_ih = sum of da x^T      dW_hh = sum of db h_s^T      db_ih = sum of da      db_hh = sum of db

Kept are r, z, n and b_n, and the states apart from the output, which its user may write into.
"""

import torch
from torch import Tensor

from nacre.layers.recurrent.sequence import gradient, join, order, replace, split, states_before


def forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reverse: bool,
) -> tuple[tuple[Tensor, ...], tuple]:
    # half precision is computed in float32 from the first step to the last, and the results are rounded once
    dtype = torch.promote_types(input.dtype, torch.float32)
    sums = input.to(dtype) @ weight_ih.to(dtype).T
    if bias_ih is not None:
        sums = sums + bias_ih.to(dtype)
    recurrent = weight_hh.to(dtype).T
    steps = split(sums, batch_sizes)
    outputs, gates = list(steps), list(steps)
    h = h0.to(dtype)
    for t in order(len(steps), reverse):
        h_before = h[: steps[t].shape[0]]
        a_r, a_z, a_n = steps[t].chunk(3, -1)
        b = h_before @ recurrent
        if bias_hh is not None:
            b = b + bias_hh.to(dtype)
        b_r, b_z, b_n = b.chunk(3, -1)
        r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
        n = (a_n + r * b_n).tanh()
        gates[t] = torch.cat((r, z, n, b_n), -1)
        outputs[t] = n + z * (h_before - n)
        h = replace(h, outputs[t])
    output = join(outputs, batch_sizes).to(h0.dtype)
    kept = join(gates, batch_sizes).to(input.dtype), output
    tensors = input, h0, weight_ih, weight_hh, bias_ih, bias_hh
    return (output, h.to(h0.dtype)), (*tensors, batch_sizes, reverse, *kept)


def backward(grads: tuple[Tensor | None, ...], saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reverse, gates, states = saved
    dtype = torch.promote_types(input.dtype, torch.float32)
    r, z, n, b_n = gates.to(dtype).chunk(4, -1)
    h_before = states_before(states.to(dtype), h0.to(dtype), batch_sizes, reverse)
    slope_n = (1 - z) * (1 - n * n)
    sum_slopes = torch.cat((slope_n * b_n * r * (1 - r), (h_before - n) * z * (1 - z), slope_n * r, slope_n), -1)
    slopes, update = split(sum_slopes, batch_sizes), split(z, batch_sizes)

    recurrent = weight_hh.to(dtype)
    grad_h = split(gradient(grads[0], states, dtype), batch_sizes)
    grad_sums = list(slopes)
    dh = gradient(grads[1], h0, dtype)
    walk = order(len(slopes), reverse)
    for t in reversed(walk):
        dh_t = grad_h[t] + dh[: slopes[t].shape[0]]
        grad_sums[t] = torch.cat((dh_t, dh_t, dh_t, dh_t), -1) * slopes[t]
        if needs[1] or t != walk[0]:
            dr, dz, db_n, _ = grad_sums[t].chunk(4, -1)
            dh = replace(dh, dh_t * update[t] + torch.cat((dr, dz, db_n), -1) @ recurrent)

    dr, dz, db_n, da_n = join(grad_sums, batch_sizes).chunk(4, -1)
    da, db = torch.cat((dr, dz, da_n), -1), torch.cat((dr, dz, db_n), -1)
    grad_input = (da @ weight_ih.to(dtype)).to(input.dtype) if needs[0] else None
    da, db = da.flatten(0, -2), db.flatten(0, -2)
    grad_h0 = grad_ih = grad_hh = grad_bias_ih = grad_bias_hh = None
    if needs[1]:
        grad_h0 = dh.to(h0.dtype)
    if needs[2]:
        grad_ih = (da.T @ input.to(dtype).flatten(0, -2)).to(weight_ih.dtype)
    if needs[3]:
        grad_hh = (db.T @ h_before.flatten(0, -2)).to(weight_hh.dtype)
    if needs[4]:
        grad_bias_ih = da.sum(0).to(bias_ih.dtype)
    if needs[5]:
        grad_bias_hh = db.sum(0).to(bias_hh.dtype)
    return grad_input, grad_h0, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh

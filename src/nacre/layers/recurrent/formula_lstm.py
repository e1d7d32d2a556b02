"""LSTM: a memory cell which gates write, keep and read; one layer in one direction.

Forward, at step t with s the step before it (* multiplies element by element, ^T transposes):

    a = W_ih x_t + b_ih + W_hh h_s + b_hh         the sums of the four gates: a = (a_i, a_f, a_g, a_o)
    i = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
    c_t = f * c_s + i * g
    m_t = o * tanh(c_t)
    h_t = m_t                                     with a projection: h_t = W_hr m_t

W_ih x_t needs no state: it is one product for the whole sequence.

Backward, from the last step to the first. A step receives dh_t, the gradient of its output and what step t + 1 passed
to its state, and dc_t, what step t + 1 passed to its cell. With dm = dh_t, or W_hr^T dh_t after a projection, the
cell's whole gradient is

    dc_t <- dc_t + dm * o * (1 - tanh(c_t)^2)

and each gate's sum has one of the two gradients times a slope which is known for all steps beforehand:

    da_i = dc_t * g i (1 - i)      da_f = dc_t * c_s f (1 - f)
    da_g = dc_t * i (1 - g^2)      da_o = dm * tanh(c_t) o (1 - o)

The step passes on dc_s = dc_t * f and dh_s = W_hh^T da. The other gradients are sums over all steps, and each of them
is one product for the whole sequence:

    dx = W_ih^T da      dW_ih = sum of da x^T      dW_hh = sum of da h_s^T      dW_hr = sum of dh m^T
    db_ih = db_hh = sum of da

Kept are the gates and the cells, from which the states follow as h_t = o * tanh(c_t); projected states are kept too.
"""

import torch
from torch import Tensor

from nacre.layers.recurrent.sequence import gradient, join, order, replace, split, states_before


def forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    reverse: bool,
) -> tuple[tuple[Tensor, ...], tuple]:
    # half precision is computed in float32 from the first step to the last, and the results are rounded once
    dtype = torch.promote_types(input.dtype, torch.float32)
    sums = input.to(dtype) @ weight_ih.to(dtype).T
    if bias_ih is not None and bias_hh is not None:
        sums = sums + (bias_ih.to(dtype) + bias_hh.to(dtype))
    recurrent = weight_hh.to(dtype).T
    projection = None if weight_hr is None else weight_hr.to(dtype).T
    steps = split(sums, batch_sizes)
    outputs, gates, cells = list(steps), list(steps), list(steps)
    h, c = h0.to(dtype), c0.to(dtype)
    for t in order(len(steps), reverse):
        rows = steps[t].shape[0]
        i, f, g, o = (steps[t] + h[:rows] @ recurrent).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        gates[t] = torch.cat((i, f, g, o), -1)
        cells[t] = f * c[:rows] + i * g
        m = o * cells[t].tanh()
        outputs[t] = m if projection is None else m @ projection
        h, c = replace(h, outputs[t]), replace(c, cells[t])
    results = join(outputs, batch_sizes).to(h0.dtype), h.to(h0.dtype), c.to(c0.dtype)
    states = h0.new_empty(0) if projection is None else join(outputs, batch_sizes).to(h0.dtype, copy=True)
    kept = join(gates, batch_sizes).to(input.dtype), join(cells, batch_sizes).to(c0.dtype), states
    tensors = input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    return results, (*tensors, batch_sizes, reverse, *kept)


def backward(grads: tuple[Tensor | None, ...], saved: tuple, needs: list[bool]) -> tuple[Tensor | None, ...]:
    input, h0, c0, weight_ih, weight_hh, bias_ih, _, weight_hr, batch_sizes, reverse, gates, cells, states = saved
    dtype = torch.promote_types(input.dtype, torch.float32)
    i, f, g, o = gates.to(dtype).chunk(4, -1)
    tanh_c = cells.to(dtype).tanh()
    c_before = states_before(cells.to(dtype), c0.to(dtype), batch_sizes, reverse)
    sum_slopes = torch.cat((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)), -1)
    slopes = split(sum_slopes, batch_sizes)
    cell_slopes = split(o * (1 - tanh_c * tanh_c), batch_sizes)
    forget = split(f, batch_sizes)

    recurrent = weight_hh.to(dtype)
    projection = None if weight_hr is None else weight_hr.to(dtype)
    grad_h = list(split(gradient(grads[0], tanh_c[..., : h0.shape[-1]], dtype), batch_sizes))
    grad_sums = list(slopes)
    dh, dc = gradient(grads[1], h0, dtype), gradient(grads[2], c0, dtype)
    walk = order(len(slopes), reverse)
    for t in reversed(walk):
        rows = slopes[t].shape[0]
        grad_h[t] = grad_h[t] + dh[:rows]
        dm = grad_h[t] if projection is None else grad_h[t] @ projection
        dc_t = dc[:rows] + dm * cell_slopes[t]
        grad_sums[t] = torch.cat((dc_t, dc_t, dc_t, dm), -1) * slopes[t]
        dc = replace(dc, dc_t * forget[t])
        if needs[1] or t != walk[0]:
            dh = replace(dh, grad_sums[t] @ recurrent)

    da = join(grad_sums, batch_sizes)
    grad_input = (da @ weight_ih.to(dtype)).to(input.dtype) if needs[0] else None
    da, m = da.flatten(0, -2), o * tanh_c
    grad_ih = grad_hh = grad_bias = grad_hr = None
    if needs[3]:
        grad_ih = (da.T @ input.to(dtype).flatten(0, -2)).to(weight_ih.dtype)
    if needs[4]:
        h = m if projection is None else states.to(dtype)
        h_before = states_before(h, h0.to(dtype), batch_sizes, reverse)
        grad_hh = (da.T @ h_before.flatten(0, -2)).to(weight_hh.dtype)
    if needs[5] or needs[6]:
        grad_bias = da.sum(0).to(bias_ih.dtype)
    if needs[7]:
        grad_hr = (join(grad_h, batch_sizes).flatten(0, -2).T @ m.flatten(0, -2)).to(weight_hr.dtype)
    grad_states = dh.to(h0.dtype) if needs[1] else None, dc.to(c0.dtype) if needs[2] else None
    return grad_input, *grad_states, grad_ih, grad_hh, grad_bias, grad_bias, grad_hr

"""The LSTM and GRU layers."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from nacre.core.choice import cpp_kernel
from nacre.core.op import Op
from nacre.core.tracing import Proxy, as_torchs_layer, traced
from nacre.layers.recurrent import formula_gru, formula_lstm, stack
from nacre.layers.recurrent.flops import count_places

_GRU_TENSORS = ("input", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
_LSTM_TENSORS = ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _fake_lstm(
    input: Tensor, batch_sizes: Tensor | None, h0: Tensor, c0: Tensor, weight_ih: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    output = h0.new_empty((*input.shape[:-1], h0.shape[-1]))
    gates = input.new_empty((*input.shape[:-1], weight_ih.shape[0]))
    cells = c0.new_empty((*input.shape[:-1], c0.shape[-1]))
    states = output.new_empty(0 if h0.shape[-1] == c0.shape[-1] else output.shape)
    return output, h0.new_empty(h0.shape), c0.new_empty(c0.shape), gates, cells, states


def _fake_gru(input: Tensor, batch_sizes: Tensor | None, h0: Tensor, *others: Any) -> tuple[Tensor, ...]:
    output = h0.new_empty((*input.shape[:-1], h0.shape[-1]))
    gates = input.new_empty((*input.shape[:-1], 4 * h0.shape[-1]))
    return output, h0.new_empty(h0.shape), gates, torch.empty_like(output)


def _fake_gradients(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(tensor.new_empty(tensor.shape) if need else None for tensor, need in zip(tensors, needs, strict=True))


_KERNEL_DTYPES = (torch.float32, torch.float64)

_lstm = Op(
    "lstm(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor weight_ih, Tensor weight_hh,"
    " Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, bool reverse)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor states)",
    forward=formula_lstm.forward,
    backward=formula_lstm.backward,
    saved=(*_LSTM_TENSORS, "batch_sizes", "reverse", "gates", "cells", "states"),
    gradients=_LSTM_TENSORS,
    outputs=3,
    autocast={"cpu": "lower", "cuda": "lower", "xpu": "lower", "mps": "lower"},
    autocast_keeps=("h0", "c0"),
    kernels=[
        cpp_kernel(
            {
                "1 feature or more": lambda input, *_: input.shape[-1] > 0,
                "states of the input's dtype": lambda input, sizes, h0, c0, *_: h0.dtype == c0.dtype == input.dtype,
            },
            dtypes=_KERNEL_DTYPES,
        )
    ],
    # the formulas' loops over time would unroll into a traced graph, and fix the number of steps in it
    fake=_fake_lstm,
    fake_backward=lambda *arguments: _fake_gradients(arguments[3:11], arguments[-1]),
)
count_places(_lstm)

_gru = Op(
    "gru(Tensor input, Tensor? batch_sizes, Tensor h0, Tensor weight_ih, Tensor weight_hh,"
    " Tensor? bias_ih, Tensor? bias_hh, bool reverse)"
    " -> (Tensor output, Tensor h_n, Tensor gates, Tensor states)",
    forward=formula_gru.forward,
    backward=formula_gru.backward,
    saved=(*_GRU_TENSORS, "batch_sizes", "reverse", "gates", "states"),
    gradients=_GRU_TENSORS,
    outputs=2,
    autocast={"cpu": "lower", "cuda": "lower", "xpu": "lower", "mps": "lower"},
    autocast_keeps=("h0",),
    kernels=[
        cpp_kernel(
            {
                "1 feature or more": lambda input, *_: input.shape[-1] > 0,
                "a state of the input's dtype": lambda input, sizes, h0, *_: h0.dtype == input.dtype,
            },
            dtypes=_KERNEL_DTYPES,
        )
    ],
    fake=_fake_gru,
    fake_backward=lambda *arguments: _fake_gradients(arguments[2:8], arguments[-1]),
)
count_places(_gru)


class LSTM(torch.nn.LSTM):
    r"""Reads sequences with a memory that gates write, keep and read, so that it can bridge long distances.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \qquad
        f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \qquad
        o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t) \qquad \text{with a projection: } h_t = W_{hr} (o_t \odot \tanh(c_t))

    ``weight_ih_l0`` stacks :math:`W_{ii}, W_{if}, W_{ig}, W_{io}`, ``weight_hh_l0`` and the biases likewise; the
    parameters of level k end in ``_lk``, those of the direction from the last step to the first in ``_reverse``. Each
    level reads the outputs of the level below, both directions side by side.

    Args:
        input_size: features of a step of the input, D.
        hidden_size: features of the memory cell, H.
        num_layers: levels on top of each other. Default: 1.
        bias: learn the biases. Default: True.
        batch_first: input and output are (B, T, features) rather than (T, B, features). Default: False.
        dropout: probability of an element between two levels to be dropped in training, from 0 to 1. Default: 0.
        bidirectional: read each sequence from its end as well, with weights of their own. Default: False.
        proj_size: features of the projected state, R < H; 0 for none, then R = H. Default: 0.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    All parameters start uniform in :math:`\pm 1 / \sqrt{H}`.

    Shape:
        With T steps, B sequences, L levels and S = 2 directions where ``bidirectional``, else 1:

        - input: (T, B, D), with ``batch_first`` (B, T, D), unbatched (T, D), or a
          :class:`torch.nn.utils.rnn.PackedSequence` of sequences of unlike lengths
        - h_0, c_0, optional: (L S, B, R) and (L S, B, H), unbatched (L S, R) and (L S, H); zeros by default
        - output: as the input, with S R features
        - h_n, c_n: as h_0 and c_0, each sequence's state after its own last step

    Numerics:
        float16 and bfloat16 are computed in float32 from the first step to the last, the cell included, and the results
        are rounded once. Under autocast the products read the lower precision; states are kept as torch.nn keeps them.
        ``torch.compile(fullgraph=True)`` takes recurrent modules only where ``torch._dynamo.config.allow_rnn`` is set,
        torch.nn's and these alike; then a sequence of any length is one operator of the graph.

    Raises:
        ValueError: the input has neither 2 nor 3 dimensions, or another dtype than the weights; a size is not positive,
            ``proj_size`` not under ``hidden_size``, or ``dropout`` outside 0 to 1.
        RuntimeError: other sizes than the layer's, no step at all, states that do not fit the input, a
            PackedSequence that contradicts itself, devices that differ.

    Cost:
        For a level and direction of D inputs 4 H (D + R + 2) parameters, and H R for a projection; for each of its rows
        (a step of a sequence) 8 H (D + R) FLOPs, and 2 H R, twice that backward; 5 H values, the R of a projected state
        and the input are kept.

    Paper:
        Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; with a projection: Sak,
        Senior, Beaufays, "Long Short-Term Memory Based Recurrent Neural Network Architectures", 2014, arXiv:1402.1128.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = layer(torch.ones(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
        >>> bool((output[-1] == h_n[-1]).all())
        True
    """

    __prepare_scriptable__ = as_torchs_layer

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(self, input: Any, hx: Any = None) -> Any:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input, hx)
        return stack.forward(self, _lstm, super().forward, input, hx)


class GRU(torch.nn.GRU):
    r"""Reads sequences with a state that gates reset and renew: an LSTM's reach with three gates' work for its four.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    ``weight_ih_l0`` stacks :math:`W_{ir}, W_{iz}, W_{in}`, ``weight_hh_l0`` and the biases likewise; the parameters of
    level k end in ``_lk``, those of the direction from the last step to the first in ``_reverse``. Each level reads the
    outputs of the level below, both directions side by side. As in torch.nn and cuDNN the reset gate multiplies
    :math:`W_{hn} h_{t-1} + b_{hn}`, where the paper has it multiply :math:`h_{t-1}`.

    Args:
        input_size: features of a step of the input, D.
        hidden_size: features of the state, H.
        num_layers: levels on top of each other. Default: 1.
        bias: learn the biases. Default: True.
        batch_first: input and output are (B, T, features) rather than (T, B, features). Default: False.
        dropout: probability of an element between two levels to be dropped in training, from 0 to 1. Default: 0.
        bidirectional: read each sequence from its end as well, with weights of their own. Default: False.
        device: where the parameters are made. Default: torch's default device.
        dtype: of the parameters. Default: torch's default dtype.

    All parameters start uniform in :math:`\pm 1 / \sqrt{H}`.

    Shape:
        With T steps, B sequences, L levels and S = 2 directions where ``bidirectional``, else 1:

        - input: (T, B, D), with ``batch_first`` (B, T, D), unbatched (T, D), or a
          :class:`torch.nn.utils.rnn.PackedSequence` of sequences of unlike lengths
        - h_0, optional: (L S, B, H), unbatched (L S, H); zeros by default
        - output: as the input, with S H features
        - h_n: as h_0, each sequence's state after its own last step

    Numerics:
        float16 and bfloat16 are computed in float32 from the first step to the last and the results are rounded once.
        Under autocast the products read the lower precision; states are kept as torch.nn keeps them.
        ``torch.compile(fullgraph=True)`` takes recurrent modules only where ``torch._dynamo.config.allow_rnn`` is set,
        torch.nn's and these alike; then a sequence of any length is one operator of the graph.

    Raises:
        ValueError: the input has neither 2 nor 3 dimensions, or another dtype than the weights; a size is not positive,
            or ``dropout`` outside 0 to 1.
        RuntimeError: other sizes than the layer's, no step at all, states that do not fit the input, a
            PackedSequence that contradicts itself, devices that differ.

    Cost:
        For a level and direction of D inputs 3 H (D + H + 2) parameters; for each of its rows (a step of a sequence)
        6 H (D + H) FLOPs, twice that backward, and 5 H values and the input kept.

    Paper:
        Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio, "Learning Phrase Representations using RNN
        Encoder-Decoder for Statistical Machine Translation", EMNLP 2014, arXiv:1406.1078.

    Example:
        >>> import torch, nacre
        >>> layer = nacre.GRU(10, 20, batch_first=True, bidirectional=True)
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(4, 10), torch.ones(2, 10)])
        >>> output, h_n = layer(packed)
        >>> output.data.shape, h_n.shape
        (torch.Size([6, 40]), torch.Size([2, 2, 20]))
    """

    __prepare_scriptable__ = as_torchs_layer

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Any = None) -> Any:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return traced(self, input, hx)
        return stack.forward(self, _gru, super().forward, input, hx)

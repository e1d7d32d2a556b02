"""LSTM and GRU, to be read in this order: sequence.py, formula_lstm.py, formula_gru.py, cost.py, stack.py, layer.py,
kernel_cpu.cpp and cases.py.

flops.py: the products of one operator, for torch's counter.
"""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.recurrent.cases import GRU_CASES, LSTM_CASES
from nacre.layers.recurrent.cost import COMPLEXITY, LETTERS, gru_cost, lstm_cost, sizes
from nacre.layers.recurrent.layer import GRU, LSTM

__all__ = ["GRU", "LSTM", "SPECS"]

SPECS = (
    LayerSpec(
        name="lstm",
        layer=LSTM,
        replaces=torch.nn.LSTM,
        purpose="reads a sequence with a memory that gates write, keep and read",
        complexity=COMPLEXITY,
        operators=("lstm",),
        sizes=sizes,
        cost=lstm_cost,
        cases=LSTM_CASES,
        letters=LETTERS,
    ),
    LayerSpec(
        name="gru",
        layer=GRU,
        replaces=torch.nn.GRU,
        purpose="reads a sequence with a state that gates reset and renew",
        complexity=COMPLEXITY,
        operators=("gru",),
        sizes=sizes,
        cost=gru_cost,
        cases=GRU_CASES,
        letters=LETTERS,
    ),
)

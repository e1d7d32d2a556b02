"""Language models of characters with a recurrent memory: LSTM and GRU."""

from typing import ClassVar

from torch import Tensor, nn

import nacre
from nacre.applications.recipe import Recipe

RECIPE = Recipe(batch_size=16, learning_rate=4e-3, weight_decay=0.01, steps=2000, validate_every=250)


class LSTMLanguageModel(nn.Module):
    """Predicts the next character from a memory of all the characters before it.

    ``logits_t = W h_t + b``, where ``h_t`` is the state of the last LSTM layer after character t.

    Args:
        vocabulary_size: how many characters there are.
        width: features of a character and of each layer's state. Default 128.
        depth: recurrent layers. Default 2.
        block: the characters of a training window; the memory itself has no such bound. Default 64.
        dropout: the share dropped between the layers and before the head in training. Default 0.1.

    Shape: character numbers (B, T) to logits (B, T, vocabulary_size).

    Paper: Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997.

    Example:
        >>> import torch
        >>> model = LSTMLanguageModel(vocabulary_size=30, width=16)
        >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 30])
    """

    cell: ClassVar[type[nacre.LSTM] | type[nacre.GRU]] = nacre.LSTM

    def __init__(
        self, vocabulary_size: int, *, width: int = 128, depth: int = 2, block: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.block = block
        self.embedding = nacre.Embedding(vocabulary_size, width)
        self.memory = self.cell(width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0)
        self.dropout = nacre.Dropout(dropout)
        self.head = nacre.Linear(width, vocabulary_size)
        self.criterion = nacre.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.memory(self.embedding(tokens))
        return self.head(self.dropout(states))


class GRULanguageModel(LSTMLanguageModel):
    """Predicts the next character as ``LSTMLanguageModel`` does, with GRU layers: three gates where LSTM has four.

    Paper: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.

    Example:
        >>> sum(parameter.numel() for parameter in GRULanguageModel(30, width=16, depth=1).memory.parameters())
        1632
    """

    cell = nacre.GRU

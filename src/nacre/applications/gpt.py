"""GPT on characters: a transformer that predicts the next one."""

import math

import torch
from torch import Tensor, nn

import nacre
from nacre.applications.recipe import Recipe

RECIPE = Recipe(batch_size=12, learning_rate=1e-3, steps=2000, validate_every=250)


class GPT(nn.Module):
    """Predicts the next character by attention to the characters before it.

    Character and position embeddings are added, causal transformer blocks follow, and the last norm's output is
    compared with every character's embedding: the head's weight is the embedding's, one parameter under two names.
    No layer has a bias.

    Args:
        vocabulary_size: how many characters there are.
        width: features of a character. Default 128.
        depth: transformer blocks. Default 4.
        heads: attention heads of a block. Default 4.
        block: the longest sequence, in characters. Default 64.
        dropout: the share dropped after the embeddings and inside the blocks in training. Default 0.

    Shape: character numbers (B, T), T up to ``block``, to logits (B, T, vocabulary_size).

    Numerics: weights start from a normal distribution of deviation 0.02; the two maps of a block that add to the
    residual stream from 0.02 / sqrt(2 depth), so that its variance does not grow with the depth.

    Raises:
        ValueError: heads that do not divide the width, or a sequence longer than ``block``.

    Paper: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Example:
        >>> model = GPT(vocabulary_size=65)
        >>> model(torch.zeros(2, 64, dtype=torch.int64)).shape
        torch.Size([2, 64, 65])
        >>> sum(parameter.numel() for parameter in model.parameters())
        804096
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        block: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width; got {heads} heads and width {width}.")
        self.block = block
        self.characters = nacre.Embedding(vocabulary_size, width)
        self.positions = nacre.Embedding(block, width)
        self.dropout = nacre.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(nacre.TransformerBlock(width, heads, dropout=dropout, causal=True, bias=False) for _ in range(depth))
        )
        self.norm = nacre.LayerNorm(width, bias=False)
        self.head = nacre.Linear(width, vocabulary_size, bias=False)
        self.head.weight = self.characters.weight
        self.criterion = nacre.CrossEntropyLoss()
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            adds_to_the_residual = name.endswith(("attn.out_proj.weight", "ff.2.weight"))
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if adds_to_the_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.block:
            raise ValueError(f"GPT was built for {self.block} characters at most; got a sequence of {length}.")
        positions = self.positions(torch.arange(length, device=tokens.device))
        features = self.blocks(self.dropout(self.characters(tokens) + positions))
        return self.head(self.norm(features))

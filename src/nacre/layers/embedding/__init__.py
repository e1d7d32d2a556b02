"""Embedding: formula.py, cost.py, layer.py, kernel_cpu.cpp and cases.py, to be read in this order."""

import torch

from nacre.core.spec import LayerSpec
from nacre.layers.embedding.cases import CASES
from nacre.layers.embedding.cost import COMPLEXITY, LETTERS, cost, sizes
from nacre.layers.embedding.layer import Embedding, embedding

__all__ = ["SPECS", "Embedding", "embedding"]

SPECS = (
    LayerSpec(
        name="embedding",
        layer=Embedding,
        replaces=torch.nn.Embedding,
        purpose="looks up a row of features for each token",
        complexity=COMPLEXITY,
        operators=("embedding",),
        sizes=sizes,
        cost=cost,
        cases=CASES,
        letters=LETTERS,
    ),
)

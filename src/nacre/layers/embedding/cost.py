"""What Embedding costs: no arithmetic forward, one addition a looked-up value backward; the rest is traffic."""

from typing import Any

import torch

from nacre.core.cost import Cost
from nacre.core.spec import Letters

COMPLEXITY = "time O(N D), backward O(D (N + V)), saved O(N)"


def sizes(layer: torch.nn.Embedding, input: torch.Tensor) -> dict[str, Any]:
    """N tokens looked up in a table of V rows of D features, from a call of the layer."""
    return {
        "tokens": input.numel(),
        "num_embeddings": layer.num_embeddings,
        "embedding_dim": layer.embedding_dim,
        "renormalised": layer.max_norm is not None,
        "padding": layer.padding_idx is not None,
        "scale_grad_by_freq": layer.scale_grad_by_freq,
        "sparse": layer.sparse,
        "itemsize": layer.weight.element_size(),
        "index_itemsize": input.element_size(),
        "weight_gradient": layer.weight.requires_grad,
    }


def _inputs(layer: torch.nn.Embedding, size: int) -> tuple[torch.Tensor]:
    return (torch.empty(size, dtype=torch.int64, device="meta"),)


LETTERS = Letters(lambda sizes: {"tokens": "N", "num_embeddings": "V", "embedding_dim": "D"}, _inputs)


def cost(
    tokens: int,
    num_embeddings: int,
    embedding_dim: int,
    renormalised: bool = False,
    padding: bool = False,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    itemsize: int = 4,
    index_itemsize: int = 8,
    weight_gradient: bool = True,
) -> Cost:
    """The exact bill, as if every token were another row of the table.

    Forward: a copy. With a largest norm, a token: D powers, their D - 1 additions and a root, a comparison, an addition
    and a division for the factor, D products with it (3 D + 3).
    Backward, dense: one addition for each of N D values; with a padding index one comparison a token; scaled by
    frequency, one addition a token for the counts and a division for each of the V D sums. Sparse: nothing is added.
    Traffic: the indices, one row read and one written for each token, not the whole table; a largest norm writes the
    rows once more. Backward reads the indices and g and writes the V D values of the gradient, or, of a sparse one,
    N indices, as int64, and N rows.
    Kept: the indices.
    """
    values, table = tokens * embedding_dim, num_embeddings * embedding_dim
    added = values + scale_grad_by_freq * (tokens + table)
    written = itemsize * table * (1 - sparse) + (itemsize * values + 8 * tokens) * sparse
    return Cost(
        parameters=table,
        elementwise_flops=renormalised * (3 * values + 3 * tokens),
        backward_elementwise_flops=weight_gradient * (added * (1 - sparse) + padding * tokens),
        bytes=index_itemsize * tokens + itemsize * values * (2 + renormalised),
        backward_bytes=weight_gradient * (index_itemsize * tokens + itemsize * values + written),
        saved_bytes=weight_gradient * index_itemsize * tokens,
    )

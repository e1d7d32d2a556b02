"""What the test files of the two cross-entropies share."""

import pytest
import torch

torch_cross_entropy = torch.nn.functional.cross_entropy
since_2_13 = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has the loss and its options since 2.13"
)


def logits(*shape, scale=1.0):
    return torch.randn(shape, dtype=torch.float64) * scale


def reference(x, w, target, bias=None, ignore_index=-100, **keywords):
    """The loss of all logits at once, by torch."""
    z = torch.nn.functional.linear(x, w.flatten(0, -2), None if bias is None else bias.flatten())
    return torch_cross_entropy(z.reshape(*x.shape[:-1], *w.shape[:-1]), target, ignore_index=ignore_index, **keywords)

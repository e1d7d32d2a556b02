"""Counter-based random numbers: element i of a mask depends on the seed and on i alone.

Philox4x32-10 enciphers a counter under a key in ten rounds. Each block of four 32-bit words has its own counter, so
any element can be computed by any thread in any order, and a backward computes the mask again instead of keeping it.
Here the cipher stands in plain torch operations on int64; kernels compute the same words.

Paper: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """A 63-bit seed drawn from torch's generator of the device, as a tensor of one int64."""
    return torch.randint(0, 2**63 - 1, (), device=device, dtype=torch.int64)


def random_words(seed: Tensor, count: int) -> Tensor:
    """``count`` random 32-bit words, as int64, in the order of their counters.

    Example:
        >>> random_words(torch.tensor(0), 4).tolist()  # the published test vector of counter 0, key 0
        [1713891541, 3781805453, 3159862348, 2600524760]
    """
    block = torch.arange((count + 3) // 4, device=seed.device)
    words = [block & _WORD, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # a product of two 32-bit words fills 64 bits; int64 wraps, and shift and mask read its two halves all the same
        left, right = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((right >> 32) & _WORD) ^ words[1] ^ key[0],
            right & _WORD,
            ((left >> 32) & _WORD) ^ words[3] ^ key[1],
            left & _WORD,
        ]
        key = [(key[0] + _KEY_STEPS[0]) & _WORD, (key[1] + _KEY_STEPS[1]) & _WORD]
    return torch.stack(words, dim=-1).flatten()[:count]


def keep_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """True where an element is kept: each with probability 1 - p, from the word whose number is its flat position.

    Example:
        >>> keep_mask(torch.tensor(7), (2, 3), 0.0).all()
        tensor(True)
    """
    count = 1
    for size in shape:
        count = count * size
    return (random_words(seed, count) >= round(p * 2**32)).reshape(shape)


def dropout_seed(input: Tensor, p: float, training: bool) -> Tensor | None:
    """The seed of one call of dropout; None where nothing can be dropped, and no random number is drawn.

    Like torch, p = 1 draws none either.

    Example:
        >>> dropout_seed(torch.ones(3), 0.5, training=False) is None
        True
    """
    if not training or p == 0 or input.numel() == 0:
        return None
    return new_seed(input.device) if p < 1 else torch.zeros((), dtype=torch.int64, device=input.device)


def masked(tensor: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """What dropout leaves of a tensor: the kept elements times 1 / (1 - p); without a seed the tensor itself.

    Example:
        >>> masked(torch.ones(6), torch.tensor(7), 0.5).unique()
        tensor([0., 2.])
    """
    if seed is None:
        return tensor
    scale = 1 / (1 - p) if p < 1 else 0.0
    return tensor * keep_mask(seed, tensor.shape, p) * scale

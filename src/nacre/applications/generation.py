"""Text from a language model, one character after the other."""

from typing import cast

import torch
from torch import nn

from nacre.applications.data import Vocabulary


@torch.no_grad()
def generate(
    model: nn.Module,
    vocabulary: Vocabulary,
    length: int,
    prompt: str = "\n",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> str:
    """Continue ``prompt`` by ``length`` characters, each drawn from ``softmax(logits / temperature)``.

    The model sees the last ``model.block`` characters and is put in evaluation mode.

    Args:
        model: a language model, from (1, T) character numbers to (1, T, vocabulary) logits, with its ``block``.
        vocabulary: the characters it was trained on.
        length: how many characters to add.
        prompt: what to continue, at least one character. Default a line's end.
        temperature: under 1 more probable characters, above 1 more varied ones. Default 1.
        generator: where the random numbers come from. Default torch's own.

    Raises:
        ValueError: an empty prompt, a character that the model does not know, a temperature of 0 or less.

    Example:
        >>> from nacre.applications.recurrent import GRULanguageModel
        >>> len(generate(GRULanguageModel(3, width=8), Vocabulary("abc"), length=5, prompt="a"))
        6
    """
    if not prompt:
        raise ValueError("a prompt must have at least one character; got none.")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive; got {temperature}.")
    model.eval()
    device = next(model.parameters()).device
    block = cast(int, model.block)
    tokens = vocabulary.encode(prompt)
    for _ in range(length):
        logits = model(tokens[None, -block:].to(device))[0, -1].cpu()
        probabilities = (logits / temperature).softmax(dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)])
    return vocabulary.decode(tokens)

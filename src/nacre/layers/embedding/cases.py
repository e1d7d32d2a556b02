"""Named shapes and edge cases of Embedding."""

import torch

from nacre.core.spec import Case, Integers, Made


def _table(num_embeddings: int, embedding_dim: int, **options: object) -> dict[str, object]:
    return {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim, **options}


def _int32(shape: tuple[int, ...], high: int) -> Made:
    return Made(lambda dtype, generator: torch.randint(high, shape, generator=generator, dtype=torch.int32))


def _transposed(shape: tuple[int, int], high: int) -> Made:
    return Made(lambda dtype, generator: torch.randint(high, shape, generator=generator).t())


CASES = (
    Case("tokens", _table(7, 3), (Integers((2, 5), 7),)),
    Case("repeated tokens", _table(3, 5), (Integers((13,), 2),)),
    Case("one token", _table(5, 3), (Integers((), 5),)),
    Case("one row", _table(1, 4), (Integers((6,), 1),)),
    Case("one feature", _table(6, 1), (Integers((2, 3), 6),)),
    Case("no tokens", _table(5, 3), (Integers((0, 2), 5),)),
    Case("three dimensions", _table(5, 2), (Integers((2, 3, 2), 5),)),
    Case("int32", _table(7, 3), (_int32((2, 5), 7),)),
    Case("transposed", _table(7, 3), (_transposed((3, 4), 7),)),
    # by definition these have another gradient than the derivative, which finite differences would find
    Case("padding", _table(4, 3, padding_idx=1), (Integers((2, 6), 4),), smooth=False),
    Case("padding from the end", _table(4, 3, padding_idx=-1), (Integers((2, 6), 4),), smooth=False),
    Case("first row padding", _table(3, 2, padding_idx=0), (Integers((7,), 3),), smooth=False),
    Case("only padding", _table(4, 3, padding_idx=0), (Integers((5,), 1),), smooth=False),
    Case("by frequency", _table(4, 3, scale_grad_by_freq=True), (Integers((2, 6), 4),), smooth=False),
    Case(
        "by frequency with padding",
        _table(4, 3, padding_idx=2, scale_grad_by_freq=True),
        (Integers((9,), 4),),
        smooth=False,
    ),
    # the table is changed by being looked up: not a smooth function of itself
    Case("largest norm", _table(6, 3, max_norm=1.0), (Integers((2, 5), 6),), smooth=False),
    Case("largest 1-norm", _table(6, 3, max_norm=1.5, norm_type=1.0), (Integers((7,), 6),), smooth=False),
    # finite differences are taken of dense gradients
    Case("sparse", _table(6, 3, sparse=True), (Integers((2, 5), 6),), smooth=False),
    Case("sparse with padding", _table(4, 3, sparse=True, padding_idx=1), (Integers((2, 5), 4),), smooth=False),
    Case("characters", _table(65, 128), (Integers((12, 64), 65),), bench=True),
    Case("words", _table(50000, 512), (Integers((8, 512), 50000),), bench=True),
    Case("BERT", _table(30522, 768), (Integers((8, 512), 30522),), bench=True),
    Case("GPT-2", _table(50257, 768), (Integers((8, 1024), 50257),), bench=True),
)

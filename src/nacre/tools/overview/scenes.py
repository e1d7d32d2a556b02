"""Which calls of a layer are drawn: cases of its own, and what their axes are to the eye."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nacre.core.spec import LayerSpec, Normal

SHOWN = 8
"""At most so many positions are drawn along an axis; of longer ones the first."""


@dataclass(frozen=True)
class Scene:
    """A call to draw.

    Args:
        case: the name of one of the layer's cases.
        source: a word for each axis of what the output is differentiated by: ``each`` (its positions are drawn, one or
            two axes), ``all`` (taken together) or ``first`` (the first position alone).
        output: the same for the output.
        cells: what a position of the source is, in the plural.
        results: what a position of the output is, in the plural.
        keywords: axes of the tensors among the keyword inputs, which are cut as the source is.
        parameter: the parameter which is the source; the first input when None.
    """

    case: str
    source: str
    output: str
    cells: str
    results: str
    keywords: Mapping[str, str] = field(default_factory=dict)
    parameter: str | None = None


_TOKENS = ("first each all", "first each all", "tokens", "tokens")
_ROWS = ("each each", "each each", "values", "values")
_STEPS = ("first each all", "first each all", "steps", "steps")

_SCENES = {
    "attention": (
        Scene("small", *_TOKENS),
        Scene("text, causal, dropout", *_TOKENS, keywords={"attn_mask": "each each"}),
    ),
    "conv2d": (Scene("digits", "first all each each", "first all each each", "pixels", "pixels"),),
    "cross_entropy": (Scene("none", "each each", "each", "logits", "losses"),),
    "embedding": (Scene("tokens", "each all", "each each all", "rows of the table", "tokens", parameter="weight"),),
    "gru": (Scene("language model", *_STEPS), Scene("tagger", *_STEPS)),
    "linear": (Scene("odd sizes", "first each", "first each", "features", "features"),),
    "linear_cross_entropy": (Scene("none", "each each", "each", "features", "losses"),),
    "lstm": (Scene("language model", *_STEPS), Scene("tagger", *_STEPS)),
    "dropout": (Scene("half dropped", *_ROWS),),
    "transformer_block": (Scene("GPT-2", *_TOKENS),),
    "transformer_encoder_layer": (Scene("original transformer", *_TOKENS),),
}


def scenes_of(spec: LayerSpec) -> tuple[Scene, ...]:
    """What is drawn of a layer; of one without a scene of its own, the first case with an input of two axes."""
    if spec.name in _SCENES:
        return _SCENES[spec.name]
    fitting = (
        case
        for case in spec.cases
        if not case.bench and case.inputs and isinstance(case.inputs[0], Normal) and len(case.inputs[0].shape) == 2
    )
    case = next(fitting, None)
    return () if case is None else (Scene(case.name, *_ROWS),)

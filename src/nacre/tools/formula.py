"""What a layer costs, as formulas in named sizes: the functions that count exact integers, fed with symbols."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from nacre.blocks import BLOCKS
from nacre.core import check
from nacre.core.cost import Cost
from nacre.core.spec import LayerSpec, Letters
from nacre.layers import LAYERS
from nacre.tools import growth

if TYPE_CHECKING:
    import sympy

NAMES = {
    "parameters": "parameters",
    "flops": "FLOPs forward",
    "backward_flops": "FLOPs backward",
    "elementwise_flops": "elementwise forward",
    "backward_elementwise_flops": "elementwise backward",
    "bytes": "bytes forward",
    "backward_bytes": "bytes backward",
    "saved_bytes": "bytes kept",
}


@dataclass(frozen=True)
class CostFormula:
    """The cost of a layer as expanded SymPy expressions in the letters of its sizes; see :func:`nacre.cost_formula`.

    Args:
        layer: the class.
        parameters, flops, backward_flops, elementwise_flops, backward_elementwise_flops, bytes, backward_bytes,
            saved_bytes: as the integers of :class:`nacre.core.cost.Cost`.
        letters: what each letter stands for, in the order in which products are written.
        sizes: the letters' numbers, as far as they are known: those of the layer, and those of the inputs given.
        where: letters for what is computed from other letters, with their expressions.
        at_most: letters which each of some products bounds, up to a constant factor.
    """

    layer: str
    parameters: "sympy.Expr"
    flops: "sympy.Expr"
    backward_flops: "sympy.Expr"
    elementwise_flops: "sympy.Expr"
    backward_elementwise_flops: "sympy.Expr"
    bytes: "sympy.Expr"
    backward_bytes: "sympy.Expr"
    saved_bytes: "sympy.Expr"
    letters: Mapping[str, str]
    sizes: Mapping[str, int]
    where: Mapping[str, "sympy.Expr"] = field(default_factory=dict)
    at_most: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def time(self) -> str:
        """Growth of the forward's time: of its FLOPs of both kinds and of its bytes."""
        return self._growth(self.flops + self.elementwise_flops + self.bytes)

    @property
    def backward_time(self) -> str:
        """Growth of the backward's time."""
        return self._growth(self.backward_flops + self.backward_elementwise_flops + self.backward_bytes)

    @property
    def saved(self) -> str:
        """Growth of the memory kept for the backward."""
        return self._growth(self.saved_bytes)

    @property
    def complexity(self) -> str:
        """Growth of time and of the memory kept for the backward, as in the table of ``nacre layers``."""
        backward = "" if self.backward_time in (self.time, "0") else f", backward {self.backward_time}"
        return f"time {self.time}{backward}, saved {self.saved}"

    def _growth(self, expression: "sympy.Expr") -> str:
        return growth.describe(growth.leading(expression, self.at_most), [*self.letters, *self.where])

    def evaluate(self, **sizes: int) -> Cost:
        """The exact integers for these sizes, by letter; those of the layer need not be given.

        Raises:
            TypeError: a letter without a number, an unknown letter, or a number that is no integer.
            ValueError: a negative number, or one that its parts do not divide.

        Example:
            >>> import nacre
            >>> nacre.cost_formula(nacre.Linear(768, 3072)).evaluate(N=1576).flops
            7436500992
        """
        import sympy

        given = {**self.sizes, **sizes}
        self._check(given)
        values = {_symbol(letter): sympy.Integer(number) for letter, number in given.items()}
        values |= {_symbol(letter): expression.xreplace(values) for letter, expression in self.where.items()}
        counts = {name: expression.xreplace(values) for name, expression in self.items()}
        if bad := next((name for name, count in counts.items() if not count.is_Integer), None):
            got = ", ".join(f"{letter} = {number}" for letter, number in given.items())
            rule = f"the {NAMES[bad]} of {self.layer} are a whole number"
            raise check.error(ValueError, rule, f"{counts[bad]} for {got}")
        return Cost(**{name: int(count) for name, count in counts.items()})

    def _check(self, given: Mapping[str, Any]) -> None:
        if unknown := [letter for letter in given if letter not in self.letters]:
            letters = ", ".join(self.letters)
            raise check.error(TypeError, f"the sizes of this {self.layer} are {letters}", ", ".join(unknown))
        if missing := [letter for letter in self.letters if letter not in given]:
            meaning = ", ".join(f"{letter} ({self.letters[letter]})" for letter in missing)
            got = ", ".join(given) or "none"
            raise check.error(TypeError, f"the cost of {self.layer} also depends on {meaning}", got)
        for letter, number in given.items():
            if type(number) is not int:
                raise check.error(TypeError, "a size is an integer", f"{letter} = {number!r}")
            if number < 0:
                raise check.error(ValueError, "a size is at least 0", f"{letter} = {number}")

    def items(self) -> Iterator[tuple[str, "sympy.Expr"]]:
        """The expressions by name, in the order of :class:`nacre.core.cost.Cost`."""
        return ((one.name, getattr(self, one.name)) for one in fields(Cost))

    def latex(self, name: str | None = None) -> str:
        r"""LaTeX of one expression, by its name or the letter of a definition, or of all of them, aligned.

        Example:
            >>> import nacre
            >>> nacre.cost_formula(nacre.Linear(768, 3072)).latex("flops")
            '2 N D E'
        """
        if name is not None:
            return _latex(self.where[name] if name in self.where else getattr(self, name), self._order())
        rows = [(rf"\text{{{NAMES[one]}}}", self.latex(one)) for one, _ in self.items()]
        rows += [(letter, self.latex(letter)) for letter in self.where]
        return "\n".join([r"\begin{aligned}", *(rf"{left} &= {right} \\" for left, right in rows), r"\end{aligned}"])

    def _repr_latex_(self) -> str:
        return f"$$\n{self.latex()}\n$$"

    def _order(self) -> list[str]:
        return [*self.letters, *self.where]

    def __str__(self) -> str:
        known = {letter: f"{letter} = {number}" for letter, number in self.sizes.items()}
        sizes = ", ".join(f"{known.get(letter, letter)} ({meaning})" for letter, meaning in self.letters.items())
        lines = [f"{self.layer} with {sizes}"]
        for name, expression in self.items():
            lines.append(f"  {NAMES[name]:21} {_text(expression, self._order())}")
        lines += [f"  where {letter} = {_text(one, self._order())}" for letter, one in self.where.items()]
        return "\n".join([*lines, f"  {self.complexity}"])


def cost_formula(layer: torch.nn.Module, *inputs: Any, **keywords: Any) -> CostFormula:
    """The cost of a layer or block as formulas: parameters, FLOPs, bytes and memory kept, forward and backward.

    Sizes are letters, as in the layer's docstring; its settings (bias, padding, number of levels, dtype) and those of
    the call (masks, which gradients are asked for) are the numbers they are. A block is the sum of its parts. Nothing
    is computed: what counts the exact integers of a call counts symbols instead.

    Args:
        layer: a layer or block of nacre, or the torch.nn counterpart of one.
        inputs: of the call to describe; only their shapes count, so meta tensors do. Default: a usual call of the
            layer, whose inputs ask for their gradients.
        keywords: the call's keyword inputs.

    Raises:
        TypeError: the layer is none of nacre's.

    Example:
        >>> import nacre
        >>> formula = nacre.cost_formula(nacre.MultiheadAttention(512, 8))
        >>> formula.time, formula.saved
        ('O(N L E (L + E))', 'O(N L E)')
        >>> print(nacre.cost_formula(nacre.Linear(768, 3072, bias=False)))
        Linear with N (rows), D = 768 (in_features), E = 3072 (out_features)
          parameters            D*E
          FLOPs forward         2*N*D*E
          FLOPs backward        4*N*D*E
          elementwise forward   0
          elementwise backward  0
          bytes forward         4*N*D + 4*N*E + 4*D*E
          bytes backward        8*N*D + 4*N*E + 8*D*E
          bytes kept            4*N*D
          time O(N D E), saved O(N D)
    """
    spec, names = _spec_of(layer)
    if inputs or keywords:
        sizes = _sizes_of(spec, layer, inputs, keywords)
        letters = names.names(sizes)
        known = _numbers(sizes, letters)
    else:
        # the layer's own sizes are those which stay as the inputs grow
        sizes, larger = (spec.sizes(layer, *names.inputs(layer, size)) for size in (2, 3))
        letters = names.names(sizes)
        grown = _numbers(larger, letters)
        known = {letter: number for letter, number in _numbers(sizes, letters).items() if grown[letter] == number}
    symbolic = _with_symbols(sizes, letters)
    where = dict(names.where(**symbolic)) if names.where else {}
    named = {expression: _symbol(letter) for letter, expression in where.items()}
    counts = {name: _expanded(count, named) for name, count in vars(spec.cost(**symbolic)).items()}
    meanings = {letter: names.meanings.get(letter, name) for letter, name in _meanings(sizes, letters).items()}
    return CostFormula(
        layer=type(layer).__name__,
        letters=meanings,
        sizes={letter: known[letter] for letter in meanings if letter in known},
        where=where,
        at_most=names.at_most,
        **counts,
    )


def _spec_of(layer: Any) -> tuple[LayerSpec, Letters]:
    for spec in (*LAYERS.values(), *BLOCKS.values()):
        if type(layer) in (spec.layer, spec.replaces) and spec.letters is not None:
            return spec, spec.letters
    given = layer if isinstance(layer, type) else type(layer)
    got = f"the class {given.__name__}" if isinstance(layer, type) else f"a {given.__name__}"
    fix = f"Give an instance, {given.__name__}(...)." if isinstance(layer, type) else "Give its layers one by one."
    known = ", ".join(spec.layer.__name__ for spec in (*LAYERS.values(), *BLOCKS.values()))
    raise check.error(TypeError, f"cost_formula takes a layer or block, one of {known}", got, fix)


def sizes_by_letter(spec: LayerSpec, sizes: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the letters of a layer's formula stand for in one call.

    Args:
        spec: of the layer.
        sizes: of the call, as ``spec.sizes`` finds them.

    Example:
        >>> from nacre.layers import LAYERS
        >>> spec = LAYERS["linear"]
        >>> sizes_by_letter(spec, spec.sizes(torch.nn.Linear(8, 16), torch.empty(10, 8)))
        {'N': 10, 'D': 8, 'E': 16}
    """
    if spec.letters is None:
        return {}
    letters = spec.letters.names(sizes)
    numbers = _numbers(sizes, letters)
    return {letter: numbers[letter] for letter in _meanings(sizes, letters) if letter in numbers}


def _sizes_of(spec: LayerSpec, layer: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return spec.sizes(layer, *inputs, **keywords)
    except (AttributeError, IndexError, TypeError) as error:
        given = [*(f"a {type(one).__name__}" for one in inputs), *(f"{name}=" for name in keywords)]
        rule = f"the inputs are those of a call of {type(layer).__name__}, tensors of any device"
        raise check.error(TypeError, rule, f"{', '.join(given)} ({error})") from error


# ---- from sizes to symbols


def _symbol(letter: str) -> "sympy.Symbol":
    import sympy

    return sympy.Symbol(letter, integer=True, positive=True)


def _expression(product: str) -> "sympy.Expr":
    """What a product of letters and fractions says: ``"B T"``, ``"8/3 D"``."""
    import sympy

    factors = (_symbol(one) if one[0].isalpha() else sympy.Rational(Fraction(one)) for one in product.split())
    return sympy.Mul(*factors)


def _with_symbols(sizes: Mapping[str, Any], letters: Mapping[str, Any]) -> dict[str, Any]:
    symbolic: dict[str, Any] = {}
    for name, value in sizes.items():
        if name == "parts":
            pairs = zip(value, letters["parts"], strict=True)
            symbolic[name] = tuple((part, _with_symbols(own, named)) for (part, own), named in pairs)
        elif name in letters:
            symbolic[name] = _expression(letters[name])
        else:  # sympy's own truth values have no arithmetic
            symbolic[name] = int(value) if isinstance(value, bool) else value
    return symbolic


def _named(sizes: Mapping[str, Any], letters: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, letters and number of every size that has letters, the parts of a block one after the other."""
    for (_, own), named in zip(sizes.get("parts", ()), letters.get("parts", ()), strict=True):
        yield from _named(own, named)
    for name, product in letters.items():
        if name != "parts":
            yield name, product, sizes[name]


def _numbers(sizes: Mapping[str, Any], letters: Mapping[str, Any]) -> dict[str, int]:
    return {product: number for _, product, number in _named(sizes, letters) if product.isidentifier()}


def _meanings(sizes: Mapping[str, Any], letters: Mapping[str, Any]) -> dict[str, str]:
    """What each letter stands for, letters in the order in which they come first."""
    named = list(_named(sizes, letters))
    order = dict.fromkeys(one for _, product, _ in named for one in product.split() if one[0].isalpha())
    stands_for = {product: name for name, product, _ in reversed(named)}
    return {letter: stands_for[letter] for letter in order}


# ---- expressions, expanded so that equal ones are equal, and factored where they are printed


def _expanded(count: Any, named: Mapping["sympy.Expr", "sympy.Symbol"]) -> "sympy.Expr":
    import sympy

    return sympy.sympify(count).xreplace(named).expand()


def _in_order(expression: "sympy.Expr", order: list[str]) -> "sympy.Expr":
    """The expression with symbols that SymPy's printers, which go by the alphabet, leave in the order given."""
    import sympy

    renamed = {_symbol(letter): sympy.Symbol(f"_{place:02}_{letter}") for place, letter in enumerate(order)}
    return sympy.factor_terms(expression).xreplace(renamed)


def _text(expression: "sympy.Expr", order: list[str]) -> str:
    return re.sub(r"_\d\d_", "", str(_in_order(expression, order)))


def _latex(expression: "sympy.Expr", order: list[str]) -> str:
    import sympy

    ordered = _in_order(expression, order)
    names = {symbol: sympy.latex(sympy.Symbol(symbol.name[4:])) for symbol in ordered.free_symbols}
    return sympy.latex(ordered, symbol_names=names)

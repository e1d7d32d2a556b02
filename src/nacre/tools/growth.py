"""How an expression grows with its sizes: what is left inside O(...).

A term is one dictionary of exponents by letter. Letters count something and are at least 1, so a term is dominated by
another whose exponents are all as large, and by one whose larger letters bound its own: N H by N E where H is at most
E.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

Term = dict[str, int]


def leading(expression: "sympy.Expr", at_most: Mapping[str, Sequence[str]]) -> list[Term]:
    """The terms which no other dominates, without their factors; empty for 0, one empty term for a constant.

    What is subtracted is dominated by what it is subtracted from, and left out.
    """
    terms: list[Term] = []
    for summand in expression.expand().as_ordered_terms():
        factor, rest = summand.as_coeff_Mul()
        term = {str(letter): int(power) for letter, power in rest.as_powers_dict().items() if letter.is_Symbol}
        if factor > 0 and term not in terms:
            terms.append(term)
    bounds = {letter: [powers(product) for product in products] for letter, products in at_most.items()}
    return [term for term in terms if not any(_dominates(other, term, bounds) for other in terms if other != term)]


def powers(product: str) -> Term:
    """A product as text: ``"B H T^2"``.

    Example:
        >>> powers("B H T^2")
        {'B': 1, 'H': 1, 'T': 2}
    """
    pairs = (letter.partition("^") for letter in product.split())
    return {letter: int(power or 1) for letter, _, power in pairs}


def _dominates(large: Term, small: Term, bounds: Mapping[str, Sequence[Term]]) -> bool:
    ratio = {letter: large.get(letter, 0) - small.get(letter, 0) for letter in {**large, **small}}
    return _at_least_constant(ratio, bounds)


def _at_least_constant(ratio: Term, bounds: Mapping[str, Sequence[Term]]) -> bool:
    below = [letter for letter, power in ratio.items() if power < 0]
    if not below:
        return True
    return any(_at_least_constant(_replace(ratio, below[0], bound), bounds) for bound in bounds.get(below[0], ()))


def _replace(ratio: Term, letter: str, bound: Term) -> Term:
    replaced = {one: power for one, power in ratio.items() if one != letter}
    for one, times in bound.items():
        replaced[one] = replaced.get(one, 0) + ratio[letter] * times
    return replaced


def describe(terms: Sequence[Term], order: Sequence[str]) -> str:
    """The terms as a reader would write their sum: what all share before a bracket, letters in the order given.

    Example:
        >>> describe([{"N": 1, "D": 1, "H": 1}, {"N": 1, "H": 2}], ["N", "D", "H"])
        'O(N H (D + H))'
    """
    if not terms:
        return "0"
    shared = {letter: least for letter in order if (least := min(term.get(letter, 0) for term in terms)) != 0}
    rests = [{letter: term.get(letter, 0) - shared.get(letter, 0) for letter in order} for term in terms]
    rests.sort(key=lambda term: [term[letter] for letter in order], reverse=True)
    factors = _product(shared, order)
    if len(rests) == 1:
        return f"O({factors or '1'})"
    total = " + ".join(_product(rest, order) or "1" for rest in rests)
    return f"O({factors} ({total}))" if factors else f"O({total})"


def _product(term: Mapping[str, int], order: Sequence[str]) -> str:
    above = [_power(letter, term[letter]) for letter in order if term.get(letter, 0) > 0]
    below = [_power(letter, -term[letter]) for letter in order if term.get(letter, 0) < 0]
    return "/".join([" ".join(above), *below]) if below else " ".join(above)


def _power(letter: str, power: int) -> str:
    return letter if power == 1 else f"{letter}^{power}"

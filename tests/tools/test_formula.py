"""The formulas of costs against the exact integers, the growth of counts, torch's own counter and the docstrings."""

import contextlib
import dataclasses
import inspect
import math
import random
import re
from fractions import Fraction

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nacre
from nacre.blocks import BLOCKS
from nacre.layers import LAYERS
from nacre.tools import growth

SPECS = [*LAYERS.values(), *BLOCKS.values()]
BY_NAME = [pytest.param(spec, id=spec.name) for spec in SPECS]


def call_of(spec, case):
    """A layer and the inputs of a case, those of large cases without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) if case.bench else contextlib.nullcontext():
        layer = spec.layer(**case.arguments).train(case.training)
        return layer, *case.make()


def symbol(letter):
    return sympy.Symbol(letter, integer=True, positive=True)


def parse(text):
    """An expression as the docstrings write it: ``4 E^2 + 4 E``."""
    python = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", text.strip()).replace("^", "**")
    return sympy.sympify(python, locals={letter: symbol(letter) for letter in re.findall(r"[A-Za-z_]+", python)})


def usual(spec, **arguments):
    """The formula of the layer which the table of layers shows."""
    case = next(case for case in spec.cases if case.bench)
    with torch.device("meta"):
        return nacre.cost_formula(spec.layer(**{**case.arguments, **arguments}))


# ---- the integers


def with_numbers(sizes, letters, numbers):
    """The sizes with numbers in place of their letters."""
    filled = dict(sizes)
    for name, product in letters.items():
        if name == "parts":
            pairs = zip(sizes[name], product, strict=True)
            filled[name] = tuple((part, with_numbers(own, named, numbers)) for (part, own), named in pairs)
        else:
            value = math.prod(Fraction(numbers.get(one, one)) for one in product.split())
            assert value.denominator == 1
            filled[name] = int(value)
    return filled


@pytest.mark.parametrize("spec", BY_NAME)
def test_every_case_at_its_own_and_at_random_sizes(spec):
    """What the functions that count integers say of a call, the formula of that call says too, and at other sizes."""
    draw = random.Random(0)
    for case in spec.cases:
        layer, inputs, keywords = call_of(spec, case)
        sizes = spec.sizes(layer, *inputs, **keywords)
        formula = nacre.cost_formula(layer, *inputs, **keywords)
        assert formula.evaluate() == spec.cost(**sizes), case.name
        letters = spec.letters.names(sizes)
        for _ in range(2):
            # 12 is divided by every ratio of widths and every number of groups among the cases; images of more than 300
            # rows have windows of any kernel drawn here
            numbers = {letter: 12 * draw.randint(1, 9) for letter in formula.letters}
            numbers |= {letter: 3 * draw.randint(200, 300) for letter in ("H", "W") if spec.name == "conv2d"}
            numbers |= {"G": draw.choice([2, 3, 12])} if "G" in numbers else {}
            expected = spec.cost(**with_numbers(sizes, letters, numbers))
            assert formula.evaluate(**numbers) == expected, (case.name, numbers)


def tokens(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def test_a_small_layers_formula_counts_a_large_layer():
    """The letters mean what they say: the integers of another layer, from the shapes of its own call."""
    mha, three = tokens(5, 3, 12), torch.empty(7, dtype=torch.int64)
    pairs = [
        (nacre.Linear(2, 3), nacre.Linear(30, 70), (tokens(4, 5, 30),), {"N": 20, "D": 30, "E": 70}),
        (nacre.LayerNorm(2), nacre.LayerNorm((3, 5)), (tokens(4, 3, 5),), {"N": 4, "D": 15}),
        (nacre.Embedding(2, 3), nacre.Embedding(9, 4), (three,), {"N": 7, "V": 9, "D": 4}),
        (
            nacre.MultiheadAttention(4, 2),
            nacre.MultiheadAttention(12, 3),
            (mha,) * 3,
            {"N": 3, "L": 5, "E": 12, "H": 3},
        ),
        (
            nacre.MultiheadAttention(4, 2, kdim=5, vdim=6),
            nacre.MultiheadAttention(12, 3, kdim=7, vdim=8),
            (mha, tokens(6, 3, 7), tokens(6, 3, 8)),
            {"N": 3, "L": 5, "S": 6, "E": 12, "H": 3, "K": 7, "V": 8},
        ),
        (
            nacre.Conv2d(2, 2, 3, stride=2, padding=1, groups=2),
            nacre.Conv2d(12, 18, (3, 5), stride=2, padding=1, groups=3),
            (tokens(2, 12, 31, 40),),
            {"N": 2, "C": 12, "E": 18, "I": 3, "J": 5, "H": 31, "W": 40, "G": 3},
        ),
        (nacre.LSTM(2, 3, 2), nacre.LSTM(7, 5, 2), (tokens(9, 4, 7),), {"N": 36, "B": 4, "D": 7, "H": 5}),
        (
            nacre.LSTM(2, 3, proj_size=1, bidirectional=True),
            nacre.LSTM(7, 5, proj_size=2, bidirectional=True),
            (tokens(9, 4, 7),),
            {"N": 36, "B": 4, "D": 7, "H": 5, "R": 2},
        ),
        (
            nacre.GRU(2, 3, 2, bidirectional=True),
            nacre.GRU(7, 5, 2, bidirectional=True),
            (tokens(9, 4, 7),),
            {"N": 36, "B": 4, "D": 7, "H": 5},
        ),
        (nacre.ResidualBlock(2), nacre.ResidualBlock(14), (tokens(3, 4, 14),), {"N": 12, "D": 14}),
        (
            nacre.TransformerBlock(4, 2, mlp_ratio=1.5, causal=True, dropout=0.1),
            nacre.TransformerBlock(12, 3, mlp_ratio=1.5, causal=True, dropout=0.1),
            (tokens(2, 7, 12),),
            {"B": 2, "T": 7, "D": 12, "H": 3},
        ),
        (
            nacre.TransformerEncoderLayer(4, 2, 9),
            nacre.TransformerEncoderLayer(12, 3, 50),
            (tokens(7, 2, 12),),
            {"B": 2, "T": 7, "D": 12, "H": 3, "F": 50},
        ),
    ]
    for small, large, inputs, numbers in pairs:
        spec = next(spec for spec in SPECS if spec.layer is type(large))
        assert nacre.cost_formula(small).evaluate(**numbers) == spec.cost(**spec.sizes(large, *inputs))


@pytest.mark.parametrize("spec", [param for param in BY_NAME if param.values[0].replaces])
def test_the_torch_counterpart_has_the_same_formula(spec):
    ours, theirs = usual(spec), usual(dataclasses.replace(spec, layer=spec.replaces))
    if spec.name in BLOCKS:  # nacre's runs dropout, sum and normalisation in one pass, with fewer bytes
        ours, theirs = ((one.parameters, one.flops, one.backward_flops, one.complexity) for one in (ours, theirs))
    assert ours == theirs


# ---- growth


@pytest.mark.parametrize("spec", BY_NAME)
def test_the_complexity_of_the_table_is_the_derived_one(spec):
    assert spec.complexity == usual(spec).complexity


@pytest.mark.parametrize("spec", BY_NAME)
def test_counts_grow_as_the_formula_says(spec):
    """One size doubled, far above the others: the integers grow by 2 to the exponent in the leading terms."""
    formula = usual(spec)
    totals = {
        "time": (("flops", "elementwise_flops", "bytes"), formula.time),
        "backward": (("backward_flops", "backward_elementwise_flops", "backward_bytes"), formula.backward_time),
        "saved": (("saved_bytes",), formula.saved),
    }
    outputs = {"H": "P", "W": "Q"} if spec.name == "conv2d" else {}  # rows of the output grow as those of the image
    for letter in formula.letters:
        if letter in formula.at_most and letter not in outputs:
            continue  # heads cannot grow alone
        base = {one: 2**90 if one in outputs else 4 for one in formula.letters}
        for what, (names, text) in totals.items():
            exponent = degree(text, [letter, outputs.get(letter, letter)])
            counts = []
            for factor in (1, 2):
                bill = formula.evaluate(**{**base, letter: factor * (2**90 if letter in outputs else 2**40)})
                counts.append(sum(getattr(bill, name) for name in names))
            assert counts[1] / counts[0] == pytest.approx(2**exponent, rel=1e-6), (what, letter, text)


def degree(text, letters):
    """The largest exponent of any of the letters in ``O(N (D + H))``."""
    inside = parse(text.removeprefix("O").strip()).expand()
    return max(sympy.degree(inside, symbol(letter)) if inside.has(symbol(letter)) else 0 for letter in letters)


def test_dominated_terms():
    N, D, H, E = (symbol(letter) for letter in "NDHE")
    assert growth.leading(3 * N * D + 5 * N + 2, {}) == [{"N": 1, "D": 1}]
    assert growth.leading(N**2 + N * D - D**3, {}) == [{"D": 1, "N": 1}, {"N": 2}]
    assert growth.leading(N * H + N * E, {}) == [{"E": 1, "N": 1}, {"H": 1, "N": 1}]
    assert growth.leading(N * H + N * E, {"H": ("E",)}) == [{"E": 1, "N": 1}]
    assert growth.leading(N * D / H + N, {"H": ("D",)}) == [{"D": 1, "H": -1, "N": 1}]
    assert growth.leading(sympy.Integer(7), {}) == [{}] and growth.leading(sympy.Integer(0), {}) == []
    assert [growth.describe(terms, []) for terms in ([{}], [])] == ["O(1)", "0"]
    assert growth.describe([{"N": 1, "C": 1, "G": -1}], ["N", "C", "G"]) == "O(N C/G)"
    assert growth.describe([{"N": 1}, {"D": 2}], ["N", "D"]) == "O(N + D^2)"


# ---- torch's counter, where it is right: dense products forward, and backward where every input has a gradient

MEASURED = {
    "linear": (lambda n: (torch.nn.Linear(3 * n, 5 * n), (tokens(7 * n, 3 * n),)), {"N": 7, "D": 3, "E": 5}, 3),
    "conv2d": (
        lambda n: (torch.nn.Conv2d(3 * n, 5 * n, 3, padding=1), (tokens(2 * n, 3 * n, 4 * n, 6 * n),)),
        {"N": 2, "C": 3, "E": 5, "H": 4, "W": 6},
        5,
    ),
    "attention": (
        lambda n: (torch.nn.MultiheadAttention(8 * n, 2), (tokens(5 * n, 3 * n, 8 * n),) * 3),
        {"N": 3, "L": 5, "E": 8},
        4,
    ),
    "linear_cross_entropy": (
        lambda n: (
            nacre.LinearCrossEntropyLoss(3 * n, 5 * n),
            (tokens(7 * n, 3 * n), torch.empty(7 * n, dtype=torch.int64, device="meta")),
        ),
        {"N": 7, "D": 3, "C": 5},
        3,
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_flops_are_those_which_torch_counts(name):
    make, sizes, exponent = MEASURED[name]
    measured = []
    for n in (1, 2):
        with torch.device("meta"):
            layer, inputs = make(n)
        formula = nacre.cost_formula(layer)
        bill = formula.evaluate(**{letter: n * number for letter, number in sizes.items()})
        with FlopCounterMode(display=False) as forward:
            if name == "linear_cross_entropy":  # its own op, of which torch knows nothing: its linear map, and the
                output = torch.nn.functional.linear(inputs[0], layer.linear.weight)  # gradients that it forms at once
                torch.autograd.grad(output, [inputs[0], layer.linear.weight], torch.empty_like(output))
            else:
                output = layer(*inputs)
        assert forward.get_total_flops() == bill.flops
        measured.append(bill.flops)
        if name in ("linear", "conv2d"):
            with FlopCounterMode(display=False) as backward:
                torch.autograd.grad(output, [*inputs, *layer.parameters()], torch.empty_like(output))
            assert backward.get_total_flops() == bill.backward_flops
    # with every size doubled, but the kernel's, the FLOPs grow by the degree of their terms
    assert measured[1] == measured[0] * 2**exponent


# ---- the docstrings


@pytest.mark.parametrize("spec", BY_NAME)
def test_docstrings_tell_the_derived_cost(spec):
    cost = inspect.cleandoc(spec.layer.__doc__).split("\nCost:")[1].split("\nPaper:")[0].split("\nExample:")[0]
    cost = " ".join(cost.split())
    # as the docstrings say: one level in one direction, one group, one place; a block's maps without biases
    arguments = {"transformer_block": {"bias": False}, "lstm": {"num_layers": 1}, "gru": {"num_layers": 1}}
    formula = usual(spec, **arguments.get(spec.name, {}))
    same = {symbol("R"): symbol("H"), symbol("G"): 1, symbol("r"): 4}
    growths = re.findall(r"O\(((?:[^()]|\([^()]*\))*)\)", cost)
    for text in growths:
        assert f"O({text})" in (formula.time, formula.saved), text
    found = re.findall(r"((?:[\w^+/() ]|(?<=\d)\.)*?) (parameters|FLOPs)", cost)
    checked = 0
    for text, what in found:
        expression = re.search(r"(?:\(?\b(?:[A-Zr]|\d+)\b|[\s^+/()]|(?<=\^)\d)+$", text)
        if expression is None or not expression[0].strip():
            continue  # in words: no parameters
        expected = formula.parameters if what == "parameters" else formula.flops
        if spec.name in ("lstm", "gru") and what == "FLOPs":
            expected = expected / symbol("N")  # for each row
        assert (parse(expression[0].lstrip(") ")).subs(same) - expected).expand() == 0, (text, expected)
        checked += 1
    assert checked or growths or "o parameters" in cost, "the docstring tells nothing that could be derived"
    if "o parameters" in cost:
        assert formula.parameters == 0


# ---- the object


def test_printing():
    formula = nacre.cost_formula(nacre.Conv2d(3, 8, 3, stride=2, padding=1))
    assert formula.latex("flops") == "2 N E C I J P Q"
    assert formula.latex("P") == r"\left\lfloor{- \frac{I}{2} + \frac{H}{2}}\right\rfloor + 2"
    assert str(formula).splitlines()[0].startswith("Conv2d with N (samples), E = 8 (out_channels), C = 3 (in_channels)")
    assert formula._repr_latex_().startswith("$$\n\\begin{aligned}\n\\text{parameters} &= ")
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert "B_{last}" in nacre.cost_formula(nacre.LSTM(2, 3, bidirectional=True), packed).latex()
    block = nacre.cost_formula(nacre.TransformerBlock(8, 2))
    assert list(block.letters.items()) == [("B", "batch"), ("T", "tokens"), ("D", "features"), ("H", "num_heads")]
    with pytest.raises(dataclasses.FrozenInstanceError):
        formula.flops = 0


def test_settings_of_a_call():
    layer, x = nacre.MultiheadAttention(4, 2), torch.ones(3, 2, 4)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    formula = nacre.cost_formula(layer, x, x, x, attn_mask=mask, need_weights=False)
    N, L, E, M = (symbol(letter) for letter in "NLEM")
    assert formula.sizes == {"N": 2, "L": 3, "E": 4, "H": 2, "M": 9} and formula.time == "O(N L E (L + E))"
    assert formula.bytes == 8 * N * L * E + 16 * E**2 + 16 * E + M
    frozen = nacre.cost_formula(nacre.Linear(4, 3).requires_grad_(False), x)
    assert frozen.backward_flops == 0 and frozen.complexity == "time O(N D E), saved 0"


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({}, TypeError, r"also depends on N \(samples\), H \(height\), W \(width\); got E, C, I, J, G"),
        ({"N": 1, "H": 8, "W": 8, "K": 2}, TypeError, "the sizes of this Conv2d are N, E, C, I, J, H, W, G; got K"),
        ({"N": 1.0, "H": 8, "W": 8}, TypeError, "a size is an integer; got N = 1.0"),
        ({"N": True, "H": 8, "W": 8}, TypeError, "a size is an integer; got N = True"),
        ({"N": -1, "H": 8, "W": 8}, ValueError, "a size is at least 0; got N = -1"),
        (
            {"N": 1, "H": 8, "W": 8, "C": 5, "E": 3},
            ValueError,
            "parameters of Conv2d are a whole number; got 141/2 for .*E = 3, C = 5",
        ),
    ],
)
def test_bad_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        nacre.cost_formula(nacre.Conv2d(4, 4, 3, groups=2)).evaluate(**sizes)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.Bilinear(2, 2, 2), "takes a layer or block, one of .*; got a Bilinear. Give its layers one by one"),
        (nacre.Linear, r"got the class Linear. Give an instance, Linear\(...\)."),
        (3, "got a int"),
    ],
)
def test_other_layers(layer, message):
    with pytest.raises(TypeError, match=message):
        nacre.cost_formula(layer)


@pytest.mark.parametrize(
    ("inputs", "keywords"), [((5,), {}), ((torch.ones(()),), {}), ((torch.ones(2, 3, 3),), {"mask": 1})]
)
def test_other_inputs(inputs, keywords):
    with pytest.raises(TypeError, match="the inputs are those of a call of Conv2d, tensors of any device; got a "):
        nacre.cost_formula(nacre.Conv2d(2, 2, 3), *inputs, **keywords)


def test_every_layer_has_letters():
    assert [spec.name for spec in SPECS if spec.letters is None] == []

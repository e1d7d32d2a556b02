"""The compiled kernel of attention: against its formula and torch's own, on odd shapes, strides and threads."""

import math

import pytest
import torch
import torch.nn.functional as F

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.core.op import OPS
from tests.support import assert_as_good_as_torch, in_dtype, tensors

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

attention = nacre.functional.scaled_dot_product_attention
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


NONE, EACH, MEAN = (False, False), (True, False), (True, True)  # of the weights that are returned


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def three(queries, keys, features, value_features=None, leading=(2, 3)):
    return (
        normal(*leading, queries, features),
        normal(*leading, keys, features, seed=1),
        normal(*leading, keys, value_features or features, seed=2),
    )


def results(function, arguments, keywords):
    arguments = [argument.detach().requires_grad_(argument.is_floating_point()) for argument in arguments]
    output = function(*arguments, **keywords)
    cotangent = torch.linspace(-3, 3, output.numel(), dtype=torch.float64).sin().reshape(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [a for a in arguments if a.requires_grad], cotangent)]


def kernel_results(function, arguments, keywords):
    with record_choices() as choices:
        found = results(function, arguments, keywords)
    assert [(choice.operator, choice.implementation) for choice in choices] == [
        ("attention", "C++ kernel"),
        ("attention_backward", "C++ kernel"),
    ]
    return found


def assert_as_good(arguments, keywords, dtype, slack=1):
    arguments = in_dtype(arguments, dtype)
    found = kernel_results(attention, arguments, keywords)
    torchs = results(F.scaled_dot_product_attention, arguments, keywords)
    judge = results(F.scaled_dot_product_attention, in_dtype(arguments, torch.float64), keywords)
    for triple, what in zip(zip(found, torchs, judge, strict=True), ("output", "dq", "dk", "dv", "dm"), strict=False):
        assert_as_good_as_torch(*triple, dtype, what, slack)


# ---- as good as torch's, whatever the sizes

SIZES = {
    "one of all": three(1, 1, 1),
    "15 of 17": three(15, 17, 15),
    "17 of 15, odd heads": three(17, 15, 17, 33, (1, 3)),
    "63 of 65": three(63, 65, 40),
    "65 of 63, wide values": three(65, 63, 16, 130),
    "image tokens": three(197, 197, 64),
    "one query": three(1, 130, 64),
    "few queries of few features": three(8, 67, 5),
    "few queries of many keys": three(3, 203, 80, 100, (1, 2)),
    "one key": three(130, 1, 8),
    "no leading dimensions": three(97, 99, 20, leading=()),
    "five dimensions": three(7, 9, 20, leading=(2, 1, 3)),
    "wide heads": three(50, 50, 129),
    "a prime": three(1021, 1021, 24, leading=(1, 1)),
}


@DTYPES
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, is_causal, dtype):
    assert_as_good(SIZES[name], {"is_causal": is_causal}, dtype)


MASKS = {
    "a number each": normal(3, 197, 211, seed=4),
    "a number a key": normal(2, 1, 1, 211, seed=4),
    "a number a query": normal(197, 1, seed=4),
    "one number": normal(1, seed=4),
    "a bool each": normal(2, 3, 197, 211, seed=4) > -1,
    "a bool a key": normal(2, 1, 1, 211, seed=4) > 0,
    "transposed": (normal(211, 197, seed=4) > 0).T,
    "blind queries": normal(197, 1, seed=4) > 0,
    "nothing seen": torch.zeros(197, 211, dtype=torch.bool),
    "padding": (torch.arange(211) < torch.tensor([3, 150])[:, None])[:, None, None],
    "padding in front": (torch.arange(211) >= torch.tensor([130, 207])[:, None])[:, None, None],
    "blocks": torch.block_diag(torch.ones(60, 50), torch.ones(37, 90), torch.ones(100, 71)) > 0,
    "one key of all": torch.zeros(197, 211, dtype=torch.bool).index_fill(1, torch.tensor(100), True),
}


@DTYPES
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    # one number added to every score changes nothing: its gradient is 0, and what is left of it is the luck of the
    # roundings of 250,000 terms
    slack = 16 if name == "one number" else 1
    assert_as_good((*three(197, 211, 20), MASKS[name]), {}, dtype, slack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_in_float32_beside_half_precision(dtype):
    arguments = (*in_dtype(three(33, 35, 20), dtype), normal(33, 35, seed=4))
    found = kernel_results(attention, arguments, {})
    assert found[-1].dtype is torch.float32
    torchs = results(F.scaled_dot_product_attention, arguments, {})
    judge = results(F.scaled_dot_product_attention, in_dtype(arguments, torch.float64), {})
    for one, other, exact in zip(found[:-1], torchs[:-1], judge[:-1], strict=True):
        assert_as_good_as_torch(one, other, exact, dtype, "result")


@DTYPES
@pytest.mark.parametrize("queries", [1, 65])
@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_grouped_queries(key_heads, queries, dtype):
    arguments = (normal(2, 6, queries, 20), normal(2, key_heads, 70, 20, seed=1), normal(2, key_heads, 70, 24, seed=2))
    assert_as_good(arguments, {"enable_gqa": True}, dtype)


def test_large_scores():
    query, key, value = three(65, 66, 20)
    assert_as_good((query * 5, key * 5, value), {}, torch.float32)


def test_weights_are_not_rounded_with_their_largest_score():
    """Scores of 1e4 have steps of 1e-3; a maximum and a sum that are kept as one number lose that much of a weight."""
    query, key, value = three(65, 66, 20)
    key = torch.cat([key[:, :, :33]] * 2, 2)  # each score twice, so that no weight is 0 or 1
    arguments = (query * 30, key * 30, value)
    found = kernel_results(attention, arguments, {})[3]
    exact = results(F.scaled_dot_product_attention, in_dtype(arguments, torch.float64), {})[3]
    torchs = results(F.scaled_dot_product_attention, arguments, {})[3]
    assert (found - exact).abs().max() < (torchs - exact).abs().max() / 3


def test_nan_and_infinity_show_where_torchs_do():
    query, key, value = three(20, 21, 8)
    key[0, 0, 3, 2], query[0, 1, 5, 0], value[1, 2, 7, 1] = math.nan, math.inf, math.inf
    with torch.no_grad():
        found, expected = attention(query, key, value), F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(found.isfinite(), expected.isfinite())
    # float32: a few dozen terms in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_what_broadcasts_is_left_to_the_formula():
    with record_choices() as choices:
        attention(normal(2, 3, 5, 4), normal(1, 3, 5, 4), normal(2, 3, 5, 4))
    assert [choice.implementation for choice in choices] == ["formula"]
    assert "same leading dimensions" in choices[0].reason


# ---- wherever the tensors lie


def in_other_places(tensor):
    """The same values unaligned, heads split off, transposed, every second, reversed in memory, and repeated."""
    flat = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    wide = torch.zeros(*tensor.shape, 2)
    wide[..., 1] = tensor
    packed = tensor.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    return [flat, packed, tensor.mT.contiguous().mT, wide[..., 1]]


@pytest.mark.parametrize("queries", [5, 37])
@pytest.mark.parametrize("place", range(4), ids=["unaligned", "heads split off", "transposed", "every second"])
def test_strides(place, queries):
    arguments = three(queries, 41, 20)
    expected = kernel_results(attention, arguments, {"is_causal": True})
    moved = [in_other_places(argument)[place] for argument in arguments]
    found = kernel_results(attention, moved, {"is_causal": True})
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_repeated_rows():
    query, key, value = three(1, 1, 8)
    moved = [tensor.expand(2, 3, 9, 8) for tensor in (query, key, value)]
    expected = kernel_results(attention, [tensor.contiguous() for tensor in moved], {})
    for one, other in zip(kernel_results(attention, moved, {}), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_is_copied_between_the_projections(batch_first):
    """The projection is read where it lies, and its gradient is one tensor that lies as it does."""
    layer = nacre.MultiheadAttention(12, 3, batch_first=batch_first)
    tokens = normal(4, 5, 12).requires_grad_()
    seen = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            found = function(*arguments, **(keywords or {}))
            name = function._schema.name
            seen.setdefault(name, []).append((arguments, found))
            return found

    with Watch():
        output, _ = layer(tokens, tokens, tokens, need_weights=False)
        torch.autograd.grad(output, [tokens, *layer.parameters()], torch.empty_like(output).fill_(0.5))
    assert not {"aten::cat", "aten::clone", "aten::contiguous", "aten::copy_"} & set(seen)
    products = [argument for name in ("nacre::linear", "nacre::linear_backward") for (argument, *_), _ in seen[name]]
    assert len(products) == 4 and all(product.is_contiguous() for product in products)
    (arguments, found), *more = seen["nacre::attention_backward"]
    packed = arguments[2]
    assert not more and packed.shape == (packed.shape[0], packed.shape[1], 36)
    assert found[0].stride() == packed.stride()
    assert packed.is_contiguous() != batch_first


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", [NONE, EACH, MEAN])
def test_packed_is_the_same_as_three(batch_first, weights):
    packed = normal(*((3, 21, 36) if batch_first else (21, 3, 36)))
    packed = packed.transpose(0, 1) if batch_first else packed
    settings = (None, None, torch.tensor(5), 0.2, True, 0.3, False, *weights)
    packed.requires_grad_()
    output, weights = OPS["attention"](packed, None, None, *settings, 3)
    heads = [part.unflatten(-1, (3, 4)).permute(1, 2, 0, 3) for part in packed.chunk(3, -1)]
    expected, expected_weights = OPS["attention"](*heads, *settings, 0)
    assert output.is_contiguous() and torch.equal(output, expected.permute(2, 0, 1, 3).flatten(-2))
    assert torch.equal(weights, expected_weights)
    count = 1 + (expected_weights.numel() > 0)
    cotangents = [normal(*output.shape, seed=1), normal(*weights.shape, seed=2)][:count]
    (gradient,) = torch.autograd.grad([output, weights][:count], packed, cotangents)
    cotangents[0] = cotangents[0].unflatten(-1, (3, 4)).permute(1, 2, 0, 3)
    (expected_gradient,) = torch.autograd.grad([expected, expected_weights][:count], packed, cotangents)
    assert torch.equal(gradient, expected_gradient)


# ---- against the formula, which shares masks, seeds and returned weights


def flat(function, arguments):
    """Results and gradients of every tensor of numbers."""
    arguments = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    ]
    with record_choices() as choices:
        found = function(*arguments)[:2]
        wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        given = [f for f in found if f.numel()]
        cotangents = [normal(*f.shape, seed=9, dtype=f.dtype) for f in given]
        gradients = torch.autograd.grad(given, wanted, cotangents)
    return [*given, *gradients], {choice.implementation for choice in choices}


BLOCKS = torch.block_diag(torch.ones(31, 40), torch.ones(70, 63), torch.ones(30, 30)) > 0

CALLS = {
    "dropout": ((197, 197, 20), None, None, 0.1, False, NONE),
    "dropout, causal": ((130, 131, 20), None, None, 0.3, True, NONE),
    "dropout and weights": ((70, 66, 20), None, None, 0.5, False, EACH),
    "dropout of all": ((33, 35, 8), None, None, 1.0, False, EACH),
    "weights": ((70, 66, 20), None, None, 0.0, False, EACH),
    "mean of the weights": ((70, 66, 20), None, None, 0.0, False, MEAN),
    "mean of the weights, dropout, causal": ((205, 66, 20), None, None, 0.3, True, MEAN),
    "mean of the weights, masks": ((33, 35, 8), normal(33, 35, seed=3), normal(2, 1, 1, 35, seed=4), 0.2, False, MEAN),
    "mean of the weights, few queries": ((4, 131, 20), None, None, 0.3, True, MEAN),
    "weights, causal": ((70, 66, 20), None, None, 0.0, True, EACH),
    "few queries, dropout and weights": ((4, 131, 20), None, None, 0.3, True, EACH),
    "few queries, both masks": ((4, 67, 8), normal(4, 67, seed=3), normal(2, 1, 1, 67, seed=4) > 0, 0.2, False, NONE),
    "both masks": ((33, 35, 8), normal(33, 35, seed=3), normal(2, 1, 1, 35, seed=4), 0.2, False, EACH),
    "blocks, dropout, causal": ((131, 133, 8), BLOCKS, None, 0.2, True, NONE),
    "blocks, a mask of numbers": ((131, 133, 8), BLOCKS, normal(2, 1, 1, 133, seed=4), 0.2, False, NONE),
    "blocks, weights": ((131, 133, 8), BLOCKS.logical_or(torch.arange(133) == 0), None, 0.0, False, EACH),
    "mask of each head": ((33, 35, 8), normal(3, 33, 35, seed=3), normal(35, seed=4) > 0, 0.0, True, NONE),
    "masks of queries and keys": ((33, 35, 8), normal(3, 33, 1, seed=3), normal(1, 35, seed=4), 0.2, False, NONE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kernel_and_formula_agree(name, dtype):
    sizes, mask, key_mask, p, is_causal, weights = CALLS[name]
    seed = torch.tensor(123456789) if p else None
    arguments = (*three(*sizes), mask, key_mask, seed, p, is_causal, 0.3, False, *weights, 0)
    arguments = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    found, ran = flat(OPS["attention"], arguments)
    assert ran == {"C++ kernel"}
    expected, ran = flat(OPS["attention"]._formula, arguments)
    assert not ran
    # sums of some hundred terms of about 1 in another order
    tolerance = {torch.float32: 3e-5, torch.float64: 1e-13}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_weights_are_dropped(dtype):
    """Exactly where the formula drops them, for every distance of a row's first word from a block's."""
    arguments = (*in_dtype(three(9, 67, 4), dtype), None, None, torch.tensor(7), 0.4, False, 0.3, False, *EACH, 0)
    _, weights = OPS["attention"](*arguments)
    expected = OPS["attention"]._formula(*arguments)[1]
    assert torch.equal(weights == 0, expected == 0)
    assert 0.3 < (weights == 0).double().mean() < 0.5


def test_a_blind_query_where_weights_are_returned():
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    arguments = (*three(5, 7, 4), seen, None, None, 0.0, False, 0.3, False, *EACH, 0)
    output, weights = OPS["attention"](*arguments)
    assert output[..., 2, :].isnan().all() and weights[..., 2, :].isnan().all()
    assert output[..., [0, 1, 3, 4], :].isfinite().all()


def test_what_no_query_of_a_block_sees_is_not_even_read():
    """NaN in keys and values beyond what a mask lets anyone see reaches nothing."""
    query, key, value = three(70, 300, 16)
    seen = (torch.arange(300) >= 128) & (torch.arange(300) < 140)
    expected = results(attention, (query, key[:, :, 128:140], value[:, :, 128:140]), {})
    for tensor in (key, value):
        tensor[:, :, :128] = tensor[:, :, 192:] = math.nan
    found = results(attention, (query, key, value), {"attn_mask": seen})
    for one, other in zip(found, expected, strict=True):
        one = one[:, :, 128:140] if one.shape[2] == 300 else one
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # float32: a dozen terms in another order
    assert all(not gradient[:, :, :128].any() and not gradient[:, :, 140:].any() for gradient in found[2:])


# ---- threads, memory, arguments


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("leading", [(1, 1), (4, 8)], ids=["one head", "many heads"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("queries", [2, 205])
@pytest.mark.parametrize("weights", [NONE, MEAN])
def test_same_bits_for_any_number_of_threads(leading, is_causal, queries, weights):
    arguments = (
        *three(queries, 203, 20, leading=leading),
        None,
        None,
        torch.tensor(3),
        0.1,
        is_causal,
        0.3,
        False,
        *weights,
        0,
    )
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(flat(OPS["attention"], arguments)[0])
    for more in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(more, found[0], strict=True))


def test_no_matrix_of_queries_by_keys_is_ever_held():
    arguments = [t.requires_grad_() for t in three(3000, 3000, 16, leading=(1, 1))]
    nacre.memory.reset_peak()
    before = nacre.memory.stats()
    output = attention(*arguments, dropout_p=0.1, is_causal=True)
    torch.autograd.grad(output.sum(), arguments)
    assert nacre.memory.stats().peak - before.used < 3000 * 3000 * 4 / 2


def test_the_mean_of_the_weights_holds_no_matrix_of_each_head():
    layer = nacre.MultiheadAttention(64, 16)
    tokens = normal(700, 1, 64, seed=1).requires_grad_()
    before = nacre.memory.stats()
    nacre.memory.reset_peak()
    output, weights = layer(tokens, tokens, tokens)
    torch.autograd.grad(output.sum() + weights.square().sum(), tokens)
    assert weights.shape == (1, 700, 700)
    assert nacre.memory.stats().peak - before.used < 16 * 700 * 700 * 4 / 2


def test_the_mean_of_half_precision_is_rounded_once():
    """The mean over many heads is as near to float64 as its dtype allows."""
    arguments = in_dtype(three(9, 12, 8, leading=(2, 64)), torch.bfloat16)
    weights = OPS["attention"](*arguments, None, None, None, 0.0, False, 0.3, False, *MEAN, 0)[1]
    exact = (arguments[0].double() @ arguments[1].double().mT * 0.3).softmax(-1).mean(-3)
    # half a unit in the last of bfloat16's 8 binary digits, and the error of float32 before it
    assert weights.dtype is torch.bfloat16 and ((weights.double() - exact).abs() <= exact * 2**-8 * 1.01).all()


BAD = {
    "fewer keys than values": (three(3, 4, 5)[0], three(3, 4, 5)[1], three(3, 5, 5)[2]),
    "another dtype": (three(3, 4, 5)[0], three(3, 4, 5)[1].double(), three(3, 4, 5)[2]),
    "heads that do not divide": (normal(2, 3, 4, 5), normal(2, 2, 4, 5), normal(2, 2, 4, 5)),
    "nothing": (normal(2, 3, 0, 5), normal(2, 3, 4, 5), normal(2, 3, 4, 5)),
    "a vector": (normal(5), normal(5), normal(5)),
    "a packed tensor of other heads": (normal(3, 2, 10), None, None),
    "a key without a value": (normal(3, 2, 12), normal(3, 2, 12), None),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_direct_calls_raise(name):
    kernel = torch.ops.nacre.attention.kernel
    grouped = name == "heads that do not divide"
    with pytest.raises(RuntimeError, match="attention"):
        kernel(*BAD[name], None, None, None, 0.0, False, 1.0, grouped, *NONE, 3)


def test_wrong_masks_seeds_and_gradients_raise():
    query, key, value = three(3, 4, 5)
    kernel, backward = torch.ops.nacre.attention.kernel, torch.ops.nacre.attention_backward.kernel
    rest = (False, 1.0, False, *NONE, 0)
    for mask in (normal(4, 4), normal(1, 2, 3, 3, 4), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="attention"):
            kernel(query, key, value, mask, None, None, 0.0, *rest)
    for seed, p in ((torch.zeros(2, dtype=torch.int64), 0.5), (torch.tensor(0.5), 0.5), (torch.tensor(1), 1.5)):
        with pytest.raises(RuntimeError, match="attention"):
            kernel(query, key, value, None, None, seed, p, *rest)
    with pytest.raises(RuntimeError, match="only weights that are returned are averaged"):
        kernel(query, key, value, None, None, None, 0.0, False, 1.0, False, False, True, 0)
    with pytest.raises(RuntimeError, match="over heads"):
        kernel(query[0, 0], key[0, 0], value[0, 0], None, None, None, 0.0, False, 1.0, False, *MEAN, 0)
    rows = torch.ones(2, 3, 3, 1)
    for output, maximum, needs in (
        (normal(2, 3, 3, 6), rows, [True] * 3 + [False] * 2),
        (normal(2, 3, 3, 5), rows[:, :2], [True] * 3 + [False] * 2),
        (normal(2, 3, 3, 5), rows, [True] * 5),
        (normal(2, 3, 3, 5), rows, [True]),
    ):
        with pytest.raises(RuntimeError, match="attention"):
            backward(output, None, query, key, value, None, None, None, 0.0, *rest, maximum, rows, needs)


def test_gradients_that_nothing_asks_for_are_left_out():
    for wanted in range(3):
        arguments = list(three(20, 21, 8))
        expected = results(attention, arguments, {})[1 + wanted]
        arguments[wanted].requires_grad_()
        output = attention(*arguments)
        cotangent = torch.linspace(-3, 3, output.numel(), dtype=torch.float64).sin().reshape(output.shape).float()
        (gradient,) = torch.autograd.grad(output, arguments[wanted], cotangent)
        assert torch.equal(gradient, expected)
        assert len(list(tensors(output))) == 1


def test_large_scores_are_as_exact_as_torchs_over_many_draws():
    """Scores of some hundreds, as PyTorch's own data have: a draw's error is luck, the mean of 60 draws is not."""
    logarithms = torch.zeros(60, 4, dtype=torch.float64)
    for seed in range(len(logarithms)):
        generator = torch.Generator().manual_seed(seed)
        arguments = [torch.rand(2, 3, 8, 8, generator=generator) * 18 - 9 for _ in range(3)]
        ours = results(attention, arguments, {"is_causal": True})
        torchs = results(F.scaled_dot_product_attention, arguments, {"is_causal": True})
        judges = results(F.scaled_dot_product_attention, in_dtype(arguments, torch.float64), {"is_causal": True})
        for index, (one, two, judge) in enumerate(zip(ours, torchs, judges, strict=True)):
            ratio = (one - judge).square().sum() / (two - judge).square().sum()
            logarithms[seed, index] = ratio.sqrt().log()
    assert (logarithms.mean(0).exp() < 1.2).all(), logarithms.mean(0).exp()  # between 0.3 and 1 when written

"""Dropout: its masks, their statistics, and what the contract cannot compare because torch draws another mask."""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.core.random import keep_mask, random_words
from nacre.layers.dropout import formula

dropout = nacre.functional.dropout
RATES = [0.1, 0.25, 0.5, 0.9]


def drawn(shape, p, seed=0):
    """The mask of a call with this seed of torch's generator."""
    torch.manual_seed(seed)
    return dropout(torch.ones(shape), p) != 0


# ---- identity and the ends of the range


@pytest.mark.parametrize("inplace", [False, True])
def test_returns_the_input_itself_where_nothing_is_dropped(inplace):
    input = torch.randn(3, 4, requires_grad=True)
    state = torch.get_rng_state()
    assert dropout(input, 0.5, training=False, inplace=inplace) is input
    assert dropout(input, 1.0, training=False, inplace=inplace) is input
    assert dropout(input, 0.0, training=True, inplace=inplace) is input
    assert nacre.Dropout(0.3, inplace).eval()(input) is input
    empty = torch.empty(0, 3)
    assert dropout(empty, 0.5, inplace=inplace) is empty
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"


def test_everything_dropped():
    input = torch.randn(3, 4, requires_grad=True)
    state = torch.get_rng_state()
    output = dropout(input, 1.0)
    assert torch.equal(output, torch.zeros(3, 4))
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert torch.equal(gradient, torch.zeros(3, 4))
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_infinity_and_nan_become_nan_when_dropped(p):
    """As torch.nn, which multiplies by the mask; so a diverged activation is never hidden."""
    input = torch.tensor([math.inf, -math.inf, math.nan]).repeat(20).requires_grad_()
    for function in (dropout, F.dropout):
        torch.manual_seed(0)
        output = function(input, p)
        assert output.isnan().any() and not (output == 0).any()
        assert p < 1 or output.isnan().all()
    torch.manual_seed(0)
    kept = dropout(torch.ones(60), p) != 0
    torch.manual_seed(0)
    values = torch.full((60,), math.inf)
    assert torch.equal(dropout(values, p).isinf(), kept)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_p_is_a_probability(p, training):
    for function in (F.dropout, dropout):
        with pytest.raises(ValueError, match=str(p)):
            function(torch.ones(2), p, training)
    for kind in (torch.nn.Dropout, nacre.Dropout):
        with pytest.raises(ValueError, match=str(p)):
            kind(p)


def test_p_that_is_no_number():
    for function in (F.dropout, dropout):
        with pytest.raises(RuntimeError, match="nan"):
            function(torch.ones(2), math.nan)
        with pytest.raises(TypeError):
            function(torch.ones(2), "0.5")
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(9), torch.tensor(0.5)) != 0, drawn(9, 0.5))


def test_integers_are_left_to_torch():
    input = torch.arange(4)
    with record_choices() as choices:
        assert dropout(input, 0.5, training=False) is input
        assert torch.equal(dropout(input, 1.0), torch.zeros(4, dtype=torch.int64))
    assert [choice.implementation for choice in choices] == ["torch", "torch"]
    for function in (F.dropout, dropout):
        with pytest.raises(RuntimeError):
            function(input, 0.5)


# ---- values and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", RATES)
def test_kept_values_are_scaled_and_rounded_once(p, dtype):
    input = torch.randn(500, dtype=torch.float64).to(dtype)
    output = dropout(input, p)
    wide = input.to(torch.promote_types(dtype, torch.float32))
    kept = output != 0
    assert torch.equal(output[kept], (wide * (1 / (1 - p))).to(dtype)[kept])
    assert 0 < kept.sum() < 500


@pytest.mark.parametrize("p", RATES)
def test_gradient_mask_is_the_forward_mask(p):
    input = torch.ones(64, 65, requires_grad=True)
    output = dropout(input, p)
    (gradient,) = torch.autograd.grad(output.sum(), input, create_graph=True)
    assert torch.equal(gradient, output)
    grad = torch.ones(64, 65, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, input, grad, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), grad)
    assert torch.equal(second, output)


def test_every_derivative_of_the_op():
    seed = torch.tensor(11)

    def function(input):
        return torch.ops.nacre.dropout(input, seed, 0.4)

    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, input, check_fwd_over_rev=True)


def test_functional_derivatives_use_the_forward_mask():
    input = torch.ones(50)
    output, pull_back = torch.func.vjp(lambda x: dropout(x, 0.5), input)
    assert torch.equal(pull_back(torch.ones(50))[0], output)
    output, tangent = torch.func.jvp(lambda x: dropout(x, 0.5), (input,), (torch.ones(50),))
    assert torch.equal(tangent, output)
    torch.manual_seed(3)
    gradient = torch.func.grad(lambda x: dropout(x, 0.5).sum())(input)
    assert torch.equal(gradient != 0, drawn(50, 0.5, seed=3))


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_inplace(p):
    leaf = torch.randn(40, requires_grad=True)
    torch.manual_seed(1)
    expected = dropout(leaf, p)
    torch.manual_seed(1)
    given = leaf * 1
    output = dropout(given, p, inplace=True)
    assert output is given and torch.equal(output, expected)
    grads = [torch.autograd.grad(result.sum(), leaf)[0] for result in (output, expected)]
    assert torch.equal(*grads)


def test_inplace_errors():
    for input in (torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)[:2], torch.ones(1).expand(3)):
        for function, p in ((F.dropout, 0.5), (dropout, 0.5), (F.dropout, 1.0), (dropout, 1.0)):
            with pytest.raises(RuntimeError):
                function(input, p, inplace=True)
            assert (input == 1).all(), "a refused input was overwritten"


def test_keeps_the_seed_alone():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dropout(torch.randn(100, 100, requires_grad=True), 0.5)
    assert [tensor.numel() * tensor.element_size() for tensor in kept] == [8]


@pytest.mark.parametrize(
    "input",
    [
        torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.ones(2, 3, 4).permute(2, 0, 1),
        torch.ones(4, 6)[:, ::2],
        torch.ones(3, 1).expand(3, 4),
        torch.ones(3).expand(5, 3),
    ],
    ids=["channels_last", "permuted", "sliced", "expanded", "expanded in front"],
)
def test_memory_formats(input):
    output = dropout(input, 0.5)
    assert output.stride() == F.dropout(input, 0.5).stride()
    torch.manual_seed(4)
    assert torch.equal(dropout(input, 0.5) != 0, drawn(input.shape, 0.5, seed=4)), "the mask depends on the strides"


# ---- where the mask comes from


def test_the_same_seed_gives_the_same_mask():
    assert torch.equal(drawn((30, 40), 0.5, seed=1), drawn((30, 40), 0.5, seed=1))
    assert not torch.equal(drawn((30, 40), 0.5, seed=1), drawn((30, 40), 0.5, seed=2))


def test_every_call_draws_a_new_mask():
    layer = nacre.Dropout(0.5)
    masks = [tuple((layer(torch.ones(100)) != 0).tolist()) for _ in range(20)]
    assert len(set(masks)) == 20


def test_the_mask_does_not_depend_on_the_number_of_threads():
    masks = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        masks.append(drawn((100, 1000), 0.5))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_the_mask_does_not_depend_on_the_dtype():
    torch.manual_seed(0)
    half = dropout(torch.ones(1000, dtype=torch.bfloat16), 0.3) != 0
    assert torch.equal(half, drawn(1000, 0.3))


def test_a_longer_tensor_begins_with_the_same_mask():
    assert torch.equal(drawn(1003, 0.5)[:17], drawn(17, 0.5))


# ---- the kernel

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MULTIPLIERS, KEY_STEPS, WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def philox(counter, key):
    """The cipher's definition, on numbers without bounds."""
    a, b, c, d = counter
    for _ in range(10):
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (right >> 32) ^ b ^ key[0], right & WORD, (left >> 32) ^ d ^ key[1], left & WORD
        key = [(half + step) & WORD for half, step in zip(key, KEY_STEPS, strict=True)]
    return [a, b, c, d]


def kernels_words(seed, block, count, four):
    if (library := native.library()) is None:
        pytest.skip(native.unavailable())
    words = torch.zeros(count, dtype=torch.int32)
    numbers = ctypes.c_int64(seed), ctypes.c_uint64(block), ctypes.c_int64(count), ctypes.c_bool(four)
    library.nacre_random_words(*numbers, ctypes.c_void_p(words.data_ptr()))
    return words.long() & WORD


def run_by_the_kernel(operator, *arguments):
    with record_choices() as choices:
        result = operator(*arguments)
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel"]
    return result


def test_the_definition_gives_the_published_vectors():
    """Those of the authors' library Random123, kat_vectors."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([WORD] * 4, [WORD] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("four", [True, False], ids=["four vectors", "two vectors"])
@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, 1 << 32, 0x123456789ABCDEF0, 2**63 - 2])
def test_the_kernels_words(seed, four):
    for count in (1, 3, 4, 31, 64, 65, 1003):
        assert torch.equal(kernels_words(seed, 0, count, four), random_words(torch.tensor(seed), count))
    # counters around the ends of their low words, and near the last one that a tensor can reach
    for block in (3, 2**30 - 7, 2**32 - 9, 2**32 - 1, 2**32 + 5, 2**61 - 20):
        words = kernels_words(seed, block, 80, four).view(20, 4)
        for number, four_words in enumerate(words.tolist(), start=block):
            assert four_words == philox([number & WORD, number >> 32, 0, 0], [seed & WORD, seed >> 32])


@pytest.mark.parametrize("p", [1e-12, 2**-33 + 2**-40, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_gives_the_formulas_bits(dtype, p):
    seed = torch.tensor(0x123456789ABCDEF0)
    for size in (0, 1, 15, 17, 63, 64, 65, 127, 257, 1023, 40009):
        input = (torch.randn(size + 1) * 3).to(dtype)[1:]  # aligned to its own size only
        input[::7] = -0.0
        expected = formula.masked(input, seed, p)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(run_by_the_kernel(torch.ops.nacre.dropout, input, seed, p).view(bits), expected.view(bits))
        gradient = run_by_the_kernel(torch.ops.nacre.dropout_backward, input, seed, p, [True])
        assert torch.equal(gradient.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_takes_memory_of_any_layout(dtype):
    def normal(*shape):
        return torch.randn(shape).to(dtype)

    inputs = {
        "a window": normal(5, 40)[:, 3:36],
        "every second": normal(5, 66)[:, ::2],
        "transposed": normal(2, 33, 5).transpose(1, 2),
        "permuted with a gap": normal(4, 5, 33)[:, 1:4].permute(2, 0, 1),
        "one row for all": normal(1, 33).expand(5, 33),
        "one number for all": normal(1).expand(5, 33),
        "channels_last": normal(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
        "one channel": normal(2, 1, 5, 7).contiguous(memory_format=torch.channels_last),
        "a size of one with a stride of its own": normal(12).as_strided((1, 6), (7, 1)),
        "no dimensions": normal(),
        "no elements": normal(3, 0, 2).transpose(0, 2),
    }
    seed = torch.tensor(6)
    for layout, input in inputs.items():
        output, expected = (
            run_by_the_kernel(torch.ops.nacre.dropout, input, seed, 0.4),
            formula.masked(input, seed, 0.4),
        )
        assert torch.equal(output, expected) and output.stride() == expected.stride(), layout


def test_the_kernel_itself_refuses_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    forward, backward = torch.ops.nacre.dropout.kernel, torch.ops.nacre.dropout_backward.kernel
    x, seed = torch.ones(5), torch.tensor(1)
    for message, call in {
        "probability": lambda: forward(x, seed, 1.5),
        "a probability, from": lambda: forward(x, seed, math.nan),
        "one int64": lambda: forward(x, torch.ones(()), 0.5),
        "one int64 on": lambda: forward(x, torch.tensor([1, 2]), 0.5),
        "float32, float64": lambda: forward(x.int(), seed, 0.5),
        "one gradient": lambda: backward(x, seed, 0.5, []),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    assert backward(x, seed, 0.5, [False]) is None


# ---- statistics; seeds are fixed, so that these never fail by chance


@pytest.mark.parametrize("p", [0.001, *RATES, 0.999])
def test_fraction_that_is_kept(p):
    count = 200_000
    kept = drawn(count, p).sum().item()
    deviation = math.sqrt(count * p * (1 - p))
    assert abs(kept - count * (1 - p)) < 4 * deviation


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mean_stays(p):
    count = 200_000
    torch.manual_seed(2)
    deviation = math.sqrt(p / (1 - p) / count)
    assert abs(dropout(torch.ones(count), p).mean().item() - 1) < 4 * deviation


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8, 16, 64, 1000])
def test_neighbours_are_independent(distance):
    """The correlation of independent elements is 0 with a standard deviation of 1 / sqrt(count)."""
    mask = drawn(100_000, 0.3).double()
    pairs = torch.stack([mask[:-distance], mask[distance:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4 / math.sqrt(pairs.shape[1])


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 62], ids=hex)
def test_seeds_are_independent(other):
    """Seeds that differ in one bit, in the low or the high half of the key."""
    masks = torch.stack([keep_mask(torch.tensor(seed), (100_000,), 0.3).double() for seed in (0, other)])
    assert abs(torch.corrcoef(masks)[0, 1].item()) < 4 / math.sqrt(100_000)


def test_every_position_is_kept_alike():
    """Over many seeds the kept counts of all positions: chi-square within 4 of its standard deviations."""
    seeds, positions, p = 2000, 64, 0.3
    kept = torch.vmap(lambda seed: keep_mask(seed, (positions,), p))(torch.arange(seeds)).sum(0).double()
    chi_square = ((kept - seeds * (1 - p)).square() / (seeds * p * (1 - p))).sum().item()
    assert abs(chi_square - positions) < 4 * math.sqrt(2 * positions)


# ---- transforms, compilers, recomputation


def test_vmap_randomness():
    input = torch.ones(6, 200)
    for function in (F.dropout, dropout):
        same = torch.vmap(lambda x, function=function: function(x, 0.5), randomness="same")(input)
        assert (same == same[0]).all()
        different = torch.vmap(lambda x, function=function: function(x, 0.5), randomness="different")(input)
        assert len({tuple(row.tolist()) for row in different}) == 6
        unbatched = torch.vmap(lambda _, function=function: function(torch.ones(200), 0.5), randomness="different")
        assert len({tuple(row.tolist()) for row in unbatched(input)}) == 6
        with pytest.raises(RuntimeError, match="random"):
            torch.vmap(lambda x, function=function: function(x, 0.5))(input)
        for keywords in ({"p": 1.0}, {"p": 0.0}, {"training": False}):  # nothing is drawn
            torch.vmap(lambda x, function=function, keywords=keywords: function(x, **keywords))(input)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_a_gradient(randomness):
    def both(row):
        output, pull_back = torch.func.vjp(lambda x: dropout(x, 0.5), row)
        return output, pull_back(torch.ones_like(output))[0]

    output, gradient = torch.vmap(both, randomness=randomness)(torch.ones(4, 50))
    assert torch.equal(output, gradient)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    layer = torch.compile(nacre.Dropout(0.5), fullgraph=True, backend=backend)
    masks = []
    for _ in range(5):
        input = torch.ones(8, 16, requires_grad=True)
        output = layer(input)
        (gradient,) = torch.autograd.grad(output.sum(), input)
        assert torch.equal(gradient, output)
        masks.append(tuple((output != 0).flatten().tolist()))
    assert len(set(masks)) == 5
    torch.manual_seed(0)
    first = layer(torch.ones(8, 16))
    torch.manual_seed(0)
    assert torch.equal(layer(torch.ones(8, 16)), first)


def test_compiled_with_a_dynamic_size():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        input = torch.ones(rows, 7, requires_grad=True)
        output = compiled(input)
        (gradient,) = torch.autograd.grad(output.sum(), input)
        assert torch.equal(gradient, output) and 0 < (output != 0).sum() < output.numel()


def test_compiled_mask_is_the_eager_mask():
    """aot_eager draws from torch's generator as eager code does."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(50))
    torch.manual_seed(9)
    assert torch.equal(compiled(torch.ones(50)) != 0, drawn(50, 0.5, seed=9))


def test_exported():
    exported = torch.export.export(nacre.Dropout(0.5).train(), (torch.ones(200),)).module()
    first, second = exported(torch.ones(200)), exported(torch.ones(200))
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_regenerates_the_mask(use_reentrant):
    layer = nacre.Dropout(0.5)
    input = torch.ones(300, requires_grad=True)
    outputs = []

    def segment(x):
        outputs.append(layer(x))
        return outputs[-1].square()

    result = checkpoint(segment, input, use_reentrant=use_reentrant)
    torch.manual_seed(1234)  # what the program draws in between does not matter
    result.sum().backward()
    first, again = outputs
    assert torch.equal(first, again)
    assert torch.equal(input.grad, 2 * first * 2)


def test_meta():
    layer = nacre.Dropout(0.5)
    assert layer(torch.ones(3, 4, device="meta")).shape == (3, 4)

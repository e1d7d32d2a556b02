"""What is special to Embedding: the order of the sum, gradients that are no derivative, the table changed in place."""

import copy

import pytest
import torch
from torch.nn.functional import embedding as torchs_embedding

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.functional import embedding
from nacre.layers.embedding import formula
from nacre.layers.embedding.cost import cost, sizes

OPTIONS = [
    {},
    {"padding_idx": 1},
    {"padding_idx": -6},
    {"scale_grad_by_freq": True},
    {"padding_idx": 2, "scale_grad_by_freq": True},
]


def test_published_number():
    with torch.device("meta"):
        layer = nacre.Embedding(50000, 512)
    assert sum(p.numel() for p in layer.parameters()) == 25_600_000
    assert cost(**sizes(layer, torch.empty(8, 512, dtype=torch.int64, device="meta"))).parameters == 25_600_000


# ---- the sum over repeated tokens


@pytest.mark.usual_algorithms
@pytest.mark.parametrize(("tokens", "rows", "features"), [(5000, 7, 33), (3000, 1, 4), (300, 5, 9000), (2000, 50, 1)])
def test_gradients_are_added_in_the_order_of_the_tokens(tokens, rows, features):
    indices = torch.randint(rows, (tokens,))
    # over many orders of magnitude, so that any other order gives other bits
    grad = torch.randn(tokens, features) * 10 ** torch.randn(tokens, 1)
    expected = torch.zeros(rows, features)
    for index, row in zip(indices.tolist(), grad, strict=True):
        expected[index] += row
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        for _ in range(3):
            weight = torch.randn(rows, features, requires_grad=True)
            embedding(indices, weight).backward(grad)
            assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_deterministic_algorithms_serve(options):
    weight, indices = torch.randn(6, 3, requires_grad=True), torch.randint(6, (50,))
    torch.use_deterministic_algorithms(True)
    (first,), (second,) = (torch.autograd.grad(embedding(indices, weight, **options).exp().sum(), weight) for _ in "12")
    torch.use_deterministic_algorithms(False)
    (third,) = torch.autograd.grad(embedding(indices, weight, **options).exp().sum(), weight)
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    weight = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    count = 5000  # added one by one, bfloat16 stops at 256 and float16 at 2048
    embedding(torch.ones(count, dtype=torch.int64), weight).sum().backward()
    assert weight.grad[:, 0].tolist() == [0, torch.tensor(5000.0).to(dtype)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_second_and_batched_gradients(options):
    """The derivative of the gradient that is given, padding and scaling included, with respect to the output's."""
    weight, indices = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randint(6, (2, 5))
    grad = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def gradient(grad):
        output = embedding(indices, weight, **options)
        return torch.autograd.grad(output, weight, grad, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, grad)
    grads = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    output = embedding(indices, weight, **options)
    (batched,) = torch.autograd.grad(output, weight, grads, is_grads_batched=True)
    # float64; sums of a few terms
    torch.testing.assert_close(batched, torch.stack([gradient(grad) for grad in grads]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("places", [(0, None), (None, 0), (0, 0)], ids=["tokens", "tables", "both"])
def test_vmap_over_tokens_and_tables(options, places):
    def gradient(function):
        return torch.func.grad(lambda weight, indices: function(indices, weight, **options).pow(3).sum())

    weights, tokens = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(6, (2, 2, 5))
    indices = tokens if places[0] == 0 else tokens[0]
    tables = weights if places[1] == 0 else weights[0]
    for transform, order in ((lambda f: lambda i, w: f(i, w, **options), 1), (gradient, -1)):
        ours, torchs = (
            torch.vmap(transform(f), places[::order])(*(indices, tables)[::order])
            for f in (embedding, torchs_embedding)
        )
        assert torch.equal(ours, torchs)


def test_the_table_may_change_between_forward_and_backward():
    """A second lookup with a largest norm, say; torch keeps no table for the backward either."""
    for function in (embedding, torchs_embedding):
        weight = torch.ones(3, 2, requires_grad=True)
        output = function(torch.tensor([0, 0, 2]), weight)
        with torch.no_grad():
            weight.mul_(2)
        output.sum().backward()
        assert weight.grad.tolist() == [[2, 2], [0, 0], [1, 1]]


# ---- the kernel

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def results_of_the_kernel(weight, indices, grad, padding_idx=-1, scale_grad_by_freq=False):
    """Output and gradient of the table, by the op itself."""
    options = (weight.shape[0], padding_idx, scale_grad_by_freq, False)
    with record_choices() as choices:
        output = torch.ops.nacre.embedding(weight, indices, *options)
        gradient = torch.ops.nacre.embedding_backward(grad, indices, *options, [True])
    if not native.unavailable():
        assert [choice.implementation for choice in choices] == ["C++ kernel", "C++ kernel"]
    return output, gradient


def results_of_the_formula(weight, indices, grad, padding_idx=-1, scale_grad_by_freq=False):
    output, saved = formula.forward(weight, indices, weight.shape[0], padding_idx, scale_grad_by_freq, False)
    return output, formula.backward(grad, saved, [True])


def assert_the_formulas_bits(*arguments):
    for ours, expected in zip(results_of_the_kernel(*arguments), results_of_the_formula(*arguments), strict=True):
        assert ours.stride() == expected.stride() and torch.equal(ours, expected)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("options", [(-1, False), (1, False), (-1, True), (0, True)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_gives_the_formulas_bits(dtype, index_dtype, options):
    for rows, features, shape in [
        *((7, size, (23,)) for size in (1, 2, 15, 16, 17, 63, 65, 1023)),
        (1, 4, (3, 5)),
        (509, 33, (6, 7)),
        (3, 5, ()),
        (3, 5, (0, 2)),
        (20000, 3, (9973,)),
    ]:
        indices = torch.randint(rows, shape, dtype=index_dtype)
        weight, grad = torch.randn(rows, features).to(dtype), torch.randn(*shape, features).to(dtype)
        assert_the_formulas_bits(weight, indices, grad, *options)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_takes_memory_of_any_layout(dtype):
    def unaligned(*shape):
        return torch.randn(torch.Size(shape).numel() + 1).to(dtype)[1:].view(shape)

    tables = [
        unaligned(9, 33),
        torch.randn(33, 9).to(dtype).T,
        torch.randn(9, 80).to(dtype)[:, 5:38],
        torch.randn(9, 66).to(dtype)[:, ::2],
        torch.randn(1, 33).to(dtype).expand(9, 33),
    ]
    tokens = [torch.randint(9, (4, 5)), torch.randint(9, (5, 4)).T, torch.randint(9, (4, 10))[:, ::2]]
    grads = [
        unaligned(4, 5, 33),
        torch.randn(33, 5, 4).to(dtype).permute(2, 1, 0),
        torch.ones(1, dtype=dtype).expand(4, 5, 33),
    ]
    for weight in tables:
        for indices in tokens:
            for grad in grads:
                assert_the_formulas_bits(weight, indices, grad)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_a_gradient_larger_than_caches(tokens, dtype):
    """Rows without tokens are written past the caches, whatever their alignment; none is left out."""
    rows, features = 4099, 16_777_216 // (4096 * dtype.itemsize) + 1
    indices = torch.randint(rows, (tokens,))
    grad = torch.randn(tokens, features).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_the_formulas_bits(torch.zeros(rows, features, dtype=dtype), indices, grad)


@pytest.mark.usual_algorithms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_with_most_of_the_work(dtype):
    """Threads share its features: the order of its sum stays."""
    indices = torch.randint(100, (4000,))
    indices[torch.rand(4000) < 0.7] = 42
    weight, grad = torch.randn(100, 321).to(dtype), torch.randn(4000, 321).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for options in ((-1, False), (-1, True), (42, False)):
            assert_the_formulas_bits(weight, indices, grad, *options)


def test_a_table_without_features():
    for rows in (4, 0):
        indices = torch.zeros(min(rows, 3), dtype=torch.int64)
        output, gradient = results_of_the_kernel(torch.ones(rows, 0), indices, torch.ones(len(indices), 0))
        assert output.shape == (len(indices), 0) and gradient.shape == (rows, 0)


def test_the_kernel_itself_refuses_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    forward, backward = torch.ops.nacre.embedding.kernel, torch.ops.nacre.embedding_backward.kernel
    table, indices, grad = torch.ones(4, 3), torch.tensor([0, 3]), torch.ones(2, 3)
    for error, message, call in [
        (RuntimeError, "a table", lambda: forward(table[0], indices, 4, -1, False, False)),
        (RuntimeError, "a table", lambda: forward(table, indices, 5, -1, False, False)),
        (RuntimeError, "int32 or int64", lambda: forward(table, indices.short(), 4, -1, False, False)),
        (RuntimeError, "int32 or int64", lambda: backward(grad, indices.short(), 4, -1, False, False, [True])),
        (RuntimeError, "a row for each", lambda: backward(grad[:1], indices, 4, -1, False, False, [True])),
        (RuntimeError, "a row for each", lambda: backward(grad[0], indices, 4, -1, False, False, [True])),
        (RuntimeError, "dense", lambda: backward(grad, indices, 4, -1, False, True, [True])),
        (RuntimeError, "one gradient", lambda: backward(grad, indices, 4, -1, False, False, [])),
        (RuntimeError, "float32, float64", lambda: backward(grad.int(), indices, 4, -1, False, False, [True])),
        (IndexError, "out of range", lambda: forward(table, indices + 1, 4, -1, False, False)),
        (IndexError, "out of range", lambda: forward(table, indices - 1, 4, -1, False, False)),
        (IndexError, "out of range", lambda: backward(grad, indices, 3, -1, False, False, [True])),
        (IndexError, "out of range", lambda: backward(grad, indices - 1, 4, -1, False, False, [True])),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert backward(grad, indices, 4, -1, False, False, [False]) is None


# ---- options


def test_from_pretrained():
    table = torch.randn(4, 3)
    layer = nacre.Embedding.from_pretrained(table, padding_idx=1)
    assert type(layer) is nacre.Embedding and not layer.weight.requires_grad and layer.padding_idx == 1
    assert layer.weight.data_ptr() == table.data_ptr()
    with record_choices() as choices:
        assert torch.equal(layer(torch.tensor([3, 1])), table[[3, 1]])
    assert [choice.operator for choice in choices] == ["embedding"]
    assert nacre.Embedding.from_pretrained(table, freeze=False).weight.requires_grad


def test_the_padding_row_starts_at_zero_and_stays():
    layer = nacre.Embedding(5, 2, padding_idx=-2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.arange(5)).sum().backward()
    optimiser.step()
    assert layer.weight[3].tolist() == [0, 0]
    assert layer.weight.grad[:, 0].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, 0.0, float("inf")])
def test_largest_norm_gives_torchs_bits(norm_type, dtype):
    for features, max_norm in ((1, 0.1), (3, 1.0), (17, 0.1), (100, 5.0), (3, 0.0)):
        ours = torch.randn(9, features, dtype=dtype)
        ours[3] = 0
        before, torchs = ours.clone(), ours.clone()
        indices = torch.tensor([[0, 3, 3], [7, 0, 8]])
        outputs = [
            f(indices, w, max_norm=max_norm, norm_type=norm_type)
            for f, w in ((embedding, ours), (torchs_embedding, torchs))
        ]
        assert torch.equal(*outputs) and torch.equal(ours, torchs)
        untouched = [1, 2, 4, 5, 6]
        assert torch.equal(ours[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_largest_norm_in_half_precision(dtype):
    ours = torch.randn(9, 20).to(dtype)
    torchs = ours.clone()
    for function, weight in ((embedding, ours), (torchs_embedding, torchs)):
        function(torch.arange(9), weight, max_norm=1.0)
    # torch also rounds the factor to half precision: two roundings against our one
    torch.testing.assert_close(ours, torchs, rtol=1.5 * torch.finfo(dtype).eps, atol=0)


def test_largest_norm_under_compile():
    layer = nacre.Embedding(5, 3, max_norm=1.0)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    indices = torch.tensor([0, 4, 0])
    assert torch.equal(layer(indices), compiled(indices))
    assert torch.equal(layer.weight, compiled.weight)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"padding_idx": 0}], ids=str)
@pytest.mark.parametrize("shape", [(2, 5), (), (0,), (1,)], ids=str)
def test_sparse_gradient_is_torchs(shape, options):
    if shape == () and options:
        return  # torch's own backward fails: it takes a mask of an index without dimensions
    indices = torch.randint(4, shape, dtype=torch.int32) if shape else torch.tensor(0)
    found = []
    for function in (embedding, torchs_embedding):
        weight = torch.randn(4, 3, requires_grad=True, generator=torch.Generator().manual_seed(1))
        function(indices, weight, sparse=True, **options).exp().sum().backward()
        found.append(weight.grad)
    ours, torchs = found
    assert ours.layout is torchs.layout is torch.sparse_coo and ours.shape == torchs.shape
    assert ours.is_coalesced() == torchs.is_coalesced()
    assert torch.equal(ours._indices(), torchs._indices()) and torch.equal(ours._values(), torchs._values())
    assert ours._indices().dtype == torchs._indices().dtype


@pytest.mark.parametrize("table", [(0, 0), (10, 0)], ids=str)
def test_sparse_gradient_of_an_empty_table(table):
    layer = nacre.Embedding(*table, sparse=True)
    layer(torch.arange(table[0])).sum().backward()
    assert layer.weight.grad.is_sparse and layer.weight.grad.shape == table


def test_sparse_gradients_train_and_differentiate_again():
    indices = torch.tensor([[1, 3], [3, 0]])
    results = []
    for kind in (nacre.Embedding, torch.nn.Embedding):
        torch.manual_seed(0)
        layer = kind(4, 3, sparse=True)
        optimiser = torch.optim.SparseAdam(layer.parameters())
        for _ in range(3):
            optimiser.zero_grad()
            layer(indices).square().sum().backward()
            optimiser.step()
        (gradient,) = torch.autograd.grad(layer(indices).pow(3).sum(), layer.weight, create_graph=True)
        (second,) = torch.autograd.grad(gradient.to_dense().square().sum(), layer.weight)
        results.append((layer.weight, second.to_dense()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_sparse_gradient_cannot_be_scaled():
    with record_choices() as choices:
        output = embedding(
            torch.tensor([0, 0]), torch.ones(2, 2, requires_grad=True), scale_grad_by_freq=True, sparse=True
        )
    assert [choice.implementation for choice in choices] == ["torch"]
    with pytest.raises(RuntimeError, match="scale_grad_by_freq not supported with sparse"):
        output.sum().backward()


# ---- bad input


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (
            torch.tensor([[0, 3], [7, 4]]),
            r"rows with indices from 0 to 3; got index 7 at position \(1, 0\).*Embedding\(8, 2\)",
        ),
        (torch.tensor([1, 4], dtype=torch.int32), r"got index 4 at position 1\. Did you mean Embedding\(5, 2\)"),
        (torch.tensor(9), r"got index 9\. Did you mean"),
        (torch.tensor([1, -1]), r"got index -1 at position 1\. Indices do not count from the end"),
    ],
)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_index_out_of_range(indices, message, max_norm):
    weight = torch.ones(4, 2)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for function in (embedding, compiled):
        with pytest.raises(IndexError, match=f"index out of range in self, a table of 4.*{message}"):
            function(indices, weight, max_norm=max_norm)
    assert torch.equal(weight, torch.ones(4, 2))
    with pytest.raises(IndexError):
        torchs_embedding(indices, weight, max_norm=max_norm)
    with pytest.raises(IndexError, match="index out of range"):
        torch.vmap(lambda i: embedding(i, weight))(indices.expand(2, *indices.shape))


def test_tensors_without_values_are_not_looked_into():
    weight, indices = torch.empty(4, 2, device="meta"), torch.empty(3, 5, dtype=torch.int64, device="meta")
    assert embedding(indices, weight).shape == (3, 5, 2)


INDICES, TABLE = torch.tensor([[0, 2]]), torch.ones(3, 2)
BAD = {
    "float indices": ((INDICES.float(), TABLE), r"got indices of dtype torch.float32\. Did you mean input\.long\(\)"),
    "bool indices": ((INDICES.bool(), TABLE), "torch.bool"),
    "swapped": ((TABLE, INDICES), r"Did you mean embedding\(weight, input\)"),
    "flat table": ((INDICES, TABLE[0]), r"a table of shape \(num_embeddings, embedding_dim\)"),
    "no table": ((INDICES, None), "weight"),
    "no indices": ((None, TABLE), "indices"),
    "empty table": ((INDICES, TABLE[:0]), "Is the vocabulary empty"),
    "padding index": ((INDICES, TABLE, 3), "from -3 to 2; got padding_idx = 3"),
    "negative padding index": ((INDICES, TABLE, -4), "from -3 to 2; got padding_idx = -4"),
    "padding index of no integer": ((INDICES, TABLE, 1.0), "padding_idx"),
    "truth as padding index": ((INDICES, TABLE, True), "padding_idx"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_of_torchs_type(name):
    arguments, message = BAD[name]
    with pytest.raises(Exception) as torchs:
        torchs_embedding(*arguments)
    with pytest.raises(torchs.type, match=message):
        embedding(*arguments)


def test_calls_left_to_torch():
    for weight in (torch.arange(6).reshape(3, 2), torch.randn(3, 2, dtype=torch.complex64)):
        with record_choices() as choices:
            assert torch.equal(embedding(INDICES, weight), weight[INDICES])
        assert [choice.implementation for choice in choices] == ["torch"]
    nested = torch.nested.nested_tensor([torch.tensor([0, 1, 2]), torch.tensor([2])], layout=torch.jagged)
    assert torch.equal(embedding(nested, TABLE).values(), TABLE[[0, 1, 2, 2]])

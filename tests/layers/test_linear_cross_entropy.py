"""What is special to LinearCrossEntropyLoss; the contract test holds the rest."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

import nacre
from nacre.core.op import OPS
from nacre.functional import cross_entropy, linear_cross_entropy
from nacre.layers.cross_entropy import linear_formula
from nacre.layers.cross_entropy.linear_base import WithoutTorch
from nacre.layers.cross_entropy.linear_checks import chosen_chunk
from tests.layers.cross_entropy_support import reference, since_2_13

# ---- errors


def x(*shape, **keywords):
    return torch.zeros(shape, **keywords)


def y(*shape, fill=0, dtype=torch.int64):
    return torch.full(shape, fill, dtype=dtype)


LINEAR_BAD = {
    "dimensions": (RuntimeError, (x(2, 3, 3), x(4, 3), y(2)), {}, "expected input with dimensionality 1 or 2, got 3"),
    "weight": (RuntimeError, (x(2, 3), x(3), y(2)), {}, "linear_weight with dimensionality at least 2, got 1"),
    "features": (RuntimeError, (x(2, 3), x(4, 5), y(2)), {}, r"\(in_features\), got 3 and 5, respectively"),
    "bias": (RuntimeError, (x(2, 3), x(4, 3), y(2)), {"linear_bias": x(3)}, r"shape \(4,\), got \(3,\)"),
    "one row": (RuntimeError, (x(3), x(4, 2, 3), y(2)), {}, r"requires batched input, \(N, 3\), got unbatched"),
    "ignored": (RuntimeError, (x(2, 3), x(4, 3), x(2, 4)), {"ignore_index": -9}, "cannot be specified"),
    "dtype": (RuntimeError, (x(2, 3), x(4, 3, dtype=torch.float64), y(2)), {}, "one dtype"),
    "no such class": (IndexError, (x(2, 3), x(4, 3), y(2, fill=4)), {}, "Target 4 is out of bounds.*0 to 3"),
    "batches": (ValueError, (x(2, 3), x(4, 3), y(5)), {}, r"\(2\) to match target batch_size \(5\)"),
    "reduction": (ValueError, (x(2, 3), x(4, 3), y(2)), {"reduction": "average"}, "average"),
    "integers": (NotImplementedError, (y(2, 3), y(4, 3), y(2)), {}, "Long"),
}


@since_2_13
@pytest.mark.parametrize("name", LINEAR_BAD)
def test_linear_errors_are_of_torchs_type(name):
    kind, arguments, keywords, message = LINEAR_BAD[name]
    with pytest.raises(kind, match=message):
        linear_cross_entropy(*arguments, **keywords)
    with pytest.raises(kind):
        torch.nn.functional.linear_cross_entropy(*arguments, **keywords)


# ---- chunks


def linear_problem(rows=7, features=3, classes=5, places=()):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    target = torch.randint(classes, (rows, *places), generator=generator)
    target.view(-1)[0] = -100
    return draw(rows, features), draw(classes, *places, features), draw(classes, *places), target


def in_chunks(x, w, b, target, chunk, reduction="mean", weight=None, smoothing=0.0, formed=(False, False, False)):
    return OPS["linear_cross_entropy"](x, w, b, target, weight, reduction, -100, smoothing, chunk, list(formed))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 8, None])
def test_chunks_change_nothing(chunk, reduction):
    for places, form in itertools.product(((), (2,)), (False, reduction != "none")):
        x, w, b, target = linear_problem(places=places)
        weight = torch.rand(5, dtype=torch.float64)
        found = in_chunks(x, w, b, target, chunk, reduction, weight, 0.1, (form,) * 3)
        expected = reference(x, w, target, b, weight=weight, reduction=reduction, label_smoothing=0.1)
        cotangent = torch.rand_like(expected)
        gradients = torch.autograd.grad(found, (x, w, b), cotangent)
        expected_gradients = torch.autograd.grad(expected, (x, w, b), cotangent)
        # float64 sums of seven rows, in another order
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-13)


def test_chunks_of_probabilities():
    x, w, b, _ = linear_problem()
    q = torch.rand(7, 5, dtype=torch.float64).softmax(1).requires_grad_()
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    free = (x, w, b, q, weight)
    gradients = torch.autograd.grad(in_chunks(x, w, b, q, 3, weight=weight, smoothing=0.2), free)
    expected = torch.autograd.grad(reference(x, w, q, b, weight=weight, label_smoothing=0.2), free)
    # float64 sums of seven rows, in another order
    torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_gradients_asked_for(needed):
    x, w, b, target = linear_problem()
    given = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
    in_chunks(*given, target, 3).backward()
    reference(x, w, target, b).backward()
    for ours, theirs, need in zip(given, (x, w, b), needed, strict=True):
        if not need:
            assert ours.grad is None
        else:
            # float64 sums of seven rows, in another order
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def test_chunks_under_every_order_of_derivative():
    x, w, b, target = linear_problem()

    def loss(x, w, b):
        return in_chunks(x, w, b, target, 3)

    assert torch.autograd.gradcheck(loss, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (x, w, b), check_fwd_over_rev=True)
    values = tuple(t.detach() for t in (x, w, b))
    hessian = torch.func.hessian(loss)(*values)
    judge = torch.func.hessian(lambda x: reference(x, w.detach(), target, b.detach()))(values[0])
    # float64 products of two derivatives
    torch.testing.assert_close(hessian, judge, rtol=1e-9, atol=1e-11)

    def row_loss(row, y):
        return in_chunks(row[None], values[1], values[2], y[None], 1, "sum")

    rows = torch.func.vmap(torch.func.grad(row_loss))(values[0], target)
    (expected,) = torch.autograd.grad(in_chunks(x, *values[1:], target, None, "sum"), x)
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that any operation makes, inside nacre's formulas too."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "nacre":
            name = function._schema.name.removeprefix("nacre::")
            op = OPS[name.removesuffix("_backward")]
            with self:
                return (op._formula_backward if name.endswith("_backward") else op._formula)(*arguments)
        result = function(*arguments, **(keywords or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_logits_never_exist(reduction, smoothing):
    tokens, features, classes, chunk = 600, 8, 50, linear_formula.LEAST_ROWS
    layer = nacre.LinearCrossEntropyLoss(
        features, classes, bias=True, reduction=reduction, label_smoothing=smoothing, weight=torch.rand(classes)
    )
    x = torch.randn(tokens, features, requires_grad=True)
    target = torch.randint(classes, (tokens,))
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, target).sum().backward()
    assert largest.elements == max(chunk * classes, tokens * features)
    assert max(kept) == tokens * features
    assert x.grad.isfinite().all() and layer.linear.weight.grad.isfinite().all()
    # the mode does see the logits of a loss which holds them all
    with LargestTensor() as largest:
        cross_entropy(layer.linear(x), target).backward()
    assert largest.elements == tokens * classes


def test_rows_of_a_chunk():
    def rows(tokens, features, classes):
        return linear_formula.chunk_rows(torch.empty(tokens, features, device="meta"), torch.empty(classes, features))

    assert rows(8192, 1024, 4096) == 2048  # as many logits as the input has elements
    assert rows(8192, 1024, 50304) == 256  # fewer would starve the products
    assert rows(64, 512, 10) >= 64  # logits smaller than the input: one chunk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_over_chunks_in_float32(dtype):
    """In bfloat16 itself a sum of 600 terms would stop growing at 2^8 times a term."""
    rows = 600
    x = torch.ones(rows, 1, dtype=dtype)
    w = torch.zeros(2, 1, dtype=dtype, requires_grad=True)
    in_chunks(x, w, None, torch.zeros(rows, dtype=torch.int64), 1, "sum").backward()
    # every row gives -1/2 and 1/2, all of which are exact
    assert w.grad.flatten().tolist() == [-300, 300]


# ---- options, older versions of torch, autocast, tracing


@since_2_13
def test_options_choose_the_chunk():
    options = torch.nn.LinearCrossEntropyOptions
    x, w = torch.randn(100, 8), torch.randn(40, 8)
    assert chosen_chunk(None, x, w) is None
    assert chosen_chunk(options(), x, w) is None
    assert chosen_chunk(options(batch_chunk_size=7), x, w) == 7
    assert chosen_chunk(options(chunking_method=None), x, w) == 100
    assert chosen_chunk(options(chunking_method="aspect_ratio"), x, w) == 32  # next power of 2 from 100 / (40 / 8)
    assert chosen_chunk(options(chunking_method="aspect_ratio:4"), x, w) == 8
    assert chosen_chunk(options(chunking_method="aspect_ratio:999"), x, w) == 1
    assert chosen_chunk(options(chunking_method="aspect_ratio", batch_chunk_size=32), x, w) == 32
    for fields, given in (
        ({"chunking_method": "aspect_ratio"}, x),
        ({"chunking_method": "aspect_ratio:2"}, x[:70]),
        ({"chunking_method": "aspect_ratio"}, x[:3]),
    ):
        torchs = options(**fields)._adjust(given.shape[0], 8, 40, x.dtype, x.device)
        assert chosen_chunk(options(**fields), given, w) == torchs.batch_chunk_size
    with pytest.raises(ValueError, match=r"chunks of 32 rows.*batch_chunk_size = 7"):
        chosen_chunk(options(chunking_method="aspect_ratio", batch_chunk_size=7), x, w)
    with pytest.raises(RuntimeError, match="acc_dtype"):
        chosen_chunk(options(acc_dtype=torch.float64), x, w)
    assert chosen_chunk(options(acc_dtype=torch.float32), x.bfloat16(), w.bfloat16()) is None


@since_2_13
def test_options_give_torchs_results():
    x, w, b, target = linear_problem()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    for reduction in ("mean", "sum", "none"):
        keywords = {"linear_bias": b, "reduction": reduction, "options": options}
        found = linear_cross_entropy(x, w, target, **keywords)
        expected = torch.nn.functional.linear_cross_entropy(x, w, target, **keywords)
        # float64 sums of seven rows, in another order
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), (x, w, b)),
            torch.autograd.grad(expected.sum(), (x, w, b)),
            rtol=1e-11,
            atol=1e-13,
        )
    layer = nacre.LinearCrossEntropyLoss(3, 5, options=torch.nn.LinearCrossEntropyOptions())
    loss = layer(x.float(), target)
    loss.backward(retain_graph=True)
    loss.backward()  # where torch's layer raises
    two = linear_cross_entropy(x.bfloat16(), w.float(), target, options=options)
    assert two.dtype is torch.bfloat16  # torch takes two dtypes here: left to torch


@since_2_13
def test_the_class_for_older_versions_of_torch_equals_torchs():
    for keywords in ({}, {"bias": True, "out_features": (2, 3)}, {"weight": torch.rand(5), "ignore_index": 2}):
        torch.manual_seed(0)
        torchs = torch.nn.LinearCrossEntropyLoss(3, 5, **keywords)
        torch.manual_seed(0)
        ours = WithoutTorch(3, 5, **keywords)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in torchs.state_dict().items())
        assert vars(ours).keys() == vars(torchs).keys()
        assert ours.extra_repr().split() == torchs.extra_repr().replace(",", ", ").replace(",  ", ", ").split() or (
            ours.extra_repr() == torchs.extra_repr()
        )
    with pytest.raises(RuntimeError, match=r"expected weight shape to be \(5,\), got \(4,\)"):
        WithoutTorch(3, 5, weight=torch.rand(4))
    with pytest.raises(RuntimeError, match="range"):
        WithoutTorch(3, 5, label_smoothing=2.0)

    class Older(WithoutTorch):
        forward = nacre.LinearCrossEntropyLoss.forward

    layer = Older(3, 5, bias=True, out_features=(2,))
    assert layer(torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.int64)).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_logits_only(dtype):
    x, w, b, target = (t.detach() for t in linear_problem())
    x, w, b = x.float().requires_grad_(), w.float().requires_grad_(), b.float()
    q = torch.rand(7, 5).softmax(1)
    for goal in (target, q):
        with torch.autocast("cpu", dtype):
            found = linear_cross_entropy(x, w, goal, linear_bias=b)
            expected = reference(x, w, goal, b)
        assert found.dtype is expected.dtype is torch.float32
        gradients = torch.autograd.grad(found, (x, w))
        assert all(gradient.dtype is torch.float32 for gradient in gradients)
        # both round the logits, of about 3, to 8 bits
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_sizes_stay_symbolic():
    layer = nacre.LinearCrossEntropyLoss(3, 5, bias=True)
    rows = torch.export.Dim("rows", min=2, max=100_000)
    given = (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    exported = torch.export.export(layer, given, dynamic_shapes=({0: rows}, {0: rows})).module()
    x, target = torch.randn(300, 3), torch.randint(5, (300,))
    assert torch.equal(exported(x, target), layer(x, target))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for count in (5, 300, 700):
        x = torch.randn(count, 3, requires_grad=True)
        target = torch.randint(5, (count,))
        compiled(x, target).backward()
        (expected,) = torch.autograd.grad(layer(x, target), x)
        assert torch.equal(x.grad, expected)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, "compiled anew for another number of rows"


def test_meta_tensors():
    loss = nacre.LinearCrossEntropyLoss(3, 5, reduction="none", out_features=(2,), device="meta")
    assert loss(torch.empty(4, 3, device="meta"), torch.empty(4, 2, dtype=torch.int64, device="meta")).shape == (4, 2)
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    cross_entropy(x, torch.empty(4, dtype=torch.int64, device="meta")).backward()
    assert x.grad.shape == (4, 5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes that are compared are constants of a trace
def test_torchs_tracer_records_it():
    loss = nacre.LinearCrossEntropyLoss(4, 3)
    given = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    traced = torch.jit.trace(loss, given)
    torch.testing.assert_close(traced(*given), loss(*given))

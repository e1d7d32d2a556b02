"""Residual, dropout and LayerNorm in one pass: the same bits as one after the other, wherever nobody looks between."""

import copy
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import nacre
from nacre.blocks import BLOCKS
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.layers.dropout import residual_dropout
from nacre.layers.layer_norm import residual_dropout_layer_norm
from tests.support import SavedBytes, assert_as_good_as_torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# around a vector of 4, 8 or 16 values and around four of them, a prime, and rows that do not begin at multiples of 4
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 768, 1023]


def leaves(*shape, dtype=torch.float32, parameters=True):
    """Residual, branch, weight and bias; none is aligned to more than its own size."""

    def unaligned(*shape):
        count = torch.Size(shape).numel()
        return torch.randn(count + 1, dtype=torch.float64).to(dtype)[1:].view(shape).requires_grad_()

    return [unaligned(*shape), unaligned(*shape), unaligned(shape[-1]), unaligned(shape[-1])]


def apart(residual, branch, weight, bias, p, training=True, eps=1e-5):
    sum = residual + nacre.functional.dropout(branch, p, training)
    return nacre.functional.layer_norm(sum, residual.shape[-1:], weight, bias, eps), sum


def together(residual, branch, weight, bias, p, training=True, eps=1e-5):
    return residual_dropout_layer_norm(residual, branch, p, training, residual.shape[-1:], weight, bias, eps)


def results(function, given, *options, seed=3):
    """Outputs, gradients, and the state of torch's generator afterwards."""
    torch.manual_seed(seed)
    outputs = function(*given, *options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    state = torch.get_rng_state()
    grads = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, given, grads), state]


def run_by_the_kernels(function, *arguments, **keywords):
    with record_choices() as choices:
        found = results(function, *arguments, **keywords)
    if not native.unavailable():
        assert {choice.implementation for choice in choices} == {"C++ kernel"}
        assert {choice.operator.removesuffix("_backward") for choice in choices} in (
            {"residual_dropout"},
            {"residual_dropout_layer_norm"},
        )
    return found


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_are_those_of_the_layers_one_after_the_other(size, dtype, p):
    given = leaves(13, size, dtype=dtype)
    for one, other in zip(run_by_the_kernels(together, given, p), results(apart, given, p), strict=True):
        assert torch.equal(one, other)
    given = given[:2]
    found = run_by_the_kernels(residual_dropout, given, p, True)
    expected = results(lambda residual, branch: residual + nacre.functional.dropout(branch, p), given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs(size, dtype, training):
    """Where p is 1 nothing is left of the branch, and where nothing is dropped all of it: torch's mask is known."""
    p = 1.0 if training else 0.5
    given = leaves(37, size, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]

    def torchs(residual, branch, weight, bias):
        sum = residual + nn.functional.dropout(branch, p, training)
        return nn.functional.layer_norm(sum, (size,), weight, bias), sum

    ours, theirs = run_by_the_kernels(together, given, p, training), results(torchs, given)
    for index, values in enumerate(zip(ours[:-1], theirs[:-1], results(torchs, wide)[:-1], strict=True)):
        if index == 2 and size <= 2:  # rstd is up to 1 / sqrt(eps) there: what rounds before it is not comparable
            continue
        assert_as_good_as_torch(*(value.detach() for value in values), dtype, f"result {index}")
        assert values[0].stride() == values[1].stride()


@pytest.mark.parametrize("shape", [(3, 0), (0, 5), (0,), (2, 0, 3)])
def test_nothing_to_add(shape):
    for one, other in zip(results(together, leaves(*shape), 0.3), results(apart, leaves(*shape), 0.3), strict=True):
        assert torch.equal(one, other)


def test_memory_of_any_layout():
    layouts = {
        "transposed": lambda: torch.randn(4, 3, 9).transpose(0, 1),
        "features first": lambda: torch.randn(9, 3, 4).permute(1, 2, 0),
        "a window": lambda: torch.randn(3, 4, 20)[..., 5:14],
        "one row for all": lambda: torch.randn(9).expand(3, 4, 9),
        "plain": lambda: torch.randn(3, 4, 9),
    }
    for first, make_residual in layouts.items():
        for second, make_branch in layouts.items():
            given = [make_residual().requires_grad_(), make_branch().requires_grad_(), *leaves(9)[:2]]
            for function in (together, lambda residual, branch, *_: residual_dropout(residual, branch, 0.4, True)):
                options = (0.4,) if function is together else ()
                used = given if function is together else given[:2]
                reference = apart if function is together else lambda r, x: r + nacre.functional.dropout(x, 0.4)
                ours, expected = results(function, used, *options), results(reference, used, *options)
                for one, other in zip(ours, expected, strict=True):
                    assert torch.equal(one, other), (first, second)
                assert ours[0].stride() == expected[0].stride(), (first, second)


def test_rows_written_past_the_caches():
    """More than 16 MB of rows whose length is a multiple of a vector."""
    given = leaves(5500, 800)
    for one, other in zip(run_by_the_kernels(together, given, 0.3), results(apart, given, 0.3), strict=True):
        assert torch.equal(one, other)
    found = results(residual_dropout, given[:2], 0.3, True)
    expected = results(lambda residual, branch: residual + nacre.functional.dropout(branch, 0.3), given[:2])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usual_algorithms
def test_the_same_bits_for_any_number_of_threads():
    given = leaves(700, 129)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([*results(together, given, 0.3), *results(residual_dropout, given[:2], 0.3, True)])
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_infinity_and_nan_in_what_is_dropped_show():
    residual, branch = torch.zeros(3, 40), torch.ones(3, 40)
    branch[0], branch[1] = math.inf, math.nan
    torch.manual_seed(0)
    output, sum = together(residual, branch, None, None, 0.5)
    assert sum[0].isnan().any() and sum[0].isinf().any() and sum[1].isnan().all()
    assert output[:2].isnan().all() and output[2].isfinite().all()


NEEDS = [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0)]
OF_PARAMETERS = [(0, 0, 1, 0), (0, 0, 0, 1)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("outputs", "needs"),
    [*product([(0, 1), (0,), (1,)], NEEDS), *product([(0,)], OF_PARAMETERS)],
)
def test_only_the_gradients_asked_for(outputs, needs, p):
    given = leaves(9, 21)
    for leaf, needed in zip(given, needs, strict=True):
        leaf.requires_grad_(bool(needed))
    asked = [leaf for leaf in given if leaf.requires_grad]
    found = []
    for function in (together, apart):
        torch.manual_seed(1)
        results = [function(*given, p)[index] for index in outputs]
        grads = [torch.randn(9, 21, generator=torch.Generator().manual_seed(2)) for _ in results]
        found.append(torch.autograd.grad(results, asked, grads, allow_unused=True))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def gradients_as_they_arrive(function):
    """Where the gradients of residual, branch and output lie in memory when autograd hands them on."""
    arrived = {}
    given = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]
    passed = [leaf * 1 for leaf in given]
    for index, tensor in enumerate(passed):
        tensor.register_hook(lambda grad, index=index: arrived.__setitem__(index, grad.data_ptr()))
    output = function(*passed)
    output.register_hook(lambda grad: arrived.__setitem__("output", grad.data_ptr()))
    output.square().sum().backward()
    return arrived


def test_gradients_that_pass_through_are_not_copied():
    arrived = gradients_as_they_arrive(lambda residual, branch: residual_dropout(residual, branch, 0.5, True))
    assert arrived[0] == arrived["output"] != arrived[1]
    arrived = gradients_as_they_arrive(lambda residual, branch: residual_dropout(residual, branch, 0.5, False))
    assert arrived[0] == arrived["output"] == arrived[1]
    for p, same in ((0.5, False), (0.0, True)):
        arrived = gradients_as_they_arrive(lambda r, x, p=p: together(r, x, None, None, p)[0])
        assert (arrived[0] == arrived[1]) == same
    # what is shared is not written to
    residual, branch = (torch.ones(4, 8, requires_grad=True) for _ in range(2))
    residual_dropout(residual, branch, 0.0, True).square().sum().backward()
    residual.grad.add_(1)
    assert (residual.grad == 5).all() and (branch.grad == 4).all()


def test_the_kernels_themselves_refuse_what_does_not_fit():
    if reason := native.unavailable():
        pytest.skip(reason)
    add, normalise = torch.ops.nacre.residual_dropout, torch.ops.nacre.residual_dropout_layer_norm
    back, back_norm = torch.ops.nacre.residual_dropout_backward, torch.ops.nacre.residual_dropout_layer_norm_backward
    x, seed, four = torch.ones(4, 6), torch.tensor(1), [True] * 4
    for message, call in {
        "one shape": lambda: add.kernel(x, x[:2], seed, 0.5),
        "one dtype": lambda: add.kernel(x.double(), x, seed, 0.5),
        "probability": lambda: add.kernel(x, x, seed, 1.5),
        "one int64": lambda: add.kernel(x, x, x, 0.5),
        "branch's gradient": lambda: back.kernel(x, seed, 0.5, []),
        "have one shape": lambda: normalise.kernel(x, x[0], seed, 0.5, [6], None, None, 1e-5),
        "tensors of one dtype": lambda: normalise.kernel(x, x.double(), seed, 0.5, [6], None, None, 1e-5),
        "normalized_shape": lambda: normalise.kernel(x, x, seed, 0.5, [5], None, None, 1e-5),
        "weight and bias": lambda: normalise.kernel(x, x, seed, 0.5, [6], torch.ones(5), None, 1e-5),
        "four gradients": lambda: back_norm.kernel(x, x, x, seed, 0.5, [6], None, 1e-5, [True]),
        "shape of the outputs": lambda: back_norm.kernel(x[:2], x, x, seed, 0.5, [6], None, 1e-5, four),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="probability"):
        residual_dropout(x, x, 1.5, True)
    with pytest.raises(RuntimeError, match="normalises the last"):
        residual_dropout_layer_norm(x, x, 0.5, True, (5,), None, None, 1e-5)


# ---- inside blocks

BLOCKS_WITH_DROPOUT = {
    "block": lambda: nacre.TransformerBlock(16, 2, dropout=0.4),
    "block, norm last": lambda: nacre.TransformerBlock(16, 2, dropout=0.4, norm_first=False),
    "layer": lambda: nacre.TransformerEncoderLayer(16, 2, 24, dropout=0.4),
    "layer, norm first": lambda: nacre.TransformerEncoderLayer(
        16, 2, 24, 0.4, "gelu", batch_first=True, norm_first=True
    ),
}


def block_results(block, x, seed=4):
    torch.manual_seed(seed)
    with record_choices() as choices:
        output = block(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *block.parameters()])
    return [output, *gradients], [choice.operator for choice in choices]


def watch(module, kind):
    """A hook on the module, and the list that it writes to."""
    called = []
    register = {
        "forward": module.register_forward_hook,
        "forward pre": module.register_forward_pre_hook,
        "backward": module.register_full_backward_hook,
    }[kind]
    register(lambda *_: called.append(kind))
    return called


@pytest.mark.parametrize(
    ("part", "kind"),
    [("dropout1", "forward"), ("norm1", "forward pre"), ("dropout2", "backward"), ("norm2", "forward")],
)
@pytest.mark.parametrize("name", BLOCKS_WITH_DROPOUT)
def test_a_hook_inside_fires_and_changes_no_bit(name, part, kind):
    block, x = BLOCKS_WITH_DROPOUT[name]().double(), torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    expected, operators = block_results(block, x)
    assert sum(operator.startswith("residual_") and not operator.endswith("_backward") for operator in operators) == 2
    called = watch(block.get_submodule(part), kind)
    found, _ = block_results(block, x)
    assert called == [kind]
    for one, other in zip(found, expected, strict=True):
        # the gradients of residual and branch are added in another order where one operator gives both
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", BLOCKS_WITH_DROPOUT)
def test_hooks_on_all_modules_see_each(name):
    block, x = BLOCKS_WITH_DROPOUT[name](), torch.randn(3, 5, 16, requires_grad=True)
    seen = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        block(x)
    finally:
        handle.remove()
    assert {block.norm1, block.norm2, block.dropout1, block.dropout2} <= set(seen)


@pytest.mark.parametrize("name", BLOCKS_WITH_DROPOUT)
def test_parts_that_are_not_ours_are_called(name):
    block, x = BLOCKS_WITH_DROPOUT[name](), torch.randn(3, 5, 16)

    class Doubled(nacre.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    expected = block.eval()(x)
    for part, other in {"norm2": Doubled(16), "norm1": nn.Identity(), "dropout1": nn.LogSigmoid()}.items():
        changed = copy.deepcopy(block)
        setattr(changed, part, other)
        assert not torch.allclose(changed(x), expected)
    changed = copy.deepcopy(block)
    changed.dropout2.forward = lambda branch: 2 * branch
    assert not torch.allclose(changed(x), expected)


def test_layers_whose_parts_are_overridden():
    class Own(nacre.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) + 1

    layer, x = Own(16, 2, 24).eval(), torch.randn(3, 5, 16)
    plain = nacre.TransformerEncoderLayer(16, 2, 24).eval()
    plain.load_state_dict(layer.state_dict())
    gathered = plain.norm1(x + plain._sa_block(x, None, None))
    # float32 sums of a few dozen terms
    torch.testing.assert_close(layer(x), plain.norm2(gathered + plain._ff_block(gathered) + 1), rtol=1e-5, atol=1e-6)
    plain._sa_block = lambda *_, **__: torch.zeros(3, 5, 16)
    torch.testing.assert_close(plain(x), plain.norm2(plain.norm1(x) + plain._ff_block(plain.norm1(x))))


@pytest.mark.parametrize("part", [None, "dropout1", "dropout2", "norm1", "norm2"])
@pytest.mark.parametrize("name", BLOCKS_WITH_DROPOUT)
def test_saved_bytes_with_and_without_hooks(name, part):
    block, x = BLOCKS_WITH_DROPOUT[name](), torch.randn(3, 5, 16, requires_grad=True)
    if part:
        watch(block.get_submodule(part), "forward")
    spec = BLOCKS["transformer_block" if name.startswith("block") else "transformer_encoder_layer"]
    with SavedBytes(block) as saved:
        output = block(x)
    assert output.requires_grad and spec.cost(**spec.sizes(block, x)).saved_bytes == saved.bytes


def test_mixed_precision_runs_the_parts_apart():
    block, x = nacre.TransformerBlock(16, 2, dropout=0.4), torch.randn(3, 5, 16)
    with torch.autocast("cpu", torch.bfloat16), record_choices() as choices:
        output = block(x)
    assert output.dtype is torch.float32 and not [c for c in choices if c.operator.startswith("residual_")]


@pytest.mark.usual_sizes
def test_small_sums_without_dropout_are_torchs():
    residual, branch = torch.randn(4, 6), torch.randn(4, 6)
    with record_choices() as choices:
        assert torch.equal(residual_dropout(residual, branch, 0.1, False), residual + branch)
        together(residual, branch, None, None, 0.0)
        together(residual, branch, None, None, 0.1)
    assert [choice.implementation for choice in choices][:2] == ["torch", "torch"]
    assert choices[2].implementation != "torch"

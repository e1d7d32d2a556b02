"""PyTorch's own module test data (torch.testing._internal.common_modules), with nacre's classes in place of torch's.

The checks are those of PyTorch's test_modules.py which a machine without a GPU can run.
"""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like

import nacre
from nacre.blocks import BLOCKS
from nacre.layers import LAYERS
from tests.support import fresh, rebuild, tensors

# torch's own containers tell why they will not take their fused path
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")

REPLACEMENTS = {spec.replaces: spec.layer for spec in (*LAYERS.values(), *BLOCKS.values()) if spec.replaces is not None}
# torch.nn modules which hold layers that nacre serves: built as torch's, then converted
CONTAINERS = (torch.nn.TransformerEncoder, torch.nn.TransformerDecoderLayer, torch.nn.Transformer)

INFOS = [info for info in module_db if info.module_cls in REPLACEMENTS or info.module_cls in CONTAINERS]
EVERY = [
    pytest.param(info, training, id=f"{info.name}-{'train' if training else 'eval'}")
    for info, training in product(INFOS, (True, False))
]
ONCE = [pytest.param(info, id=info.name) for info in INFOS]


def test_the_data_names_our_layers():
    named = {info.module_cls for info in INFOS}
    # PyTorch's data has no entry for Dropout; that layer's own test file compares it with torch's
    assert set(REPLACEMENTS) - named == {torch.nn.Dropout}


def construct(info, arguments, **keywords):
    torch.manual_seed(0)
    kind = REPLACEMENTS.get(info.module_cls)
    if kind is not None:
        return kind(*arguments.args, **{**arguments.kwargs, **keywords})
    return nacre.convert(info.module_cls(*arguments.args, **{**arguments.kwargs, **keywords}))


# LinearCrossEntropyLoss has 857 samples, every product of its settings. The forward tests run all of them, the other
# tests every 11th, which meets every setting, since 11 divides the number of values of none.
MANY = 150


def inputs_of(info, dtype, *, requires_grad, training, every=False):
    torch.manual_seed(0)
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)
    return found if every or len(found) < MANY else found[::11]


def built(info, dtype, training, *, requires_grad=False, every=False):
    """Each constructed module with its forward input."""
    for item in inputs_of(info, dtype, requires_grad=requires_grad, training=training, every=every):
        if item.forward_input is not None:
            module = construct(info, item.constructor_input).to(dtype).train(training)
            yield module, item


def forward(module, given):
    with freeze_rng_state():  # the same dropout mask at every call
        torch.manual_seed(11)
        return module(*given.args, **given.kwargs)


def forward_and_gradients(module, given):
    """The outputs, and the gradients of their sum with respect to the inputs that ask for one and the parameters."""
    given = (given.args, given.kwargs)
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors(given)]
    args, keywords = rebuild(given, iter(leaves))
    with freeze_rng_state():
        torch.manual_seed(11)
        output = module(*args, **keywords)
    wishes = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    loss = sum(t.sum() for t in tensors(output) if t.requires_grad)
    gradients = torch.autograd.grad(loss, wishes, allow_unused=True) if torch.is_tensor(loss) else ()
    return output, [torch.zeros_like(wish) if g is None else g for g, wish in zip(gradients, wishes, strict=True)]


def assert_same(first, second, **tolerance):
    for one, other in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("info", "training"), EVERY)
def test_forward(info, training, dtype):
    checked = 0
    for module, item in built(info, dtype, training, every=True):
        output = module(*item.forward_input.args, **item.forward_input.kwargs)
        assert all(t.dtype == dtype or not t.is_floating_point() for t in tensors(output))
        if item.reference_fn is not None:
            reference = item.reference_fn(module, *item.forward_input.args, **item.forward_input.kwargs)
            assert_same(output, reference)
        checked += 1
    assert checked


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")  # as torch says of its own layer
@pytest.mark.parametrize(("info", "training"), EVERY)
def test_same_as_torch(info, training):
    """Beyond PyTorch's own references: the torch.nn module with the same state, wherever nothing is drawn at random."""
    for module, item in built(info, torch.float64, training, requires_grad=True, every=True):
        if training and any(getattr(part, "dropout", 0) or getattr(part, "p", 0) for part in module.modules()):
            continue
        reference = info.module_cls(*item.constructor_input.args, **item.constructor_input.kwargs)
        reference = reference.double().train(training)
        reference.load_state_dict(module.state_dict())
        results = (
            forward_and_gradients(module, item.forward_input),
            forward_and_gradients(reference, item.forward_input),
        )
        assert_same(*results, rtol=1e-9, atol=1e-11)  # float64: products and sums in another order
    assert repr(module) is not None


# torch.nn.TransformerEncoder takes a layer that is already made, and no device
@pytest.mark.parametrize("info", [p for p in ONCE if p.values[0].module_cls is not torch.nn.TransformerEncoder])
def test_factory_keywords(info):
    for item in inputs_of(info, torch.float32, requires_grad=False, training=False):
        module = construct(info, item.constructor_input)
        if next(module.parameters(), None) is None:
            continue
        for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
            made = construct(info, item.constructor_input, device=device, dtype=dtype)
            # a buffer that was passed in stays where it is
            buffers = [] if list(tensors(item.constructor_input.kwargs)) else list(made.buffers())
            for part in (*made.parameters(), *(b for b in buffers if b.is_floating_point())):
                assert part.device.type == device and part.dtype == dtype
    assert isinstance(repr(module), str)


@pytest.mark.parametrize(("info", "training"), EVERY)
def test_pickle_deepcopy_and_state(info, training):
    for module, item in built(info, torch.float32, training):
        expected = forward(module, item.forward_input)
        assert_same(forward(pickle.loads(pickle.dumps(module)), item.forward_input), expected, rtol=0, atol=0)
        assert_same(forward(copy.deepcopy(module), item.forward_input), expected, rtol=0, atol=0)
        stored = io.BytesIO()
        torch.save(module.state_dict(), stored)
        stored.seek(0)
        other = construct(info, item.constructor_input).train(training)
        other.load_state_dict(torch.load(stored, weights_only=True))
        assert_same(forward(other, item.forward_input), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("info", "training"), EVERY)
def test_non_contiguous_tensors(info, training):
    for module, item in built(info, torch.float32, training):
        given = (item.forward_input.args, item.forward_input.kwargs)
        wanted = [t.is_floating_point() for t in tensors(given)]
        results = []
        for scattered in (False, True):
            leaves = [noncontiguous_like(t) if scattered and t.dim() else t.clone() for t in tensors(given)]
            leaves = [
                t.detach().requires_grad_(w and not _is_target(module)) for t, w in zip(leaves, wanted, strict=True)
            ]
            args, keywords = rebuild(given, iter(leaves))
            torch.manual_seed(3)
            output = module(*args, **keywords)
            wishes = [t for t in leaves if t.requires_grad] + list(module.parameters())
            loss = sum(t.sum() for t in tensors(output) if t.requires_grad)
            gradients = torch.autograd.grad(loss, wishes, allow_unused=True) if torch.is_tensor(loss) else []
            results.append((output, [g for g in gradients if g is not None]))
        # float32 sums may run in another order
        assert_same(results[0], results[1], rtol=1e-4, atol=1e-5)


def _is_target(module):
    return isinstance(module, torch.nn.modules.loss._Loss)


@pytest.mark.parametrize(("info", "training"), EVERY)
def test_inplace(info, training):
    checked = 0
    for item in inputs_of(info, torch.float64, requires_grad=True, training=training):
        plain = construct(info, item.constructor_input).double().train(training)
        if not hasattr(plain, "inplace"):
            assert info.module_cls not in (torch.nn.ReLU, torch.nn.SiLU)
            return
        inplace = construct(info, item.constructor_input, inplace=True).double().train(training)
        expected = plain(*fresh(item.forward_input.args), **item.forward_input.kwargs)
        leaves = fresh(item.forward_input.args)
        copied = tuple(leaf.clone() for leaf in leaves)
        version = copied[0]._version
        found = inplace(*copied, **item.forward_input.kwargs)
        assert copied[0]._version > version
        assert found.data_ptr() == copied[0].data_ptr()
        assert_same(found, expected, rtol=0, atol=0)
        expected_leaves = fresh(item.forward_input.args)
        plain(*expected_leaves, **item.forward_input.kwargs).sum().backward()
        found.sum().backward()
        assert_same([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected_leaves], rtol=0, atol=0)
        checked += 1
    assert checked


def check_gradients(info, training, check):
    for module, item in built(info, torch.float64, training, requires_grad=True):
        given = (item.forward_input.args, item.forward_input.kwargs)
        free = [t for t in tensors(given) if t.requires_grad]
        names = [name for name, _ in module.named_parameters()]

        def function(*values, module=module, given=given, names=names):
            replacements = iter(values)
            args, keywords = rebuild(given, (next(replacements) if t.requires_grad else t for t in tensors(given)))
            with freeze_rng_state():
                torch.manual_seed(5)
                output = torch.func.functional_call(module, dict(zip(names, replacements, strict=True)), args, keywords)
            return tuple(t for t in tensors(output) if t.is_floating_point())

        values = [t.detach().clone().requires_grad_() for t in (*free, *module.parameters())]
        if not all(t.isfinite().all() for t in function(*values)):
            continue  # the mean over no target is NaN, which finite differences cannot judge
        assert check(function, values, fast_mode=True)


# once where training changes nothing; the containers' derivatives are those of the layers in them, which are checked by
# themselves, and test_same_as_torch compares their gradients with torch's
DIFFERENTIATED = [
    param
    for param in EVERY
    for info, training in [param.values]
    if info.module_cls not in CONTAINERS and (training or info.train_and_eval_differ)
]


@pytest.mark.parametrize(("info", "training"), DIFFERENTIATED)
def test_gradients(info, training):
    check_gradients(info, training, torch.autograd.gradcheck)


@pytest.mark.parametrize(("info", "training"), [p for p in DIFFERENTIATED if p.values[0].supports_gradgrad])
def test_second_gradients(info, training):
    check_gradients(info, training, torch.autograd.gradgradcheck)


@pytest.mark.parametrize(("info", "training"), EVERY)
def test_memory_format(info, training):
    """Channels-last inputs and weights give the same values, in channels-last output where torch's module does."""
    for module, item in built(info, torch.float32, training):
        given = item.forward_input
        images = [t for t in tensors((given.args, given.kwargs)) if t.dim() == 4]
        if not images:
            continue
        expected = forward(module, given)
        last = torch.channels_last
        moved = rebuild(
            (given.args, given.kwargs),
            (t.contiguous(memory_format=last) if t.dim() == 4 else t for t in tensors((given.args, given.kwargs))),
        )
        module.to(memory_format=last)
        found = forward(module, type(given)(*moved[0], **moved[1]))
        assert_same(found, expected, rtol=1e-4, atol=1e-5)
        if info.module_memformat_affects_out:
            assert all(t.is_contiguous(memory_format=last) for t in tensors(found))
    assert module is not None


@pytest.mark.parametrize("info", ONCE)
def test_training_attribute(info):
    """A module reads ``self.training`` exactly where torch's does."""
    for training in (True, False):
        for module, item in built(info, torch.float32, training):
            if info.module_cls in CONTAINERS:
                return
            del module.training
            try:
                module(*item.forward_input.args, **item.forward_input.kwargs)
            except AttributeError as error:
                assert "training" in str(error)
                assert info.train_and_eval_differ
            else:
                # torch's encoder layer reads its mode to choose its fused path, which ours does not have
                assert not info.train_and_eval_differ or info.module_cls is torch.nn.TransformerEncoderLayer


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")  # a pattern in PyTorch's data
@pytest.mark.parametrize("info", [pytest.param(i, id=i.name) for i in INFOS if i.module_error_inputs_func])
def test_errors(info):
    """The error data of PyTorch holds patterns of messages too: ours keep them."""
    for training in (True, False):
        data = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
        )
        for item in data:
            given = item.module_error_input
            if item.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(item.error_type, match=item.error_regex):
                    construct(info, given.constructor_input)
            else:
                module = construct(info, given.constructor_input)
                with pytest.raises(item.error_type, match=item.error_regex):
                    module(*given.forward_input.args, **given.forward_input.kwargs)


@pytest.mark.parametrize("info", ONCE)
def test_moving(info):
    for module, item in built(info, torch.float32, False):
        before = [p.dtype for p in module.parameters()]
        module.to(torch.float64).to(torch.float32)
        assert [p.dtype for p in module.parameters()] == before
        empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
        assert [p.shape for p in empty.parameters()] == [p.shape for p in module.parameters()]
        empty.load_state_dict(module.state_dict())
        assert_same(forward(empty, item.forward_input), forward(module, item.forward_input), rtol=0, atol=0)

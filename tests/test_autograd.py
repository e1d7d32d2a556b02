"""What autograd records of a kernel's call: the compiled node and Python's do the same in every situation."""

import contextlib
import copy
import threading

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import nacre
from nacre.core import native
from nacre.core.choice import record_choices
from nacre.core.op import OPS

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "-")


@pytest.fixture(params=["compiled", "python"])
def recorder(request, monkeypatch):
    """Who records: core/autograd.cpp, or the Function of core/op.py as with a torch that it was not built for."""
    if request.param == "python":
        for op in OPS.values():
            monkeypatch.setattr(op, "_recorded", False)
    elif not native.records():
        pytest.skip("core/autograd.cpp is for the torch that development pins")
    return request.param


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_development_records_in_cpp():
    if torch.__version__.startswith("2.13."):
        assert native.records()
        assert all(op._recorded for op in OPS.values() if op.name != "linear_cross_entropy")


def test_both_give_the_same_bits(monkeypatch):
    layer = nacre.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    x = torch.randn(2, 5, 16)

    def gradients():
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        output = layer(leaves[0])
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    compiled = gradients()
    for op in OPS.values():
        monkeypatch.setattr(op, "_recorded", False)
    assert all(torch.equal(one, other) for one, other in zip(compiled, gradients(), strict=True))


def test_the_node_is_named_after_its_op(recorder):
    assert nacre.functional.silu(torch.ones(3, requires_grad=True)).grad_fn.name() == "Nacre_siluBackward"


def test_a_graph_is_used_once_unless_it_is_kept(recorder):
    x = torch.randn(4, 3, requires_grad=True)
    loss = nacre.functional.layer_norm(x, (3,)).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, x))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("name", ["input", "output"])
def test_a_change_in_place_of_what_was_saved_is_an_error(recorder, name):
    x = torch.randn(4, 3, requires_grad=True)
    changed = x * 1
    output = nacre.functional.softmax(changed, 1) if name == "output" else nacre.functional.silu(changed)
    loss = output.sum()
    with torch.no_grad():
        (output if name == "output" else changed).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_gradients_asked_for_are_computed(recorder):
    layer = nacre.Linear(3, 2)
    layer.bias.requires_grad_(False)
    x = torch.randn(4, 3)
    output = layer(x)
    layer.weight.grad = None
    output.sum().backward()
    assert x.grad is None and layer.bias.grad is None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 3))


def test_an_output_that_nothing_depends_on_has_no_gradient(recorder):
    layer, reference = nacre.LSTM(3, 4), torch.nn.LSTM(3, 4)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    for which in (lambda output, states: output, lambda output, states: states[0], lambda output, states: states[1]):
        found, expected = (
            torch.autograd.grad(which(*module(x)).sum(), [*module.parameters()]) for module in (layer, reference)
        )
        torch.testing.assert_close(found, expected)


def test_hooks_of_saved_tensors_see_them(recorder):
    kept = []
    x = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        loss = nacre.functional.cross_entropy(x, torch.tensor([0, 1, 2, 0]))
    # the targets, the two statistics of each row, the logits
    assert sorted(shape.numel() for shape in kept) == [4, 4, 4, 12]
    assert torch.autograd.grad(loss, x)[0].shape == x.shape


def test_a_second_derivative_is_the_formulas(recorder):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (nacre.functional.gelu, (x,)),
        (lambda x, weight: nacre.functional.layer_norm(x, (3,), weight), (x, weight)),
        (lambda x: nacre.functional.cross_entropy(x, torch.tensor([2, 0]), label_smoothing=0.1), (x,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_what_watches_only_the_backward_sees_it(recorder):
    x = torch.randn(4, 3, requires_grad=True)
    with Seen() as seen:
        nacre.functional.silu(x).sum().backward()
    assert "nacre.silu_backward.default" in seen.names
    loss = nacre.functional.silu(x).sum()
    with Seen() as seen:
        loss.backward()
    assert "nacre.silu_backward.default" in seen.names
    loss = nacre.functional.silu(x).sum()
    with record_choices() as choices:
        loss.backward()
    assert [choice.operator for choice in choices] == ["silu_backward"]


def test_a_batch_of_gradients(recorder):
    x = torch.randn(3, 4, requires_grad=True)
    output = nacre.functional.softmax(x, 1)
    grads = torch.randn(5, 3, 4)
    (batched,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_inference_makes_no_graph(recorder):
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert nacre.functional.silu(x).grad_fn is None
    with torch.inference_mode():
        assert nacre.functional.silu(x).is_inference()
    assert nacre.functional.silu(x.detach()).grad_fn is None


def test_threads_share_a_graph(recorder):
    x = torch.randn(64, 64, requires_grad=True)
    loss = nacre.functional.layer_norm(nacre.functional.gelu(x), (64,)).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.autograd.grad(loss, x, retain_graph=True)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(gradient, expected) for gradient in found)


def test_detecting_anomalies_names_the_node(recorder):
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    with pytest.warns(UserWarning, match="Error detected in Nacre_siluBackward|Anomaly Detection has been enabled"):
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"Nacre_siluBackward.*nan"):
            nacre.functional.silu(x).sum().backward()


def test_gradients_of_views_and_expanded_ones(recorder):
    x = torch.randn(6, 4, requires_grad=True)
    expected = torch.nn.functional.silu(x)
    grad = torch.ones(()).expand(6, 4)
    found = nacre.functional.silu(x)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad))
    torch.testing.assert_close(
        torch.autograd.grad(nacre.functional.silu(x).t()[::2].sum(), x),
        torch.autograd.grad(torch.nn.functional.silu(x).t()[::2].sum(), x),
    )


# torch's compiler asks every saved tensor for its gradient
asked_for_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@asked_for_grad
def test_compiled_autograd_gives_the_same_gradients(recorder):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    layers = [
        nacre.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True),
        # settings, and gradients asked for, which alone tell one graph from another
        *(nacre.LayerNorm(16, eps=eps) for eps in (1e-5, 0.5)),
        *(nacre.Softmax(dim) for dim in (1, 2)),
        nacre.LayerNorm(16, elementwise_affine=False),
        nacre.LayerNorm(16).requires_grad_(False),
        nacre.Dropout(0.0),
        nacre.LSTM(16, 4),
    ]
    layers[6].bias.requires_grad_(True)

    def gradients(layer, backward):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
        output = layer(leaves[0])
        output = output[0] if isinstance(output, tuple) else output
        with backward:
            return torch.autograd.grad(output.square().sum(), leaves)

    for layer in layers:
        compiled = compiled_autograd._enable(torch.compile(backend="eager"))
        for found, expected in zip(gradients(layer, compiled), gradients(layer, contextlib.nullcontext()), strict=True):
            torch.testing.assert_close(found, expected)  # sums of two gradients are formed in another order


@asked_for_grad
def test_compiled_autograd_unpacks_saved_tensors_and_asks_once(recorder):
    x = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: 2 * tensor, lambda tensor: tensor / 2):
        loss = nacre.functional.silu(x).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = torch.autograd.grad(loss, x)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, torch.autograd.grad(torch.nn.functional.silu(x).square().sum(), x))


@pytest.mark.parametrize("kind", [torch.nn.MultiheadAttention, torch.nn.LSTM, torch.nn.GRU])
def test_inputs_made_in_inference_mode_serve_where_torch_copies_them(recorder, kind):
    layer = kind(8, 2, batch_first=True)
    own = nacre.convert(copy.deepcopy(layer))
    with torch.inference_mode():
        x = torch.randn(2, 5, 8)
    inputs = (x, x, x) if kind is torch.nn.MultiheadAttention else (x,)
    for each in (layer, own):
        each(*inputs)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(own.get_parameter(name).grad, parameter.grad)


def test_a_mask_made_in_inference_mode_serves_as_in_torch(recorder):
    layer = torch.nn.MultiheadAttention(8, 2)
    own = nacre.convert(copy.deepcopy(layer))
    x = torch.randn(5, 2, 8)
    with torch.inference_mode():
        mask = torch.randn(5, 5)
    for each in (layer, own):
        each(x, x, x, attn_mask=mask)[0].sum().backward()
    torch.testing.assert_close(own.in_proj_weight.grad, layer.in_proj_weight.grad)


def test_other_inputs_made_in_inference_mode_cannot_be_kept(recorder):
    with torch.inference_mode():
        x = torch.randn(5, 2, 8)
    for layer in (torch.nn.Linear(8, 4), torch.nn.LSTM(8, 4), torch.nn.LayerNorm(8)):
        for each in (layer, nacre.convert(copy.deepcopy(layer))):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                each(x)

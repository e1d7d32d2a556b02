"""nacre.explain tells what runs, and changes nothing."""

import torch

import nacre
from nacre.core import native


def test_it_names_the_implementation_and_the_reason():
    explanation = nacre.explain(nacre.LayerNorm(8), torch.randn(2, 8))
    (choice,) = explanation.choices
    assert choice.operator == "layer_norm"
    if native.unavailable():
        assert choice.implementation == "formula"
        assert native.unavailable() in str(explanation)
    else:
        assert choice.implementation == "C++ kernel"
        assert "float32" in str(explanation)


def test_it_tells_when_torch_computes():
    complex_numbers = torch.randn(3, 3, dtype=torch.complex64)
    explanation = nacre.explain(nacre.functional.linear, complex_numbers, complex_numbers)
    assert [choice.implementation for choice in explanation.choices] == ["torch"]
    assert "complex64" in str(explanation)
    assert "torch computed" in str(nacre.explain(torch.nn.Linear(3, 3), torch.randn(2, 3)))


def test_it_walks_through_a_whole_model():
    model = torch.nn.Sequential(nacre.Linear(4, 4), nacre.GELU(), nacre.Linear(4, 4))
    operators = [choice.operator for choice in nacre.explain(model, torch.randn(2, 4)).choices]
    assert operators == ["linear", "gelu", "linear"]


def test_random_state_is_put_back():
    x = torch.randn(3, 3)
    state = torch.get_rng_state()
    nacre.explain(nacre.Dropout(0.5), x)
    assert torch.equal(torch.get_rng_state(), state)

"""The models: shapes, initialisation, refusals, and the text they write."""

import math

import pytest
import torch

from nacre.applications import APPLICATIONS, Recipe, build
from nacre.applications.data import Vocabulary
from nacre.applications.generation import generate
from nacre.applications.gpt import GPT
from tests.applications.support import tiny_application, tiny_images, tiny_text

RECIPE = Recipe(batch_size=4, learning_rate=1e-2, steps=1)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    application = tiny_application(name, RECIPE, dropout=0.0)
    inputs, targets = application.data.training_batch(0, 4, seed=0)
    logits = application.model(inputs)
    assert logits.shape[:-1] == targets.shape
    application.model.criterion(logits.flatten(0, -2), targets.flatten()).backward()
    for parameter_name, parameter in application.model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_seed_alone_sets_the_first_weights(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = tiny_application(name, RECIPE).model.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    two = tiny_application(name, RECIPE).model.state_dict()
    other = tiny_application(name, RECIPE, seed=1).model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["lstm", "gru", "gpt"])
def test_no_character_sees_the_future(name: str) -> None:
    model = tiny_application(name, RECIPE).model.eval()
    tokens = torch.randint(5, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 5
    before, after = model(tokens), model(changed)
    # masked scores add exact zeros, but another summation order is allowed: float32 rounding of values about 1
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_gpt_starts_as_nanogpt_does() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary_size=65)
    assert model.head.weight is model.characters.weight
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    deviations = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    residual = [name for name in deviations if name.endswith(("attn.out_proj.weight", "ff.2.weight"))]
    assert len(residual) == 8
    for name, deviation in deviations.items():
        expected = 0.02 / math.sqrt(8) if name in residual else 0.02
        # with n elements a deviation is met within 1 / sqrt(2n) of itself, 0.8 % for the smallest, 8,192; five of those
        assert deviation == pytest.approx(expected, rel=0.04), name


def test_gpt_refuses_a_sequence_longer_than_its_block() -> None:
    with pytest.raises(ValueError, match="64 characters at most; got a sequence of 65"):
        GPT(vocabulary_size=5)(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "sizes", "rule"),
    [
        ("gpt", {"heads": 3}, "heads must divide the width; got 3 heads and width 128"),
        ("vit", {"heads": 3}, "heads must divide the width"),
        ("vit", {"patch": 3}, "3x3 does not divide 8x8"),
        ("mlp", {"depth": 0}, "depth must be at least 1; got 0"),
        ("lstm", {"width": -1}, "width must be at least 1"),
        ("mlp", {"dropout": 1.5}, "dropout"),
    ],
)
def test_impossible_sizes_are_refused(name: str, sizes: dict[str, float], rule: str) -> None:
    data = tiny_text(block=64) if name in {"gpt", "lstm"} else tiny_images()
    with pytest.raises(ValueError, match=rule):
        build(name, data=data, **sizes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no application 'rnn'; there are mlp, cnn, vit, lstm, gru, gpt"):
        build("rnn")
    with pytest.raises(TypeError, match="mlp has no heads; it has width, depth, dropout"):
        build("mlp", data=tiny_images(), heads=2)
    with pytest.raises(TypeError, match="gpt learns from TextData; got ImageData"):
        build("gpt", data=tiny_images())


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": None},
        {"epochs": 3},
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"gradient_clip": -1.0},
        {"weight_decay": -0.1},
        {"final_learning_rate": 2.0},
        {"validate_every": 0},
    ],
)
def test_impossible_recipes_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Recipe(**{"batch_size": 4, "learning_rate": 1e-2, "steps": 1} | setting)  # type: ignore[arg-type]


def test_weight_decay_is_for_matrices() -> None:
    application = tiny_application("vit", RECIPE)
    decayed, plain = application.recipe.optimizer(application.model).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in application.model.named_parameters()}
    assert all(name.endswith("weight") or name == "positions" for name in (names[p] for p in decayed["params"]))
    assert all("norm" in name or name.endswith("bias") for name in (names[p] for p in plain["params"]))
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_written_text_follows_the_generator() -> None:
    application = tiny_application("gpt", RECIPE)
    vocabulary = application.data.vocabulary

    def write(seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        return generate(application.model, vocabulary, 30, prompt="to be", generator=generator)

    assert write(0) == write(0) != write(1)
    assert write(0).startswith("to be")
    assert len(write(0)) == 35


def test_a_low_temperature_writes_the_most_probable_character() -> None:
    application = tiny_application("gru", RECIPE)
    text = generate(application.model, application.data.vocabulary, 1, prompt="to b", temperature=1e-4)
    logits = application.model(application.data.vocabulary.encode("to b")[None])
    assert text[-1] == application.data.vocabulary.characters[int(logits[0, -1].argmax())]


def test_impossible_wishes_for_text_are_refused() -> None:
    application = tiny_application("gru", RECIPE)
    vocabulary = application.data.vocabulary
    with pytest.raises(ValueError, match="at least one character"):
        generate(application.model, vocabulary, 3, prompt="")
    with pytest.raises(ValueError, match="must be positive; got 0"):
        generate(application.model, vocabulary, 3, prompt="to", temperature=0)
    with pytest.raises(ValueError, match="has no 'Z'"):
        generate(application.model, Vocabulary("ab"), 3, prompt="Z")

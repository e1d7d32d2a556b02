"""How a model is trained: AdamW, a warm-up and a cosine for the learning rate, a bound on the gradient's length."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run that do not belong to the model.

    The learning rate rises in a straight line over the warm-up and then falls along half a cosine,
    ``final + (1 - final) (1 + cos(pi progress)) / 2`` times its largest value.

    Args:
        batch_size: images or windows a step.
        learning_rate: the largest learning rate.
        steps: how many steps; or
        epochs: how many times through the training data. Exactly one of the two.
        warm_up_steps: the steps of the warm-up, at most a tenth of the run. Default 100.
        final_learning_rate: the last learning rate as a share of the largest. Default 0.1.
        betas: AdamW's decay of the two moments. Default (0.9, 0.99).
        weight_decay: applied to matrices and convolution kernels, never to biases and norms. Default 0.1.
        gradient_clip: the largest length of the whole gradient. Default 1.0.
        validate_every: steps between two validations and checkpoints. Default None: an epoch.

    Raises:
        ValueError: a setting outside its range.

    Paper: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> recipe = Recipe(batch_size=12, learning_rate=1e-3, steps=2000)
        >>> [f"{recipe.learning_rate_at(step, 2000):.6f}" for step in (0, 99, 100, 1050, 1999)]
        ['0.000010', '0.001000', '0.001000', '0.000550', '0.000100']
    """

    batch_size: int
    learning_rate: float
    steps: int | None = None
    epochs: int | None = None
    warm_up_steps: int = 100
    final_learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    validate_every: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"a recipe has either steps or epochs; got steps={self.steps} and epochs={self.epochs}.")
        for name in ("batch_size", "steps", "epochs", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number; got {value}.")
        for name in ("weight_decay", "warm_up_steps"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise ValueError(f"{name} must not be negative; got {value}.")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate is a share, from 0 to 1; got {self.final_learning_rate}.")

    def lasting(self, steps: int | None = None, epochs: int | None = None) -> "Recipe":
        """The same recipe for another length; without either, the recipe itself."""
        return self if steps is None and epochs is None else replace(self, steps=steps, epochs=epochs)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) in a run of ``steps``."""
        warm_up = min(self.warm_up_steps, steps // 10)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over the model's parameters, with weight decay on those of two dimensions and more."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=True)

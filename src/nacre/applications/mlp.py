"""A multi-layer perceptron that reads handwritten digits."""

from collections import OrderedDict

from torch import Tensor, nn

import nacre
from nacre.applications.recipe import Recipe

RECIPE = Recipe(batch_size=64, learning_rate=2e-3, epochs=40)


class MLP(nn.Module):
    """Classifies images by linear maps with ReLU between them, blind to which pixels are neighbours.

    ``h = Dropout(ReLU(W h + b))``, ``depth`` times, then ``logits = W h + b``.

    Args:
        image_size: height and width in pixels.
        classes: how many classes there are.
        width: features of a hidden layer. Default 256.
        depth: hidden layers. Default 2.
        dropout: the share of hidden features dropped in training. Default 0.2.

    Shape: images (B, 1, H, W) to logits (B, classes).

    Example:
        >>> import torch
        >>> model = MLP((8, 8), classes=10)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, image_size: tuple[int, int], classes: int, *, width: int = 256, depth: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        features = image_size[0] * image_size[1]
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number in range(depth):
            layers[f"linear{number}"] = nacre.Linear(features, width)
            layers[f"relu{number}"] = nacre.ReLU()
            layers[f"dropout{number}"] = nacre.Dropout(dropout)
            features = width
        self.hidden = nn.Sequential(layers)
        self.head = nacre.Linear(features, classes)
        self.criterion = nacre.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(images))

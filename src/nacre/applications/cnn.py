"""A convolutional network that reads handwritten digits."""

from torch import Tensor, nn

import nacre
from nacre.applications.recipe import Recipe

RECIPE = Recipe(batch_size=64, learning_rate=2e-3, epochs=40)


class CNN(nn.Module):
    """Classifies images by small patterns, found wherever they are, and then by patterns of patterns.

    Two stages of two 3x3 convolutions; each stage ends by halving height and width and doubles the channels of the
    stage before. One hidden layer reads the result.

    Args:
        image_size: height and width in pixels, each at least 4.
        classes: how many classes there are.
        width: channels of the first stage. Default 32.
        dropout: the share of features dropped before each of the last two maps. Default 0.3.

    Shape: images (B, 1, H, W) to logits (B, classes).

    Raises:
        ValueError: an image under 4x4 pixels.

    Example:
        >>> import torch
        >>> model = CNN((8, 8), classes=10)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, image_size: tuple[int, int], classes: int, *, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__()
        height, breadth = image_size
        if min(image_size) < 4:
            raise ValueError(f"CNN halves height and width twice, so each needs 4 pixels; got {height}x{breadth}.")
        self.stages = nn.Sequential(self._stage(1, width), self._stage(width, 2 * width))
        self.head = nn.Sequential(
            nn.Flatten(),
            nacre.Dropout(dropout),
            nacre.Linear(2 * width * (height // 4) * (breadth // 4), 4 * width),
            nacre.ReLU(),
            nacre.Dropout(dropout),
            nacre.Linear(4 * width, classes),
        )
        self.criterion = nacre.CrossEntropyLoss()

    @staticmethod
    def _stage(channels: int, wider: int) -> nn.Sequential:
        return nn.Sequential(
            nacre.Conv2d(channels, wider, kernel_size=3, padding=1),
            nacre.ReLU(),
            nacre.Conv2d(wider, wider, kernel_size=3, padding=1),
            nacre.ReLU(),
            nn.MaxPool2d(2),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images))

"""A small vision transformer that reads handwritten digits."""

import torch
from torch import Tensor, nn

import nacre
from nacre.applications.recipe import Recipe

RECIPE = Recipe(batch_size=64, learning_rate=2e-3, epochs=30)


class ViT(nn.Module):
    """Classifies images as sequences: each patch of pixels is one token, and attention relates every patch to all.

    A convolution whose stride is its kernel maps each patch to a token; a learned position is added; transformer
    blocks follow; the mean of the tokens is classified.

    Args:
        image_size: height and width in pixels.
        classes: how many classes there are.
        patch: height and width of a patch in pixels. Default None: 2 for images up to 16 pixels, else 4.
        width: features of a token. Default 64.
        depth: transformer blocks. Default 4.
        heads: attention heads of a block. Default 4.
        dropout: the share dropped inside the blocks in training. Default 0.1.

    Shape: images (B, 1, H, W) to logits (B, classes).

    Raises:
        ValueError: a patch that does not divide the image, or heads that do not divide the width.

    Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.

    Example:
        >>> model = ViT((8, 8), classes=10)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        classes: int,
        *,
        patch: int | None = None,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        height, breadth = image_size
        patch = patch or (2 if max(image_size) <= 16 else 4)
        if height % patch or breadth % patch:
            raise ValueError(f"patches must fill the image; {patch}x{patch} does not divide {height}x{breadth} pixels.")
        if width % heads:
            raise ValueError(f"heads must divide the width; got {heads} heads and width {width}.")
        self.patches = nacre.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(height // patch * (breadth // patch), width))
        self.blocks = nn.Sequential(*(nacre.TransformerBlock(width, heads, dropout=dropout) for _ in range(depth)))
        self.norm = nacre.LayerNorm(width)
        self.head = nacre.Linear(width, classes)
        self.criterion = nacre.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(tokens + self.positions)
        return self.head(self.norm(tokens).mean(dim=1))

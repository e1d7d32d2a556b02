"""Tiny data and tiny runs for the tests of the applications."""

import gzip
import signal
import struct
from pathlib import Path
from typing import Any

import torch

from nacre.applications import Application, Recipe, build
from nacre.applications.data import ImageData, TextData

TEXT = "to be or not to be, that is the question.\n" * 40


def tiny_text(block: int = 8) -> TextData:
    """A text that a small model learns in a few steps."""
    return TextData(TEXT, block=block)


def tiny_images(count: int = 40) -> ImageData:
    """Images of 8x8 pixels whose class is the brighter half."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 8, (count, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    images[labels == 0, :4] += 8
    images[labels == 1, 4:] += 8
    return ImageData((images, labels), (images[:10], labels[:10]), name="halves")


def tiny_application(name: str, recipe: Recipe, seed: int = 0, dropout: float = 0.3) -> Application:
    """A small model of the named kind, with dropout."""
    sizes: dict[str, Any] = {"width": 8, "dropout": dropout}
    if name in {"lstm", "gru", "gpt"}:
        sizes |= {"block": 8, "depth": 2}
    if name in {"vit", "gpt"}:
        sizes |= {"heads": 2, "depth": 1}
    data = tiny_images() if name in {"mlp", "cnn", "vit"} else tiny_text()
    return build(name, data=data, recipe=recipe, seed=seed, **sizes)


def interrupting_at(step: int, number: signal.Signals = signal.SIGINT) -> Any:
    """An ``on_step`` that presses Ctrl-C, or sends another signal, after the given step."""

    def on_step(now: int, steps: int, loss: float) -> None:
        if now == step:
            signal.raise_signal(number)

    return on_step


def idx_bytes(elements: torch.Tensor) -> bytes:
    """The content of an IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, elements.dim()]) + struct.pack(f">{elements.dim()}I", *elements.shape)
    return header + elements.byte().numpy().tobytes()


def write_idx_folder(folder: Path, compressed: bool = False) -> Path:
    """The four files of MNIST, with 6 training and 4 test images of 5x7 pixels in 3 classes."""
    parts = {
        "train-images-idx3-ubyte": torch.arange(6 * 35).remainder(256).view(6, 5, 7),
        "train-labels-idx1-ubyte": torch.tensor([0, 1, 2, 0, 1, 2]),
        "t10k-images-idx3-ubyte": torch.arange(4 * 35).remainder(200).view(4, 5, 7),
        "t10k-labels-idx1-ubyte": torch.tensor([2, 1, 0, 0]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, elements in parts.items():
        content = idx_bytes(elements)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder

"""Where images and texts are loaded from: packages that are installed, and files.

Files are untrusted: what is wrong with one is said with its name, before anything is made of it.
"""

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from nacre.applications.data import Batch, ImageData, TextData
from nacre.applications.idx import find_idx_file, read_idx

TEST_SHARE = 0.2
"""The part of the digits that is held out."""

STANDARD_LIBRARY_LIMIT = 4_000_000
"""The most characters that are read from the standard library."""

_OTHER_PEOPLES_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_SIDE_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}


def load_digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of each class held out, always the same fifth.

    Example:
        >>> load_digits().description
        "scikit-learn's digits: 1,437 training and 360 test images of 8x8 pixels, 10 classes"
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    training, test, training_labels, test_labels = train_test_split(
        digits.images.astype("uint8"), digits.target, test_size=TEST_SHARE, random_state=0, stratify=digits.target
    )
    tensor = torch.from_numpy
    return ImageData(
        (tensor(training), tensor(training_labels)), (tensor(test), tensor(test_labels)), name="scikit-learn's digits"
    )


def load_idx_folder(folder: str | Path) -> ImageData:
    """Images in MNIST's format and files: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-`` likewise.

    Raises:
        FileNotFoundError: a file is missing.
        NotADirectoryError: ``folder`` is not one.
        ValueError: a file is damaged, or the files do not belong together.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"images come from a folder of IDX files (MNIST's format); {folder} is not a folder.")

    def part(name: str) -> Batch:
        images, labels = find_idx_file(folder, f"{name}-images", 3), find_idx_file(folder, f"{name}-labels", 1)
        return read_idx(images, 3), read_idx(labels, 1)

    return ImageData(part("train"), part("t10k"), name=str(folder))


def load_text(path: str | Path, block: int = 64) -> TextData:
    """A text file in UTF-8.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: bytes that are not UTF-8, an empty or too short text.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a language model learns from one text file; {path} is a folder.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8; byte {error.start:,} is 0x{error.object[error.start]:02x} ({error.reason})."
            " Convert it, for instance with iconv."
        ) from error
    if not text:
        raise ValueError(f"{path} must hold some text; it is empty.")
    return TextData(text, block, name=path.name)


def load_standard_library(block: int = 64) -> TextData:
    """The source of Python's own standard library, as it lies on this machine: text that needs no download.

    Whole files in the order of their paths, up to 4 million characters, without tests and without the few files that
    are not plain ASCII.

    Raises:
        FileNotFoundError: this Python was installed without its source.
    """
    texts: list[str] = []
    characters = 0
    for path in _standard_library_files():
        content = path.read_bytes()
        if characters + len(content) > STANDARD_LIBRARY_LIMIT:
            break
        if content.isascii():
            texts.append(content.decode("ascii"))
            characters += len(content)
    if not texts:
        raise FileNotFoundError("this Python has no source of its standard library; give a text file as the data.")
    name = f"the source of Python {platform.python_version()}'s standard library ({len(texts)} files)"
    return TextData("".join(texts), block, name)


def _standard_library_files() -> Iterator[Path]:
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _OTHER_PEOPLES_FOLDERS - _SIDE_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)

"""The IDX format of the MNIST files: a magic number, the sizes, then one byte an element.

The header is big-endian: two zero bytes, the element type (8 is the unsigned byte), the number of dimensions, and one
32-bit size a dimension. Nothing of the file is trusted before it was checked against the bytes that are there.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
LARGEST_FILE = 2**31


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (by its name's ending, ``.gz``).

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 3 for images (count, height, width), 1 for labels.

    Shape: as the header says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: wrong magic number, a size of zero, fewer or more bytes than the sizes promise, a damaged archive.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        >>> read_idx(path, dimensions=1)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _read_sizes(path, file.read(4 + 4 * dimensions), dimensions)
            count = math.prod(sizes)
            content = file.read(count + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip archive; {error}. Download or copy it again.") from error
    if len(content) != count:
        held = "more" if len(content) > count else f"{len(content):,}"
        raise ValueError(
            f"{path} must hold {count:,} bytes after its header, as its sizes {sizes} promise; it holds {held}."
            " Download or copy it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(sizes)


def _read_sizes(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    expected = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if header[:4] != expected:
        raise ValueError(
            f"{path} must begin with the IDX magic number 0x{expected.hex()} (unsigned bytes, {dimensions}"
            f" dimension{'s' if dimensions > 1 else ''}); it begins with 0x{header[:4].hex()}."
            " Is it another file, or compressed without .gz in its name?"
        )
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path} must have a header of {4 + 4 * dimensions} bytes; it ends after {len(header)}.")
    sizes = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in sizes or math.prod(sizes) > LARGEST_FILE:
        raise ValueError(f"{path} must have sizes from 1 to {LARGEST_FILE:,} elements in all; its header says {sizes}.")
    return sizes


def find_idx_file(folder: str | Path, stem: str, dimensions: int) -> Path:
    """The file of ``folder`` named ``{stem}-idx{dimensions}-ubyte``, with ``.idx`` for ``-idx`` or ``.gz`` behind it.

    Raises:
        FileNotFoundError: the folder holds none of them.
    """
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    for name in names:
        if (path := Path(folder) / name).is_file():
            return path
    raise FileNotFoundError(f"{folder} must hold {names[0]} or {names[1]}, and holds neither.")

"""What the applications learn from: images of handwritten digits, and the characters of a text.

Both hold everything in memory, and both give the batch of a step as a pure function of the step and the seed. A run
that was interrupted therefore meets the same batches again, without any position to save. sources.py loads them.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

VALIDATION_SHARE = 0.1
"""The part of a text, at its end, that is held out."""

VALIDATION_IMAGES = 500
"""The images of one validation batch."""

VALIDATION_BATCH = 64
"""The windows of a text in one validation batch."""

VALIDATION_WINDOWS = 2048
"""The most windows of a text on which one validation is computed, spread evenly over the held-out part."""


class Data(Protocol):
    """What training asks of its data."""

    description: str
    metric: str

    def steps_per_epoch(self, batch_size: int) -> int: ...

    def training_batch(self, step: int, batch_size: int, seed: int) -> Batch: ...

    def validation_batches(self) -> Iterator[Batch]: ...

    def fingerprint(self) -> str: ...


def generator_of(*key: object) -> torch.Generator:
    """A generator of its own for ``key``: the same key gives the same numbers, whatever else draws random numbers.

    Example:
        >>> torch.randperm(4, generator=generator_of("epoch", 0)).equal(torch.randperm(4, generator=generator_of(1)))
        False
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class _EpochOrder:
    """The order in which an epoch goes through the data, kept until another one is asked for."""

    def __init__(self, shuffle: Callable[[torch.Generator], Tensor]) -> None:
        self.shuffle = shuffle
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def of_epoch(self, epoch: int, seed: int) -> Tensor:
        if self._last is None or self._last[0] != (epoch, seed):
            self._last = (epoch, seed), self.shuffle(generator_of(seed, epoch))
        return self._last[1]


class ImageData:
    """Labelled grey images, in a training part and a test part, scaled to mean 0 and variance 1.

    Args:
        training: images (N, H, W) of bytes, and their labels (N).
        test: the same, held out.
        name: where they come from, for the description.

    Shape: a batch is images (B, 1, H, W) in float32 and labels (B) in int64.

    Raises:
        ValueError: counts, sizes or labels that do not fit together, or images without any contrast.

    Example:
        >>> images, labels = torch.arange(32).view(8, 2, 2).byte(), torch.tensor([0, 1] * 4).byte()
        >>> data = ImageData((images, labels), (images[:2], labels[:2]), name="squares")
        >>> data.description
        'squares: 8 training and 2 test images of 2x2 pixels, 2 classes'
        >>> data.training_batch(step=0, batch_size=3, seed=0)[0].shape
        torch.Size([3, 1, 2, 2])
    """

    metric = "accuracy"

    def __init__(self, training: Batch, test: Batch, name: str) -> None:
        for part, (images, labels) in (("training", training), ("test", test)):
            if len(images) != len(labels):
                raise ValueError(
                    f"every image must have one label; the {part} part of {name} has {len(images):,} images and"
                    f" {len(labels):,} labels. Do the two files belong together?"
                )
        self.images, self.labels = training[0], training[1].long()
        self.test_images, self.test_labels = test[0], test[1].long()
        self.classes = int(self.labels.max()) + 1
        self.image_size = (self.images.shape[1], self.images.shape[2])
        if self.test_images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"test images must have the size of the training images; {name} has {tuple(self.test_images.shape[1:])}"
                f" and {self.image_size}. Do the files belong together?"
            )
        if int(self.test_labels.max()) >= self.classes:
            raise ValueError(
                f"every test label must occur in training; {name} has the test label {int(self.test_labels.max())} and"
                f" training labels up to {self.classes - 1}. Do the files belong together?"
            )
        pixels = self.images.double()
        self.mean, self.deviation = float(pixels.mean()), float(pixels.std(correction=0))
        if self.deviation == 0:
            raise ValueError(f"images must differ in their pixels; every pixel of {name} is {self.mean:g}.")
        self.description = (
            f"{name}: {len(self.images):,} training and {len(self.test_images):,} test images of"
            f" {self.image_size[0]}x{self.image_size[1]} pixels, {self.classes} classes"
        )
        self._order = _EpochOrder(lambda generator: torch.randperm(len(self.images), generator=generator))

    def steps_per_epoch(self, batch_size: int) -> int:
        """The steps that show every training image once; the last of them may be smaller."""
        return -(-len(self.images) // batch_size)

    def training_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a step: its part of the epoch's own permutation."""
        epoch, position = divmod(step, self.steps_per_epoch(batch_size))
        chosen = self._order.of_epoch(epoch, seed)[position * batch_size : (position + 1) * batch_size]
        return self._scaled(self.images[chosen]), self.labels[chosen]

    def validation_batches(self) -> Iterator[Batch]:
        """The whole test part, in order."""
        for start in range(0, len(self.test_images), VALIDATION_IMAGES):
            part = slice(start, start + VALIDATION_IMAGES)
            yield self._scaled(self.test_images[part]), self.test_labels[part]

    def fingerprint(self) -> str:
        """A short hash of the training part: a run goes on only with the data it was started on."""
        content = self.images.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def _scaled(self, images: Tensor) -> Tensor:
        return (images.float().unsqueeze(1) - self.mean) / self.deviation


class Vocabulary:
    """The characters that a language model knows, numbered in the order given.

    Raises:
        ValueError: no characters, one given twice, or a text with a character that is not among them.

    Example:
        >>> vocabulary = Vocabulary("abc")
        >>> vocabulary.encode("cab").tolist()
        [2, 0, 1]
        >>> vocabulary.decode(torch.tensor([2, 0, 1]))
        'cab'
    """

    def __init__(self, characters: str) -> None:
        if not characters:
            raise ValueError("a vocabulary must have at least one character; got none. Is the text empty?")
        self.characters = characters
        self._number = {character: number for number, character in enumerate(characters)}
        if len(self._number) != len(characters):
            raise ValueError(f"a vocabulary must name each character once; got {characters!r}.")

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The numbers of a text's characters: (length), in int64."""
        try:
            return torch.tensor([self._number[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            raise ValueError(f"the vocabulary has no {error.args[0]!r}; it has {self.characters!r}.") from None

    def decode(self, tokens: Tensor) -> str:
        """The text of a sequence of numbers."""
        return "".join(self.characters[number] for number in tokens.tolist())


class TextData:
    """A text as characters: the first nine tenths to learn from, the last tenth held out.

    Args:
        text: the characters.
        block: the length of a window. Default 64.
        name: where they come from, for the description.

    Shape: a batch is two windows (B, block) of character numbers in int64, the second one character further on.

    Raises:
        ValueError: a block under 1, an empty text, or one whose parts are no longer than a window.

    Example:
        >>> data = TextData("to be or not to be, that is the question: " * 8, block=16)
        >>> inputs, targets = data.training_batch(step=0, batch_size=2, seed=0)
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([2, 16]), True)
    """

    metric = "perplexity"

    def __init__(self, text: str, block: int = 64, name: str = "text") -> None:
        if block < 1:
            raise ValueError(f"a block must have at least one character; got {block}.")
        self.vocabulary = Vocabulary("".join(sorted(set(text))))
        tokens = self.vocabulary.encode(text)
        held_out = int(VALIDATION_SHARE * len(tokens))
        self.training, self.validation = tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :]
        self.block = block
        self._order = _EpochOrder(self._shuffled_windows)
        if held_out <= block:
            raise ValueError(
                f"each part of a text must hold a block and one character more, {block + 1} characters; the last"
                f" {VALIDATION_SHARE:.0%} of {name} has {held_out}. Give a longer text or a smaller block."
            )
        self.description = f"{name}: {len(tokens):,} characters, {len(self.vocabulary)} different"

    def steps_per_epoch(self, batch_size: int) -> int:
        """The full batches of windows, side by side, that the training part holds wherever the first one begins."""
        return max(1, (len(self.training) // self.block - 1) // batch_size)

    def training_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a step: its part of the epoch's windows, which lie side by side and are shuffled."""
        epoch, position = divmod(step, self.steps_per_epoch(batch_size))
        starts = self._order.of_epoch(epoch, seed)[position * batch_size : (position + 1) * batch_size]
        return self._windows(self.training, starts)

    def validation_batches(self) -> Iterator[Batch]:
        """Windows side by side over the held-out part; of a long one, evenly spread ones."""
        count = (len(self.validation) - 1) // self.block
        chosen = torch.linspace(0, count - 1, min(count, VALIDATION_WINDOWS), dtype=torch.float64).round().long()
        for starts in (chosen * self.block).split(VALIDATION_BATCH):
            yield self._windows(self.validation, starts)

    def fingerprint(self) -> str:
        """A short hash of the text: a run goes on only with the text it was started on."""
        content = self.vocabulary.characters.encode("utf-8", "surrogatepass") + self.training.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def _shuffled_windows(self, generator: torch.Generator) -> Tensor:
        """Where an epoch's windows begin: each epoch cuts the text elsewhere."""
        first = int(torch.randint(self.block, (), generator=generator))
        starts = torch.arange(first, len(self.training) - self.block, self.block)
        return starts[torch.randperm(len(starts), generator=generator)]

    def _windows(self, tokens: Tensor, starts: Tensor) -> Batch:
        windows = tokens[starts[:, None] + torch.arange(self.block + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

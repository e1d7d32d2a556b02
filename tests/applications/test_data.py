"""Images and texts: what is read, how it is split, and which files are refused."""

import gzip
import itertools
import sysconfig
from pathlib import Path

import pytest
import torch

from nacre.applications.data import ImageData, TextData, Vocabulary
from nacre.applications.idx import read_idx
from nacre.applications.sources import load_digits, load_idx_folder, load_standard_library, load_text
from tests.applications.support import TEXT, idx_bytes, tiny_images, tiny_text, write_idx_folder


@pytest.mark.parametrize("compressed", [False, True])
def test_an_idx_folder_is_read_plain_and_compressed(tmp_path: Path, compressed: bool) -> None:
    data = load_idx_folder(write_idx_folder(tmp_path, compressed))
    assert data.image_size == (5, 7)
    assert data.classes == 3
    assert data.images.flatten().tolist() == [number % 256 for number in range(6 * 35)]
    assert data.test_labels.tolist() == [2, 1, 0, 0]


def test_the_dotted_names_of_idx_files_are_found(tmp_path: Path) -> None:
    for path in list(write_idx_folder(tmp_path).iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert load_idx_folder(tmp_path).classes == 3


LABELS = idx_bytes(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "must begin with the IDX magic number 0x00000801"),
        (b"\x00\x00\x08", "must begin with the IDX magic number"),
        (b"\x00\x00\x0d\x01" + LABELS[4:], "it begins with 0x00000d01"),
        (idx_bytes(torch.zeros(1, 2, 3)), "it begins with 0x00000803"),
        (gzip.compress(LABELS, mtime=0), "compressed without .gz in its name"),
        (LABELS[:6], "must have a header of 8 bytes; it ends after 6"),
        (LABELS[:-1], r"must hold 3 bytes .* it holds 2"),
        (LABELS + b"\x00", r"must hold 3 bytes .* it holds more"),
        (LABELS[:4] + bytes(4), "must have sizes from 1"),
        (LABELS[:4] + b"\xff\xff\xff\xff", "must have sizes from 1"),
    ],
)
def test_a_corrupt_idx_file_is_refused_by_name_and_rule(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as error:
        read_idx(path, dimensions=1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "bytes", "not gzip"])
def test_a_corrupt_archive_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = gzip.compress(idx_bytes(torch.arange(150)))
    path.write_bytes({"truncated": whole[:-12], "bytes": whole[:15] + b"\xff" * 20, "not gzip": LABELS}[damage])
    with pytest.raises(ValueError, match="must be a whole gzip archive"):
        read_idx(path, dimensions=1)


def test_a_folder_without_the_files_says_which(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        load_idx_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        load_idx_folder(tmp_path / "nowhere")


def test_images_and_labels_must_belong_together() -> None:
    images, labels = torch.arange(48).view(3, 4, 4).byte(), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        ImageData((images, labels[:2]), (images, labels), name="x")
    with pytest.raises(ValueError, match="size of the training images"):
        ImageData((images, labels), (images[:, :2], labels), name="x")
    with pytest.raises(ValueError, match="the test label 3"):
        ImageData((images, labels), (images, labels + 1), name="x")
    with pytest.raises(ValueError, match="differ in their pixels"):
        ImageData((images * 0 + 7, labels), (images, labels), name="x")


def test_the_digits_are_split_by_class_and_always_alike() -> None:
    data = load_digits()
    assert (len(data.images), len(data.test_images)) == (1437, 360)
    share = data.test_labels.bincount() / (data.labels.bincount() + data.test_labels.bincount())
    assert (share - 0.2).abs().max() < 0.005  # a class has about 180 images, so a fifth is met within half an image
    assert data.fingerprint() == load_digits().fingerprint()


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    data = tiny_images(count=23)
    steps = data.steps_per_epoch(5)
    assert steps == 5
    epochs = [
        torch.cat([data.training_batch(epoch * steps + step, 5, seed=0)[0] for step in range(steps)]).flatten(1)
        for epoch in range(2)
    ]
    everything = sorted(data._scaled(data.images).flatten(1).tolist())
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == everything
    assert not torch.equal(epochs[0], epochs[1])


def test_training_images_have_mean_0_and_variance_1() -> None:
    data = tiny_images()
    scaled = data._scaled(data.images)
    # float32 over 2,560 pixels: a few times 1e-7 times the root of their number
    assert abs(scaled.mean()) < 1e-5
    assert abs(scaled.var(correction=0) - 1) < 1e-5


@pytest.mark.parametrize("data", [tiny_images(), tiny_text()], ids=["images", "text"])
def test_a_batch_depends_on_step_and_seed_alone(data: ImageData | TextData) -> None:
    first = data.training_batch(7, 4, seed=1)
    torch.manual_seed(99)
    for step in (3, 8, 0):
        data.training_batch(step, 4, seed=1)
    again = data.training_batch(7, 4, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], data.training_batch(7, 4, seed=2)[0])
    assert not torch.equal(first[0], data.training_batch(8, 4, seed=1)[0])


def test_a_text_is_split_by_position() -> None:
    data = tiny_text()
    decoded = data.vocabulary.decode(torch.cat([data.training, data.validation]))
    assert decoded == TEXT
    assert len(data.validation) == len(TEXT) // 10


def test_windows_lie_in_their_part_and_targets_are_one_further() -> None:
    data = tiny_text(block=8)
    training = data.vocabulary.decode(data.training)
    for inputs, targets in itertools.chain([data.training_batch(0, 16, seed=0)], data.validation_batches()):
        assert inputs.shape == targets.shape
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.vocabulary.decode(data.training_batch(0, 16, seed=0)[0][0]) in training


def test_an_epoch_reads_the_text_once_and_cuts_it_in_its_own_way() -> None:
    data = TextData("".join(chr(32 + number) for number in range(1000)), block=8)
    steps = data.steps_per_epoch(4)
    cuts = []
    for epoch in range(3):
        batches = [data.training_batch(epoch * steps + step, 4, seed=0)[0] for step in range(steps)]
        assert all(batch.shape == (4, 8) for batch in batches)
        read = torch.cat(batches).flatten()
        assert len(read.unique()) == len(read)  # every character of this text is another
        assert len(read) > len(data.training) - (4 + 2) * 8  # left over: a cut at each end and an incomplete batch
        cuts.append(int(read.min()) % 8)
        assert read.tolist() != sorted(read.tolist())
    assert len(set(cuts)) > 1


def test_the_first_and_the_last_character_are_learned() -> None:
    data = TextData("".join(chr(32 + number) for number in range(40)), block=2)
    batches = [data.training_batch(step, 1, seed=0) for step in range(60 * data.steps_per_epoch(1))]
    assert min(int(inputs.min()) for inputs, _ in batches) == int(data.training[0])
    assert max(int(targets.max()) for _, targets in batches) == int(data.training[-1])


def test_a_text_of_few_windows_makes_a_smaller_batch() -> None:
    data = tiny_text(block=100)
    sizes = {len(data.training_batch(step, 64, seed=0)[0]) for step in range(20)}
    assert sizes <= {14, 15}  # 1,512 characters hold 15 windows of 100, or 14 behind a late first cut


def test_validation_reads_the_held_out_part_once() -> None:
    data = tiny_text(block=8)
    windows = torch.cat([inputs for inputs, _ in data.validation_batches()])
    whole = len(windows) * 8
    assert torch.equal(windows.flatten(), data.validation[:whole])
    assert len(data.validation) - whole <= 8


def test_validation_of_a_long_text_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nacre.applications.data.VALIDATION_WINDOWS", 5)
    data = TextData("".join(chr(32 + number % 90) for number in range(4000)), block=4)
    windows = torch.cat([inputs for inputs, _ in data.validation_batches()])
    assert len(windows) == 5
    assert torch.equal(windows[0], data.validation[:4])
    assert torch.equal(windows[-1], data.validation[98 * 4 : 99 * 4])


def test_a_text_file_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "größer, größer\r\n".encode() * 20)
    data = load_text(path, block=4)
    assert set(data.vocabulary.characters) == set("größer, \r\n")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "it is empty"),
        (b"short", "must hold a block and one character more, 65 characters"),
        (b"a" * 640, "has 64"),
        (b"abc\xffdef" * 1000, "must be text in UTF-8; byte 3 is 0xff"),
    ],
)
def test_a_text_that_cannot_be_learned_is_refused(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        load_text(path)


def test_a_missing_text_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_text(tmp_path)


def test_a_vocabulary_refuses_what_it_cannot_number() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        Vocabulary("")
    with pytest.raises(ValueError, match="each character once"):
        Vocabulary("aba")
    with pytest.raises(ValueError, match="has no 'x'"):
        Vocabulary("abc").encode("abxc")
    with pytest.raises(ValueError, match="at least one character"):
        TextData("", block=4)
    with pytest.raises(ValueError, match="at least one character; got 0"):
        TextData("abc", block=0)


def test_the_standard_library_is_read_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "b.py": "second = 2\n" * 20,
        "a.py": "first = 1\n" * 20,
        "accents.py": "größe = 1\n" * 20,
        "notes.txt": "not source\n",
        "json/tool.py": "third = 3\n" * 20,
        "test/test_a.py": "left out\n",
        "site-packages/other.py": "left out\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    data = load_standard_library(block=8)
    text = data.vocabulary.decode(torch.cat([data.training, data.validation]))
    assert text == "first = 1\n" * 20 + "second = 2\n" * 20 + "third = 3\n" * 20
    assert "(3 files): 620 characters" in data.description
    monkeypatch.setattr("nacre.applications.sources.STANDARD_LIBRARY_LIMIT", 450)
    assert "(2 files)" in load_standard_library(block=8).description


def test_a_python_without_its_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no source of its standard library"):
        load_standard_library()


def test_the_real_standard_library_is_enough_to_learn_from() -> None:
    data = load_standard_library()
    assert 1_000_000 < len(data.training) + len(data.validation) <= 4_000_000
    assert data.vocabulary.characters.isascii()

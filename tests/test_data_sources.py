"""Sources: parsing, the split rules that all share, digits, synthetic, .npz files and channel statistics."""

import os
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastanchor.data import folder, sources
from fastanchor.data.arrays import Arrays, stratified_choice
from fastanchor.data.encoded import Encoded
from fastanchor.data.sources import ImageSet, Split, channel_stats, image_stats, load, why_encoded
from fastanchor.errors import UserError


def refusal(source, **settings):
    """The one-line text with which `load` refuses."""
    with pytest.raises(UserError) as error:
        load(str(source), **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def numbered(count, start=0):
    """uint8 images (count, 4, 5, 3), each of which carries its own number."""
    images = np.zeros((count, 4, 5, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(start, start + count), 256)
    return images


def numbers(split):
    pixels = split.images[:, 0, 0].long()
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()


def arrays(train=60, test=30, classes=3, **changes):
    content = {
        "train_images": numbered(train),
        "train_labels": np.arange(train) % classes,
        "test_images": numbered(test, 1000),
        "test_labels": np.arange(test) % classes,
    }
    content.update(changes)
    return {key: value for key, value in content.items() if value is not None}


@pytest.fixture(autouse=True)
def synthetic_images_made_anew(synthetic_images_made_once, monkeypatch):
    monkeypatch.setattr(sources, "_synthetic", synthetic_images_made_once)


@pytest.fixture
def saved(tmp_path):
    """A function that writes an .npz file and gives its source string."""

    def save(**content):
        np.savez(tmp_path / "set.npz", **content)
        return f"npz:{tmp_path / 'set.npz'}"

    return save


# What a source string may be


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (
            "cifar-10",
            [
                "'cifar-10'",
                "digits, cifar10, cifar100, cifar100:coarse, folder:PATH, packed:PATH, npz:PATH, synthetic",
                "did you mean 'cifar10'?",
            ],
        ),
        ("foldr:/data/x", ["did you mean 'folder'?"]),
        ("Digits", ["did you mean 'digits'?"]),
        ("folder", ["names no path", "must be folder:PATH"]),
        ("npz:", ["names no path", "must be npz:PATH"]),
        ("digits:8", ["'digits:8'", "takes no path"]),
        ("packed", ["names no path", "must be packed:PATH"]),
        ("cifar100:", ["'cifar100:' must be one of cifar100, cifar100:coarse"]),
        ("cifar10:coarse", ["'cifar10:coarse' must be 'cifar10' alone"]),
    ],
)
def test_unknown_source_is_told_with_the_list_and_the_nearest(source, parts):
    text = refusal(source)
    assert all(part in text for part in parts), text


def test_nothing_near_gives_no_guess():
    text = refusal("qqqq")
    assert "must be one of digits" in text and "did you mean" not in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"val_fraction": 0.0}, "val_fraction is 0.0 and must lie in (0, 0.5]"),
        ({"val_fraction": 0.51}, "val_fraction is 0.51 and must lie in (0, 0.5]"),
        ({"val_fraction": float("nan")}, "val_fraction is nan and must lie in (0, 0.5]"),
        ({"split_seed": -1}, "split_seed is -1 and must lie in [0, 4294967295]"),
        ({"limit": 0}, "limit is 0 and must be a positive number of images"),
        ({"limit": 19}, "limit is 19 and must be at least 20, two images for each of 10 classes"),
        (
            {"image_size": 8},
            "image_size is 8, and it must be left out for synthetic: it resizes images of folder: and packed: only",
        ),
    ],
)
def test_settings_out_of_range(settings, text):
    assert refusal("synthetic", **settings) == text


# The rules that all sources share


def test_digits_are_the_scikit_learn_images():
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert isinstance(digits, ImageSet) and digits.name == "digits" and digits.notes == ()
    assert digits.class_names == tuple("0123456789") and digits.num_classes == 10 and digits.image_shape == (32, 32)
    assert len(digits.test) == 359 and len(digits.train) + len(digits.val) == 1797 - 359
    images = torch.cat([digits.train.images, digits.val.images, digits.test.images])
    assert images.dtype == torch.uint8 and images.shape == (1797, 32, 32, 3)
    assert torch.equal(images[..., 0], images[..., 1]) and torch.equal(images[..., 0], images[..., 2])
    assert digits.train.labels.dtype == torch.int64
    # Bilinear enlargement by four, written as a matrix, of all images; the order within a split does not matter here.
    bunch = load_digits()
    source = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(source[:, None] - np.arange(8)))
    expected = np.rint(weights @ bunch.images @ weights.T * (255 / 16)).reshape(1797, -1)
    found = images[..., 0].reshape(1797, -1).numpy()
    labels = torch.cat([digits.train.labels, digits.val.labels, digits.test.labels])[:, None].numpy()
    assert np.array_equal(
        np.unique(np.hstack([found, labels]), axis=0), np.unique(np.hstack([expected, bunch.target[:, None]]), axis=0)
    )
    counts = np.bincount(bunch.target)
    assert np.all(np.abs(digits.test.labels.bincount().numpy() - 0.2 * counts) <= 1)


def test_synthetic_is_learnable():
    data = load("synthetic")
    assert (len(data.train), len(data.val), len(data.test)) == (1800, 200, 500) and data.image_shape == (32, 32)
    means = torch.stack([data.train.images[data.train.labels == c].double().mean(0) for c in range(10)])
    distance = (data.test.images.double()[:, None] - means).flatten(2).norm(dim=2)
    assert (distance.argmin(1) == data.test.labels).float().mean() > 0.95
    # Noise and templates both matter: images of a class differ, and so do the classes.
    assert data.train.images[data.train.labels == 0].double().std(0).mean() > 20
    assert torch.pdist(means.flatten(1)).min() / 3072**0.5 > 10


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_same_seed_same_data_other_seed_other_data(source):
    first, again, other = load(source), load(source), load(source, split_seed=1)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part).images, getattr(again, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
    assert not torch.equal(first.val.images, other.val.images) and not torch.equal(first.test.images, other.test.images)


def test_global_random_states_neither_matter_nor_change():
    before = load("digits", limit=200)
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for source in ("digits", "synthetic"):
        data = load(source, limit=200)
        if source == "digits":
            assert torch.equal(data.val.images, before.val.images) and torch.equal(data.train.images, before.train.images)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state) and random.getstate() == python_state


def test_train_and_val_are_disjoint_and_together_the_training_set(saved):
    labels = np.repeat([0, 1, 2], [300, 100, 20])
    data = load(saved(**arrays(train=420, train_labels=labels)), val_fraction=0.1)
    train, val = numbers(data.train), numbers(data.val)
    assert not set(train) & set(val) and sorted(train + val) == list(range(420))
    assert data.val.labels.bincount().tolist() == [30, 10, 2]
    assert torch.equal(data.train.labels, torch.from_numpy(labels[train]))
    assert train == sorted(train) and numbers(data.test) == list(range(1000, 1030))


def test_every_class_keeps_a_training_image(saved):
    data = load(saved(**arrays(train=5, train_labels=np.array([0, 0, 0, 1, 2]))), val_fraction=0.5)
    assert sorted(set(data.train.labels.tolist())) == [0, 1, 2] and data.val.labels.tolist() == [0, 0]


def test_no_class_can_spare_an_image(saved):
    text = refusal(saved(**arrays(train=3)))
    assert "no class has two training images, and every class must keep one" in text


def test_limit_counts_train_and_val_together_and_is_stratified(saved):
    labels = np.repeat([0, 1, 2], [400, 196, 4])
    source = saved(**arrays(train=600, test=90, train_labels=labels))
    data = load(source, limit=60, val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (48, 12, 60)
    both = torch.cat([data.train.labels, data.val.labels]).bincount().tolist()
    assert both[2] == 1 and sum(both) == 60 and abs(both[0] - 40) <= 1
    assert data.test.labels.bincount().tolist() == [20, 20, 20]
    assert numbers(load(source, limit=60).train) == numbers(load(source, limit=60).train)
    assert numbers(load(source, limit=60).train) != numbers(load(source, limit=60, split_seed=5).train)
    whole = load(source, limit=600)
    assert len(whole.train) + len(whole.val) == 600 and len(whole.test) == 90
    assert "must be at least 6, two images for each of 3 classes" in refusal(source, limit=5)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    total=st.integers(0, 90),
    at_least=st.integers(0, 2),
    leave=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_choice_keeps_its_promises(groups, total, at_least, leave, seed):
    groups = np.array(groups)
    chosen = stratified_choice(groups, total, np.random.RandomState([seed, 0]), at_least=at_least, leave=leave)
    counts = np.bincount(groups)
    taken = np.bincount(groups[chosen], minlength=len(counts))
    highest = np.maximum(counts - leave, 0)
    lowest = np.minimum(highest, at_least)
    assert np.array_equal(chosen, np.unique(chosen)) and np.all(taken <= highest) and np.all(taken >= lowest)
    assert len(chosen) == np.clip(total, lowest.sum(), highest.sum())
    share = counts * (len(chosen) / len(groups))
    if np.all(np.floor(share) >= lowest) and np.all(np.ceil(share) <= highest):
        assert np.all(np.abs(taken - share) < 1)


# .npz files


def test_npz_round_trip_with_names_and_grey_and_floats(saved):
    grey = np.random.RandomState(0).randint(0, 256, (30, 4, 5)).astype(np.uint8)
    data = load(saved(**arrays(test_images=grey, class_names=np.array(["rot", "grün", "blau"]))))
    assert data.class_names == ("rot", "grün", "blau") and data.image_shape == (4, 5)
    assert torch.equal(data.test.images, torch.from_numpy(grey)[..., None].expand(-1, -1, -1, 3))
    assert load(saved(**arrays())).class_names == ("0", "1", "2")
    assert torch.equal(load(saved(**arrays(test_images=grey[..., None]))).test.images, data.test.images)
    for kind in (np.float16, np.float32, np.float64):
        floats = (grey / 255).astype(kind)
        assert torch.equal(load(saved(**arrays(test_images=floats))).test.images, data.test.images)


def test_npz_with_its_own_validation_split(saved):
    own = {"val_images": numbered(12, 500), "val_labels": np.arange(12) % 3}
    source = saved(**arrays(), **own)
    data = load(source)
    assert numbers(data.val) == list(range(500, 512)) and numbers(data.train) == list(range(60))
    few = load(source, limit=36)
    assert (len(few.train), len(few.val)) == (30, 6) and set(numbers(few.val)) <= set(range(500, 512))
    del own["val_labels"]
    assert "has val_images alone, and val_images and val_labels come together" in refusal(saved(**arrays(), **own))


NAN = np.full((60, 4, 5, 3), 0.5, np.float32)
NAN[7, 1, 4, 2] = np.nan
LOW = np.full((60, 4, 5, 3), 0.5, np.float16)
LOW[2, 0, 1, 0] = -0.25
HIGH = np.full((1100, 4, 5, 3), 0.5)
HIGH[1030, 3, 0, 1] = 1.5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"test_labels": None}, "has no test_labels, and train_images, train_labels, test_images, test_labels are needed"),
        ({"train_images": NAN}, "train_images[7, 1, 4, 2] is nan, and float images must lie in [0, 1]"),
        ({"train_images": LOW}, "train_images[2, 0, 1, 0] is -0.25, and float images must lie in [0, 1]"),
        ({"train_images": HIGH, "train_labels": np.arange(1100) % 3}, "train_images[1030, 3, 0, 1] is 1.5, and float images"),
        ({"train_images": numbered(60).astype(np.int32)}, "is of type int32, and images must be uint8, or floats in [0, 1]"),
        ({"test_images": np.zeros((30, 3, 4, 5), np.uint8)}, "has shape (30, 3, 4, 5), and images must be (N, H, W, 3)"),
        ({"test_images": np.zeros((30, 20), np.uint8)}, "has shape (30, 20), and images must be (N, H, W, 3)"),
        ({"test_images": np.zeros((30, 0, 5, 3), np.uint8)}, "has shape (30, 0, 5, 3)"),
        ({"test_images": np.zeros((30, 8, 9, 3), np.uint8)}, "test images are 8x9 and training images 4x5"),
        ({"test_images": np.zeros((0, 4, 5, 3), np.uint8), "test_labels": np.zeros(0, int)}, "has no test images"),
        ({"train_images": numbered(0), "train_labels": np.zeros(0, int)}, "has no train images"),
        ({"train_labels": np.zeros(60)}, "train_labels is float64 of shape (60,), and labels must be integers of shape (N,)"),
        ({"train_labels": np.zeros((60, 3), int)}, "train_labels is int64 of shape (60, 3)"),
        ({"train_labels": np.zeros(59, int)}, "has 59 entries for 60 images"),
        ({"train_labels": np.zeros(60, int), "test_labels": np.zeros(30, int)}, "has 1 class, and at least 2 are needed"),
        ({"train_labels": np.arange(60) % 3 * 2}, "no training image has label 1 although 4 occurs"),
        ({"train_labels": np.arange(60) % 3 - 1}, "train_labels[0] is -1, and labels start at 0"),
        (
            {"test_labels": np.r_[np.zeros(17, int), 12, 13, np.zeros(11, int)]},
            "test_labels[17] is 12, and labels must lie in [0, 3)",
        ),
        ({"test_labels": np.full(30, 2**64 - 1, np.uint64)}, "test_labels[0] is 18446744073709551615"),
        ({"class_names": np.array(["a", "b"])}, "train_labels[2] is 2, and labels must lie in [0, 2)"),
        ({"class_names": np.array(["a", "b", "c", "d"])}, "class 'd' (label 3) has no training image"),
        ({"class_names": np.array([1, 2, 3])}, "class_names is int64 of shape (3,), and it must be a list of strings"),
        ({"class_names": np.array(["a", None], object)}, "class_names cannot be read as .npz data: Object arrays cannot"),
    ],
)
def test_npz_content_is_refused_with_key_and_index(saved, changes, text):
    source = saved(**arrays(**changes))
    found = refusal(source)
    assert text in found and repr(source.removeprefix("npz:")) in found, found


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int16"])
def test_npz_labels_of_any_integer_type(saved, kind):
    data = load(saved(**arrays(train_labels=(np.arange(60) % 3).astype(kind))))
    assert data.train.labels.dtype == torch.int64 and data.train.labels.unique().tolist() == [0, 1, 2]


def test_npz_file_faults(saved, tmp_path):
    path = tmp_path / "set.npz"
    assert "cannot be read as .npz data: No such file or directory" in refusal(f"npz:{path}")
    assert "is a folder, not a file" in refusal(f"npz:{tmp_path}")
    source = saved(**arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as .npz data" in refusal(source)
    path.write_bytes(b"")
    assert "cannot be read as .npz data" in refusal(source)
    middle = whole.index(b"train_images") + 400  # inside the pixels, whose checksum zip keeps
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "train_images cannot be read as .npz data: Bad CRC-32" in refusal(source)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert "is a single array, and an .npz file with train_images" in refusal(source)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(f"npz:{tmp_path / 'pipe'}")


class CreatesFile:
    """Unpickling an instance creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_npz_is_never_unpickled(saved, tmp_path):
    trap = tmp_path / "trap"
    source = saved(**arrays(class_names=np.array([CreatesFile(trap), "b", "c"], object)))
    assert "Object arrays cannot be loaded" in refusal(source)
    assert not trap.exists()


def test_npz_array_header_that_is_no_header(tmp_path):
    path = tmp_path / "set.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((\n")
    assert "train_images cannot be read as .npz data" in refusal(f"npz:{path}")


# Decoded or encoded


@pytest.fixture
def photos(tmp_path):
    """Two classes of square JPEG files of 40 pixels, 30 each in train and 5 in test."""
    for part, count in (("train", 30), ("test", 5)):
        for label, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(100 * label + i).randint(0, 256, (5, 5, 3)).astype(np.uint8)
                image = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
                image.save(tmp_path / part / name / f"{i:02}.jpg")
    return f"folder:{tmp_path}"


NEEDED = 70 * 40 * 40 * 3  # bytes of all of them


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "decoded into memory: 0 MB of uint8"),
        ({"budget": NEEDED}, "decoded into memory: 0 MB of uint8"),
        (
            {"budget": NEEDED - 1},
            "kept as JPEG and PNG files: 0 MB of uint8 are more than the 0 MB of uint8 that there is room for",
        ),
        ({"budget": NEEDED - 1, "limit": 20}, "decoded into memory"),
        ({"budget": 70 * 16 * 16 * 3, "image_size": 16}, "decoded into memory"),
        ({"budget": 0, "backend": "resident", "augment": "simclr", "image_size": 16}, "decoded into memory"),
        ({"backend": "dali"}, "kept as JPEG and PNG files: the dali backend decodes them batch by batch"),
        ({"backend": "torch"}, "kept as JPEG and PNG files: the torch backend decodes them batch by batch"),
        ({"augment": "simclr"}, "decoded into memory"),
        ({"augment": "simclr", "image_size": 40}, "decoded into memory"),
        ({"augment": "simclr", "image_size": 50}, "decoded into memory"),
        ({"augment": "crop_flip", "image_size": 16}, "decoded into memory"),
        (
            {"augment": "resized_crop_flip", "image_size": 39},
            "kept as JPEG and PNG files: the crops of resized_crop_flip are taken from the stored images, which are larger",
        ),
        ({"augment": "simclr", "image_size": 16}, "kept as JPEG and PNG files: the crops of simclr"),
    ],
)
def test_a_folder_is_decoded_or_kept_for_a_reason(photos, settings, why):
    data = load(photos, **settings)
    assert data.why.startswith(why)
    kinds = {type(getattr(data, part)) for part in ("train", "val", "test")}
    assert kinds == {Encoded if why.startswith("kept") else Split}


def test_reasons_count_in_megabytes():
    assert why_encoded("auto", 10**9, "simclr", 158_700_000_000, False) == (
        "158,700 MB of uint8 are more than the 1,000 MB of uint8 that there is room for"
    )
    assert load("digits").why == "decoded into memory: 6 MB of uint8"
    assert load("digits", backend="dali", budget=0, augment="simclr").why == "decoded into memory: 6 MB of uint8"


def test_classes_and_labels_reach_the_folder(photos, tmp_path):
    classes, labels = tmp_path / "classes.txt", tmp_path / "labels.csv"
    classes.write_text("b\na\n")
    rows = [f"train/{name}/{i:02}.jpg,{name}\n" for name in "ab" for i in range(30)]
    labels.write_text("".join(["train/a/00.jpg,b\n", *rows[1:]]))
    for backend in ("torch", "resident"):
        data = load(photos, classes=classes, labels=str(labels), skip_broken=True, backend=backend)
        assert data.class_names == ("b", "a")
        assert (data.train.labels.bincount() + data.val.labels.bincount()).tolist() == [30, 29]
    assert refusal(photos, classes=tmp_path / "none").startswith(repr(str(tmp_path / "none")))
    assert "1 file mislabelled ('train/a/00.jpg' lies in 'a' and line 1 says 'b')" in refusal(photos, labels=labels)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"classes": "x.txt"},
            "classes is x.txt, and it must be left out for digits: it chooses among the class folders of folder: only",
        ),
        ({"labels": "x.csv"}, "labels is x.csv, and it must be left out for digits: it checks the class folders of folder: only"),
        ({"backend": "dalli"}, "backend is 'dalli' and must be one of auto, resident, dali, torch; did you mean 'dali'?"),
    ],
)
def test_settings_of_folders_alone(settings, text):
    assert refusal("digits", **settings) == text


def encoded_set(photos, **changes):
    """What a reader of encoded images returns, with something changed about it."""
    found = folder.index(Path(photos.removeprefix("folder:")))
    return replace(found, **{name: change(getattr(found, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"test": lambda split: split.take([])}, "has no test images"),
        ({"train": lambda split: split.take(range(30))}, "class 'b' (label 1) has no training image, and every class needs one"),
        ({"test": lambda split: replace(split, labels=split.labels * 7)}, "test_labels[5] is 7, and labels must lie in [0, 2)"),
        (
            {"test": lambda split: replace(split, image_size=8)},
            "test images are 8x8 and training images 40x40, and all must have one",
        ),
        (
            {"class_names": lambda names: names[:1], "train": lambda s: s.take([0]), "test": lambda s: s.take([0])},
            "has 1 class, and at",
        ),
        ({"train": lambda split: split.take([0, 30])}, "no class has two training images, and every class must keep one"),
    ],
)
def test_the_rules_of_arrays_hold_for_encoded_images(photos, monkeypatch, changes, text):
    monkeypatch.setattr(sources.packed, "read", lambda place, image_size=None: encoded_set(photos, **changes))
    found = refusal("packed:/some/where")
    assert text in found and "'/some/where'" in found


def test_packed_images_are_decoded_where_they_are_wanted_or_fit(photos, monkeypatch):
    calls = []

    def read(place, image_size=None):
        calls.append((str(place), image_size))
        size = image_size or 40
        return encoded_set(
            photos, train=lambda split: replace(split, image_size=size), test=lambda s: replace(s, image_size=size)
        )

    monkeypatch.setattr(sources.packed, "read", read)
    reference = load(photos, limit=20)
    for wanted, kind, why in (
        ({}, Split, "decoded into memory: 0 MB of uint8"),
        ({"backend": "resident", "budget": 0}, Split, "decoded into memory: 0 MB"),
        ({"budget": 0}, Encoded, "kept as JPEG and PNG bytes in shards: 0 MB of uint8 are more than"),
        ({"backend": "torch"}, Encoded, "kept as JPEG and PNG bytes in shards: the torch backend"),
        ({"augment": "simclr"}, Split, "decoded into memory"),
    ):
        data = load("packed:/some/where", limit=20, **wanted)
        assert type(data.train) is type(data.val) is type(data.test) is kind and data.why.startswith(why)
        for part in ("train", "val", "test"):
            assert torch.equal(getattr(data, part).images, getattr(reference, part).images)
            assert torch.equal(getattr(data, part).labels, getattr(reference, part).labels)
    data = load("packed:/some/where", image_size=16, augment="simclr")
    assert "the crops of simclr" in data.why and data.image_shape == (16, 16)
    assert calls[0] == ("/some/where", None) and calls[-1] == ("/some/where", 16)


def test_packed_arrays_are_as_other_arrays(monkeypatch):
    images = numbered(20)
    monkeypatch.setattr(
        sources.packed,
        "read",
        lambda place, image_size=None: Arrays(("a", "b"), images, np.arange(20) % 2, images, np.arange(20) % 2),
    )
    data = load("packed:x", backend="dali")
    assert isinstance(data.train, Split) and sorted(numbers(data.train) + numbers(data.val)) == list(range(20))


def test_packed_images_too_many_for_the_memory(photos, monkeypatch):
    monkeypatch.setattr(sources.packed, "read", lambda place, image_size=None: encoded_set(photos))

    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Encoded, "decode", full)
    assert refusal("packed:x") == "'x': 70 images of 40x40 do not fit into memory: --data.limit takes fewer"


def test_statistics_of_encoded_images_are_those_of_a_fixed_sample(photos, monkeypatch):
    kept, held = load(photos, backend="torch"), load(photos)
    assert image_stats(kept.train) == image_stats(held.train) == channel_stats(held.train.images)
    monkeypatch.setattr(sources, "STATS_IMAGES", 8)
    few = kept.train.subset(8)
    assert few.labels.bincount().tolist() == [4, 4]
    assert image_stats(kept.train) == channel_stats(few.images) != channel_stats(held.train.images)
    assert image_stats(held.train) == channel_stats(held.train.images)


def test_statistics_of_encoded_images_decode_a_few_at_once(photos, monkeypatch):
    kept = load(photos, backend="torch").train
    expected, asked, real = channel_stats(kept.images), [], Encoded.decode
    monkeypatch.setattr(Encoded, "decode", lambda split, indices: asked.append(len(indices)) or real(split, indices))
    for pixels, pieces in ((7 * 40 * 40, [7] * 7 + [5]), (1, [1] * 54)):  # also where one image is more than a piece
        monkeypatch.setattr(sources, "STATS_PIXELS", pixels)
        asked.clear()
        assert image_stats(kept) == expected and asked == pieces


# Channel statistics


def test_channel_stats_are_exact():
    images = torch.randint(0, 256, (37, 9, 11, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_stats(images)
    exact = images.double().div(255).reshape(-1, 3)
    assert mean == pytest.approx(exact.mean(0).tolist(), rel=1e-14)
    assert std == pytest.approx(exact.std(0, correction=0).tolist(), rel=1e-13)
    constant = channel_stats(torch.full((3, 2, 2, 3), 255, dtype=torch.uint8))
    assert constant == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def test_channel_stats_past_the_range_of_32_bits_and_over_several_pieces():
    images = torch.zeros(40, 256, 256, 3, dtype=torch.uint8)  # 2.6 million pixels: three pieces
    images[:, :, ::2] = 255
    assert channel_stats(images) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 4, 4, 3, dtype=torch.uint8)]
)
def test_channel_stats_want_uint8_nhwc(images):
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\) and not empty"):
        channel_stats(images)


def test_split_has_a_length():
    assert len(Split(torch.zeros(5, 2, 2, 3, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))) == 5

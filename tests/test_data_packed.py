"""Reading packed folders: the same images as the folder gives, and a sentence for every way in which one can be damaged or hostile."""

import hashlib
import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastanchor.data import folder, packed
from fastanchor.data.arrays import Arrays
from fastanchor.data.decode import BrokenImage
from fastanchor.data.encoded import EncodedSet
from fastanchor.data.pack import pack
from fastanchor.data.packplan import Options
from fastanchor.errors import UserError

SIDE = 18


class Quiet:
    """A report that nobody reads."""

    def say(self, text):
        pass

    begin = say

    def advance(self, files, size, kept=False):
        pass

    def end(self):
        pass


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Two classes, seven files in train and three in test each; one of them CMYK."""
    root = tmp_path_factory.mktemp("source") / "images"
    seed = 0
    for part, count in (("train", 7), ("test", 3)):
        for name in ("cat", "dog ö"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                image = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
                image = image.convert("CMYK") if seed == 3 else image
                image.save(root / part / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def originals(source):
    """The folder packed as pixels and as files, several shards each."""
    for kind in ("uint8", "jpeg"):
        pack(source, source.parent / kind, Options(kind=kind, shard_bytes=6000), Quiet())
    return source.parent


@pytest.fixture
def pixels(originals, tmp_path):
    return shutil.copytree(originals / "uint8", tmp_path / "pixels")


@pytest.fixture
def files(originals, tmp_path):
    return shutil.copytree(originals / "jpeg", tmp_path / "files")


def refusal(root, **settings):
    with pytest.raises(UserError) as error:
        packed.read(root, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def remedy(root):
    return f"remove '{root}' and pack the images again"


def rewrite(root, change):
    """Change the manifest as a person with an editor would."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def replace_file(root, entry_of, data):
    """Other bytes for a file, with a manifest that says so."""

    def change(manifest):
        entry = entry_of(manifest)
        (root / entry["file"]).write_bytes(data)
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    rewrite(root, change)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_pixels_are_those_of_the_folder(pixels, source):
    found, expected = packed.read(pixels), folder.read(source)
    assert isinstance(found, Arrays) and found.class_names == expected.class_names == ("cat", "dog ö")
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    assert found.train_images.dtype == np.uint8 and found.train_labels.dtype == np.int64


def test_files_are_those_of_the_folder(files, source):
    found, expected = packed.read(files), folder.index(source)
    assert isinstance(found, EncodedSet) and found.class_names == expected.class_names
    for split in ("train", "test"):
        ours, theirs = getattr(found, split), getattr(expected, split)
        assert ours.labels.equal(theirs.labels) and ours.sizes.equal(theirs.sizes)
        assert np.array_equal(ours.odd, theirs.odd) and ours.image_size == theirs.image_size == SIDE
        assert [bytes(ours.read(i)) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]
        assert ours.images.equal(theirs.images)
        assert [ours.name(i) for i in range(len(ours))] == [str(theirs.name(i))[len(str(source)) + 1 :] for i in range(len(ours))]
    assert found.train.odd.sum() == 1


def test_another_image_size(files, pixels, source):
    small, expected = packed.read(files, image_size=9), folder.index(source, image_size=9)
    assert small.test.image_shape == (9, 9) and small.test.images.equal(expected.test.images)
    assert packed.read(pixels, image_size=SIDE).train_images.shape[1:3] == (SIDE, SIDE)
    assert "holds images of 18x18 pixels, and image_size is 9" in refusal(pixels, image_size=9)


def test_the_store_is_pickled_and_read_by_threads(files, monkeypatch):
    monkeypatch.setattr(packed, "OPEN_SHARDS", 1)  # every second read opens a shard again
    train = packed.read(files).train
    expected = [train.read(i) for i in range(len(train))]
    copy = pickle.loads(pickle.dumps(train))
    assert [copy.read(i) for i in range(len(copy))] == expected and copy.name(9) == train.name(9) == "train/dog ö/2.jpg"
    assert copy.digest() == train.digest() != packed.read(files).test.digest()
    order = list(np.random.RandomState(0).randint(0, len(train), 2000))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.read, order)) == [expected[i] for i in order]
    assert len(train.store) == len(expected)


def test_the_digest_changes_with_the_images(files, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    shutil.copy(other / "train/cat/0.jpg", other / "train/cat/1.jpg")
    pack(other, tmp_path / "packed", Options(kind="jpeg"), Quiet())
    pack(source, tmp_path / "again", Options(kind="jpeg", shard_bytes=6000), Quiet())
    digest = packed.read(files).train.digest()
    assert digest != packed.read(tmp_path / "packed").train.digest()
    assert digest == packed.read(tmp_path / "again").train.digest()


def test_a_folder_that_is_not_packed(tmp_path, source):
    assert "manifest.json' is not there: a packed folder is made by fastanchor data pack" in refusal(source)
    assert "is not there" in refusal(tmp_path / "nowhere")
    (tmp_path / "partial").mkdir()
    text = refusal(tmp_path)
    assert "its packing did not finish, and the same fastanchor data pack, given again, goes on or tells why it cannot" in text
    for data in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "manifest.json").write_bytes(data)
        assert "manifest.json' is not the manifest" in refusal(tmp_path) or b"9" in data
    for data in (b"[]", b"null", b"{}", b'{"schema": true}', b'{"schema": "1"}'):
        (tmp_path / "manifest.json").write_bytes(data)
        assert "the file is damaged, or not from fastanchor data pack" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"schema": 2}')
    assert "schema is 2, and this fastanchor knows 1" in refusal(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    assert "is a folder, not a file" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
@pytest.mark.parametrize("which", ["shards", "names", "labels"])
def test_missing_truncated_and_longer_files(originals, tmp_path, kind, which):
    root = shutil.copytree(originals / kind, tmp_path / "packed")
    part = json.loads((root / "manifest.json").read_text())["splits"]["test"]
    which = "index" if (which, kind) == ("labels", "jpeg") else which
    path = root / (part["shards"][-1] if which == "shards" else part[which])["file"]
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        text = refusal(root)
        assert f"{path.name}' has {len(changed):,} bytes, and {len(data):,} were packed" in text and text.endswith(remedy(root))
    path.unlink()
    text = refusal(root)
    assert f"{path.name}' is not there, and manifest.json beside it names it" in text and text.endswith(remedy(root))
    path.mkdir()
    assert f"{path.name}' cannot be read: is a folder" in refusal(root)


def test_altered_pixels_labels_and_index(pixels, files):
    for root, name in ((pixels, "train-00001.npy"), (pixels, "test-labels.npy"), (files, "train-index.npy")):
        flip(root / name, -1)
        text = refusal(root)
        assert f"{name}' is altered: its SHA-256 is" in text and text.endswith(remedy(root))
        flip(root / name, -1)
    flip(pixels / "test-00000.npy", 5)  # in its header
    text = refusal(pixels)
    assert "test-00000.npy" in text and text.endswith(remedy(pixels))
    packed.read(files)


def test_altered_bytes_of_a_file_are_told_when_first_read(files):
    entry = np.load(files / "train-index.npy")[4]
    shard = files / f"train-{entry['shard']:05d}.tar"
    flip(shard, int(entry["offset"]) + 300)
    train = packed.read(files).train
    with pytest.raises(BrokenImage, match="is altered: its bytes in .*tar' are not those that were packed"):
        train.read(4)
    with pytest.raises(UserError, match=r"'train/cat/4.jpg' is altered") as error:
        train.decode([4])
    assert str(error.value).endswith(f"; {remedy(files)}")
    assert train.read(3)
    with pytest.raises(UserError, match="is altered: its SHA-256"):
        packed.check_files(files, packed.read_manifest(files))


def test_a_shard_cut_short_or_gone_while_in_use(files):
    train = packed.read(files).train
    first = train.read(0)
    entry = train.store._index[0]
    shard = files / f"train-{entry['shard']:05d}.tar"
    with open(shard, "r+b") as file:
        file.truncate(int(entry["offset"]) + 10)
    with pytest.raises(BrokenImage, match="which is truncated"):
        train.read(0)
    shard.unlink()
    with pytest.raises(BrokenImage, match="cannot be read from .* \\(No such file"):
        pickle.loads(pickle.dumps(train)).read(0)
    assert len(first) == entry["length"]
    (files / "train-names.txt").unlink()
    assert "image 5 of" in pickle.loads(pickle.dumps(train)).name(5)


HOSTILE = {
    "kind": lambda m: m.update(kind="pickle"),
    "class_names": lambda m: m.update(class_names=["cat"]),
    "class_names ": lambda m: m.update(class_names=["cat", "cat"]),
    "class_names  ": lambda m: m.update(class_names=[["cat"], "dog"]),
    "notes": lambda m: m.update(notes="text"),
    "image_size": lambda m: m.update(image_size=0),
    "image_size ": lambda m: m.update(image_size=True),
    "image_size  ": lambda m: m.update(image_size=10**30),
    "splits": lambda m: m.update(splits=[]),
    "splits.train": lambda m: m["splits"].pop("train"),
    "splits.test.images": lambda m: m["splits"]["test"].update(images=0),
    "splits.test.images ": lambda m: m["splits"]["test"].update(images="6"),
    "splits.test.counts": lambda m: m["splits"]["test"].update(counts=[3, 4]),
    "splits.test.counts ": lambda m: m["splits"]["test"].update(counts=[-1, 7]),
    "splits.train.counts": lambda m: m["splits"]["train"].update(counts=[14]),
    "splits.train.shards": lambda m: m["splits"]["train"].update(shards=[]),
    "splits.train.shards ": lambda m: m["splits"]["train"]["shards"].pop(),
    "splits.train.shards[0]": lambda m: m["splits"]["train"].update(shards=["train-00000.tar"]),
    "splits.train.shards[0].file": lambda m: m["splits"]["train"]["shards"][0].update(file="../secret"),
    "splits.train.shards[0].file ": lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"),
    "splits.train.shards[0].file  ": lambda m: m["splits"]["train"]["shards"][0].update(file=".."),
    "splits.train.shards[0].file   ": lambda m: m["splits"]["train"]["shards"][0].update(file="a\n"),
    "splits.train.shards[1].file": lambda m: m["splits"]["train"]["shards"][1].update(file="train-00000.tar"),
    "splits.train.shards[1].bytes": lambda m: m["splits"]["train"]["shards"][1].update(bytes=-1),
    "splits.train.shards[1].sha256": lambda m: m["splits"]["train"]["shards"][1].update(sha256="0" * 63),
    "splits.train.shards[1].images": lambda m: m["splits"]["train"]["shards"][1].update(images=1.0),
    "splits.train.index": lambda m: m["splits"]["train"].pop("index"),
    "splits.test.names.file": lambda m: m["splits"]["test"]["names"].update(file="a/b"),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_manifests(files, key):
    rewrite(files, HOSTILE[key])
    assert f"manifest.json': {key.strip()} must be " in refusal(files)


def test_hostile_shapes(pixels):
    for shape in ([0, 18], [18], "18x18", [18, 18.0], [10**5, 10**5], None):
        rewrite(pixels, lambda m, shape=shape: m.update(shape=shape))
        assert "shape must be the height and width" in refusal(pixels)
    rewrite(pixels, lambda m: m.update(shape=[18, 17]))
    assert "holds uint8 of shape" in refusal(pixels) and "wants uint8 of shape (" in refusal(pixels)


def test_hostile_counts_of_images(pixels):
    def change(manifest):
        part = manifest["splits"]["train"]
        part["images"] = part["shards"][0]["images"] = 2**61
        part["shards"][0]["images"] -= sum(shard["images"] for shard in part["shards"][1:])
        part["counts"] = [2**60, 2**60]

    rewrite(pixels, change)
    assert "do not fit into memory" in refusal(pixels)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_an_index_that_points_elsewhere(files):
    good = np.load(files / "train-index.npy")

    def told(**changes):
        index = good.copy()
        for key, value in changes.items():
            index[key][2] = value
        replace_file(files, lambda manifest: manifest["splits"]["train"]["index"], npy(index))
        return refusal(files)

    size = (files / "train-00000.tar").stat().st_size
    for changes in ({"offset": size}, {"offset": 2**64 - 1}, {"length": 2**32 - 1}, {"length": 0}, {"shard": 99},
                    {"height": 0}, {"height": 2**31, "width": 2**31}):  # fmt: skip
        assert "train-index.npy': row 2 points outside its shard, or at no image" in told(**changes), changes
    assert "label 2 is 7, and labels must lie in [0, 2)" in told(label=7)
    assert "other numbers of images a class" in told(label=1)
    assert "other numbers of images a shard" in told(shard=(good["shard"][2] + 1) % 2)
    for array in (good[:-1], good.astype([(name, "<i8") for name in good.dtype.names]), np.zeros(14), good.reshape(2, 7)):
        replace_file(files, lambda manifest: manifest["splits"]["train"]["index"], npy(array))
        assert "train-index.npy' holds" in refusal(files)
    replace_file(files, lambda manifest: manifest["splits"]["train"]["index"], pickle.dumps([1]))
    assert "train-index.npy' is not a .npy file" in refusal(files)
    replace_file(files, lambda manifest: manifest["splits"]["train"]["index"], npy(np.array([print], object)))
    assert "train-index.npy' holds object" in refusal(files)


def test_labels_that_do_not_match(pixels):
    for labels, words in (([0] * 5 + [2], "label 5 is 2"), ([-1, 0, 0, 1, 1, 1], "label 0 is -1"), ([0] * 6, "other numbers of")):
        replace_file(pixels, lambda manifest: manifest["splits"]["test"]["labels"], npy(np.array(labels)))
        assert words in refusal(pixels)


def test_as_a_data_source(pixels, files, source):
    from fastanchor.data.sources import SOURCES, load

    if not any(known.startswith("packed") for known in SOURCES):
        pytest.skip("packed: is no source yet")
    plain = load(f"folder:{source}", val_fraction=0.3)
    found = load(f"packed:{pixels}", val_fraction=0.3)
    for split in ("train", "val", "test"):
        assert getattr(found, split).digest() == getattr(plain, split).digest()
    encoded = load(f"packed:{files}", val_fraction=0.3, backend="torch")
    assert encoded.train.labels.equal(plain.train.labels) and encoded.train.images.equal(plain.train.images)

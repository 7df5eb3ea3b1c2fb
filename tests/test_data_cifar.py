"""CIFAR archives: read as published, told apart from altered ones, never a means to run code."""

import hashlib
import io
import pickle
import struct
import sys
import tarfile
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastanchor.data import cifar
from fastanchor.data.sources import load
from fastanchor.errors import UserError

IMAGES_A_FILE = 20


# Python 2 pickles, byte by byte as the official files have them: byte strings for text and for the array's content.


def py2_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def py2_int(value):
    return b"J" + struct.pack("<i", value)


def py2_list(items):
    return b"](" + b"".join(items) + b"e"


def py2_array(array, module):
    dtype = b"cnumpy\ndtype\n(" + py2_string("u1") + py2_int(0) + py2_int(1) + b"tR(" + py2_int(3) + py2_string("|")
    dtype += b"NNN" + py2_int(-1) + py2_int(-1) + py2_int(0) + b"tb"
    shape = b"(" + b"".join(py2_int(n) for n in array.shape) + b"t"
    head = f"c{module}\n_reconstruct\n".encode() + b"(cnumpy\nndarray\n(" + py2_int(0) + b"t" + py2_string("b") + b"tR"
    return head + b"(" + py2_int(1) + shape + dtype + b"\x89" + py2_string(array.tobytes()) + b"tb"


def py2_dict(**entries):
    return b"\x80\x02}(" + b"".join(py2_string(key) + value for key, value in entries.items()) + b"u."


def planes(images):
    """uint8 (N, 32, 32, 3) as the rows of an official file, one pixel at a time."""
    rows = np.zeros((len(images), 3072), np.uint8)
    for channel in range(3):
        for y in range(32):
            rows[:, 1024 * channel + 32 * y : 1024 * channel + 32 * y + 32] = images[:, y, :, channel]
    return rows


def official_files(name, module="numpy.core.multiarray"):
    """File contents by name, and the images and labels of train and test that they hold."""
    edition, rng = cifar.EDITIONS[name], np.random.RandomState(0)
    classes = 10 if name == "cifar10" else 100
    files, truth = {}, {"train": ([], []), "test": ([], [])}
    count = IMAGES_A_FILE if name == "cifar10" else 2 * classes
    for file in (*edition.train, edition.test):
        images = rng.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        labels = [int(label) for label in rng.permutation(np.arange(count) % classes)]
        entries = {edition.labels_key: py2_list([py2_int(label) for label in labels])}
        if name == "cifar100":
            entries["coarse_labels"] = py2_list([py2_int(label % 20) for label in labels])
        files[file] = py2_dict(data=py2_array(planes(images), module), batch_label=py2_string(file), **entries)
        part = truth["test" if file == edition.test else "train"]
        part[0].append(images)
        part[1].extend(labels)
    names = [f"class {i}" for i in range(classes)]
    groups = {"coarse_label_names": py2_list([py2_string(f"group {i}") for i in range(20)])} if name == "cifar100" else {}
    files[edition.meta] = py2_dict(**{edition.names_key: py2_list([py2_string(entry) for entry in names])}, **groups)
    return files, {part: (np.concatenate(images), np.array(labels)) for part, (images, labels) in truth.items()}, names


def write_archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo(folder)
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
        for name, content in {**files, "readme.html": b"<p>"}.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function that writes files as an archive or a folder and makes their checksums the expected ones."""

    def write(name, files, form="archive"):
        edition = cifar.EDITIONS[name]
        if form == "archive":
            path = tmp_path / edition.archive
            write_archive(path, edition.folder, files)
            content = path.read_bytes()
            known = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        else:
            path = tmp_path / edition.folder
            path.mkdir()
            for file, content in files.items():
                (path / file).write_bytes(content)
            known = {"file_md5": {file: hashlib.md5(content).hexdigest() for file, content in files.items()}}
        monkeypatch.setitem(cifar.EDITIONS, name, replace(edition, **known))
        return path

    return write


def refusal(root, source="cifar10", **settings):
    with pytest.raises(UserError) as error:
        load(source, root=root, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def in_order(data):
    """Images and labels of train and val, back in the order of the files (the first of equal rows settles it)."""
    images = torch.cat([data.train.images, data.val.images]).numpy()
    labels = torch.cat([data.train.labels, data.val.labels]).numpy()
    order = np.lexsort(images.reshape(len(images), -1)[:, :4].T)
    return images[order], labels[order]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("form", ["archive", "folder"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_labels_and_names_as_published(publish, tmp_path, name, form, module):
    files, truth, names = official_files(name, module)
    publish(name, files, form)
    data = load(name, root=tmp_path)
    assert data.class_names == tuple(names) and data.image_shape == (32, 32)
    assert np.array_equal(data.test.images.numpy(), truth["test"][0])
    assert np.array_equal(data.test.labels.numpy(), truth["test"][1])
    images, labels = truth["train"]
    order = np.lexsort(images.reshape(len(images), -1)[:, :4].T)
    found_images, found_labels = in_order(data)
    assert np.array_equal(found_images, images[order]) and np.array_equal(found_labels, labels[order])
    assert list(tmp_path.iterdir()) == [tmp_path / getattr(cifar.EDITIONS[name], form)]  # nothing was extracted


def test_coarse_labels_of_cifar100(publish, tmp_path):
    files, truth, _ = official_files("cifar100")
    publish("cifar100", files)
    coarse, fine = load("cifar100:coarse", root=tmp_path), load("cifar100", root=tmp_path)
    assert coarse.class_names == tuple(f"group {i}" for i in range(20)) and coarse.name == "cifar100:coarse"
    assert np.array_equal(coarse.test.images.numpy(), truth["test"][0])
    assert np.array_equal(coarse.test.labels.numpy(), truth["test"][1] % 20)
    assert np.array_equal(coarse.test.labels.numpy(), fine.test.labels.numpy() % 20)
    images, labels = truth["train"]
    order = np.lexsort(images.reshape(len(images), -1)[:, :4].T)
    assert np.array_equal(in_order(coarse)[1], labels[order] % 20)
    text = refusal(tmp_path, "cifar100:course")
    assert text == ("data source 'cifar100:course' must be one of cifar100, cifar100:coarse; did you mean 'cifar100:coarse'?")
    with pytest.raises(ValueError, match="cifar10 has no coarse labels"):
        cifar.read("cifar10", tmp_path, coarse=True)


def test_coarse_labels_that_are_not_there(publish, tmp_path):
    files = official_files("cifar100")[0]
    publish("cifar100", {**files, "meta": py2_dict(fine_label_names=py2_list([py2_string("x")]))})
    assert "'coarse_label_names' must be a list of class names" in refusal(tmp_path, "cifar100:coarse")


def test_root_from_the_environment(publish, tmp_path, monkeypatch):
    publish("cifar10", official_files("cifar10")[0])
    monkeypatch.setenv("FASTANCHOR_DATA", str(tmp_path))
    assert len(load("cifar10").test) == IMAGES_A_FILE
    monkeypatch.setenv("FASTANCHOR_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="elsewhere"):
        load("cifar10")


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTANCHOR_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        load("cifar100")
    assert f"cifar100 was looked for in '{tmp_path}/.cache/fastanchor'" in str(error.value)


def test_missing_archive_says_where_and_how(tmp_path):
    text = refusal(tmp_path)
    for part in (
        f"looked for in {str(tmp_path)!r}",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "put the archive there",
        "--data.download",
        'pip install "fastanchor[vision]"',
    ):
        assert part in text, text


def test_incomplete_folder_is_not_used(publish, tmp_path):
    path = publish("cifar10", official_files("cifar10")[0], "folder")
    (path / "data_batch_3").unlink()
    assert "nor a complete folder cifar-10-batches-py is there" in refusal(tmp_path)


def test_altered_archive_with_both_checksums_and_sizes(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"not the archive")
    text = refusal(tmp_path)
    assert text == (
        f"{str(path)!r} is truncated or altered: expected sha256 "
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce and 170,498,071 bytes, found sha256 "
        f"{hashlib.sha256(b'not the archive').hexdigest()} and 15 bytes; nothing in it was used"
    )


def test_altered_file_in_a_folder(publish, tmp_path):
    path = publish("cifar10", official_files("cifar10")[0], "folder") / "test_batch"
    content = bytearray(path.read_bytes())
    expected = hashlib.md5(content).hexdigest()
    content[5000] ^= 1
    path.write_bytes(content)
    text = refusal(tmp_path)
    found = hashlib.md5(content).hexdigest()
    assert str(path) in text and f"expected md5 {expected}, found md5 {found} and {len(content):,} bytes" in text


def test_one_byte_more_or_less_is_noticed_by_size(publish, tmp_path):
    path = publish("cifar10", official_files("cifar10")[0])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert f"and {size:,} bytes, found" in refusal(tmp_path)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").mkdir()
    assert "cifar-10-python.tar.gz' cannot be read: is a folder, not a file" in refusal(tmp_path)


def test_published_checksums_are_the_ones_of_the_data_sets():
    """A slip of the pen in the table would refuse genuine data."""
    ten, hundred = cifar.EDITIONS["cifar10"], cifar.EDITIONS["cifar100"]
    assert ten.sha256 == "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    assert hundred.sha256 == "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
    assert (ten.md5, hundred.md5) == ("c58f30108f718f92721af3b95e74349a", "eb9058c3a382ffc7106e4002c42a8d85")
    for edition in (ten, hundred):
        assert set(edition.file_md5) == {*edition.train, edition.test, edition.meta}
        assert all(len(checksum) == 32 for checksum in edition.file_md5.values())


# Hostile content


class CreatesFile:
    """Unpickling an instance creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_malicious_pickle_is_not_executed(publish, tmp_path, monkeypatch, form):
    trap = tmp_path / "trap"
    malicious = pickle.dumps({"data": CreatesFile(trap)}, protocol=2)
    pickle.loads(malicious)["data"].close()  # the trap works ...
    trap.unlink()
    files = {**official_files("cifar10")[0], "data_batch_1": malicious, "batches.meta": malicious}
    genuine = cifar.EDITIONS["cifar10"]
    publish("cifar10", files, form)
    matching = cifar.EDITIONS["cifar10"]
    monkeypatch.setitem(cifar.EDITIONS, "cifar10", genuine)
    assert "is truncated or altered" in refusal(tmp_path) and not trap.exists()  # ... is stopped by the checksum ...
    monkeypatch.setitem(cifar.EDITIONS, "cifar10", matching)
    text = refusal(tmp_path)  # ... and, were the checksum right, by the unpickler
    assert "batches.meta" in text and "refused as a CIFAR file: it asks for" in text and "open" in text
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\narray\n.",
        pickle.dumps({"data": np.random.RandomState}, protocol=4),
    ],
)
def test_only_arrays_are_admitted(content):
    with pytest.raises(UserError, match="x was refused as a CIFAR file: it asks for"):
        cifar.unpickle(content, "x")


@pytest.mark.parametrize("content", [b"", b"\x80", b"}(U\x03abc", b"\xff\xff", b"0.", b"R.", b"]" * 50])
def test_malformed_pickles_are_told(content):
    with pytest.raises(UserError, match=r"^x was refused as a CIFAR file: .+"):
        cifar.unpickle(content, "x")


ROWS = py2_array(np.zeros((2, 3072), np.uint8), "numpy.core.multiarray")


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("batches.meta", b"\x80\x02](U\x01ae.", "it holds a list, not a dictionary"),
        ("batches.meta", py2_dict(other=py2_string("x")), "'label_names' must be a list of class names"),
        ("data_batch_2", py2_dict(data=py2_string("x"), labels=py2_list([])), "'data' must be a uint8 array"),
        (
            "data_batch_2",
            py2_dict(data=py2_array(np.zeros((2, 9), np.uint8), "numpy.core.multiarray"), labels=py2_list([])),
            "'data' must be a uint8 array of shape (N, 3072)",
        ),
        ("test_batch", py2_dict(data=ROWS, labels=py2_list([py2_int(1)])), "'labels' must list one integer an image"),
        ("test_batch", py2_dict(data=ROWS, labels=py2_list([py2_string("1")] * 2)), "must list one integer an image"),
        (
            "test_batch",
            py2_dict(data=ROWS, labels=py2_list([py2_int(3), py2_int(10)])),
            "cifar10: test_labels[1] is 10, and labels must lie in [0, 10)",
        ),
    ],
)
def test_layout_is_checked(publish, tmp_path, file, content, text):
    publish("cifar10", {**official_files("cifar10")[0], file: content})
    found = refusal(tmp_path)
    assert text in found and (file in found or "cifar10:" in found), found


def test_member_missing_or_no_plain_file(publish, tmp_path, monkeypatch):
    files = official_files("cifar10")[0]
    path = publish("cifar10", {name: content for name, content in files.items() if name != "test_batch"})
    assert "cifar-10-batches-py/test_batch is not in the archive" in refusal(tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/batches.meta")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    content = path.read_bytes()
    known = replace(cifar.EDITIONS["cifar10"], sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setitem(cifar.EDITIONS, "cifar10", known)
    assert "cifar-10-batches-py/batches.meta is not in the archive" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x1f\x8b\x08\x00truncated"])
def test_archive_that_is_no_archive(tmp_path, monkeypatch, content):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    known = replace(cifar.EDITIONS["cifar10"], sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setitem(cifar.EDITIONS, "cifar10", known)
    assert "cannot be read as a .tar.gz archive" in refusal(tmp_path)


def test_larger_than_any_genuine_file_is_hashed_but_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "data"
    path.write_bytes(bytes(5000))
    checksum = hashlib.md5(bytes(5000)).hexdigest()
    assert cifar.read_checked(path, "md5", checksum) == bytes(5000)
    monkeypatch.setattr(cifar, "MAX_BYTES", 4999)
    with pytest.raises(UserError, match="5,000 bytes; nothing in it was used"):
        cifar.read_checked(path, "md5", checksum)


# Downloading


def fake_torchvision(monkeypatch, download_url):
    modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.datasets.utils")}
    modules["torchvision.datasets.utils"].download_url = download_url
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_download_asks_torchvision_for_the_archive_once(publish, tmp_path, monkeypatch):
    path = publish("cifar10", official_files("cifar10")[0])
    content, calls = path.read_bytes(), []
    root = tmp_path / "new" / "folder"

    def download_url(url, root, filename=None, md5=None):
        calls.append((url, root, filename, md5))
        with open(f"{root}/{filename}", "wb") as file:
            file.write(content)

    fake_torchvision(monkeypatch, download_url)
    assert len(load("cifar10", root=root, download=True).test) == IMAGES_A_FILE
    assert calls == [
        (
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            str(root),
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
        )
    ]
    load("cifar10", root=root, download=True)
    assert len(calls) == 1


@pytest.mark.parametrize("failure", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
def test_failed_download_is_told(tmp_path, monkeypatch, failure):
    def download_url(*args, **kwargs):
        raise failure

    fake_torchvision(monkeypatch, download_url)
    text = refusal(tmp_path, "cifar100", download=True)
    assert f"failed ({failure}): try again, or put cifar-100-python.tar.gz from" in text


@pytest.mark.parametrize(
    "failure", [ImportError("No module named 'torchvision'"), RuntimeError("operator torchvision::nms does not exist")]
)
def test_torchvision_missing_or_of_another_build(tmp_path, monkeypatch, failure):
    class Refuses:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise failure

    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    text = refusal(tmp_path, download=True)
    assert f"cannot be imported here ({failure})" in text and 'pip install "fastanchor[vision]"' in text
    assert "by hand" in text

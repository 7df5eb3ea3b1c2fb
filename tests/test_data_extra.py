"""Extra images from an npz file: mapped where they lie, checked, and mixed with a training split."""

import hashlib
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from fastanchor.data import extra as module
from fastanchor.data.extra import ExtraSplit, Mixed, read_extra
from fastanchor.data.sources import Split
from fastanchor.errors import UserError

COUNT, SHAPE, CLASSES = 40, (5, 6), 7


def pixels(count=COUNT, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, *SHAPE, 3)).astype(np.uint8)


def some_labels(count=COUNT):
    return np.arange(count) * 3 % CLASSES


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "generated images é.npz"
    np.savez(path, image=pixels(), label=some_labels())
    return path


def saved(tmp_path, save=np.savez, **arrays):
    path = tmp_path / "other.npz"
    save(path, **{"image": pixels(), "label": some_labels(), **arrays})
    return path


def read(path):
    return read_extra(path, CLASSES, SHAPE)


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def is_mapped(split):
    """Whether the images lie in a map of a file, by what the system says of their address."""
    address = split.images.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= address < high:
                return ".npz" in line
    return False


def test_images_are_mapped_from_the_file_and_labels_read(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = read(str(file))
    assert isinstance(split, Split) and len(split) == COUNT and split.image_shape == SHAPE
    assert split.images.dtype == torch.uint8 and np.array_equal(split.images.numpy(), pixels())
    assert split.labels.dtype == torch.int64 and split.labels.tolist() == some_labels().tolist()
    assert np.array_equal(split.gather(torch.tensor([7, 0, 7])).numpy(), pixels()[[7, 0, 7]])
    if sys.platform == "linux":
        assert is_mapped(split)
    before = file.read_bytes()
    split.images.zero_()  # a copy on write: whatever happens in this process, the file stays
    assert file.read_bytes() == before


def test_keys_of_this_project_and_other_types_of_labels(tmp_path):
    path = tmp_path / "ours.npz"
    np.savez(
        path, train_images=pixels(), train_labels=some_labels().astype(np.uint8), test_images=np.zeros(3), note=np.array("x")
    )
    split = read(path)
    assert np.array_equal(split.images.numpy(), pixels()) and split.labels.tolist() == some_labels().tolist()


def test_the_members_may_lie_anywhere(tmp_path):
    """Headers of any length, other members before, and a zip file that does not begin with its first byte."""
    path = tmp_path / "odd.npz"
    np.save(tmp_path / "image.npy", pixels())
    np.save(tmp_path / "label.npy", some_labels())
    with open(path, "wb") as out:
        out.write(b"something before the archive" * 3)
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("readme.txt", "hello")
            archive.write(tmp_path / "label.npy", "label.npy")
            info = zipfile.ZipInfo("image.npy")
            info.extra = b"\x99\x99\x04\x00abcd"
            archive.writestr(info, (tmp_path / "image.npy").read_bytes())
            info.extra = b""  # of the directory, which is written last: other than that of the member itself
    assert np.array_equal(read(path).images.numpy(), pixels())


def test_compressed_files_are_read_into_memory_when_small(tmp_path, file, monkeypatch):
    path = saved(tmp_path, np.savez_compressed)
    split = read(path)
    assert np.array_equal(split.images.numpy(), pixels()) and split.place is None
    assert split.digest() == read(file).digest()
    monkeypatch.setattr(module, "LARGEST_COMPRESSED", 1000)
    refused(path, r"image is compressed, which is allowed up to .* GiB, and has .* GiB; rewrite it uncompressed: d = numpy.load")
    assert np.array_equal(read(file).images.numpy(), pixels())


def test_what_a_file_must_hold(tmp_path):
    refused(tmp_path / "missing.npz", r"missing.npz' cannot be read: No such file or directory$")
    refused(tmp_path, r"' cannot be read: is a folder, not a file$")
    np.savez(tmp_path / "none.npz", images=pixels())
    refused(
        tmp_path / "none.npz",
        r"has neither of the arrays that extra data needs: image and label or train_images and train_labels$",
    )
    np.savez(tmp_path / "half.npz", image=pixels())
    refused(tmp_path / "half.npz", r"has no label, and extra data needs image and label$")
    np.save(tmp_path / "single.npz", pixels())
    os.rename(tmp_path / "single.npz.npy", tmp_path / "single.npz")
    refused(tmp_path / "single.npz", r"cannot be read as .npz data, which may be truncated or altered: File is not a zip file$")

    def given(**arrays):
        return saved(tmp_path, **arrays)

    refused(
        given(image=pixels().astype(np.float32)), r": image is float32 of shape \(40, 5, 6, 3\), and extra images must be uint8"
    )
    refused(given(image=pixels()[..., 0]), r": image is uint8 of shape \(40, 5, 6\), and extra images must be uint8 of shape")
    refused(given(image=pixels().transpose(0, 3, 1, 2).copy()), r"shape \(40, 3, 5, 6\), and extra images must be uint8")
    refused(given(image=pixels()[:, :4].copy()), r": image has images of 6x4, and the training images are 6x5$")
    refused(given(image=np.asfortranarray(pixels())), r": image is in Fortran order, and must be saved as")
    refused(given(image=pixels()[:0], label=some_labels()[:0]), r": image has no images$")
    refused(given(image=np.array([{"a": 1}], dtype=object)), r": image is object of shape \(1,\)")
    refused(given(label=np.array([None] * COUNT, dtype=object)), r": label cannot be read as .npz data.*allow_pickle")
    refused(
        given(label=some_labels() * 1.0), r": label is float64 of shape \(40,\), and labels must be integers of shape \(N,\)$"
    )
    refused(given(label=some_labels()[:, None]), r": label is int64 of shape \(40, 1\), and labels must be integers")
    refused(given(label=some_labels()[:-1]), r": label has 39 entries for 40 images, and there must be one an image$")
    for bad in (-1, CLASSES):
        labels = some_labels()
        labels[23] = bad
        refused(given(label=labels), rf": label\[23\] is {bad}, and labels must lie in \[0, {CLASSES}\)$")


def test_truncated_and_altered_files_are_named(tmp_path, file, monkeypatch):
    whole = file.read_bytes()
    path = tmp_path / "hurt.npz"
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(path, "cannot be read as .npz data, which may be truncated or altered")

    def altered(at):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        return path

    image_data = whole.index(pixels().tobytes())
    refused(altered(image_data + 700), "image cannot be read as .npz data, which may be truncated or altered: Bad CRC-32")
    refused(altered(whole.index(some_labels().tobytes()) + 8), "label cannot be read as .npz data.*Bad CRC-32")
    refused(altered(whole.index(b"\x93NUMPY") + 1), "image cannot be read")
    refused(altered(whole.index(b"(40, 5, 6, 3)") + 1), "image")
    # Every byte of the headers and of the directory: refused, or the same images.
    outside = [*range(image_data), *range(whole.index(some_labels().tobytes()) + 8 * COUNT, len(whole))]
    for at in outside[::3]:
        try:
            found = read(altered(at))
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert np.array_equal(found.images.numpy(), pixels()) and found.labels.tolist() == some_labels().tolist()
    # More than is read of a file for its headers alone. Above a size, the header has still to fit the archive's directory.
    np.savez(path, image=pixels(3000), label=some_labels(3000))
    path.write_bytes(path.read_bytes().replace(pixels(3000)[2000].tobytes(), pixels(3000)[2001].tobytes()))
    refused(path, "image cannot be read as .npz data.*Bad CRC-32")
    monkeypatch.setattr(module, "LARGEST_CHECKED", 100)
    assert (read(path).images.numpy() != pixels(3000)).any((1, 2, 3)).nonzero()[0].tolist() == [2000]
    path.write_bytes(path.read_bytes().replace(b"(3000, 5", b"(3001, 5"))
    refused(path, r"image has \d+ bytes where shape \(3001, 5, 6, 3\) needs \d+: truncated or altered$")


def test_bytes_behind_an_array_are_refused(tmp_path, file):
    for member in ("image.npy", "label.npy"):
        path = tmp_path / "longer.npz"
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name) + b"x" * (name == member))
        refused(path, f"{member[:5]}.*truncated or altered")


def test_pickled_as_the_name_of_the_file(tmp_path, file):
    split = read(file)
    found = pickle.loads(pickle.dumps(split))
    assert isinstance(found, ExtraSplit) and torch.equal(found.images, split.images) and torch.equal(found.labels, split.labels)
    assert found.digest() == split.digest()
    images = np.zeros((3000, *SHAPE, 3), np.uint8)
    large = read(saved(tmp_path, image=images, label=np.zeros(3000, np.uint8)))
    real = Split(torch.from_numpy(pixels()), torch.from_numpy(some_labels()))
    mixed = Mixed(real, large)
    assert len(mixed.labels) == 3040
    assert len(pickle.dumps(mixed)) < 3000 * 8 + 2 * pixels().nbytes + 5000 < images.nbytes
    again = pickle.loads(pickle.dumps(mixed))
    assert again.digest() == mixed.digest() and torch.equal(
        again.gather(torch.tensor([3039, 0])), mixed.gather(torch.tensor([3039, 0]))
    )
    in_memory = pickle.loads(pickle.dumps(read(saved(tmp_path, np.savez_compressed))))
    assert np.array_equal(in_memory.images.numpy(), pixels())


def test_digests_tell_files_apart_without_reading_them_whole(tmp_path, file, monkeypatch):
    first = read(file).digest()
    copy = tmp_path / "elsewhere.npz"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, (0, 0))
    assert read(copy).digest() == first
    other = pixels()
    other[20, 2, 3, 1] ^= 1
    relabelled = some_labels()
    relabelled[:2] = relabelled[1::-1]
    assert len({first, read(saved(tmp_path, image=other)).digest(), read(saved(tmp_path, label=relabelled)).digest()}) == 3
    # A change that the stated checksum does not show is seen in the samples, at the beginning and the end at least.
    split = read(file)
    split.images[-1, -1, -1, -1] ^= 1
    assert split.digest() != first
    asked = []
    real_blake = hashlib.blake2b

    class Counting:
        def __init__(self, data=b"", **more):
            self.inner = real_blake(data, **more)

        def update(self, data):
            asked.append(memoryview(data).nbytes)
            self.inner.update(data)

        def digest(self):
            return self.inner.digest()

    monkeypatch.setattr(module.hashlib, "blake2b", Counting)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 8)
    monkeypatch.setattr(module, "SAMPLES", 5)
    assert read(file).digest() != read(saved(tmp_path, image=other)).digest(), "by the stated checksum: the samples miss it"
    asked.clear()
    read(file).digest()
    assert len(asked) == 1 + module.SAMPLES and max(asked[1:]) == 8


# Mixed


def test_mixed_gathers_in_order_from_both(file):
    real = Split(torch.from_numpy(pixels(12, seed=5)), torch.from_numpy(some_labels(12)))
    mixed = Mixed(real, read(file))
    everything = np.concatenate([pixels(12, seed=5), pixels()])
    assert len(mixed) == 52 and mixed.image_shape == SHAPE
    assert mixed.labels.tolist() == [*some_labels(12), *some_labels()] and np.array_equal(mixed.images.numpy(), everything)
    for indices in (
        [],
        [3],
        [50],
        [51, 12, 11, 0, 12, 30, 5],
        torch.randperm(52, generator=torch.Generator().manual_seed(0)).tolist(),
    ):
        found = mixed.gather(torch.tensor(indices, dtype=torch.int64))
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), everything[indices])
    assert mixed.digest() not in (real.digest(), mixed.extra.digest(), Mixed(real, real).digest())
    assert mixed.digest() == Mixed(real, read(file)).digest()
    with pytest.raises(ValueError, match=r"images of \(5, 6\) cannot be mixed with those of \(5, 5\)"):
        Mixed(Split(real.images[:, :, :5], real.labels), mixed.extra)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_takes_no_memory(tmp_path, monkeypatch):
    """64 MB of images are mapped, and a few of them gathered, in a process of which less than 16 MB more is its own memory."""
    path = tmp_path / "large.npz"
    np.savez(path, image=np.zeros((20_000, 32, 32, 3), np.uint8), label=np.zeros(20_000, np.uint8))
    program = f"""
import torch
from fastanchor.data.extra import read_extra
def private():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
before = private()
split = read_extra({str(path)!r}, 10, (32, 32))
split.gather(torch.tensor([5, 19_999]))
print(private() - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 16 * 1024

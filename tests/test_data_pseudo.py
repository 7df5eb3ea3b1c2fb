"""Pseudo-labels from files and by k-means, and the high-frequency view: against loops in fp64, and what is refused."""

import math
import pickle

import numpy as np
import pytest
import torch
from graph_emulator import Emulator

from fastanchor import graphs
from fastanchor.data.frequency import high_frequencies
from fastanchor.data.pseudo import cluster, read_pseudo_labels
from fastanchor.errors import UserError

CLUSTERS = (2, 3)
GOOD = np.array([[0, 2], [1, 1], [0, 0], [1, 2]])


def random_images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the high-frequency view ------------------------------------------------------------------------------------------------------


def by_loops(image, radius):
    """(H, W) -> (H, W): the discrete Fourier transform and its inverse summed term by term."""
    height, width = image.shape
    frequencies = [(i - height // 2, j - width // 2) for i in range(height) for j in range(width)]
    out = np.zeros((height, width), complex)
    for i, j in frequencies:
        if math.sqrt(i * i + j * j) < radius:
            continue
        wave = np.array([[np.exp(2j * np.pi * (i * y / height + j * x / width)) for x in range(width)] for y in range(height)])
        out += (image * wave.conj()).sum() * wave / (height * width)
    return out.real


def of_the_authors(images, radius):
    """fr_util.py in numpy, for square images: shifted spectrum, and a mask by the distance of (i, j) from size / 2."""
    size = images.shape[-1]
    spectrum = np.fft.fftshift(np.fft.fftn(images, axes=(-2, -1)), axes=(-2, -1))
    for i in range(size):
        for j in range(size):
            if np.sqrt((i - size / 2) ** 2 + (j - size / 2) ** 2) < radius:
                spectrum[..., i, j] = 0
    return np.real(np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(-2, -1)), axes=(-2, -1)))


@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (7, 7), (5, 8)])
@pytest.mark.parametrize("radius", [0, 1, 2, 2.5, math.sqrt(5), 100])
def test_high_frequencies_term_by_term(shape, radius):
    images = random_images(2, 2, *shape)
    found = high_frequencies(images, radius)
    expected = np.stack([[by_loops(channel, radius) for channel in image] for image in images.numpy()])
    assert found.dtype == torch.float64 and np.abs(found.numpy() - expected).max() < 1e-13
    assert np.abs(high_frequencies(images.float(), radius).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("size, radius", [(32, 8), (32, 4), (16, 8)])
def test_high_frequencies_are_those_of_the_authors_code(size, radius):
    images = random_images(3, 3, size, size)
    expected = of_the_authors(images.numpy(), radius)
    assert np.abs(high_frequencies(images, radius).numpy() - expected).max() < 1e-13
    # Not clamped: their mean over a channel is 0.
    assert high_frequencies(images, radius).amin() < -0.1 and np.abs(expected.mean((2, 3))).max() < 1e-12


def test_high_frequencies_keep_dtype_and_layout_and_can_be_captured():
    images = random_images(2, 3, 8, 8).float()
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = high_frequencies(last, 2)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, high_frequencies(images, 2)) and high_frequencies(images, 2).is_contiguous()
    assert high_frequencies(images.bfloat16(), 2).dtype == torch.float32
    with graphs.use_recorder(Emulator):
        captured = graphs.Captured(lambda x: high_frequencies(x, 2.25), (images,))
        assert torch.equal(captured(1 - images), high_frequencies(1 - images, 2.25))


# -- files ------------------------------------------------------------------------------------------------------------------------


def write(path, value):
    np.save(path, value) if path.suffix == ".npy" else np.savez(path, **value)
    return path


def named(array=GOOD, clusters=CLUSTERS):
    return {f"pseudo_train_{count}": array[:, t] for t, count in enumerate(clusters)}


def test_files_of_both_kinds(tmp_path):
    expected = torch.from_numpy(GOOD)
    for dtype in (np.int64, np.uint8, np.int16):
        found = read_pseudo_labels(write(tmp_path / "a.npy", GOOD.astype(dtype)), CLUSTERS, 4)
        assert found.dtype == torch.int64 and torch.equal(found, expected)
        of_more = named(GOOD.astype(dtype)) | {"pseudo_train_500": np.arange(4), "pseudo_test_2": np.zeros(9, int)}
        assert torch.equal(read_pseudo_labels(write(tmp_path / "b.npz", of_more), CLUSTERS, 4), expected)
        assert torch.equal(read_pseudo_labels(tmp_path / "b.npz", CLUSTERS[::-1], 4), expected.flip(1))
    assert torch.equal(read_pseudo_labels(write(tmp_path / "c.npy", GOOD[:, 1]), (3,), 4), expected[:, 1:])


def test_a_file_for_all_of_the_sources_images(tmp_path):
    file = write(tmp_path / "a.npz", named())
    for origin in ([3, 0], [1, 2]):
        found = read_pseudo_labels(file, CLUSTERS, 2, torch.tensor(origin))
        assert torch.equal(found, torch.from_numpy(GOOD[origin]))
    assert torch.equal(read_pseudo_labels(file, CLUSTERS, 4, torch.tensor([5, 6, 9, 7])), torch.from_numpy(GOOD))
    with pytest.raises(UserError, match="has 4 labels, and there must be one for each of the 2 training images"):
        read_pseudo_labels(file, CLUSTERS, 2, torch.tensor([0, 4]))


@pytest.mark.parametrize(
    "value, said",
    [
        (GOOD[:3], "column 0 has 3 labels, and there must be one for each of the 4 training images"),
        (GOOD - 1, r"column 0\[0\] is -1, and it must lie in \[0, 2\)"),
        (GOOD + np.array([0, 1]), r"column 1\[0\] is 3, and it must lie in \[0, 3\)"),
        (GOOD.astype(float), "column 0 is float64 of shape .4,., and pseudo-labels must be integers"),
        (GOOD[:, :1], r"has shape \(4, 1\), and it must be \(N, 2\)"),
        (GOOD[None], r"has shape \(1, 4, 2\)"),
        (np.int64(3), r"has shape \(\)"),
        ({"pseudo_train_2": GOOD[:, 0]}, "has no pseudo_train_3, and pseudo_train_2, pseudo_train_3 are needed"),
        (named(GOOD[:, [0, 0, 1]], (2, 3))["pseudo_train_2"][:, None], r"has shape \(4, 1\)"),
        ({"pseudo_train_2": GOOD[:, 0], "pseudo_train_3": GOOD}, "pseudo_train_3 is int64 of shape .4, 2."),
        ({"pseudo_train_2": GOOD[:, 0] > 0, "pseudo_train_3": GOOD[:, 1]}, "pseudo_train_2 is bool"),
        ({"pseudo_train_2": np.array([None] * 4), "pseudo_train_3": GOOD[:, 1]}, "cannot be read as .npz or .npy data"),
    ],
)
def test_files_with_something_wrong(tmp_path, value, said):
    file = write(tmp_path / ("a.npz" if isinstance(value, dict) else "a.npy"), value)
    with pytest.raises(UserError, match=said) as raised:
        read_pseudo_labels(file, CLUSTERS, 4)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_not_run_but_explained(tmp_path):
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(Harmful(), protocol))
        with pytest.raises(
            UserError, match="is a pickle, which could run any code: where you trust it, write it anew with numpy"
        ):
            read_pseudo_labels(tmp_path / "a.pkl", CLUSTERS, 4)
    # What the sentence says to do is enough.
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(named()))
    with open(tmp_path / "b.pkl", "rb") as file:
        np.savez(tmp_path / "labels.npz", **pickle.load(file))
    assert torch.equal(read_pseudo_labels(tmp_path / "labels.npz", CLUSTERS, 4), torch.from_numpy(GOOD))


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_text("0 1 2")
    cut = write(tmp_path / "cut.npz", named()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(cut[: len(cut) // 2])
    for name in ("empty.npy", "text.npz", "cut.npz", "missing.npy", "."):
        with pytest.raises(UserError, match="cannot be read as .npz or .npy data"):
            read_pseudo_labels(tmp_path / name, CLUSTERS, 4)


# -- k-means ----------------------------------------------------------------------------------------------------------------------


def groups(count=4, each=25, seed=0, dim=6):
    """Features of tight groups in different directions and of any length, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][:count]
    group = torch.arange(count).repeat(each)
    rows = centres[group] + 0.05 * torch.randn(count * each, dim, generator=generator)
    return rows * (0.1 + 5 * torch.rand(len(rows), 1, generator=generator)), group


def same_partition(a, b):
    return torch.equal(a[:, None] == a, b[:, None] == b)


def test_kmeans_finds_the_groups_and_is_the_seeds_alone():
    features, group = groups()
    found = cluster(features, (4, 2), seed=3)
    assert found.dtype == torch.int64 and found.shape == (100, 2)
    assert same_partition(found[:, 0], group) and set(found[:, 1].tolist()) == {0, 1}
    torch.rand(3), np.random.rand(3)
    assert torch.equal(cluster(features, (4, 2), seed=3), found)
    assert not torch.equal(cluster(features, (40, 30), seed=4), cluster(features, (40, 30), seed=5))
    assert torch.equal(cluster(features, (4,), seed=2**40 + 3), cluster(features, (4,), seed=3))


def test_new_clusters_keep_the_numbers_of_those_before():
    features, group = groups()
    for renumbered in ([2, 0, 3, 1], [3, 2, 1, 0]):
        before = torch.tensor(renumbered)[group]
        before[::10] = 0  # some are wrong
        found = cluster(features.roll(1, 1), (4,), seed=0, before=before[:, None])
        assert torch.equal(found[:, 0], torch.tensor(renumbered)[group])
    # A cluster that nothing was in is no obstacle.
    found = cluster(features, (4,), seed=0, before=torch.zeros(100, 1, dtype=torch.int64))
    assert found.min() >= 0 and found.max() <= 3


def test_kmeans_on_what_it_cannot_cluster():
    features, _ = groups()
    with pytest.raises(UserError, match="loss.clusters = 101: must be at most 100, the number of training images"):
        cluster(features, (2, 101), seed=0)
    with pytest.raises(UserError, match="not finite"):
        cluster(features.index_fill(0, torch.tensor([4]), math.nan), (2,), seed=0)
    # As many clusters as images, and images that are all the same: some clusters are empty.
    for rows, count in ((features[:10], 10), (torch.ones(10, 3), 4)):
        found = cluster(rows, (count,), seed=0)
        assert 0 <= found.min() and found.max() < count

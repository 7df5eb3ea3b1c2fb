"""Pseudo-labels: for every training image its cluster in each of several clusterings, from a file or by k-means on features.

AdvCL (Fan et al. 2021) learns them instead of classes: features of another network, clustered into 2, 10, 50, 100 and 500.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.data.files import open_regular, reason, shown
from fastanchor.errors import UserError

# Images that one step of the mini-batch k-means looks at.
BATCH = 4096


def read_pseudo_labels(path: str | Path, clusters: Sequence[int], images: int, origin: Tensor | None = None) -> Tensor:
    """Labels (N, T) int64, column t in [0, clusters[t]), of a file for N = `images` training images, in their order.

    path: .npy, an array of integers (N, T), or of (N,) for one clustering; or .npz with an array of integers (N,) for each, named
    pseudo_train_K for K clusters. Nothing is unpickled. origin: int64 (N,), the number that each image has in its source, before
    validation images were taken out: then a file with labels for all of the source's images, as the authors' is, is good too.
    Raises UserError, one sentence for each thing that may be wrong.
    """
    found = _load(Path(path).expanduser())
    if isinstance(found, Mapping):
        names = [f"pseudo_train_{count}" for count in clusters]
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{shown(path)} has no {missing[0]}, and {', '.join(names)} are needed (loss.clusters)")
        columns = {f"{shown(path)}: {name}": found[name] for name in names}
    else:
        array = found[:, None] if found.ndim == 1 else found
        if array.ndim != 2 or array.shape[1] != len(clusters):
            raise UserError(
                f"{shown(path)} has shape {found.shape}, and it must be (N, {len(clusters)}): a column for each of loss.clusters"
            )
        columns = {f"{shown(path)}: column {t}": array[:, t] for t in range(array.shape[1])}
    pairs = zip(columns.items(), clusters, strict=True)
    labels = [_checked(column, count, images, origin, where) for (where, column), count in pairs]
    return torch.from_numpy(np.stack(labels, axis=1))


def _load(path: Path) -> np.ndarray | Mapping[str, np.ndarray]:
    try:
        with open_regular(path) as file:
            if file.read(1) == b"\x80":  # the first byte of every pickle since protocol 2
                raise UserError(
                    f"{shown(path)} is a pickle, which could run any code: where you trust it, write it anew with "
                    "numpy.savez('labels.npz', **pickle.load(file)), its keys being pseudo_train_2, pseudo_train_10 and so on"
                )
            file.seek(0)
            found = np.load(file, allow_pickle=False)
            return {name: found[name] for name in found} if isinstance(found, Mapping) else found
    except UserError:
        raise
    except Exception as error:  # a damaged zip file or array header can raise anything
        raise UserError(f"{shown(path)} cannot be read as .npz or .npy data: {reason(error)}") from error


def _checked(column: np.ndarray, clusters: int, images: int, origin: Tensor | None, where: str) -> np.ndarray:
    if column.dtype.kind not in "iu" or column.ndim != 1:
        raise UserError(f"{where} is {column.dtype} of shape {column.shape}, and pseudo-labels must be integers of shape (N,)")
    if origin is not None and len(column) > max(images, int(origin.max())):
        column = column[origin.numpy()]
    if len(column) != images:
        raise UserError(f"{where} has {len(column)} labels, and there must be one for each of the {images} training images")
    bad = (column < 0) | (column >= clusters)
    if bad.any():
        index = int(bad.argmax())
        raise UserError(f"{where}[{index}] is {column[index]}, and it must lie in [0, {clusters})")
    return column.astype(np.int64)


def check_clusters(clusters: Sequence[int], images: int) -> None:
    """Raise UserError where there would be more clusters than images."""
    if images < max(clusters):
        raise UserError(f"loss.clusters = {max(clusters)}: must be at most {images}, the number of training images")


def cluster(features: Tensor, clusters: Sequence[int], seed: int, before: Tensor | None = None) -> Tensor:
    """Labels (N, T) int64 on the CPU: features (N, F) of the images, scaled to length 1, by k-means into clusters[t] each.

    seed: with the same one the same labels. before: labels (N, T) of an earlier clustering, whose clusters the new ones grow out
    of: each begins from the mean of its images' features, and keeps its number, so that what was learnt of it stays of use.
    Mini-batch k-means (Sculley 2010) from k-means++ centres. Raises UserError for fewer images than clusters, or NaN.
    """
    from sklearn.cluster import MiniBatchKMeans

    check_clusters(clusters, len(features))
    rows = F.normalize(features.detach().float(), dim=1).cpu()
    if not bool(rows.isfinite().all()):
        raise UserError("the features to be clustered are not finite: the training has diverged")
    columns = []
    for t, count in enumerate(clusters):
        start = "k-means++" if before is None else _means(rows, before[:, t].cpu(), count).numpy()
        means = MiniBatchKMeans(count, init=start, n_init=1, batch_size=BATCH, random_state=seed % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fewer distinct images than clusters leaves some of these empty, which is fine
            columns.append(torch.from_numpy(means.fit_predict(rows.numpy()).astype(np.int64)))
    return torch.stack(columns, dim=1)


def _means(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean row of each of `count` labels, (count, F); 0 for one without rows, which k-means then puts elsewhere."""
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, labels, rows)
    return sums / labels.bincount(minlength=count).clamp(min=1)[:, None]

"""Feed of torch's DataLoader: worker processes decode with Pillow and cut the views out, for where DALI is missing.

Workers draw nothing at random: they are told of every image which box, offset and mirroring its views have.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastanchor.data.decode import BrokenImage, opened, threads, to_rgb
from fastanchor.data.encoded import Encoded
from fastanchor.data.extra import Mixed
from fastanchor.data.files import reason, shown
from fastanchor.data.geometry import Job
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec, StreamFeed
from fastanchor.errors import UserError

# A batch to make, as arrays: torch tensors would go to the workers through shared memory, a file descriptor each.
# Indices (B,) and, for each view, boxes (4, B), offsets (2, B) and mirrored (B,) or None, see `geometry.Place`.
PlainJob = tuple[np.ndarray, list[tuple[np.ndarray | None, ...]]]


class TorchFeed(StreamFeed):
    """Batches made by spec.workers processes (None: one a core, at most 16; 0: by this one), a batch by one worker at a time.

    Workers live from the first epoch until `close` and stay over an epoch that ends early; after `close`, also after an error
    or an interrupt, the next epoch starts new ones. One epoch at a time: RuntimeError for one that is left for the next.
    Views of arrays have the bits that the resident backend gives them, but where a box is resized: Pillow's bilinear rounds to
    8 bits after each of its two axes, so these differ from `simclr.resized_crop` by at most one level of 255.
    """

    backend = "torch"

    def __init__(self, split: Split | Mixed | Encoded, spec: FeedSpec):
        super().__init__(split, spec)
        self._loader: DataLoader | None = None
        self._jobs = _Jobs()
        self._turn = 0  # which epoch the workers work for

    def _make(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, tuple[Tensor, ...]]]:
        waiting: deque[Job] = deque()

        def planned() -> Iterator[PlainJob]:
            for job in jobs:
                waiting.append(job)
                yield _plain(job)

        with self._closing():
            batches = self._start(planned())
        turn = self._turn
        while turn == self._turn:
            with self._closing():
                made = next(batches, None)
                if isinstance(made, str):
                    raise UserError(made)
            if made is None:
                return
            yield waiting.popleft(), tuple(part.to(self.spec.device, non_blocking=True) for part in made)
        raise RuntimeError("a feed gives one epoch at a time, and this one was left for another or closed")

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End the workers if the body fails, by Ctrl-C too: what they send may be half received."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
                raise UserError(
                    f"data.backend = torch: a worker process ended ({reason(error)}); fewer data.workers need less memory, "
                    "and 0 works without any"
                ) from error
            raise

    def _start(self, planned: Iterator[PlainJob]) -> Iterator[list[Tensor] | str]:
        """Set the workers to work on these jobs; they leave what they had begun for an epoch before."""
        if self._loader is not None and not self._alive():
            self.close()
        self._turn += 1
        self._jobs.planned = planned
        if self._loader is None:
            self._loader = self._open()
        return iter(self._loader)

    def _open(self) -> DataLoader:
        workers = threads() if self.spec.workers is None else self.spec.workers
        # Forked, not started anew (the default of Python 3.14 and later on Linux): workers then share the images in memory
        # with this process without a copy, start at once, and need no importable main module. A fork of a process that has
        # used CUDA must not use it, and these only slice arrays and decode with Pillow; batches are pinned and moved here.
        # Elsewhere tensors reach the workers through torch's shared memory, one copy for all of them, and maps by file name.
        forks = "fork" in multiprocessing.get_all_start_methods()
        return DataLoader(
            _Maker(self.split, self.spec.pad),
            batch_size=None,  # a job is a whole batch
            sampler=self._jobs,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context="fork" if workers and forks else None,
            pin_memory=self.spec.device.type == "cuda",
            worker_init_fn=_begin,
            generator=torch.Generator(),  # for the workers' seeds, which would be taken from the global generator
        )

    def _alive(self) -> bool:
        # Without workers there is no iterator to go on with.
        iterator = self._loader._iterator
        return iterator is None or all(worker.is_alive() for worker in iterator._workers)

    def close(self) -> None:
        """End the workers. An epoch that is under way raises RuntimeError when it goes on."""
        loader, self._loader = self._loader, None
        self._turn += 1
        self._jobs.planned = iter(())
        if loader is not None and loader._iterator is not None:
            # What its destructor does; but an epoch that someone holds, or a traceback, would keep it and the workers.
            loader._iterator._shutdown_workers()


class _Jobs(Iterable):
    """A sampler whose jobs change from epoch to epoch under a loader, and its workers, that stay."""

    def __init__(self):
        self.planned: Iterator[PlainJob] = iter(())

    def __iter__(self) -> Iterator[PlainJob]:
        return self.planned


def _begin(worker: int) -> None:
    # Ctrl-C reaches all processes of a terminal. This one decides what follows; workers that end by themselves would leave
    # batches that are announced and cannot be fetched.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _plain(job: Job) -> PlainJob:
    places = [[None if part is None else part.numpy() for part in view.place] for view in job.views]
    return job.indices.numpy(), [tuple(place) for place in places]


class _Maker(Dataset):
    """Makes batches in a worker: what a dataset is to a DataLoader."""

    def __init__(self, split: Split | Mixed | Encoded, pad: int):
        self.split, self.pad = split, pad

    def __getitem__(self, job: PlainJob) -> tuple[Tensor, ...] | str:
        """One tensor a view, uint8 (B, H, W, 3), or what is wrong with a file: an error would arrive as a worker's traceback."""
        indices, views = job
        made = [np.zeros((len(indices), *self.split.image_shape, 3), np.uint8) for _ in views]
        try:
            for row, image in enumerate(self._images(indices)):
                for out, place in zip(made, views, strict=True):
                    box, offset, mirrored = (None if part is None else part[..., row].tolist() for part in place)
                    _put(out[row], image, box, offset, mirrored, self.pad)
        except UserError as error:
            return str(error)
        return tuple(torch.from_numpy(part) for part in made)

    def _images(self, indices: np.ndarray) -> Iterator[np.ndarray | Image.Image]:
        if not isinstance(self.split, Encoded):
            yield from self.split.gather(torch.from_numpy(indices)).numpy()
            return
        for index in indices.tolist():
            try:
                with opened(self.split.read(index)) as image:
                    image = to_rgb(image)
                    size = tuple(self.split.sizes[:, index].tolist())
                    if (image.height, image.width) != size:
                        now, then = f"{image.width}x{image.height}", f"{size[1]}x{size[0]}"
                        raise BrokenImage(f"has {now} pixels and had {then} when the data set was read")
                    image.load()
            except BrokenImage as error:
                raise UserError(f"{shown(self.split.name(index))} {error}; {self.split.hint}") from None
            yield image


def _put(
    out: np.ndarray,
    image: np.ndarray | Image.Image,
    box: list[int] | None,
    offset: list[int] | None,
    mirrored: bool | None,
    pad: int,
) -> None:
    """One view of one image into `out`, uint8 (H, W, 3) of zeros: see `geometry.Place`."""
    height, width = out.shape[:2]
    if box is not None:
        top, left, rows, columns = box
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = image.crop((left, top, left + columns, top + rows))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    target = out[:, ::-1] if mirrored else out
    if offset is None:
        target[:] = pixels
        return
    # How far the crop lies below and to the right of the image; what it has beyond the image stays zero.
    down, right = (at - pad for at in offset)
    size = (max(0, height - abs(down)), max(0, width - abs(right)))
    to, source = (max(0, -down), max(0, -right)), (max(0, down), max(0, right))
    target[to[0] : to[0] + size[0], to[1] : to[1] + size[1]] = pixels[
        source[0] : source[0] + size[0], source[1] : source[1] + size[1]
    ]

"""Batches by NVIDIA DALI, on the CPU or the GPU: one pipeline decodes each image once and cuts one to three views out of it.

Nothing in it is random: boxes, offsets and mirrors come from `geometry.Job`s as inputs of the pipeline, so its batches are those
of the other backends, and an epoch can begin at any of them. DALI itself is imported by the first feed, and only then.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastanchor.data.dali_errors import FAILURES, explained, lacks_memory, let_go
from fastanchor.data.decode import BrokenImage, decode, plain_png, threads
from fastanchor.data.encoded import Encoded
from fastanchor.data.files import reason, shown
from fastanchor.data.geometry import Job
from fastanchor.data.sources import Split
from fastanchor.data.stream import FeedSpec, StreamFeed
from fastanchor.errors import UserError

PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
INSTALL = (
    'pip install "fastanchor[dali]" (CUDA 12: nvidia-dali-cuda120) or "fastanchor[dali-cuda13]" (CUDA 13: nvidia-dali-cuda130)'
)
IN_FLIGHT = 2  # batches that DALI works on while one is in use
READ_AHEAD = 1  # batches whose bytes are read while DALI works on those
READERS = 4  # threads that read: they wait for disks, so their number is not that of the cores
LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255)).tolist()
JPEG_END, PNG_END, TAIL = b"\xff\xd9", b"IEND\xaeB`\x82", 64

# What DALI takes for the images of a batch: uint8 (B, H, W, 3), or the bytes of each image, uint8 (n,).
Source = np.ndarray | list[np.ndarray]


def find_dali() -> tuple[bool, str]:
    """Whether DALI is installed, and its name and version or the sentence that says how to get it; it is not imported."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even a package `nvidia`
        found = False
    if not found:
        return False, f"NVIDIA DALI is not installed: {INSTALL}"
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return True, f"NVIDIA DALI {importlib.metadata.version(package)} ({package})"
    return True, "NVIDIA DALI of unknown version"


def _import_dali() -> ModuleType:
    found, what = find_dali()
    if not found:
        raise UserError(f"data.backend = dali: {what}; the backends resident and torch need no package")
    try:
        from nvidia import dali
        from nvidia.dali import fn, types  # noqa: F401  both are used as attributes
    except Exception as error:  # a wheel for another system, a missing library of CUDA
        raise UserError(
            f"data.backend = dali: {what} is installed but cannot be loaded ({reason(error)}); "
            "the backends resident and torch do without it"
        ) from error
    return dali


class DaliFeed(StreamFeed):
    """A split's batches by DALI. Raises UserError where DALI is missing, or cannot decode as `spec.decoder` says.

    DALI works in spec.workers threads (None: one a core, at most 16; it needs one, and 0 is as 1). An epoch that is under way at
    `close` raises RuntimeError when it goes on, an epoch raises UserError for a file that cannot be decoded or where DALI fails.
    Views are fp32 whatever the precision of the recipe: they are what an attack starts from, and its images are fp32 always.
    A tensor is DALI's own memory; it is good until the next batch is asked for, and for work queued on torch's current stream.
    """

    backend = "dali"

    def __init__(self, split: Split | Encoded, spec: FeedSpec):
        super().__init__(split, spec)
        if spec.decoder == "mixed" and spec.device.type != "cuda":
            raise UserError(f"data.decoder = mixed: it needs a CUDA device, and on {spec.device} must be auto or cpu")
        self._dali = _import_dali()
        self._spare: _Line | None = None
        self._running: dict[_Line, ThreadPoolExecutor] = {}  # of the epochs under way, and what reads for each

    def close(self) -> None:
        """End all threads, also those of epochs under way: they raise RuntimeError when they go on. A later epoch starts anew."""
        # A generator that was left is no help here: a traceback may hold it until long after.
        running, self._running = self._running, {}
        spare, self._spare = self._spare, None
        for line, readers in running.items():
            readers.shutdown(cancel_futures=True)
            line.end()
        if spare is not None:
            spare.end()

    def _make(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, tuple[Tensor, ...]]]:
        # Taken away while in use: two epochs at a time have a pipeline each.
        line, self._spare = self._spare or _Line(self._dali, self.split, self.spec), None
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="fastanchor-read")
        self._running[line] = readers
        usable = False
        try:
            for made in self._through(line, self._read_ahead(jobs, readers)):
                yield made
                if line not in self._running:
                    raise RuntimeError("this epoch's feed was closed")
            usable = True
        except GeneratorExit:  # closed early: what is in the pipeline belongs to nobody
            usable = line in self._running and line.drain()
            raise
        except BaseException as error:
            let_go(error)
            raise
        finally:
            readers.shutdown(cancel_futures=True)
            self._running.pop(line, None)
            if usable and self._spare is None:
                self._spare = line
            else:
                line.end()

    def _through(self, line: _Line, sources: Iterator[tuple[Job, Source]]) -> Iterator[tuple[Job, tuple[Tensor, ...]]]:
        for job, source in sources:
            if not line.fits(job):
                while line.flying:
                    yield line.get()
            line.put(job, source)
            # A step is captured as a graph on its first batch, when nothing else should be at work on the device.
            if len(line.flying) > (IN_FLIGHT if line.proven else 0):
                yield line.get()
        while line.flying:
            yield line.get()

    def _read_ahead(self, jobs: Iterator[Job], readers: ThreadPoolExecutor) -> Iterator[tuple[Job, Source]]:
        waiting: deque[tuple[Job, list[Future]]] = deque()
        for job in jobs:
            if isinstance(self.split, Encoded):
                pieces = [readers.submit(_read, self.split, piece) for piece in job.indices.chunk(READERS)]
            else:
                pieces = [readers.submit(self.split.gather, job.indices)]
            waiting.append((job, pieces))
            if len(waiting) > READ_AHEAD:
                yield self._source(*waiting.popleft())
        while waiting:
            yield self._source(*waiting.popleft())

    def _source(self, job: Job, pieces: list[Future]) -> tuple[Job, Source]:
        if isinstance(self.split, Encoded):
            return job, [image for piece in pieces for image in piece.result()]
        return job, pieces[0].result().contiguous().numpy()


def _read(split: Encoded, indices: Tensor) -> list[np.ndarray]:
    """Bytes that DALI decodes to the pixels that `decode` gives. UserError names a file that is broken."""
    found = []
    for index in indices.tolist():
        with _named(split, index):
            data = split.read(index)
            # Pillow is the judge of a file that does not end as it should: a decoder on a GPU may fill the rest with grey, and
            # of a PNG that lacks its last bytes Pillow has all pixels, where DALI refuses it.
            if split.odd[index] or not _complete(data):
                data = plain_png(data)
        # A view of a mapped shard is copied here, in this thread: the disk is read when its pages are first touched.
        found.append(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.array(data, np.uint8))
    return found


def _complete(data: bytes | memoryview) -> bool:
    """Whether JPEG or PNG bytes end with an end marker, perhaps padded with zeros."""
    return bytes(data[-TAIL:]).rstrip(b"\0").endswith((JPEG_END, PNG_END))


@contextlib.contextmanager
def _named(split: Encoded, index: int) -> Iterator[None]:
    try:
        yield
    except BrokenImage as error:
        raise UserError(f"{shown(split.name(index))} {error}; {split.hint}") from None


class _Line:
    """A pipeline and the batches in it: they go in by `put` and come out by `get`, in that order."""

    def __init__(self, dali: ModuleType, split: Split | Encoded, spec: FeedSpec):
        self.dali, self.split, self.spec = dali, split, spec
        self.cuda = spec.device.type == "cuda"
        self.pipe = None
        self.capacity = 0
        self.proven = False  # whether a batch has come out
        self.flying: deque[tuple[Job, Source]] = deque()
        # Of batches that torch's stream may still read. DALI's memory is used again as soon as nobody refers to it.
        self.latest: tuple[Tensor, ...] = ()
        self.held: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()

    def fits(self, job: Job) -> bool:
        """Whether `put` may be called at once; else all that is in flight has to be taken out first."""
        return self.pipe is None or len(job.indices) <= self.capacity

    def put(self, job: Job, source: Source) -> None:
        """Start a batch. UserError where DALI fails."""
        if len(job.indices):
            try:
                if self.pipe is None or not self.fits(job):
                    self._build(len(job.indices), job)
                self._schedule(job, source)
            except FAILURES as error:
                raise explained(error, job) from error
        self.flying.append((job, source))

    def get(self) -> tuple[Job, tuple[Tensor, ...]]:
        """The oldest batch, fp32 (B, 3, H, W) each view. UserError names files that cannot be decoded, or why DALI fails."""
        self._hold()
        job, _ = self.flying[0]
        if len(job.indices):
            try:
                images = self._take()
            except FAILURES as error:
                images = self._again(error)
        else:  # a rank's share of a last batch that is smaller than the number of ranks; of none DALI makes no tensor
            shape = (0, *self.split.image_shape, 3)
            images = tuple(torch.empty(shape, device=self.spec.device) for _ in job.views)
        self.flying.popleft()
        self.proven = True
        # The order of bytes is NHWC, so this is channels_last without a copy.
        self.latest = tuple(image.permute(0, 3, 1, 2) for image in images)
        return job, self.latest

    def drain(self) -> bool:
        """Let what is in flight finish, for nobody. False where it cannot: the pipeline is then of no more use."""
        try:
            while self.flying:
                job, _ = self.flying.popleft()
                if len(job.indices):
                    self._take()
        except FAILURES:
            return False
        return True

    def end(self) -> None:
        """Give up the pipeline, its threads and its memory."""
        if self.cuda:
            with contextlib.suppress(RuntimeError):  # a device that has failed is told of elsewhere
                torch.cuda.synchronize(self.spec.device)
        self.pipe, self.latest = None, ()
        self.flying.clear()
        self.held.clear()

    def _hold(self) -> None:
        """Keep the batch that was in use until torch's stream is past it, at most two steps behind the host."""
        if not self.cuda or not self.latest:
            return
        used = torch.cuda.Event()
        used.record(torch.cuda.current_stream(self.spec.device))
        self.held.append((used, self.latest))
        if len(self.held) > IN_FLIGHT:
            used, images = self.held.popleft()
            used.synchronize()
            del images

    def _take(self) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(self.spec.device) if self.cuda else None
        outputs = self.pipe.share_outputs(cuda_stream=stream)
        # With exec_dynamic a tensor owns its memory, and nothing is taken back here.
        images = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        self.pipe.release_outputs()
        return images

    def _again(self, error: Exception) -> tuple[Tensor, ...]:
        """The oldest batch once more, with pixels from Pillow, after DALI has failed at it. UserError names what is broken."""
        self.pipe = None  # after an error it is of no more use, and with it all that is in flight
        job, source = self.flying[0]
        # Pixels from Pillow would need the same memory.
        if not isinstance(self.split, Encoded) or lacks_memory(error):
            raise explained(error, job) from error
        broken = [sentence for index in job.indices.tolist() if (sentence := self._broken(index))]
        if broken:
            more = f" (and {len(broken) - 1} more of its batch)" if len(broken) > 1 else ""
            raise UserError(f"{broken[0]}{more}; {self.split.hint}") from error
        self.flying[0] = (job, [np.frombuffer(plain_png(image.tobytes()), np.uint8) for image in source])
        try:
            self._build(self.capacity, job)
            for waiting, source in self.flying:
                if len(waiting.indices):
                    self._schedule(waiting, source)
            return self._take()
        except FAILURES as second:
            raise explained(second, job) from second

    def _broken(self, index: int) -> str:
        """What is wrong with an image, in Pillow's judgement; nothing where it is whole."""
        name = shown(self.split.name(index))
        try:
            height, width = decode(self.split.read(index)).shape[:2]
        except BrokenImage as error:
            return f"{name} {error}"
        listed = tuple(self.split.sizes[:, index].tolist())
        if (height, width) != listed:
            return f"{name} has {width}x{height} pixels, but had {listed[1]}x{listed[0]} when the images were listed"
        return ""

    def _schedule(self, job: Job, source: Source) -> None:
        self.pipe.feed_input("images", source)
        for number, view in enumerate(job.views):
            boxes, offsets, mirrored = view.place
            if boxes is not None:
                self._feed(f"start{number}", boxes[:2].T)
                self._feed(f"shape{number}", boxes[2:].T)
            if offsets is not None:
                self._feed(f"offset{number}", offsets.T - self.spec.pad)
            if mirrored is not None:
                self._feed(f"mirrored{number}", mirrored)
        self.pipe.schedule_run()

    def _feed(self, name: str, values: Tensor) -> None:
        # As an array: for a torch tensor DALI asks for the current CUDA stream, which fails where torch has no CUDA.
        self.pipe.feed_input(name, values.to(torch.int32).contiguous().numpy())

    def _build(self, capacity: int, job: Job) -> None:
        """A pipeline for at most `capacity` images whose views need the operations that this job's need."""
        index = None
        if self.cuda:
            index = torch.cuda.current_device() if self.spec.device.index is None else self.spec.device.index
        workers = threads() if self.spec.workers is None else max(1, self.spec.workers)
        # A depth of 1: with more, DALI's first run is several, which an epoch of one batch has no input for. It is no limit to
        # the number of runs that are started before the first is taken out.
        pipe = self.dali.Pipeline(
            batch_size=capacity, num_threads=workers, device_id=index,
            prefetch_queue_depth=1, exec_dynamic=True,
        )  # fmt: skip
        with pipe:
            pipe.set_outputs(*_views(self.dali, self.split, self.spec, job))
        try:
            pipe.build()
        except FAILURES as error:  # a driver that is older than DALI's CUDA
            if lacks_memory(error):
                raise
            raise UserError(
                f"data.backend = dali: {find_dali()[1]} cannot start on {self.spec.device} ({reason(error)}); "
                "the backends resident and torch do without it"
            ) from error
        self.pipe, self.capacity = pipe, capacity


def _views(dali: ModuleType, split: Split | Encoded, spec: FeedSpec, job: Job) -> list:
    """The graph of a pipeline: fp32 HWC in [0, 1], one a view."""
    fn, types = dali.fn, dali.types
    height, width = split.image_shape
    encoded = isinstance(split, Encoded)

    def given(name: str, number: int, ndim: int = 1):
        return fn.external_source(name=f"{name}{number}", dtype=types.INT32, ndim=ndim)

    def box(number: int) -> dict:
        return {"start": given("start", number), "shape": given("shape", number), "axis_names": "HW"}

    cut = False
    if encoded:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        # The tag that tells how a camera was held is ignored, as `decode` does.
        options = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
        if spec.device.type == "cuda" and spec.decoder != "cpu":
            options |= {"device": "mixed", "jpeg_fancy_upsampling": True}  # as libjpeg makes colours from half as many
        # Of a JPEG file the processor's decoder can leave out much of what lies outside the box, with the same pixels in it.
        cut = options["device"] == "cpu" and len(job.views) == 1 and job.views[0].place.boxes is not None
        images = fn.decoders.image_slice(images, **box(0), **options) if cut else fn.decoders.image(images, **options)
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
    if spec.device.type == "cuda":
        images = images.gpu()
    made = []
    for number, view in enumerate(job.views):
        boxes, offsets, mirrored = view.place
        image, rounded = images, True
        if boxes is not None:
            image = image if cut else fn.slice(image, **box(number))
            # Pillow rounds to whole levels here, and so do the other backends with encoded images; arrays they never round.
            rounded = encoded
            image = fn.resize(
                image, resize_y=height, resize_x=width, mode="stretch", interp_type=types.INTERP_LINEAR, antialias=True,
                dtype=types.UINT8 if rounded else types.FLOAT,
            )  # fmt: skip
        if offsets is not None:
            image = fn.slice(
                image, start=given("offset", number), shape=[height, width], axis_names="HW", out_of_bounds_policy="pad"
            )
        if mirrored is not None:
            image = fn.flip(image, horizontal=given("mirrored", number, ndim=0))
        # x / 255 rounded to nearest, from a table where it can be: the same bits as the other backends' on every device.
        levels = {"keys": list(range(256)), "values": LEVELS, "dtype": types.FLOAT}
        made.append(fn.lookup_table(image, **levels) if rounded else image / 255)
    return made

"""CUDA graphs: a function of tensors is recorded once and then replayed with one launch, without changing any result.

`Captured` records and replays, `Cache` keeps a few recordings by key, `shared_pool` lets recordings share their memory. What
can not be recorded raises `CaptureFailed`, with everything as it was before, so that the caller can go on without a graph.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class CaptureFailed(RuntimeError):
    """The function can not be recorded as a graph; the text is one sentence that names the first cause."""


class Recorder(Protocol):
    """What `Captured` needs of a device; `replay` does again what `record` saw, on the same memory."""

    def warm_up(self, function: Callable[[], Any]) -> None: ...
    def record(self, function: Callable[[], Any]) -> Any: ...
    def replay(self) -> None: ...


class Captured:
    """`function(*inputs)` recorded once; a call copies new inputs into `self.inputs`, replays, and returns `self.result`.

    function: called `warmup` + 1 times here with static tensors like the inputs, never again. All it does on the device is
        recorded with the memory it touches; what it does in Python (counters, numbers, branches, the `.training` flags that
        it reads) stays as it was while recording. It must not read a value back to the host, nor use a shape that depends on
        values. What it updates it must update in place; an optimiser needs its learning rate as a tensor on the device.
    inputs: at least one tensor, all on one device, dense: new inputs must have their shapes, dtypes and device. Their strides
        (memory format) are kept. A caller may also write into `self.inputs` and call with these.
    state: the tensors that the function changes in place (parameters, buffers, optimiser state, averages, sums), or a
        callable that finds them. All hold their old values when this returns. Tensors that only the warm-up made, such as an
        optimiser's momentum, are set to zero, which has to mean "no step yet". Tensors are the same if their memory is.
    generators: those that the function draws from, besides the device's default one. They are where they were when this
        returns; a replay moves them as the function would, and they may be seeded anew between replays.
    warmup: calls on a side stream before recording, at least 1: they make lazy state, choose algorithms, compile kernels.
    pool: see `shared_pool`. None: the graph's memory is its own.

    `self.result` is what the function returned: static tensors which the next replay overwrites; clone what is to be kept.
    `.grad` is the caller's business: the function itself should set it to None before its backward pass. Gradients then live
    in the graph's memory, each replay writes them, and they mean nothing before the first one. No autograd graph of an
    earlier step may be alive (a loss that was kept): its nodes are tied to another stream, which breaks the recording.

    Raises CaptureFailed, with state and generators as they were; ValueError for inputs that do not fit; what the function
    itself raises while it warms up; RuntimeError if it replaces tensors of the state, whose old values are then lost.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        *,
        state: Callable[[], Iterable[Tensor]] | Sequence[Tensor] = (),
        generators: Sequence[torch.Generator] = (),
        warmup: int = 2,
        pool=None,
    ):
        devices = {value.device for value in inputs}
        if len(devices) != 1:
            raise ValueError(f"the inputs are on {len(devices)} devices: there must be an input, and all of them on one device")
        if warmup < 1:
            raise ValueError(f"warmup = {warmup!r}: must be at least 1, or lazily made state would be made anew by every replay")
        (device,) = devices
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            # The cache would hand the recording casts of weights that were made outside, and keep them for code after it.
            raise CaptureFailed("a function can not be captured inside torch.autocast: enter autocast within the function")
        default = _default_generator(device)
        generators = [generator for generator in generators if generator is not default]
        self._recorder = make_recorder(device, generators, pool)
        self._function = function  # what it refers to must live as long as the graph, which knows addresses only
        with torch.no_grad():
            self.inputs = tuple(torch.empty_like(value).copy_(value) for value in inputs)
        with _unchanged(state, [default, *generators]) as check:
            for _ in range(warmup):
                self._recorder.warm_up(lambda: function(*self.inputs))
            check("the warm-up")
            self.result = self._record()
            check("the recording")

    def _record(self) -> Any:
        raised: list[Exception] = []

        def watched():
            try:
                return self._function(*self.inputs)
            except Exception as error:
                raised.append(error)
                raise

        try:
            return self._recorder.record(watched)
        except Exception as error:
            # What ends a broken capture raises once more, without the reason.
            cause = raised[0] if raised else error
            line = next(iter(str(cause).splitlines()), "")
            raise CaptureFailed(f"the function can not be captured as a graph: {type(cause).__name__}: {line}") from cause

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay on these inputs, on the current stream. Returns the static result. Raises ValueError."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(inputs)} inputs: the function was captured with {len(self.inputs)}")
        for position, (static, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (given.shape, given.dtype, given.device) != (static.shape, static.dtype, static.device):
                raise ValueError(f"input {position} is {_kind(given)}: the function was captured with {_kind(static)}")
        with torch.no_grad():
            for static, given in zip(self.inputs, inputs, strict=True):
                static.copy_(given)
        self._recorder.replay()
        return self.result


class Cache:
    """The `size` recordings used last, by key; `get` builds what is missing and drops what was not used for longest."""

    def __init__(self, size: int = 8):
        self.size = size
        self._entries: OrderedDict[Hashable, Captured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, build: Callable[[], Captured]) -> Captured:
        """The recording of this key. The key holds all that the recording froze: shapes, numbers, flags, `pointers`."""
        if key not in self._entries:
            # Room is made first: the dropped recording's memory is free for the new one.
            while len(self._entries) >= self.size:
                self._entries.popitem(last=False)
            self._entries[key] = build()
        self._entries.move_to_end(key)
        return self._entries[key]


def pointers(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Addresses of the tensors' memory. In a key they make a replaced parameter lead to a new recording."""
    return tuple(tensor.data_ptr() for tensor in tensors)


def shared_pool(device: torch.device):
    """A memory pool for `Captured(pool=...)`, one a device; None where the device has no graphs. Ask for it at every capture.

    What one graph needs only while it runs, another graph of the pool uses too. That is sound as long as no two of them run
    at once (replays on one stream do not), and what a replay returns, gradients included, is used up or cloned before another
    graph of the pool replays. Nothing that must last from one replay to the next may have been made while recording.
    """
    if device.type != "cuda":
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device not in _pools:
        handle = torch.cuda.graph_pool_handle()
        # torch refuses a pool whose last graph is gone, so this one graph stays.
        _pools[device] = handle, _trivial_graph(device, handle, ())
    return _pools[device][0]


def make_recorder(device: torch.device, generators: Sequence[torch.Generator], pool) -> Recorder:
    """The recorder for this device. Raises CaptureFailed where there is none."""
    if _factories:
        return _factories[-1](device, generators, pool)
    if device.type != "cuda":
        raise CaptureFailed(f"CUDA graphs need a CUDA device, this is {device}")
    return _CudaRecorder(device, generators, pool)


@contextlib.contextmanager
def use_recorder(factory: Callable[[torch.device, Sequence[torch.Generator], Any], Recorder]) -> Iterator[None]:
    """For tests: inside the context every recorder comes from `factory(device, generators, pool)`."""
    _factories.append(factory)
    try:
        yield
    finally:
        _factories.pop()


class _CudaRecorder:
    def __init__(self, device: torch.device, generators: Sequence[torch.Generator], pool):
        self.device, self.generators = device, generators
        self.stream = _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        self.graph = _new_graph(device, generators)
        # Cycles keep autograd graphs of earlier steps alive, whose nodes are tied to the stream of those steps.
        gc.collect()

    def warm_up(self, function: Callable[[], Any]) -> None:
        # On the stream that records: gradient accumulation and cuBLAS workspaces belong to the stream that first used them
        # (pytorch pull request 64339).
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            current.wait_stream(self.stream)

    def record(self, function: Callable[[], Any]) -> Any:
        # The outer context takes the stream back: torch.cuda.graph leaves it current when ending the capture fails.
        with torch.cuda.stream(self.stream):
            try:
                with _capture(self.graph, self.pool, self.stream):
                    return function()
            except BaseException:
                self._clear_away()
                raise

    def _clear_away(self) -> None:
        """What torch (2.11 to 2.13) leaves behind when a capture breaks: it would fail later captures, or all random numbers."""
        self.graph.reset()
        _broken.append(self.graph)  # the allocators may keep a pointer to it
        _pools.pop(self.device, None)  # the allocator of pinned memory may take the pool to be in use for ever
        with contextlib.suppress(RuntimeError):  # raised where the end of the capture did this already
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        # Generators count as capturing until a capture that they take part in ends well.
        _trivial_graph(self.device, torch.cuda.graph_pool_handle(), self.generators)

    def replay(self) -> None:
        self.graph.replay()


_factories: list[Callable] = []
_pools: dict[torch.device, tuple[Any, torch.cuda.CUDAGraph]] = {}
_broken: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all warm-ups and captures of a device: memory of a pool is shared between captures on one stream only."""
    return torch.cuda.Stream(device)


def _new_graph(device: torch.device, generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    with torch.cuda.device(device):  # registering allocates on the current device
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
    return graph


def _capture(graph: torch.cuda.CUDAGraph, pool, stream: torch.cuda.Stream) -> torch.cuda.graph:
    # "thread_local": what another thread does meanwhile, such as pinning memory for the next batch, does not end the capture.
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def _trivial_graph(device: torch.device, pool, generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    """A graph of one kernel, never replayed."""
    graph, stream = _new_graph(device, generators), _side_stream(device)
    scratch = torch.zeros(1, device=device)
    with torch.cuda.stream(stream), _capture(graph, pool, stream):
        scratch.fill_(1)
    return graph


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextlib.contextmanager
def _unchanged(state, generators: Sequence[torch.Generator]) -> Iterator[Callable[[str], None]]:
    """Gives the state's tensors and the generators back as they were; yields a check that no tensor has been replaced."""
    positions = [(generator, generator.get_state()) for generator in generators]
    with torch.no_grad():
        saved = {place: (tensor, tensor.clone()) for place, tensor in _by_place(state).items()}
    known = {place: tensor for place, (tensor, _) in saved.items()}  # holds the tensors, so that no address is used again

    def check(during: str) -> None:
        found = _by_place(state)
        if gone := len(known.keys() - found.keys()):
            raise RuntimeError(f"{during} replaced {gone} of the state's tensors: the function must update them in place")
        if during == "the recording" and (new := len(found) - len(known)):
            raise RuntimeError(f"the recording made {new} new tensors of the state: every replay would make them anew")
        known.update(found)

    try:
        yield check
    finally:  # once is enough: recording runs nothing
        with torch.no_grad():
            for place, tensor in _by_place(state).items():
                if place not in saved:
                    tensor.zero_()
            for tensor, value in saved.values():
                tensor.copy_(value)
        for generator, position in positions:
            generator.set_state(position)


def _by_place(state) -> dict[tuple, Tensor]:
    """The state's tensors by where and how they lie in memory, since state_dict() and the like make new objects each time."""
    tensors = state() if callable(state) else state
    return {(t.data_ptr(), t.dtype, t.shape, t.stride()): t.detach() for t in tensors if t.numel()}


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"

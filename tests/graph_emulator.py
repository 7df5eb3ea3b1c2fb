"""A CUDA graph's behaviour on a CPU: what a function does is recorded below autograd and done again, on the same memory.

As in a capture, recording changes nothing that was there before, what it makes holds no meaning before the first replay,
Python numbers stay as they were, and whatever needs a value on the host, or a generator that was not registered, is refused.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
# Operators without a tag that tells: lift_fresh is torch.tensor(numbers), on a GPU a copy that waits for the device.
REFUSED = {"aten::lift_fresh", "aten::set_", "aten::resize_", "aten::resize_as_", "aten::_pin_memory", "aten::bincount"}
READING_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
READING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__, torch.Tensor.pin_memory}


class Emulator:
    """A recorder for `fastanchor.graphs.use_recorder`."""

    def __init__(self, device, generators, pool):
        assert device.type == "cpu" and pool is None
        self.generators = [torch.default_generator, *generators]
        self.calls = None

    def warm_up(self, function):
        function()

    def record(self, function):
        states = [generator.get_state() for generator in self.generators]
        tape = _Tape(self.generators)
        try:
            with _NoHostReads(), tape:
                result = function()
        except RuntimeError as error:  # ending a broken capture raises again, without the reason
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            tape.undo()
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
        self.calls = tape.calls
        return result

    @torch.no_grad()
    def replay(self):
        with torch.autocast("cpu", enabled=False):  # casts were recorded as operators
            for function, args, kwargs, results in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                for position, recorded in results:
                    recorded.copy_(again[position])


class _NoHostReads(TorchFunctionMode):
    """Refuses the reads that, for a tensor on a CPU, are no operators."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READING_METHODS:
            raise RuntimeError(f"operation not permitted when stream is capturing: Tensor.{function.__name__}")
        return function(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    def __init__(self, generators):
        super().__init__()
        self.generators = generators
        self.calls = []  # (operator, args, kwargs, [(position, tensor made)])
        self.made, self.kept = {}, {}  # by address: tensors made here; storages from outside with a copy of their content

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "profiler":  # marks on the host
            return function(*args, **kwargs)
        self._refuse(function, args, kwargs)
        given = {_address(t) for t in _tensors((args, kwargs))}
        # Schemas do not tell all that is written (batch norm's running statistics), so everything used is kept.
        for tensor in _tensors((args, kwargs)):
            if _address(tensor) not in self.made | self.kept:
                self.kept[_address(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        # Aliases: the memory of this moment, whatever becomes of the object, and no hold on it that autograd could notice.
        frozen_args, frozen_kwargs = tree_map(_alias, (args, kwargs))
        results = function(*args, **kwargs)
        fresh = []
        for position, result in enumerate(tree_leaves(results)):
            if isinstance(result, Tensor) and _address(result) not in given:
                fresh.append((position, _alias(result)))
                self.made[_address(result)] = fresh[-1][1]
        is_view = not fresh and not function._schema.is_mutable
        if not is_view and function._schema.name not in EMPTY:
            self.calls.append((function, frozen_args, frozen_kwargs, fresh))
        return results

    def _refuse(self, function, args, kwargs):
        name, leaves = function._schema.name, tree_leaves((args, kwargs))
        reads = name in REFUSED or READING_TAGS & set(function.tags)
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            # With integers as indices the shape is known.
            reads = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        devices = {x.device if isinstance(x, Tensor) else x for x in leaves if isinstance(x, Tensor | torch.device)}
        if reads or devices - {torch.device("cpu")}:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for leaf in leaves:
            # An operator sees a new object for the same generator.
            if isinstance(leaf, torch.Generator) and leaf._cdata not in {known._cdata for known in self.generators}:
                raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")

    def undo(self):
        """A capture does not run anything: old memory is as it was, new memory holds nothing of use."""
        for storage, content in self.kept.values():
            storage.copy_(content)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _alias(value):
    return value.detach() if isinstance(value, Tensor) else value


def _address(tensor):
    return tensor.untyped_storage().data_ptr()

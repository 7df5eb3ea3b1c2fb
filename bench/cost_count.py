"""FLOPs and bytes of every operator of a training step, by running the engine's own operators on tensors without storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastanchor.attacks import PGD, objectives
from fastanchor.attacks.engine import ascend_once
from fastanchor.attacks.modes import attack_mode
from fastanchor.config import Config
from fastanchor.data import views as augmentation
from fastanchor.errors import UserError
from fastanchor.methods import Method, Outputs, Runner, build_method
from fastanchor.models import build_model
from fastanchor.models.folded import FoldedTwin
from fastanchor.ops import images as operators
from fastanchor.reference import attacks as reference
from fastanchor.train.optim import WeightAverage, build_optimizer

# Nothing is moved: memory is only handed out, or looked at in another shape.
_NO_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# What these write into, or take the shape of, they do not read.
_OVERWRITE = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_", "_foreach_copy_", "_foreach_zero_"}
_LIKE = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}


class Counter(TorchDispatchMode):
    """Lists (part, FLOPs, bytes) of every operator dispatched, in `operations`, under the part named by `within`.

    FLOPs: torch's formulas for convolutions and matrix products, and the contrastive kernels' 6 N M D (2 forward, 4 backward).
    Bytes: every tensor read once and every tensor written once an operator, views nothing, expanded dimensions once. Three know
    better: a convolution's backward reads what its wanted gradients need, each in a kernel of its own; a BatchNorm that takes the
    batch's statistics passes over its input twice, and backward over both of its inputs; with gpu, a convolution's bias is a pass
    of its own over the output, as in torch's cuDNN path.
    """

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu, self.operations = gpu, []
        self._name: Callable[[bool, bool], str] = lambda product, backward: "other"

    @contextmanager
    def within(self, name: str | Callable[[bool, bool], str]) -> Iterator[None]:
        """Count operators for part `name`, or for name(is a product, is in a backward pass)."""
        before, self._name = self._name, name if callable(name) else lambda product, backward: name
        try:
            yield
        finally:
            self._name = before

    def add(self, flops: int, moved: int) -> None:
        """One operator more."""
        backward = torch._C._current_autograd_node() is not None
        self.operations.append((self._name(flops > 0, backward), flops, moved))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        flops, moved = _flops(function, args, kwargs, result), _traffic(function, args, kwargs, result)
        if flops or moved:
            self.add(flops, moved)
        if self.gpu and function._overloadpacket is torch.ops.aten.convolution and args[2] is not None:
            self.add(0, 2 * _size(result))
        return result


def _flops(function, args, kwargs, result) -> int:
    if function._overloadpacket is torch.ops.fastanchor.hard_supcon:
        rows, keys = args[0], args[0] if args[1] is None else args[1]
        products = 6 if any(args[-2:]) else 2
        return products * len(rows) * len(keys) * rows.shape[1]
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _traffic(function, args, kwargs, result) -> int:
    name = function._schema.name.split("::")[1]
    if name in _NO_TRAFFIC:
        return 0
    if name == "convolution_backward":
        to_output, inputs, weight, mask = args[0], args[1], args[2], args[10]
        reads = sum(mask) * _size(to_output) + mask[0] * _size(weight) + mask[1] * _size(inputs)
        return reads + sum(map(_size, _tensors(result)))
    inputs = _tensors((args, kwargs))
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    written = sum(_size(tensor) for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages)
    read = changed = 0
    for i, argument in enumerate(function._schema.arguments):
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        size = sum(map(_size, _tensors(given)))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += size if writes else 0
        unread = (writes and (argument.kwarg_only or name in _OVERWRITE)) or name in _LIKE
        read += 0 if unread else size
    if not written and not changed:
        return 0  # a view
    return read + changed + written + _more_passes(name, args)


def _more_passes(name: str, args) -> int:
    """Bytes that an operator moves beyond reading each of its tensors once."""
    if name == "native_batch_norm" and args[5]:
        return _size(args[0])
    if name == "native_batch_norm_backward" and args[7]:
        return _size(args[0]) + _size(args[1])
    return 0


def _tensors(values) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of its elements, those along a dimension of stride 0 once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and length else length
    return count * tensor.element_size()


def count_step(
    config: Config, *, model: str = "resnet18", width: int | None = None, pixels: int = 32, classes: int = 10, batch: int = 128,
    gpu: bool = True,
) -> list[tuple[str, int, int]]:  # fmt: skip
    """(part, FLOPs, bytes) of every operator of one training step of `config`, the attack's as often as it has steps.

    model, width: as in `build_model` (None: the model's own). gpu: as a GPU runs the step, with the kernels in use (by their
    compulsory traffic) and cuDNN's biases; else as a CPU does, in plain torch. Raises UserError for what `build_model` refuses.
    """
    engine = dataclasses.replace(config.engine, kernels="on" if gpu else "off")
    config = dataclasses.replace(config, engine=engine)
    method = build_method(config)
    with torch.random.fork_rng([]):
        network = build_model(model, num_classes=classes, width=width, mean=(0.5,) * 3, std=(0.25,) * 3)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    # With storage till here: tensors without it can neither be copied deeply nor change their layout in place.
    average = WeightAverage(network, config.optim.ema_decay) if config.optim.ema_decay else None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for made_of in (network, *([] if average is None else [average.model])):
            _drop_storage(made_of, mode)
        optimizer = build_optimizer(method.trainable(network), config.optim)
        store = torch.empty(batch, pixels, pixels, 3, dtype=torch.uint8)
        index = labels = torch.empty(batch, dtype=torch.int64)
        generator, progress = torch.Generator(), torch.zeros(())
        counter = Counter(gpu)
        method.train_mode(network)
        with counter:
            made = {}
            with counter.within("augmentation"):
                rows = augmentation.Rows(store, index)
                if "clean" in method.views:
                    made["clean"] = augmentation.to_float(rows.gather())
                kind, pad = config.data.augment, config.data.pad
                made["aug"] = augmentation.augment(rows, kind, generator, pad=pad, fused=gpu and kind in augmentation.CROPS)
                if not config.channels_last:
                    made = {name: view.contiguous() for name, view in made.items()}
            for name, adversary in method.adversaries(network, progress).items():
                images = made[method.made_from[name]]
                made[name] = _attack(counter, config, adversary.attack, adversary.model, images, labels)
            _train(counter, config, method, network, {name: made[name] for name in method.views}, labels, progress)
            with counter.within("update: optimiser, average"):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                if config.optim.clip_grad_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_grad_norm, norm)
                optimizer.step()
                if average is not None:
                    average.update(network)
    return counter.operations


def _drop_storage(model: nn.Module, mode: FakeTensorMode) -> None:
    """Swap every parameter and buffer for one of the same layout without storage."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))


def _autocast(config: Config):
    return torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")


def _attack(counter: Counter, config: Config, attack: PGD, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The adversarial images; two steps are run, and the second counted for all further ones."""

    def name(product: bool, backward: bool) -> str:
        return f"attack: {'input-gradient' if backward else 'forward'} products" if product else "attack: elementwise"

    if objectives.uses_clean(attack.objective) or attack.norm != "linf":
        raise UserError("the cost model knows linf attacks on objectives of the attacked images alone")
    with attack_mode(model, attack.bn):
        network = FoldedTwin(model) if attack.bn == "eval" else model
        if network is not model:
            with counter.within("folding of BatchNorm"):
                _fold(counter, network, torch.bfloat16 if attack.precision == "bf16" else None)
        fused = attack.engine.fused(attack.kernels, "eager", objectives.head_of(attack.objective), attack.norm, images.device)
        with counter.within(name), _autocast(config):
            start = attack.start_delta(images, None).contiguous(memory_format=torch.channels_last)
            x_adv = reference.project(images + start, images, attack.eps, attack.norm)
            bounds = operators.linf_bounds(images, attack.eps) if fused.norm is None else None
            arguments = labels, images, bounds, attack.eps, attack.step_size, fused
            x_adv = ascend_once(network, attack.objective, (), x_adv, *arguments)
            if attack.steps > 1:
                # Not the first one's operators: autocast casts weights that it finds cast from then on.
                before = len(counter.operations)
                x_adv = ascend_once(network, attack.objective, (), x_adv, *arguments)
                counter.operations.extend(counter.operations[before:] * (attack.steps - 2))
    return x_adv if config.channels_last else x_adv.contiguous()


def _fold(counter: Counter, twin: FoldedTwin, dtype: torch.dtype | None) -> None:
    """Allocate the twin and fold its weights; where a kernel does it, it reads and writes every one once."""
    before = len(counter.operations)
    twin.allocate(dtype, "aten")
    if counter.gpu:
        del counter.operations[before:]
        counter.add(0, sum(_size(layer.sources[0].weight) + _size(layer.weight) for layer in twin.layers))


def _train(
    counter: Counter, config: Config, method: Method, model: nn.Module, views: dict[str, Tensor], labels: Tensor, progress: Tensor
) -> None:  # fmt: skip
    """Forward over all views, losses, backward; the losses' gradient apart from the network's."""

    def name(product: bool, backward: bool) -> str:
        kind = "gradient" if backward else "forward"
        return f"training: {kind} products" if product else "training: normalisation, elementwise"

    run = Runner(config, method, model, {}, {}, torch.device("cpu"))
    with counter.within(name):
        out = run.forward(views)
    leaves = Outputs(*({key: x.detach().requires_grad_() for key, x in of.items()} for of in (out.logits, out.embeddings)))
    with counter.within("losses"):
        torch.stack(list(method.loss(leaves, labels, progress).values())).sum().backward()
    ends = zip(
        [*out.logits.values(), *out.embeddings.values()], [*leaves.logits.values(), *leaves.embeddings.values()], strict=True
    )
    used = [(end, leaf.grad) for end, leaf in ends if leaf.grad is not None]
    with counter.within(name):
        torch.autograd.backward(*map(list, zip(*used, strict=True)))
    with counter.within("metrics"), torch.no_grad():
        method.diagnostics(out, labels, progress)
        for logits in out.logits.values():
            (logits.argmax(1) == labels).float().mean()

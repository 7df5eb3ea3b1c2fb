"""Operators on images and logits: the attack's step, its start noise and logit gradients, and the training augmentation.

torch.library operators: on CUDA the kernels of `fastanchor.kernels`, on a CPU the same in plain torch. None of them has a
derivative. `decide` says whether one is to be used on a device: not before it has agreed there with plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastanchor.errors import UserError
from fastanchor.kernels import usable
from fastanchor.ops.library import LIBRARY
from fastanchor.ops.verified import switch, verified
from fastanchor.reference import attacks, noise, objectives
from fastanchor.reference import images as reference_images
from fastanchor.reference.checks import check_name

MODES = ("auto", "on", "off")
NORMS = ("linf", "l2")
HEADS = ("ce", "cw", "dlr", "mart_bce")
NOISES = ("uniform", "gaussian")
# What the heads' kernels take.
MIN_CLASSES, MAX_CLASSES = 2, 4096

LIBRARY.define("pgd_step(Tensor x_adv, Tensor gradient, Tensor images, float eps, float step_size, str norm) -> Tensor")
LIBRARY.define("augment(Tensor images_u8, Tensor? index, Tensor offsets, Tensor? mirrored, int pad) -> Tensor")
LIBRARY.define("label_head(Tensor logits, Tensor labels, str kind) -> (Tensor, Tensor)")
LIBRARY.define("kl_head(Tensor logits, Tensor clean_logits, bool to_clean) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("start_noise(Tensor images, Tensor seed, float eps, str kind, str norm) -> Tensor")


def decide(name: str, mode: str, device: torch.device) -> tuple[bool, str]:
    """Whether the operator `name`, out of CHECKS, is to be used on this device, and why (not).

    mode: "off": no. "auto": where its kernel runs and has agreed with plain torch. "on": as auto, but a UserError where it is
    not so, and on a CPU the plain implementation. The first question on a device compiles the kernel and checks it; ask before a
    graph is captured, then the answer is known.
    """
    switch()  # a bad one is said wherever it is set, not only where kernels could run
    if mode == "off":
        return False, "kernels = off"
    if mode == "on" and device.type == "cpu":
        return True, "as plain torch on a CPU"
    good, reason = usable(device)
    if good:
        good, reason = verified(name, CHECKS[name], device)
    if mode == "on" and not good:
        raise UserError(f"kernels = on: {name}: {reason}")
    return good, reason


# -- the attack's step ----------------------------------------------------------------------------------------------------------


def pgd_step(x_adv: Tensor, gradient: Tensor, images: Tensor, *, eps: float, step_size: float, norm: str = "linf") -> Tensor:
    """One step of ascent from x_adv along the gradient (its sign, or of length 1 an image), projected on the ball and [0, 1].

    x_adv, images fp32 (N, C, H, W), gradient fp32 or bf16, in any layout -> new memory like x_adv, contiguous or channels_last as
    x_adv is (contiguous where it is neither). linf is `linf_step` to the bit, l2 the reference's `project(ascend(...))` to
    rounding. New memory rather than in place: x_adv may still be held by an objective, and a graph's pool reuses it anyway.
    """
    check_name("norm", norm, NORMS)
    return torch.ops.fastanchor.pgd_step(x_adv, gradient, images, eps, step_size, norm)


def linf_bounds(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Ball and box as one interval a pixel."""
    return (images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1)


def linf_step(x_adv: Tensor, gradient: Tensor, bounds: tuple[Tensor, Tensor], step_size: float) -> Tensor:
    """The signed step in plain torch, within `linf_bounds`."""
    return torch.clamp(x_adv.add(gradient.sign(), alpha=step_size), *bounds)


def _format(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _in_format(first: Tensor, *others: Tensor) -> list[Tensor]:
    """All in the first one's format; as a rule they are, and nothing is copied."""
    return [x.contiguous(memory_format=_format(first)) for x in (first, *others)]


@torch.library.impl(LIBRARY, "pgd_step", "CPU")
def _pgd_step_plain(x_adv, gradient, images, eps, step_size, norm):
    x_adv, gradient, images = _in_format(x_adv, gradient, images)
    gradient = gradient.to(x_adv.dtype)
    if norm == "linf":
        return linf_step(x_adv, gradient, linf_bounds(images, eps), step_size)
    return attacks.project(attacks.ascend(x_adv, gradient, step_size, "l2"), images, eps, "l2")


@torch.library.impl(LIBRARY, "pgd_step", "CUDA")
def _pgd_step_kernel(x_adv, gradient, images, eps, step_size, norm):
    from fastanchor.kernels import pgd  # Triton need not be installed where there is no CUDA device

    return pgd.pgd_step(*_in_format(x_adv, gradient, images), eps, step_size, norm)


@torch.library.register_fake("fastanchor::pgd_step", lib=LIBRARY)
def _pgd_step_fake(x_adv, gradient, images, eps, step_size, norm):
    return torch.empty_like(x_adv, memory_format=_format(x_adv))


# -- the training augmentation --------------------------------------------------------------------------------------------------


def augment(images_u8: Tensor, offsets: Tensor, mirrored: Tensor | None, *, index: Tensor | None = None, pad: int = 4) -> Tensor:
    """Gather, pad with zeros, crop, mirror and scale to [0, 1]: `apply_crop_flip` and `to_float` of the reference, to the bit.

    images_u8 uint8 (M, H, W, C), contiguous; index int64 (B,): which of them (None: all); offsets int64 (2, B) in [0, 2 * pad],
    rows then columns; mirrored bool (B,) or None -> fp32 (B, C, H, W), channels_last. On CUDA no value is looked at: an index out
    of range reads beyond the images.
    """
    return torch.ops.fastanchor.augment(images_u8, index, offsets, mirrored, pad)


@torch.library.impl(LIBRARY, "augment", "CPU")
def _augment_plain(images_u8, index, offsets, mirrored, pad):
    images_u8 = images_u8 if index is None else images_u8.index_select(0, index)
    return reference_images.to_float(reference_images.apply_crop_flip(images_u8, offsets, mirrored, pad=pad))


@torch.library.impl(LIBRARY, "augment", "CUDA")
def _augment_kernel(images_u8, index, offsets, mirrored, pad):
    from fastanchor.kernels import augment as kernels

    index, mirrored = (None if given is None else given.contiguous() for given in (index, mirrored))
    return kernels.augment(images_u8, offsets.contiguous(), mirrored, pad=pad, index=index)


@torch.library.register_fake("fastanchor::augment", lib=LIBRARY)
def _augment_fake(images_u8, index, offsets, mirrored, pad):
    _, height, width, channels = images_u8.shape
    shape = (offsets.shape[1], channels, height, width)
    return torch.empty(shape, dtype=torch.float32, device=images_u8.device, memory_format=torch.channels_last)


# -- losses on logits with their gradient ---------------------------------------------------------------------------------------


def label_head(logits: Tensor, labels: Tensor, kind: str = "ce") -> tuple[Tensor, Tensor]:
    """A loss of every image and the gradient of their sum with respect to the logits.

    kind: "ce"; "cw", the margin; "dlr" (Croce & Hein 2020), for 3 classes or more; "mart_bce" (Wang et al. 2020); formulas in
    `kernels/heads.py`. logits fp32 or bf16 (N, K), MIN_CLASSES to MAX_CLASSES of them; labels int64 (N,) in [0, K), on CUDA not
    checked -> values fp32 (N,), gradient of the logits' dtype (N, K), contiguous. The ce gradient of the true class is minus
    the sum of the others', which is more than rounding where the model is sure of itself.
    """
    check_name("kind", kind, HEADS)
    return torch.ops.fastanchor.label_head(logits, labels, kind)


def kl_head(logits: Tensor, clean_logits: Tensor, *, to_clean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """KL(softmax(clean) || softmax(logits)) of every image; the gradients of their sum for logits and for clean logits.

    logits, clean_logits of one dtype, fp32 or bf16, (N, K) -> values fp32 (N,), two gradients of that dtype (N, K); the second is
    empty (0,) unless asked for by to_clean.
    """
    return torch.ops.fastanchor.kl_head(logits, clean_logits, to_clean)


def heads_take(logits: Tensor) -> bool:
    """Whether the heads are made for such logits."""
    return logits.ndim == 2 and MIN_CLASSES <= logits.shape[1] <= MAX_CLASSES


@torch.library.impl(LIBRARY, "label_head", "CPU")
def _label_head_plain(logits, labels, kind):
    z = logits.contiguous().double()
    true = torch.zeros_like(z, dtype=torch.bool).scatter_(1, labels[:, None], True)
    others = z.masked_fill(true, -torch.inf)
    highest = ((others == others.amax(1, keepdim=True)) & ~true).double()
    share = highest / highest.sum(1, keepdim=True)  # of a tie, as amax shares its gradient
    if kind == "cw":
        value, gradient = objectives.cw_margin(z, labels), share - true.double()
    elif kind == "dlr":
        value, gradient = _dlr(z, labels, true)
    else:
        p = z.softmax(1)
        value = objectives.cross_entropy(z, labels)
        gradient = torch.where(true, -p.masked_fill(true, 0).sum(1, keepdim=True), p)
        if kind == "mart_bce":
            wrong = p.masked_fill(true, 0).amax(1)
            value = value - (1.0001 - wrong).log()
            gradient = gradient + (wrong / (1.0001 - wrong))[:, None] * (share - p)
    return _rounded(value, logits), gradient.to(logits.dtype)


def _dlr(z, labels, true):
    order = z.argsort(dim=1, descending=True, stable=True)
    first, second, third = (torch.zeros_like(true).scatter_(1, order[:, i : i + 1], True) for i in range(3))
    other = torch.where((first & true).any(1, keepdim=True), second, first)
    top, low, reached, own = (torch.where(mask, z, 0).sum(1, keepdim=True) for mask in (first, third, other, true))
    scale = 1 / (top - low + 1e-12)
    value = (reached - own) * scale
    gradient = (other.double() - true.double()) * scale - value * scale * (first.double() - third.double())
    return value[:, 0], gradient


@torch.library.impl(LIBRARY, "label_head", "CUDA")
def _label_head_kernel(logits, labels, kind):
    from fastanchor.kernels import heads

    return heads.label_head(kind, logits.contiguous(), labels.contiguous())


@torch.library.register_fake("fastanchor::label_head", lib=LIBRARY)
def _label_head_fake(logits, labels, kind):
    return _rounded(logits.new_empty(len(logits), dtype=torch.float64), logits), logits.new_empty(logits.shape)


@torch.library.impl(LIBRARY, "kl_head", "CPU")
def _kl_head_plain(logits, clean_logits, to_clean):
    p, q = (x.contiguous().double().log_softmax(1) for x in (logits, clean_logits))
    value = (q.exp() * (q - p)).sum(1)
    gradient = (p.exp() - q.exp()).to(logits.dtype)
    clean_gradient = (q.exp() * (q - p - value[:, None])).to(logits.dtype) if to_clean else logits.new_empty(0)
    return _rounded(value, logits), gradient, clean_gradient


@torch.library.impl(LIBRARY, "kl_head", "CUDA")
def _kl_head_kernel(logits, clean_logits, to_clean):
    from fastanchor.kernels import heads

    logits, clean_logits = logits.contiguous(), clean_logits.contiguous()
    clean_gradient = torch.empty_like(logits) if to_clean else None
    value, gradient = heads.kl_head(logits, clean_logits, clean_gradient=clean_gradient)
    return value, gradient, clean_gradient if to_clean else logits.new_empty(0)


@torch.library.register_fake("fastanchor::kl_head", lib=LIBRARY)
def _kl_head_fake(logits, clean_logits, to_clean):
    gradient = logits.new_empty(logits.shape)
    value = _rounded(logits.new_empty(len(logits), dtype=torch.float64), logits)
    return value, gradient, torch.empty_like(gradient) if to_clean else logits.new_empty(0)


def _rounded(value: Tensor, logits: Tensor) -> Tensor:
    return value if logits.dtype == torch.float64 else value.float()


# -- start noise ----------------------------------------------------------------------------------------------------------------


def start_noise(images: Tensor, seed: Tensor, *, eps: float, kind: str = "uniform", norm: str = "linf") -> Tensor:
    """Where an attack may start: images + noise drawn by Philox from a seed on the device, projected on the ball and [0, 1].

    images fp32 (N, C, H, W), contiguous or channels_last; seed int64, one element: add to it between calls. kind: "uniform" in
    the ball | "gaussian" 0.001 * N(0, 1). Every number is a function of the seed and of the logical place, as `kernels/noise.py`
    says. PGD does not use it: its noise is that of torch's generator, the same by every backend.
    """
    check_name("kind", kind, NOISES)
    check_name("norm", norm, NORMS)
    return torch.ops.fastanchor.start_noise(images, seed, eps, kind, norm)


@torch.library.impl(LIBRARY, "start_noise", "CPU")
def _start_noise_plain(images, seed, eps, kind, norm):
    return noise.start_noise(images, seed, eps, kind, norm)


@torch.library.impl(LIBRARY, "start_noise", "CUDA")
def _start_noise_kernel(images, seed, eps, kind, norm):
    from fastanchor.kernels import noise as kernels

    return kernels.start_noise(images, eps, seed, kind, norm)


@torch.library.register_fake("fastanchor::start_noise", lib=LIBRARY)
def _start_noise_fake(images, seed, eps, kind, norm):
    return torch.empty_like(images)


# -- checks on a device: operators against plain torch on a CPU -----------------------------------------------------------------


def _agree(operator, plain, arguments: tuple, device: torch.device, **tolerance: float) -> None:
    """Raise AssertionError unless the operator on the device gives what `plain` gives for the same arguments on a CPU."""
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    found, expected = operator(*moved), plain(*arguments)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for ours, truth in pairs:
        torch.testing.assert_close(ours.cpu(), truth, equal_nan=True, **tolerance)


def _batches():
    """Images of ragged and of aligned size, contiguous and channels_last, and the generator for more of the same."""
    for shape in ((3, 3, 33, 35), (4, 3, 32, 32)):
        generator = torch.Generator().manual_seed(0)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            yield torch.rand(shape, generator=generator).contiguous(memory_format=memory_format), generator


def _check_step(norm: str, device: torch.device) -> None:
    eps, step_size, tolerance = (8 / 255, 2 / 255, 0.0) if norm == "linf" else (0.5, 0.125, 1e-6)
    for images, generator in _batches():
        x_adv, gradient = (torch.empty_like(images).uniform_(-1, 1, generator=generator) for _ in range(2))
        x_adv = (images + 1.2 * eps * x_adv).clamp_(0, 1)
        gradient *= gradient.abs() > 0.1
        gradient[1, 0, 0, 0], x_adv[2, 0, 0, 0], images[2, 1, 1, 1] = (float("nan"),) * 3
        arguments = (x_adv, gradient, images, eps, step_size, norm)
        _agree(torch.ops.fastanchor.pgd_step, _pgd_step_plain, arguments, device, rtol=0, atol=tolerance)


def _check_augment(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((17, 13), (32, 32)):
        store = torch.arange(7 * height * width * 3).remainder(256).to(torch.uint8).view(7, height, width, 3)
        index = torch.randint(7, (5,), generator=generator)
        for chosen in (index, None):
            offsets = torch.randint(9, (2, 7 if chosen is None else 5), generator=generator)
            for mirrored in (torch.rand(offsets.shape[1], generator=generator) < 0.5, None):
                arguments = (store, chosen, offsets, mirrored, 4)
                _agree(torch.ops.fastanchor.augment, _augment_plain, arguments, device, rtol=0, atol=0)


def _some_logits():
    """Logits fp32 and bf16 of few and many classes, some rows sure of themselves, with labels and other logits."""
    for classes in (10, 100):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(70, classes, generator=generator) * torch.linspace(0.1, 12, 70)[:, None]
        labels = torch.randint(classes, (70,), generator=generator)
        labels[::3] = logits.argmax(1)[::3]
        clean = logits + torch.randn(logits.shape, generator=generator)
        for dtype, tolerance in ((torch.float32, {"rtol": 1e-4, "atol": 3e-6}), (torch.bfloat16, {"rtol": 2e-2, "atol": 1e-4})):
            yield logits.to(dtype), labels, clean.to(dtype), tolerance


def _check_label_head(kind: str, device: torch.device) -> None:
    for logits, labels, _, tolerance in _some_logits():
        _agree(torch.ops.fastanchor.label_head, _label_head_plain, (logits, labels, kind), device, **tolerance)


def _check_kl_head(device: torch.device) -> None:
    for logits, _, clean, tolerance in _some_logits():
        for to_clean in (True, False):
            _agree(torch.ops.fastanchor.kl_head, _kl_head_plain, (logits, clean, to_clean), device, **tolerance)


def _check_start_noise(device: torch.device) -> None:
    for images, _ in _batches():
        for kind in NOISES:
            for norm in NORMS:
                arguments = (images, torch.tensor([2**40 + 5]), 0.5, kind, norm)
                _agree(torch.ops.fastanchor.start_noise, _start_noise_plain, arguments, device, rtol=0, atol=2e-5)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    **{f"pgd_step_{norm}": functools.partial(_check_step, norm) for norm in NORMS},
    "augment": _check_augment,
    **{f"label_head_{kind}": functools.partial(_check_label_head, kind) for kind in HEADS},
    "kl_head": _check_kl_head,
    "start_noise": _check_start_noise,
}

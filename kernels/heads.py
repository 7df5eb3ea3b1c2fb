"""Losses on logits with their gradients, one launch each: cross-entropy, TRADES' KL, the CW margin, DLR, MART's boosted CE.

`fastanchor/reference/objectives.py` is the truth for the first three. A row's logits are read once and never leave the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_dtype, on_device

KINDS = ("ce", "cw", "dlr", "mart_bce")
# Elements a program: whole rows, as many as fit, so that 10 classes do not make one program of 16 threads' work.
ELEMENTS, WARPS = 1024, 4
MAX_CLASSES = 4096


def label_head(kind: str, logits: Tensor, labels: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The value of every image and the gradient of their sum with respect to the logits.

    p = softmax(z), o = max over k != y:
    ce        -log p_y                                         gradient p - e_y
    cw        z_o - z_y                                        e_o - e_y
    dlr       -(z_y - z_o) / (z_1st - z_3rd + 1e-12)           (Croce & Hein 2020) the largest and third largest logit; K >= 3
    mart_bce  -log p_y - log(1.0001 - p_o)                     (Wang et al. 2020, the boosted cross-entropy)

    logits: fp32 or bf16 (N, K), contiguous, K from 2 to 4096; labels: int64 (N,) in [0, K), which is not checked: the row of
    another label is meaningless. Returns value fp32 (N,) and gradient (N, K) of the logits' dtype (`gradient`: where it goes; may
    be logits). Where o is tied, cw and mart_bce share its gradient evenly, as torch.amax does; dlr takes the first. The ce
    gradient of the true class is minus the sum of the others', not p_y - 1, which cancels where the model is sure of itself.
    One launch, fp32 inside; 4 bytes read and 4 written an element, about 10 FLOPs and one exp. A NaN among a row's logits makes
    its value NaN. Raises ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(KINDS)}")
    least = 3 if kind == "dlr" else 2
    gradient = _check(logits, gradient, least)
    check_dtype("labels", labels, torch.int64)
    count, classes = logits.shape
    if labels.shape != (count,) or not labels.is_contiguous():
        raise ValueError(f"labels have shape {tuple(labels.shape)}: must be ({count},), contiguous")
    value = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count == 0:
        return value, gradient
    width, rows = _tile(classes)
    with on_device(_label_kernel, logits=logits, labels=labels, gradient=gradient):
        _label_kernel[(triton.cdiv(count, rows),)](
            logits, labels, value, gradient, count, classes,
            CE=kind in ("ce", "mart_bce"), MARGIN=kind == "cw", DLR=kind == "dlr", BOOSTED=kind == "mart_bce",
            WIDTH=width, ROWS=rows, num_warps=WARPS,
        )  # fmt: skip
    return value, gradient


def kl_head(
    logits: Tensor, clean_logits: Tensor, gradient: Tensor | None = None, clean_gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL(q || p) of every image, q = softmax(clean), p = softmax(logits), and the gradient of the sum: p - q.

    logits, clean_logits: fp32 or bf16 (N, K), contiguous, of one dtype. clean_gradient: where the gradient with respect to the
    clean logits goes, q * (log q - log p - KL); None: not computed (attacks hold the clean prediction fixed, TRADES' loss not).
    Returns value fp32 (N,) and gradient (N, K) of the logits' dtype. One launch; 8 bytes read and 4 written an element, two exp.
    Raises ValueError.
    """
    gradient = _check(logits, gradient, 1)
    count, classes = logits.shape
    for name, tensor in (("clean_logits", clean_logits), ("clean_gradient", clean_gradient)):
        if tensor is None:
            continue
        check_dtype(name, tensor, logits.dtype)
        if tensor.shape != logits.shape or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {tuple(logits.shape)}, contiguous")
    value = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count == 0:
        return value, gradient
    width, rows = _tile(classes)
    with on_device(_kl_kernel, logits=logits, clean_logits=clean_logits, gradient=gradient, clean_gradient=clean_gradient):
        _kl_kernel[(triton.cdiv(count, rows),)](
            logits, clean_logits, value, gradient, gradient if clean_gradient is None else clean_gradient, count, classes,
            TO_CLEAN=clean_gradient is not None, WIDTH=width, ROWS=rows, num_warps=WARPS,
        )  # fmt: skip
    return value, gradient


def _check(logits: Tensor, gradient: Tensor | None, least: int) -> Tensor:
    check_dtype("logits", logits, torch.float32, torch.bfloat16)
    if logits.ndim != 2 or not logits.is_contiguous():
        raise ValueError(f"logits have shape {tuple(logits.shape)}: must be (N, K), contiguous")
    if not least <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes: must be {least} to {MAX_CLASSES}")
    gradient = torch.empty_like(logits) if gradient is None else gradient
    check_dtype("gradient", gradient, logits.dtype)
    if gradient.shape != logits.shape or not gradient.is_contiguous():
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}: must be {tuple(logits.shape)}, contiguous")
    return gradient


def _tile(classes: int) -> tuple[int, int]:
    """Padded classes and rows a program."""
    width = triton.next_power_of_2(classes)
    return width, max(1, ELEMENTS // width)


@triton.jit
def _label_kernel(
    logits_ptr, labels_ptr, value_ptr, gradient_ptr,
    count, classes,
    CE: tl.constexpr, MARGIN: tl.constexpr, DLR: tl.constexpr,  # one of them
    BOOSTED: tl.constexpr,  # with CE: MART's second term
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    real = row < count
    inside = real[:, None] & (column < classes)
    at = row.to(tl.int64)[:, None] * classes + column
    # Rows past the end are rows of zeros: finite, and not stored.
    z = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    lost = tl.max(((z != z) & inside).to(tl.int32), axis=1) > 0
    z = tl.where(column < classes, z, float("-inf"))
    label = tl.load(labels_ptr + row, mask=real, other=0).to(tl.int32)
    true = column == label[:, None]
    others = tl.where(true, float("-inf"), z)
    z_true = tl.sum(tl.where(true, z, 0.0), axis=1)
    z_other = tl.max(others, axis=1)
    if CE:
        top = tl.maximum(z_other, z_true)
        e = tl.exp(z - top[:, None])
        e_others = tl.where(true, 0.0, e)
        rest = tl.sum(e_others, axis=1)
        total = rest + tl.exp(z_true - top)
        p = e / total[:, None]
        p_rest = rest / total
        value = (top - z_true) + tl.log(total)
        gradient = tl.where(true, -p_rest[:, None], p)
    if BOOSTED:
        highest = (others == z_other[:, None]) & (column < classes) & ~true
        ties = tl.sum(highest.to(tl.float32), axis=1)
        p_other = tl.exp(z_other - top) / total
        # 1 - p_o as the sum of the others: near p_o = 1 the difference would be lost, and is divided by.
        p_below = tl.sum(tl.where(highest, 0.0, p), axis=1) + (ties - 1) * p_other
        room = 0.0001 + p_below
        value -= tl.log(room)
        # d p_o / d z_k = p_o (share_k - p_k)
        alone = highest & (ties == 1)[:, None]
        share = tl.where(highest, 1.0 / ties[:, None], 0.0)
        gradient += (p_other / room)[:, None] * tl.where(alone, p_below[:, None], share - p)
    if MARGIN:
        value = z_other - z_true
        highest = ((others == z_other[:, None]) & (column < classes) & ~true).to(tl.float32)
        gradient = highest / tl.sum(highest, axis=1)[:, None] - true.to(tl.float32)
    if DLR:
        first = tl.max(z, axis=1)
        at_first = tl.min(tl.where(z == first[:, None], column, WIDTH), axis=1)
        rest1 = tl.where(column == at_first[:, None], float("-inf"), z)
        second = tl.max(rest1, axis=1)
        at_second = tl.min(tl.where(rest1 == second[:, None], column, WIDTH), axis=1)
        rest2 = tl.where(column == at_second[:, None], float("-inf"), rest1)
        third = tl.max(rest2, axis=1)
        at_third = tl.min(tl.where(rest2 == third[:, None], column, WIDTH), axis=1)
        right = at_first == label
        other = tl.where(right, second, first)
        at_other = tl.where(right, at_second, at_first)
        scale = 1.0 / (first - third + 1e-12)
        value = (other - z_true) * scale
        gradient = ((column == at_other[:, None]).to(tl.float32) - true.to(tl.float32)) * scale[:, None]
        spread = (column == at_first[:, None]).to(tl.float32) - (column == at_third[:, None]).to(tl.float32)
        gradient -= (value * scale)[:, None] * spread
    tl.store(value_ptr + row, tl.where(lost, float("nan"), value), mask=real)
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kl_kernel(
    logits_ptr, clean_ptr, value_ptr, gradient_ptr, clean_gradient_ptr,
    count, classes,
    TO_CLEAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    real = row < count
    inside = real[:, None] & (column < classes)
    at = row.to(tl.int64)[:, None] * classes + column
    # Zeros past the end, in rows and classes: finite logarithms, masked out of the sums.
    z = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    clean = tl.load(clean_ptr + at, mask=inside, other=0.0).to(tl.float32)
    known = column < classes
    z = z - tl.max(tl.where(known, z, float("-inf")), axis=1)[:, None]
    clean = clean - tl.max(tl.where(known, clean, float("-inf")), axis=1)[:, None]
    e, e_clean = tl.where(known, tl.exp(z), 0.0), tl.where(known, tl.exp(clean), 0.0)
    total, total_clean = tl.sum(e, axis=1), tl.sum(e_clean, axis=1)
    p, q = e / total[:, None], e_clean / total_clean[:, None]
    ratio = (clean - z) - (tl.log(total_clean) - tl.log(total))[:, None]  # log q - log p
    value = tl.sum(tl.where(known, q * ratio, 0.0), axis=1)
    tl.store(value_ptr + row, value, mask=real)
    tl.store(gradient_ptr + at, (p - q).to(gradient_ptr.dtype.element_ty), mask=inside)
    if TO_CLEAN:
        to_clean = q * (ratio - value[:, None])
        tl.store(clean_gradient_ptr + at, to_clean.to(gradient_ptr.dtype.element_ty), mask=inside)

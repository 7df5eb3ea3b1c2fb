"""GPU run, the small kernels: attack step, start noise, augmentation, logit losses, BatchNorm fold; right first, then how fast.

All of them move bytes: `share_of_copy` is the rate of the bytes that they must move beside that of a copy, measured in this run.
Device time alone, with a cold cache: see `cold`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases, cold
from bench.gpu_common import Bench
from bench.timing import interleaved, summary
from fastanchor.attacks.engine import own_code
from fastanchor.ceilings import copy_bandwidth
from fastanchor.data import views
from fastanchor.ops import images as ops
from fastanchor.reference import attacks, objectives

PART = "small"
ROUNDS, FILL = 5, 0.01
COMPILE_SECONDS = 8.0
EPS, STEP, L2_EPS, L2_STEP = cases.EPS, cases.STEP_SIZE, 0.5, 0.125


class Case(NamedTuple):
    """One kernel and the ways around it; all take what `inputs(seed)` gives, on the device.

    truth: its first tensors, on the CPU, from the same inputs on the CPU; tolerance: of the largest difference, in units of the
    truth's largest value. moved: bytes a call. compiled: what torch.compile is given (None: plain).
    """

    what: str
    inputs: Callable[[int], tuple]
    kernel: Callable[..., Tensor | tuple]
    plain: Callable[..., object]
    truth: Callable[..., Tensor | tuple]
    tolerance: float
    moved: int
    compiled: Callable[..., object] | None = None


def run(bench: Bench) -> None:
    """All kernels against the truth; then the time of each beside eager, and last beside torch.compile."""
    no_kernels = bench.no_kernels()
    if no_kernels is not None:
        bench.results.add(PART, "kernel", left_out=no_kernels)
    made = list(_cases(bench))
    for case in made if no_kernels is None else ():
        with bench.results.entry(PART, "against the truth", what=case.what):
            check(bench, case)
    for case in made:
        forms = {"eager": case.plain} | ({"kernel": case.kernel} if no_kernels is None else {})
        _measure(bench, case, forms)
    for case in made:
        reason = bench.no_compile(COMPILE_SECONDS)
        if reason is not None:
            bench.results.add(PART, "compiled", what=case.what, left_out=reason)
            continue
        torch._dynamo.reset()
        compiled = torch.compile(own_code(case.compiled or case.plain), fullgraph=True, dynamic=False)
        _measure(bench, case, {"eager": case.plain, "compiled": compiled})


def check(bench: Bench, case: Case) -> None:
    """A row: the largest difference from the truth, in units of the truth's largest value."""
    inputs = case.inputs(0)
    expected = _first_tensors(case.truth(*(x.cpu() if isinstance(x, Tensor) else x for x in inputs)))
    found = _first_tensors(case.kernel(*inputs))
    worst = max(_distance(a.cpu(), b) for a, b in zip(found, expected, strict=False))
    bench.results.add(PART, "against the truth", what=case.what, largest_difference=worst, ok=worst <= case.tolerance)


def _distance(found: Tensor, expected: Tensor) -> float:
    largest = expected.double().abs().max()
    return ((found.double() - expected.double()).abs().max() / torch.where(largest > 0, largest, 1.0)).item()


def _first_tensors(value: Tensor | tuple) -> tuple:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _measure(bench: Bench, case: Case, forms: dict[str, Callable[..., object]]) -> None:
    with bench.results.entry(PART, "inputs", what=case.what):
        sets = [case.inputs(seed) for seed in range(cold.sets_needed(case.moved, bench.device))]
        calls = {}
        with torch.no_grad():
            for name, function in forms.items():
                with bench.results.entry(PART, name, what=case.what):
                    call = cold.sweep(function, sets)
                    calls[name] = cold.replayed(call, bench.device) if bench.cuda else call
            times = interleaved(calls, bench.device, rounds=2 if bench.quick else ROUNDS, fill=0.0 if bench.quick else FILL)
        base = [seconds / len(sets) for seconds in times.get("eager", [])] or None
        for name, found in times.items():
            row = summary([seconds / len(sets) for seconds in found], base)
            rate = case.moved / row["ms"] * 1e3
            row["gb_per_s"] = rate / 1e9
            if bench.cuda:
                row["share_of_copy"] = rate / copy_bandwidth(bench.device)
            bench.results.add(PART, name, what=case.what, sets=len(sets), **row)
    bench.tidy()


# --- the kernels ---------------------------------------------------------------------------------------------------------------


def _cases(bench: Bench) -> Iterator[Case]:
    for batch in (4,) if bench.quick else (1024, 128):
        yield from _image_cases(bench, batch)
    for batch, classes in ((6, 10),) if bench.quick else ((1024, 10), (1024, 1000)):
        yield from _logit_cases(bench, batch, classes)
    yield _fold_case(bench)


def _random(bench: Bench, seed: int) -> Callable[..., Tensor]:
    """Normal or uniform tensors on the device; images channels_last."""
    generator = torch.Generator(bench.device).manual_seed(seed)

    def random(*shape: int, uniform: bool = False) -> Tensor:
        draw = torch.rand if uniform else torch.randn
        made = draw(shape, generator=generator, device=bench.device)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    return random


def _image_cases(bench: Bench, batch: int) -> Iterator[Case]:
    shape = (batch, 3, bench.pixels, bench.pixels)
    elements = batch * 3 * bench.pixels**2

    def step_inputs(seed: int) -> tuple:
        random = _random(bench, seed)
        images = random(*shape, uniform=True)
        lower, upper = ops.linf_bounds(images, EPS)
        x_adv = torch.clamp(images + EPS * (2 * random(*shape, uniform=True) - 1), lower, upper)
        return x_adv, random(*shape), images, lower, upper

    def linf(x_adv, gradient, images, lower, upper):
        from fastanchor.kernels import pgd

        return pgd.pgd_step(x_adv, gradient, images, EPS, STEP)

    def l2(x_adv, gradient, images, lower, upper):
        from fastanchor.kernels import pgd

        return pgd.pgd_step(x_adv, gradient, images, L2_EPS, L2_STEP, "l2")

    def plain_linf(x_adv, gradient, images, lower, upper):
        return ops.linf_step(x_adv, gradient, (lower, upper), STEP)

    yield Case(f"pgd_step linf {batch}", step_inputs, linf, plain_linf, plain_linf, 2e-7, 16 * elements)

    def plain_l2(x_adv, gradient, images, *_):
        return attacks.project(attacks.ascend(x_adv, gradient, L2_STEP, "l2"), images, L2_EPS, "l2")

    yield Case(f"pgd_step l2 {batch}", step_inputs, l2, plain_l2, plain_l2, 1e-6, 28 * elements)

    def noise_inputs(seed: int) -> tuple:
        return _random(bench, seed)(*shape, uniform=True), torch.tensor([seed], device=bench.device)

    def noise(images, seed):
        from fastanchor.kernels import noise

        return noise.start_noise(images, EPS, seed)

    yield Case(
        f"start_noise linf {batch}", noise_inputs, noise,
        lambda images, seed: (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp_(0, 1),
        lambda images, seed: torch.ops.fastanchor.start_noise(images, seed, EPS, "uniform", "linf"), 2e-7, 8 * elements,
        lambda images, seed: (images + (torch.rand_like(images) * (2 * EPS) - EPS)).clamp(0, 1),
    )  # fmt: skip

    stored = 4 * batch if bench.quick else 50_000
    store, _ = cases.make_batch(stored, bench.pixels, bench.device)

    def augment_inputs(seed: int) -> tuple:
        generator = torch.Generator(bench.device).manual_seed(seed)
        index = torch.randint(stored, (batch,), generator=generator, device=bench.device)
        return store, index, *views.draw_crop_flip(batch, generator)

    def augment(images, index, offsets, mirrored):
        from fastanchor.kernels import augment

        return augment.augment(images, offsets, mirrored, index=index)

    def plain_augment(images, index, offsets, mirrored):
        return views.to_float(views.apply_crop_flip(images.index_select(0, index), offsets, mirrored))

    yield Case(f"augment {batch}", augment_inputs, augment, plain_augment, plain_augment, 0.0, 5 * elements)


def _logit_cases(bench: Bench, batch: int, classes: int) -> Iterator[Case]:
    elements = batch * classes

    def inputs(seed: int) -> tuple:
        random = _random(bench, seed)
        labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(bench.device)
        return 3 * random(batch, classes), labels, 3 * random(batch, classes)

    def by_autograd(objective: Callable[..., Tensor]) -> Callable[..., tuple]:
        def plain(logits, labels, clean):
            with torch.enable_grad():
                z = logits.detach().requires_grad_()
                value = objective(z, labels, clean)
                (gradient,) = torch.autograd.grad(value.sum(), z)
            return value.detach(), gradient

        return plain

    def ce(logits, labels, clean):
        from fastanchor.kernels import heads

        return heads.label_head("ce", logits, labels)

    def kl(logits, labels, clean):
        from fastanchor.kernels import heads

        return heads.kl_head(logits, clean)

    def compiled_ce(logits, labels, clean):
        value = F.cross_entropy(logits, labels, reduction="none")
        return value, logits.softmax(1) - (labels[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()

    def compiled_kl(logits, labels, clean):
        p, q = logits.log_softmax(1), clean.log_softmax(1)
        return (q.exp() * (q - p)).sum(1), p.exp() - q.exp()

    size = f"{batch} x {classes}"
    yield Case(
        f"label_head ce {size}", inputs, ce, by_autograd(lambda z, labels, clean: objectives.cross_entropy(z, labels)),
        lambda z, labels, clean: torch.ops.fastanchor.label_head(z, labels, "ce"), 3e-6, 8 * elements, compiled_ce,
    )  # fmt: skip
    yield Case(
        f"kl_head {size}", inputs, kl, by_autograd(objectives.kl_divergence),
        lambda z, labels, clean: torch.ops.fastanchor.kl_head(z, clean, False)[:2], 3e-6, 12 * elements, compiled_kl,
    )  # fmt: skip


# Output channels, input channels and pixels a side of the convolutions of a ResNet-18.
CONVOLUTIONS = [(64, 3, 3)] + 4 * [(64, 64, 3)]
for _width in (128, 256, 512):
    CONVOLUTIONS += [(_width, _width // 2, 3), (_width, _width // 2, 1)] + 3 * [(_width, _width, 3)]


def _fold_case(bench: Bench) -> Case:
    shapes = CONVOLUTIONS[:2] if bench.quick else CONVOLUTIONS

    def inputs(seed: int) -> tuple:
        """Flat: weight, mean, var, gamma, beta, out_weight, out_bias of every layer; what is kept is not made anew by a call."""
        random, flat = _random(bench, seed), []
        for channels, inner, side in shapes:
            weight, vectors = random(channels, inner, side, side), [random(channels) for _ in range(4)]
            vectors[1] = vectors[1].abs() + 0.1
            out = torch.empty_like(weight, dtype=torch.bfloat16), torch.empty(channels, dtype=torch.bfloat16, device=bench.device)
            flat += [weight, *vectors, *out]
        return tuple(flat)

    tables: dict[int, object] = {}

    def kernel(*flat):
        from fastanchor.kernels import bn_fold

        if flat[0].data_ptr() not in tables:
            layers = [flat[i : i + 7] for i in range(0, len(flat), 7)]
            folds = [
                bn_fold.Fold(w, out, None, bias, mean, var, gamma, beta, 1e-5) for w, mean, var, gamma, beta, out, bias in layers
            ]
            tables[flat[0].data_ptr()] = bn_fold.FoldTable(folds)
        bn_fold.bn_fold(tables[flat[0].data_ptr()])
        return _outputs(flat)

    def plain(*flat):
        for i in range(0, len(flat), 7):
            weight, mean, var, gamma, beta, out_weight, out_bias = flat[i : i + 7]
            scale = gamma * torch.rsqrt(var + 1e-5)
            out_weight.copy_(weight * scale.view(-1, 1, 1, 1))
            out_bias.copy_(beta - mean * scale)
        return _outputs(flat)

    def truth(*flat):
        double = [x.double() for x in flat]
        return plain(*double)

    moved = 6 * sum(channels * inner * side**2 for channels, inner, side in shapes)
    # bf16 keeps 8 bits: half a unit of the last one.
    return Case("bn_fold ResNet-18", inputs, kernel, plain, truth, 2**-8, moved)


def _outputs(flat: tuple | list) -> tuple[Tensor, ...]:
    return tuple(flat[i] for start in range(0, len(flat), 7) for i in (start + 5, start + 6))

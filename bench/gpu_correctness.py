"""GPU run, correctness: graphed beside eager beside reference, the captured iteration beside the eager one, cuDNN beside ATen."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bench import cases
from bench.gpu_common import NEEDS_CUDA, Bench
from fastanchor.attacks import PGD
from fastanchor.data import sources, views
from fastanchor.models.folded import fold
from fastanchor.precision import full_precision
from fastanchor.train.optim import set_learning_rate

PART = "correctness"
DIFFERS = 1e-5
# Points of robust accuracy between a backend and the reference.
ALLOWED_POINTS = 0.2
RADII = [radius / 255 for radius in (1, 2, 4, 8, 16, 32, 64)]


def run(bench: Bench) -> None:
    """All of it, the whole iteration first: what trains must be right."""
    for method, hsc in cases.METHODS.items():
        for precision in ("fp32", "bf16"):
            with full_precision(), bench.results.entry(PART, "captured iteration", method=method, precision=precision):
                _iteration(bench, method, hsc, precision)
    with full_precision():
        images, labels = _images(bench)
        model = _trained(bench, images, labels)
        images, labels = images[: _checked(bench)], labels[: _checked(bench)]
        eps = _telling_radius(bench, model, images, labels)
        for precision in ("fp32", "bf16"):
            with bench.results.entry(PART, "cudnn convolutions", precision=precision):
                _convolutions(bench, model, images[:64], precision)
        for precision in ("fp32", "bf16"):
            for bn in ("eval", "train", "train_frozen"):
                for objective in ("ce", "kl"):
                    _attack(bench, model, images, labels, eps, {"bn": bn, "objective": objective, "precision": precision})
                    bench.tidy()


def _checked(bench: Bench) -> int:
    return 32 if bench.quick else 1000


def _images(bench: Bench) -> tuple[Tensor, Tensor]:
    """Training images of the data set, uint8, on the device."""
    found = sources.load(bench.data, limit=_checked(bench) if bench.quick else None).train
    return found.images.to(bench.device), found.labels.to(bench.device)


def _trained(bench: Bench, images_u8: Tensor, labels: Tensor) -> nn.Module:
    """A model that knows something, so that a robust accuracy can change."""
    model = cases.make_model(bench.width, bench.device)
    step = cases.make_step(cases.make_config(0.0, 2, backend="reference", eps=4 / 255), model, bench.device)
    set_learning_rate(step.optimizer, 0.05)
    batch = 16 if bench.quick else 128
    for i in range(4 if bench.quick else 80):
        chosen = torch.arange(i * batch, (i + 1) * batch, device=bench.device) % len(labels)
        step(images_u8[chosen], labels[chosen], progress=1.0)
    return model.eval()


def _telling_radius(bench: Bench, model: nn.Module, images_u8: Tensor, labels: Tensor) -> float:
    """The eps at which about half of the images withstand the reference attack: there a difference shows best."""
    scores = {}
    for eps in RADII:
        attack = PGD(eps, eps / 4, bench.steps, backend="reference")
        scores[eps] = _robust(model, _by_batches(bench, attack, model, images_u8, labels), labels)
    chosen = min(RADII, key=lambda eps: abs(scores[eps] - 50))
    clean = _robust(model, views.to_float(images_u8), labels)
    bench.results.add(
        PART, "model judged", data=bench.data, images=len(labels), eps=chosen, clean_percent=clean, robust_percent=scores[chosen]
    )
    return chosen


def _robust(model: nn.Module, x_adv: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        verdicts = [model(part).argmax(1) for part in x_adv.split(500)]
    return 100 * (torch.cat(verdicts) == labels).double().mean().item()


def _by_batches(bench: Bench, attack: PGD, model: nn.Module, images_u8: Tensor, labels: Tensor) -> Tensor:
    """x_adv of all images in two batches, so that a captured attack is also replayed on images it was not captured with."""
    generator = torch.Generator(bench.device).manual_seed(7)
    half = -(-len(labels) // 2)
    parts = zip(views.to_float(images_u8).split(half), labels.split(half), strict=True)
    return torch.cat([attack(model, images, targets, generator=generator) for images, targets in parts])


def _attack(bench: Bench, judge: nn.Module, images_u8: Tensor, labels: Tensor, eps: float, kind: dict[str, str]) -> None:
    """Reference, eager and graphed from the same generator; each on a model of its own, since bn = train moves buffers."""
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for backend in ("reference", "eager", "graphed"):
        with bench.results.entry(PART, backend, **kind):
            if backend == "graphed" and not bench.cuda:
                bench.results.add(PART, backend, **kind, left_out=NEEDS_CUDA)
                continue
            model = copy.deepcopy(judge)
            # At the clean images TRADES' objective has no gradient: its attack starts from Gaussian noise.
            start = "gaussian" if kind["objective"] == "kl" else "uniform"
            attack = PGD(eps, eps / 4, bench.steps, start=start, backend=backend, **kind)
            x_adv = _by_batches(bench, attack, model, images_u8, labels)
            found[backend] = x_adv, [buffer.clone() for buffer in model.buffers() if buffer.is_floating_point()]
            row = {"robust_percent": _robust(judge, x_adv, labels)}
            if backend != "reference" and "reference" in found:
                row |= _compare(found[backend], found["reference"])
                row["points"] = row["robust_percent"] - _robust(judge, found["reference"][0], labels)
                row["ok"] = abs(row["points"]) <= ALLOWED_POINTS + 1e-9
            if backend == "graphed" and "eager" in found:
                row |= {f"{key}_from_eager": value for key, value in _compare(found[backend], found["eager"]).items()}
            bench.results.add(PART, backend, **kind, **row)


def _compare(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    distance = (ours[0] - theirs[0]).abs()
    buffers = [((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(ours[1], theirs[1], strict=True)]
    return {
        "differing_percent": 100 * (distance > DIFFERS).double().mean().item(),
        "largest_difference": distance.max().item(),
        "buffers_relative": max(buffers),
    }


def _iteration(bench: Bench, method: str, hsc: float, precision: str) -> None:
    """Weights after five steps of one batch each, eager, eager again (what the device itself leaves to chance), captured."""
    ends: dict[str, dict[str, list[Tensor]]] = {}
    for name, graph in (("eager", "off"), ("eager again", "off"), ("captured", "on")):
        if graph == "on" and not bench.cuda:
            bench.results.add(PART, "captured iteration", method=method, precision=precision, left_out=NEEDS_CUDA)
            continue
        config = cases.make_config(hsc, bench.steps, precision=precision, graph=graph, ema_decay=0.9)
        model = cases.make_model(bench.width, bench.device)
        step = cases.make_step(config, model, bench.device)
        for i in range(5):
            set_learning_rate(step.optimizer, 0.02 / (i + 1))
            step(*cases.make_batch(8 if bench.quick else 128, bench.pixels, bench.device, seed=i), progress=i / 5)
        step.check_finite(1)
        ends[name] = {
            "weights": [parameter.detach().clone() for parameter in model.parameters()],
            "buffers": [buffer.clone() for buffer in model.buffers()],
            "average": [parameter.clone() for parameter in step.average.model.parameters()],
        }
        bench.tidy()
    start = [parameter.detach() for parameter in cases.make_model(bench.width, bench.device).parameters()]
    for name in list(ends)[1:]:
        found = {f"{kind}_largest_difference": _largest(end, ends["eager"][kind]) for kind, end in ends[name].items()}
        bench.results.add(
            PART, "captured iteration" if name == "captured" else "eager iteration again", method=method, precision=precision,
            **found, moved=_largest(ends["eager"]["weights"], start),
        )  # fmt: skip


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def _convolutions(bench: Bench, model: nn.Module, images_u8: Tensor, precision: str) -> None:
    """Logits and input gradient of the twin on cuDNN's fused convolutions, each beside the unfolded fp32 model's."""
    if not bench.cuda:
        bench.results.add(PART, "cudnn convolutions", precision=precision, left_out=NEEDS_CUDA)
        return
    images = views.to_float(images_u8)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    expected = _outputs(model, images)
    for backend in ("aten", "cudnn"):
        found = _outputs(fold(model, images[:2], dtype, backend), images)
        logits, gradient = (((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
        bench.results.add(
            PART, f"{backend} convolutions", precision=precision, logits_relative=logits, gradient_relative=gradient
        )


def _outputs(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    logits = network(x).float()
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 0].sum(), (x,))
    return logits.detach(), gradient

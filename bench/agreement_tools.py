"""What bench.agreement holds beside each other: for each repository its own function, called as it calls it, and ours.

Nothing of theirs is here: functions are taken out of the clone, and of scripts that train at their top level the statements of
the step. Both sides get the same network (narrow, in fp64 where only logits or embeddings are compared), images and labels.
Images keep away from 0 and 1 by a little: some of the originals start outside of [0, 1], where ours does not.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.clones import PeerFailed, Session
from fastanchor.config import Config
from fastanchor.methods import Method, Outputs, build_method
from fastanchor.settings import from_dict, load_recipe
from fastanchor.train.run import model_from_config

BATCH, PIXELS, CLASSES, STEPS = 12, 16, 10, 3
# Largest difference, relative; of an attack the share of pixels that differ by more than NEAR, since where a gradient is nearly 0
# its sign is rounding's.
FP64, PIXELS_APART, NEAR = 1e-9, 2e-3, 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison. loss, gradient: relative differences; pixels: share that differs; known: a difference in the definition
    that is meant, with its reason."""

    what: str
    size: str
    precision: str
    tolerance: float
    loss: float | None = None
    gradient: float | None = None
    pixels: float | None = None
    known: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A repository. commit: what this was written for; files: those it is recognised by; checks: (session) -> Checks."""

    commit: str
    files: tuple[str, ...]
    checks: tuple[Callable[[Session], Iterator[Check]], ...]


# -- tensors and weights -----------------------------------------------------------------------------------------------------


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images in [0.05, 0.95] and labels, from torch's generator."""
    images = 0.05 + 0.9 * torch.rand(BATCH, 3, PIXELS, PIXELS, dtype=torch.float64)
    return images.to(dtype), torch.randint(CLASSES, (BATCH,))


def configured(recipe: str, **changes: Any) -> Config:
    """A recipe at the size of this comparison; changes: groups of settings."""
    small = {"model": {"width": 4}, "engine": {"kernels": "off"}}
    sizes = {"head_hidden": 16, "head_dim": 8}
    base = from_dict({**small, "attack": {"backend": "reference"}}, "bench.agreement", load_recipe(recipe))
    return from_dict({"model": sizes, **changes}, "bench.agreement", base)


def network(config: Config, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The recipe's network, untrained, in train mode; its running statistics are those of a few batches."""
    method = build_method(config)
    model = model_from_config(config, CLASSES, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), method.bn_sets).to(dtype)
    with torch.no_grad():
        for _ in range(3):
            model(batch(dtype)[0])
    return model


def nudged(images: Tensor, radius: float = 0.03) -> Tensor:
    """Images a little moved, as an adversary would."""
    return (images + radius * torch.randn_like(images).sign()).clamp(0, 1)


def terms(method: Method, model: nn.Module, views: dict[str, Tensor], labels: Tensor, progress: float = 1e3) -> Tensor:
    """Our loss, summed: every view is forwarded as a batch of its own."""
    made = {name: method.forward(model, view) for name, view in views.items()}
    embeddings = {name: embedded for name, (_, embedded) in made.items() if embedded is not None}
    out = Outputs({name: logits for name, (logits, _) in made.items()}, embeddings)
    return sum(method.loss(out, labels, torch.tensor(progress)).values())


def gradient(loss: Tensor, of: list[Tensor]) -> Tensor:
    """All of it as one vector; what has no influence is 0."""
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in zip(found, of, strict=True)])


def apart(theirs: Tensor, ours: Tensor) -> float:
    """|theirs - ours| / |theirs|; nan is no agreement."""
    theirs, ours = theirs.detach().double(), ours.detach().double()
    return float((theirs - ours).norm() / theirs.norm().clamp_min(1e-30))


def compared(what: str, size: str, theirs: Tensor, their_grad: Tensor, ours: Tensor, our_grad: Tensor, known=None) -> Check:
    """A loss and its gradient in fp64."""
    return Check(what, size, "fp64", FP64, apart(theirs, ours), apart(their_grad, our_grad), known=known)


def attacked(what: str, theirs: Tensor, ours: Tensor, known: str | None = None, exact: Tensor | None = None) -> Check:
    """Adversarial images of an attack in fp32. exact: theirs in fp64; where that differs from theirs in fp32 in more pixels than
    PIXELS_APART, signs of gradients near 0 are rounding's, and ours may differ in twice as many."""

    def share(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs() > NEAR).float().mean())

    tolerance, rounding = PIXELS_APART, 0.0 if exact is None else share(theirs, exact)
    if rounding > PIXELS_APART:
        tolerance = 2 * rounding
        known = (
            f"its own fp32 differs from its own fp64 in {rounding:.1e} of the pixels: signs of gradients near 0 are rounding's"
        )
    return Check(what, size(ours), "fp32", tolerance, pixels=share(theirs, ours), known=known)


def size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def our_attack(config: Config, model: nn.Module, start: Tensor, progress: float = 1e3) -> Callable[..., Tensor]:
    """The method's adversary, from the given start."""
    method = build_method(config)
    method.heads = method.build(model)
    adversary = method.adversaries(model, torch.tensor(progress))["adv"]
    adversary.attack.start, adversary.attack.start_radius = start, None
    return lambda images, labels, **more: adversary.attack(adversary.model, images, labels, **more)


class Watched(nn.Module):
    """A network that keeps the batches that it was given in train mode."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, images: Tensor, **options: Any) -> Any:
        if self.training:
            self.seen.append(images.detach().clone())
        return self.inner(images, **options)

    def adversarial(self, images: Tensor) -> Tensor:
        """The batch that is not these images."""
        return next(x for x in reversed(self.seen) if not torch.equal(x, images))


def statements(session: Session, file: str, first: str, last: str) -> Any:
    """Compiled: the statements of one block of a script, from that which begins with `first` to that with `last`."""
    text = (session.folder / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text, filename=file)):
        for body in (getattr(node, name, None) for name in ("body", "orelse")):
            if not isinstance(body, list):
                continue
            sources = ["".join((ast.get_source_segment(text, child) or "").split()) for child in body]
            begins = [i for i, source in enumerate(sources) if source.startswith("".join(first.split()))]
            ends = [i for i, source in enumerate(sources) if source.startswith("".join(last.split()))]
            if begins and (later := [i for i in ends if i >= begins[0]]):
                block = ast.Module(body[begins[0] : later[0] + 1], type_ignores=[])
                return compile(block, str(session.folder / file), "exec")
    raise PeerFailed(f"{file} of this clone has no block from {first!r} to {last!r}")


def seeded(draw: Callable[[], Tensor]) -> Tensor:
    """What the original has drawn after the seed 1."""
    state = torch.get_rng_state()
    torch.manual_seed(1)
    noise = draw()
    torch.set_rng_state(state)
    return noise

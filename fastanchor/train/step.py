"""One training step: views, attack, one forward over all views, loss, backward, update; on a GPU replayed as one CUDA graph.

Nothing in it reads a value back from the device; what is logged is added up there and read once an epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastanchor import graphs
from fastanchor.attacks.engine import compiling, own_code
from fastanchor.config import Config
from fastanchor.data import views as augmentation
from fastanchor.data.geometry import CLEAN, kind_of
from fastanchor.errors import UserError
from fastanchor.methods import Method, Outputs, Runner
from fastanchor.methods.base import CONTRASTIVE
from fastanchor.ops import images as operators
from fastanchor.train import awp
from fastanchor.train.optim import WeightAverage, capturable, state_tensors


def _compiled(method: Method) -> Callable:
    """The method's training forward through torch.compile."""

    def forward(model: nn.Module, inputs: Tensor):
        return method.forward(model, inputs)

    compiled = torch.compile(own_code(forward), dynamic=False)

    def run(model: nn.Module, inputs: Tensor):
        with compiling("engine.compile", "training forward"):
            return compiled(model, inputs)

    return run


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


class NonFinite(UserError):
    """The loss or its gradient became NaN or infinite."""


Images = Tensor | augmentation.Rows | augmentation.Prepared


def as_given(images_u8: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch is the images and labels themselves."""
    return images_u8, labels


class TrainStep:
    """Callable on a batch; owns the sums that an epoch's metrics are made of.

    load: from what a batch is made of (indices into a resident set, say; every tensor begins with the batch) to images uint8
    (B, H, W, 3), or the `Rows` of a store, or views `Prepared` by a feed, and labels (B,), on the device; it is a part of the
    step, and of its graph. notes: how the step is run and why, for people, after the first one.
    """

    def __init__(
        self, config: Config, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None,
        device: torch.device, load: Callable[..., tuple[Images, Tensor]] = as_given,
    ):  # fmt: skip
        self.config, self.method, self.model, self.optimizer, self.average = config, method, model, optimizer, average
        self.device, self.load = device, load
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.generators = {name: torch.Generator(device) for name in ("augment", "attack")}
        # Everything that changes from step to step lives on the device at an address that stays.
        self.progress = torch.zeros((), device=device)
        self.sums: dict[str, Tensor] = {}
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_terms: Tensor | None = None
        self.term_names: list[str] = []
        self.run = Runner(
            config, method, model, method.adversaries(model, self.progress), self.generators, device, self._compiled_forward()
        )
        self.attacks = [adversary.attack for adversary in self.run.adversaries.values()]
        # All that the loss forwards, and whether its weights are perturbed in this step.
        self.network = nn.ModuleList([model] if method.heads is None else [model, method.heads])
        self.perturbs_weights = False
        self.notes: dict[str, str] = {}
        self._graphs = graphs.Cache()
        self.graphed, self.notes["graphed"] = self._decide_graph()
        if config.engine.compile:
            self.notes["compiled"] = "yes: the attack's step and the training forward"
        self.fused_views, self._views_note = self._decide_views()
        self._asked_backend = config.attack.backend
        for attack in self.attacks:
            if attack.backend in ("auto", "graphed") and (self.graphed or config.engine.compile):
                # The attack becomes a part of the step's own graph.
                attack.backend = "compiled" if config.engine.compile else "eager"

    def _compiled_forward(self) -> Callable | None:
        return _compiled(self.method) if self.config.engine.compile else None

    def _decide_graph(self) -> tuple[bool, str]:
        wanted = self.config.engine.graph
        if wanted == "off":
            return False, "no: engine.graph = off"
        if wanted == "auto" and self.device.type != "cuda":
            return False, f"no: CUDA graphs need a CUDA device, this is {self.device}"
        if not capturable(self.optimizer):
            if wanted == "on":
                raise UserError(f"engine.graph = on: a graph cannot hold optim.backend = {self.config.optim.backend}")
            return False, f"no: a graph cannot hold optim.backend = {self.config.optim.backend}"
        return True, "yes: the whole step, from the batch to the update, is one CUDA graph"

    def _decide_views(self) -> tuple[bool, str]:
        if self.config.data.augment not in augmentation.CROPS:
            return False, f"data.augment = {self.config.data.augment} has no kernel"
        # Before anything is captured: a first question compiles the kernel and checks it.
        return operators.decide("augment", self.config.engine.kernels, self.device)

    def reset(self, seeds: dict[str, int]) -> None:
        """Start an epoch: its sums anew, its generators ("augment", "attack") from these seeds."""
        for total in (*self.sums.values(), self.steps):
            total.zero_()
        self.bad_step.fill_(-1)
        for name, generator in self.generators.items():
            generator.manual_seed(seeds[name])

    def data_views(self, images: Images) -> dict[str, Tensor]:
        """The views that the data gives, by name: fp32 (B, 3, H, W) in [0, 1], channels-last."""
        data, names = self.config.data, self.method.drawn
        if isinstance(images, augmentation.Prepared):
            made = {name: images.view(name) for name in names}
            self.fused_views, self._views_note = False, "the views come from the data backend"
        else:
            made = {name: self._draw(images, kind_of(name, data.augment, data.weak)) for name in names}
        if not self.config.channels_last:
            made = {name: view.contiguous() for name, view in made.items()}
        return made

    def _draw(self, images: Tensor | augmentation.Rows, kind: str) -> Tensor:
        if kind == CLEAN:
            return augmentation.to_float(images.gather() if isinstance(images, augmentation.Rows) else images)
        return augmentation.augment(images, kind, self.generators["augment"], pad=self.config.data.pad, fused=self.fused_views)

    def make_views(self, images: Images, labels: Tensor) -> tuple[dict[str, Tensor], Outputs | None]:
        """The method's inputs by name, adversarial ones too, and outputs that it has of some of them already."""
        made = self.data_views(images)
        self.run.repeats = self.perturbs_weights
        early = self.method.perturb(self.run, made, labels)
        self.run.repeats = False
        if missing := [name for name in self.method.views if name not in made]:
            raise UserError(f"method = {self.config.method}: nothing makes the view {missing[0]!r}; there are {', '.join(made)}")
        return {name: made[name] for name in self.method.views}, early

    def __call__(self, *batch: Tensor, progress: float) -> None:
        """batch: what `load` takes, on the device; progress: epochs done, fractional."""
        self.progress.fill_(progress)
        self.perturbs_weights = self.config.optim.awp_gamma > 0 and progress >= self.config.optim.awp_start
        captured = self._captured(batch) if self.graphed else None
        if captured is None:
            self._iterate(*batch)
        else:
            captured(*batch)
        if "kernels" not in self.notes:
            self._note()

    def _note(self) -> None:
        """What is known after the first step."""
        parts = {"augmentation": f"{'yes' if self.fused_views else 'no'}: {self._views_note}"}
        for name, note in self.method.notes.items():
            (parts if name == CONTRASTIVE else self.notes)[name] = note
        for name, adversary in self.run.adversaries.items():
            plain = "no: attack.backend = reference"
            found = adversary.attack.engine.notes
            which = f" ({name})" if len(self.attacks) > 1 else ""
            self.notes["folded" + which] = found.get("folded", plain)
            parts["attack" + which] = found.get("kernels", plain)
            if "refresh" in found:
                parts["refresh of the twin" + which] = found["refresh"]
        by_note: dict[str, list[str]] = {}
        for part, note in sorted(parts.items()):
            by_note.setdefault(note, []).append(part)
        self.notes["kernels"] = "; ".join(f"{', '.join(names)}: {note}" for note, names in by_note.items())

    def describe(self) -> str:
        """How the step is run, in one line."""
        names = {
            "folded": "attack on the BN-folded twin", "compiled": "torch.compile", "graphed": "CUDA graph", "kernels": "kernels",
        }  # fmt: skip
        parts = [(*key.partition(" ("), note) for key, note in sorted(self.notes.items())]
        return "; ".join(f"{names.get(what, what)}{mark}{which}: {note}" for what, mark, which, note in parts)

    def without_graph(self, reason: str) -> None:
        """Run without a graph of the whole step from now on, and give the graphs' memory back."""
        self.graphed, self._graphs = False, graphs.Cache()
        self.notes["graphed"] = f"no: {reason}"
        if not self.config.engine.compile:
            for attack in self.attacks:
                attack.backend = self._asked_backend  # on a GPU the attack may still be a graph of its own

    def _captured(self, batch: tuple[Tensor, ...]) -> graphs.Captured | None:
        def build() -> graphs.Captured:
            return graphs.Captured(
                self._iterate, batch, state=self._state, generators=tuple(self.generators.values()),
                pool=graphs.shared_pool(self.device),
            )  # fmt: skip

        try:
            return self._graphs.get((self.perturbs_weights, *((part.shape, part.dtype) for part in batch)), build)
        except graphs.CaptureFailed as error:
            if self.config.engine.graph == "on":
                raise UserError(f"engine.graph = on: {error}") from error
            self.without_graph(str(error))
            return None

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        found = [*self.network.parameters(), *self.network.buffers(), *state_tensors(self.optimizer)]
        found += [*self.sums.values(), self.steps, self.bad_step]
        found += [] if self.bad_terms is None else [self.bad_terms]
        return found + ([] if self.average is None else self.average.tensors())

    def _iterate(self, *batch: Tensor) -> None:
        images, labels = self.load(*batch)
        self.method.train_mode(self.model)
        # Before the backward pass of a capture they must be gone: the graph's own memory holds its gradients.
        self.optimizer.zero_grad(set_to_none=True)
        views, early = self.make_views(images, labels)
        if self.perturbs_weights:

            def loss() -> Tensor:
                return _total(self._terms(self.run.forward(views), labels))

            # The outputs that there are already are of the weights as they were.
            early, weights = None, awp.perturbed(self.network, self.parameters, self.config.optim.awp_gamma, loss)
        else:
            weights = contextlib.nullcontext()
        with weights:
            out = self.run.outputs(views, early)
            terms = self._terms(out, labels)
            total = _total(terms)
            total.backward()
        norm = self._clip()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        with torch.no_grad():
            self._record(terms, total.detach(), norm, out, labels)

    def _terms(self, out: Outputs, labels: Tensor) -> dict[str, Tensor]:
        terms = self.method.loss(out, labels, self.progress)
        if not isinstance(terms, dict) or not terms:
            raise UserError(f"method = {self.config.method}: loss returns {type(terms).__name__}, must be a dict of terms")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.ndim:
                found = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
                raise UserError(f"method = {self.config.method}: the term {name!r} of its loss is {found}, must be a 0-d tensor")
        return terms

    def _clip(self) -> Tensor:
        """Total norm of the gradient, after which it is clipped where the recipe says so."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_grad_norm, norm)
        return norm

    def _record(self, terms: dict[str, Tensor], total: Tensor, norm: Tensor, out, labels: Tensor) -> None:
        values = {f"loss_{name}": term.detach() for name, term in terms.items()}
        values |= {"loss": total, "grad_norm": norm, **self.method.diagnostics(out, labels, self.progress)}
        classes = labels[:, 0] if self.method.indexed else labels
        # Where nothing trains the classifier its accuracy says nothing.
        judged = {} if self.method.selects == "last" else out.logits
        for view, logits in judged.items():
            values[f"accuracy_{view}"] = (logits.argmax(1) == classes).float().mean()
        stacked = torch.stack([*(term.detach() for term in terms.values()), norm])
        if self.bad_terms is None:
            self.bad_terms, self.term_names = torch.zeros_like(stacked), [*terms, "grad_norm"]
        first_bad = ~torch.isfinite(stacked).all() & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first_bad, self.steps, self.bad_step))
        self.bad_terms.copy_(torch.where(first_bad, stacked, self.bad_terms))
        for name, value in values.items():
            self.sums.setdefault(name, torch.zeros_like(value)).add_(value)
        self.steps += 1

    def check_finite(self, first_step: int) -> None:
        """Raise NonFinite if a step of this epoch was not; `first_step` is the number of its first step. A host read."""
        bad = int(self.bad_step)
        if bad >= 0:
            terms = ", ".join(
                f"{name} = {value:.4g}" for name, value in zip(self.term_names, self.bad_terms.tolist(), strict=True)
            )
            raise NonFinite(
                f"the training diverged at step {first_step + bad}: {terms}; try a lower optim.lr or optim.clip_grad_norm"
            )

    def read(self) -> dict[str, float]:
        """The epoch's means as Python floats. A host read."""
        names = list(self.sums)
        means = (torch.stack([self.sums[name].float() for name in names]) / self.steps).tolist()
        return dict(zip(names, means, strict=True))

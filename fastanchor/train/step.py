"""One training step: views, attack, one forward over all views, loss, backward, update.

Nothing in it reads a value back from the device; what is logged is added up there and read once an epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastanchor.config import Config
from fastanchor.data import views as augmentation
from fastanchor.errors import UserError
from fastanchor.methods import Method
from fastanchor.train.optim import WeightAverage


class NonFinite(UserError):
    """The loss or its gradient became NaN or infinite."""


class TrainStep:
    """Callable on a batch; owns the sums that an epoch's metrics are made of."""

    def __init__(self, config: Config, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer,
                 average: WeightAverage | None, generators: dict[str, torch.Generator], device: torch.device):  # fmt: skip
        self.config, self.method, self.model, self.optimizer, self.average = config, method, model, optimizer, average
        self.generators, self.device = generators, device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.reset()

    def reset(self) -> None:
        """Start an epoch's sums anew."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.bad_terms: Tensor | None = None
        self.term_names: list[str] = []

    def make_views(self, images_u8: Tensor, labels: Tensor, progress: float) -> dict[str, Tensor]:
        """The method's inputs by name: fp32 (B, 3, H, W) in [0, 1], channels-last."""
        augment = self.config.data.augment
        made: dict[str, Tensor] = {}
        if "clean" in self.method.views:
            made["clean"] = augmentation.to_float(images_u8)
        made["aug"] = augmentation.augment(images_u8, augment, self.generators["augment"], pad=self.config.data.pad)
        if not self.config.channels_last:
            made = {name: view.contiguous() for name, view in made.items()}
        if "adv" in self.method.views:
            made["adv"] = self.method.perturb(self.model, made["aug"], labels, progress, self.generators["attack"])
        return {name: made[name] for name in self.method.views}

    def __call__(self, images_u8: Tensor, labels: Tensor, progress: float) -> None:
        """images_u8 (B, H, W, 3) uint8 and labels (B,) on the device; progress: epochs done, fractional."""
        self.method.train_mode(self.model)
        views = self.make_views(images_u8, labels, progress)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.method.outputs(self.model, views)
        terms = self.method.loss(out, labels, progress)
        total = torch.stack(list(terms.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = self._clip()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        with torch.no_grad():
            self._record(terms, total.detach(), norm, out, labels, progress)

    def _clip(self) -> Tensor:
        """Total norm of the gradient, after which it is clipped where the recipe says so."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.optim.clip_grad_norm, norm)
        return norm

    def _record(self, terms: dict[str, Tensor], total: Tensor, norm: Tensor, out, labels: Tensor, progress: float) -> None:
        values = {f"loss_{name}": term.detach() for name, term in terms.items()}
        values |= {"loss": total, "grad_norm": norm, **self.method.diagnostics(out, labels, progress)}
        for view, logits in out.logits.items():
            values[f"accuracy_{view}"] = (logits.argmax(1) == labels).float().mean()
        stacked = torch.stack([*(term.detach() for term in terms.values()), norm])
        if self.bad_terms is None:
            self.bad_terms, self.term_names = torch.zeros_like(stacked), [*terms, "grad_norm"]
        first_bad = ~torch.isfinite(stacked).all() & (self.bad_step < 0)
        self.bad_step = torch.where(first_bad, self.steps, self.bad_step)
        self.bad_terms = torch.where(first_bad, stacked, self.bad_terms)
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
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

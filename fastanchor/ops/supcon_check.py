"""What must hold before the SupCon kernels are trusted on a device: loss and gradient of small batches against the reference.

The truth is the reference in fp64 on the CPU, the yardstick the reference in fp32 on unit rows rounded as the kernels round them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.reference.hard_supcon import hard_supcon as reference

CLASSES = 10
COEF = ((1.0, 0.5, 2.0), (0.0, 1.0, 1.5), (2.0, 1.0, 0.0))
MASK = ((1, 1, 0), (1, 1, 1), (0, 1, 1))
ROWS, MANY_ROWS = 130, 4200  # neither is a multiple of a tile
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # beside twice the yardstick's error, which is 2e-2 on tight classes in fp16


class Variant(NamedTuple):
    """The kernels that a call needs: settings of `ops.supcon`, with typical numbers, and what else compiles to other code.

    width: features, a power of two. many_rows: the tiles for many rows, too. keys: "own" | "given" | "with gradient".
    """

    settings: dict
    width: int
    many_rows: bool
    keys: str
    beta_tensor: bool
    views: bool
    instances: bool
    anchors: bool

    @property
    def name(self) -> str:
        of = self.settings
        shown = [of[name] for name in ("weight", "normalizer", "denominator", "reduction", "precision")]
        shown += [f"k {of['k']}"] if of["weight"] == "topk" else []
        shown += [f"temperature {of['temperature']:g}", f"selection {of['selection']}", f"keys {self.keys}"]
        marks = {
            "attached weights": not of["detach_weights"], "detached keys": of["detach_keys"], "many rows": self.many_rows,
            "hard negatives": of["hard_negative_beta"] != 0, "beta on the device": self.beta_tensor, "views": self.views,
            "instances": self.instances, "anchors": self.anchors,
        }  # fmt: skip
        shown += [mark for mark, present in marks.items() if present]
        return f"hard-positive SupCon of {self.width} features ({', '.join(shown)})"

    def check(self, device: torch.device) -> None:
        """Raise AssertionError where the kernels on `device` are off by more than rounding."""
        for case in self.cases():
            truth, yardstick = self.by_reference(case, torch.float64), self.by_reference(case, torch.float32)
            names, found = ("loss", "gradient", "gradient of the keys"), self.by_kernels(case, device)
            for name, got, want, rounded in zip(names, found, truth, yardstick, strict=True):
                if want is None:
                    continue
                error, usual = _relative(got, want), _relative(rounded, want)
                allowed = max(LOSS_TOLERANCE, 2 * usual) if name == "loss" else 2 * usual + GRADIENT_TOLERANCE
                if not error <= allowed:
                    raise AssertionError(f"{name} of {case.name} is off by {error:.1e}, {allowed:.1e} is allowed")

    def cases(self) -> Iterator[Case]:
        yield self._case("random embeddings", ROWS, self.width - 5, spread=0.0, seed=0)
        # Among the positives of a tight class, which are the k farthest hangs on roundings.
        # By one program each block of rows, so that it goes over many column tiles: small batches are split to one tile each.
        yield self._case("tight classes", 330, self.width, spread=1.0 if self._topk else 7.0, seed=1, splits=1)
        if self.many_rows:
            yield self._case("many rows", MANY_ROWS, self.width, spread=1.0, seed=2, few_anchors=True)

    @property
    def _topk(self) -> bool:
        return self.settings["weight"] == "topk"

    def _case(
        self, name: str, n: int, d: int, spread: float, seed: int, splits: int | None = None, few_anchors: bool = False
    ) -> Case:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        centres = spread * F.normalize(torch.randn(CLASSES, d, generator=g))
        u, tensors = self._rows(n, centres, g)
        keys = None
        if self.keys != "own":
            # Not as many as there may be rows: the truth holds matrices of rows x keys.
            keys, described = self._rows(min(n, 400) - 7, centres, g)
            tensors |= {f"ref_{name}": value for name, value in described.items()}
        if self.views:
            tensors |= {"positive_coef": torch.tensor(COEF), "denominator_mask": torch.tensor(MASK)}
        few = None
        if few_anchors and keys is None:
            few = torch.randperm(n, generator=g)[:ROWS]
            tensors["anchors"] = torch.zeros(n, dtype=torch.bool).index_fill_(0, few, True)
        elif self.anchors:
            tensors["anchors"] = torch.rand(n, generator=g) < 0.7
        upstream = torch.rand(n, generator=g) + 0.5 if self.settings["reduction"] == "none" else None
        return Case(name, u, keys, tensors, upstream, few, splits)

    def _rows(self, n: int, centres: Tensor, g: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.randint(CLASSES, (n,), generator=g)
        u = centres[y] + F.normalize(torch.randn(n, centres.shape[1], generator=g))
        u = u * (0.5 + torch.rand(n, 1, generator=g))
        u[7], y[5] = 0.0, 77  # a zero row, and a class of one
        described = {"labels": y}
        if self.views:
            described["views"] = torch.arange(n) % len(COEF)
        if self.instances:
            described["instances"] = torch.arange(n) % 2
        if self.settings["selection"] != "all":
            right = torch.rand(n, generator=g) < 0.6
            described["predictions"] = torch.where(right, y, torch.randint(CLASSES, (n,), generator=g))
        return u, described

    def by_kernels(self, case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        from fastanchor.kernels import supcon_launch  # Triton need not be installed where there is no CUDA device

        def there(value):
            return None if value is None else value.to(device)

        pairs = {name: there(value) for name, value in case.tensors.items()}
        loss, grad, ref_grad = supcon_launch.loss_and_grad(
            there(case.u), pairs.pop("labels"), supcon_launch.Options(**self.settings, splits=case.splits), self._beta(device),
            upstream=there(case.upstream), keys_gradient=self.keys == "with gradient", ref_embeddings=there(case.keys), **pairs,
        )  # fmt: skip
        loss = loss if case.few is None or loss.dim() == 0 else loss[there(case.few)]
        return loss.cpu(), grad.cpu(), None if ref_grad is None else ref_grad.cpu()

    def by_reference(self, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss, gradient and gradient of the keys; in fp32 with unit rows that are rounded as the kernels store them.

        For top-k weights in fp64, too: the rounded rows may have other k farthest positives.
        """
        settings = {name: value for name, value in self.settings.items() if name != "precision"}
        rounds = self.settings["precision"] != "ieee" and (dtype == torch.float32 or self._topk)
        stored = torch.float16 if rounds else None  # TF32 keeps as many bits
        x = case.u.to(dtype).requires_grad_()
        keys = None if case.keys is None else case.keys.to(dtype).requires_grad_(self.keys == "with gradient")
        rows, ref_rows = _rounded(x, stored), None if keys is None else _rounded(keys, stored)
        tensors, upstream = dict(case.tensors), case.upstream
        if case.few is not None:
            rows, ref_rows, tensors = _few_anchors(rows, case.few, tensors)
            upstream = None if upstream is None else upstream[case.few]
        loss = reference(rows, beta=self._beta(torch.device("cpu")), ref_embeddings=ref_rows, **tensors, **settings)
        wanted = [x, keys] if self.keys == "with gradient" else [x]
        grads = torch.autograd.grad(loss, wanted, upstream if upstream is None else upstream.to(dtype))
        return loss.detach(), grads[0], grads[1] if len(grads) > 1 else None

    def _beta(self, device: torch.device) -> float | Tensor:
        return torch.tensor(2.0, device=device) if self.beta_tensor else 2.0


class Case(NamedTuple):
    """fp32 rows, keys or None, what describes them, upstream gradient or None; few: the anchors' indices where not all are.

    splits: of the kernels' options.
    """

    name: str
    u: Tensor
    keys: Tensor | None
    tensors: dict[str, Tensor]
    upstream: Tensor | None
    few: Tensor | None
    splits: int | None


def _few_anchors(rows: Tensor, few: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same loss with the anchors apart from the keys, so that no matrix has all rows on both sides.

    The self pairs, which exist among own keys only, are then kept out by view matrices: every anchor is a view of its own.
    """
    described = {name: value for name, value in tensors.items() if name != "anchors"}
    described |= {f"ref_{name}": value for name, value in described.items()}
    described |= {name: described[name][few] for name in tensors if name != "anchors"}
    own = torch.arange(len(few))
    matrix = 1 - torch.eye(len(few) + 1)
    described |= {"views": own, "ref_views": torch.full((len(rows),), len(few)).index_copy_(0, few, own)}
    return rows[few], rows, described | {"positive_coef": matrix, "denominator_mask": matrix}


def _rounded(rows: Tensor, stored: torch.dtype | None) -> Tensor:
    """The rows, or their unit rows rounded to `stored`, with the gradient of the unrounded ones."""
    if stored is None:
        return rows
    z = F.normalize(rows)
    return z + (z.to(stored).to(rows.dtype) - z).detach()


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()

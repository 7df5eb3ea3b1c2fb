"""ASCL's contrastive loss (Bui et al. 2021, arXiv 2101.10027): SupCon among the rows that the network confuses.

With cosine similarity it is `HardSupConLoss`; its own is the L-infinity distance of the unit rows, which is no matrix product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastanchor.losses.hard_supcon import SupConLoss
from fastanchor.reference.checks import SELECTIONS, check_name, check_options
from fastanchor.reference.pairs import make_pairs, unit_rows

DISTANCES = ("linf", "cosine")

# Rows whose distances to all others are one call: torch's backward of cdist on CUDA makes a (N, rows, D) tensor of them.
BLOCK = 256


def linf_distances(z: Tensor) -> Tensor:
    """max_k |z_ik - z_jk| of all pairs of rows: z (N, D) floating -> (N, N), differentiable.

    At rows that are equal the gradient is 0. Coordinates that share the maximum each get all of it, where torch.max picks one.
    """
    return torch.cat([torch.cdist(rows, z, p=math.inf) for rows in z.split(BLOCK)])


class ASCLLoss(nn.Module):
    """Mean over all rows i of the supervised contrastive loss with s_ia = -dist(z_i, z_a) / tau, z = u / ||u||:

        L_i = (1 / |P(i)|) sum_{p in P(i)} ( log sum_{a in A(i)} exp(s_ia) - s_ip ),      0 where P(i) is empty

    temperature: tau. selection: "all" | "hard" | "soft" | "merge" | "leaking", by which the predicted classes leave out negatives
    and, for "leaking", positives too: the sets P and A of `fastanchor.reference.hard_supcon`.
    distance: "linf", max_k |z_ik - z_ak|, with some matrices of (N, N) and, in the backward pass on CUDA, one of (BLOCK, N, D);
    or "cosine", s_ia = z_i . z_a / tau, which the kernels compute without a matrix where they serve.
    backend: "auto" | "torch" | "triton", of the cosine loss as in HardSupConLoss; linf is plain PyTorch whatever it says. `used`
    says what computed the last loss, and why.
    Raises UserError (a ValueError) for a bad argument.
    """

    def __init__(self, temperature: float = 0.2, selection: str = "leaking", *, distance: str = "linf", backend: str = "auto"):
        super().__init__()
        check_options(temperature=temperature)
        check_name("selection", selection, SELECTIONS)
        check_name("distance", distance, DISTANCES)
        self.temperature, self.selection, self.distance, self.used = temperature, selection, distance, ""
        # The mean is over all rows, also those whose set of positives the selection has emptied.
        self.cosine = SupConLoss(temperature, selection=selection, reduction="mean_all", backend=backend)

    def forward(self, embeddings: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        """embeddings (N, D) floating, of any norm; labels, predictions (N,) integer: the class, and the class predicted now.

        Returns a 0-d tensor, fp32 (fp64 for fp64 embeddings). Raises UserError (a ValueError) for shapes that do not fit.
        """
        if self.distance == "cosine":
            loss = self.cosine(embeddings, labels, predictions=predictions)
            self.used = self.cosine.used
            return loss
        self.used = "torch: the L-infinity distance is no matrix product, it has no kernel"
        return self._linf(embeddings, labels, predictions)

    def _linf(self, embeddings: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        pairs = make_pairs(embeddings.detach(), labels, selection=self.selection, predictions=predictions)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = unit_rows(embeddings.to(pairs.similarity.dtype))
            logits = -linf_distances(z) / self.temperature
        valid = pairs.positive.any(1)
        # A row without positives costs 0 whatever its terms; it keeps all, since a log-sum-exp of none has NaN gradients.
        terms = pairs.denominator | ~valid[:, None]
        lse = logits.masked_fill(~terms, -math.inf).logsumexp(1)
        near = (logits * pairs.positive).sum(1) / pairs.positive.sum(1).clamp_min(1)
        return torch.where(valid, lse - near, 0.0).mean()

    def extra_repr(self) -> str:
        """The options that bear on the loss."""
        return f"temperature={self.temperature}, selection={self.selection}, distance={self.distance}"

"""Other people's contrastive losses, and plain PyTorch's ways to compute ours: functions (embeddings, labels) -> scalar loss.

None of them is needed: what is not installed is a row that says so. `pip install fastanchor[peers]` brings them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.attacks.engine import own_code
from fastanchor.reference.hard_supcon import hard_supcon

TEMPERATURE = 0.1
Loss = Callable[[Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """make: gives the loss, which may take long (compilers). dense: it holds N x N matrices. function: what it computes.

    high: its fp32 matrix products may be TF32's. needs: the module to be installed.
    """

    make: Callable[[], Loss]
    function: str = "hard SupCon"
    dense: bool = True
    high: bool = False
    needs: str | None = None


def supcontrast(embeddings: Tensor, labels: Tensor, temperature: float = TEMPERATURE, base_temperature: float = 0.07) -> Tensor:
    """Khosla et al. 2020, L_out, as a dense batch is usually written: one view a row, self pairs masked, row maximum subtracted.

    embeddings (N, D), labels (N,); the mean over all rows times temperature / base_temperature; rows without positives are 0.
    """
    z = F.normalize(embeddings, dim=1)
    same = (labels[:, None] == labels[None, :]).float()
    others = 1 - torch.eye(len(z), device=z.device)
    logits = z @ z.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    positives = same * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    mean = (positives * log_probability).sum(1) / positives.sum(1).clamp_min(1)
    return -(temperature / base_temperature) * mean.mean()


def eager(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The reference with its default options."""
    return hard_supcon(embeddings, labels, temperature=TEMPERATURE)


def compiled(mode: str) -> Loss:
    """The reference under torch.compile, anew: dynamo gives up on one code object after a few shapes."""
    return torch.compile(own_code(eager), fullgraph=True, dynamic=False, mode=mode)


def _pytorch_metric_learning() -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, the default, scales the gradient.
    loss = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)
    return lambda embeddings, labels: loss(*(embeddings.half(),) * 2)


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        z = F.normalize(embeddings, dim=1)
        return cal_flash_loss(z, z, scale=1 / TEMPERATURE, head_dim=min(256, z.shape[1])).mean()

    return loss


CLIP = "other function: CLIP's loss of (z, z)"
PLAIN = {
    "eager": Peer(lambda: eager),
    "eager, TF32": Peer(lambda: eager, high=True),
    "SupContrast": Peer(lambda: supcontrast, "SupCon, uniform weights"),
    "pytorch-metric-learning": Peer(_pytorch_metric_learning, "SupCon, uniform weights", needs="pytorch_metric_learning"),
    "memeff": Peer(_memeff, CLIP, dense=False, needs="memeff"),
    "inf-cl": Peer(_inf_cl, "other function: InfoNCE of (z, z)", dense=False, needs="inf_cl"),
}
# max-autotune would add CUDA graphs of its own, which do not nest in the ones that everything here is replayed from.
COMPILED = {
    "compiled, TF32": Peer(functools.partial(compiled, "default"), high=True),
    "compiled": Peer(functools.partial(compiled, "default")),
}
AUTOTUNED = {
    "compiled, max-autotune, TF32": Peer(functools.partial(compiled, "max-autotune-no-cudagraphs"), high=True),
}


def missing(peer: Peer) -> str | None:
    """Why the peer cannot be run here; None where it can."""
    return None if peer.needs is None or importlib.util.find_spec(peer.needs) else f"{peer.needs} is not installed"


@contextlib.contextmanager
def matmul_precision(high: bool) -> Iterator[None]:
    """fp32 matrix products by TF32 within, or not; as before afterwards.

    By torch's older switch: it sets the newer ones as well, where the newer ones alone make torch.compile fail.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if high else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Standard AutoAttack (Croce & Hein 2020) through pyautoattack: APGD-CE, APGD-T, FAB-T, Square, in this order, in fp32.

The verdict of each stage is kept, and an interrupted evaluation goes on at the batch where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from importlib import metadata
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from fastanchor.data.judged import DecodedSplit
from fastanchor.data.resident import ResidentSplit
from fastanchor.data.views import to_float
from fastanchor.errors import UserError
from fastanchor.evaluate.accuracy import Score, eval_mode, score
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.files import write_text
from fastanchor.precision import full_precision

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
NORMS = {"linf": "Linf", "l2": "L2"}


def autoattack(
    model: nn.Module,
    data: ResidentSplit | DecodedSplit,
    attack: AttackSpec,
    *,
    num_classes: int,
    batch_size: int = 250,
    seed: int = 0,
    state_path: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Score, dict]:
    """The final score, and {"stages": {stage: accuracy in percent after it}, "version", "pyautoattack"}.

    state_path: where the verdicts are kept after every batch; a state of the same model, images and settings is continued,
    another one is refused with UserError. Each stage runs on the images that all stages before left correct, in batches of
    `batch_size`, as the reference implementation does. The images of one batch alone are held in fp32, and of encoded ones
    a batch alone is decoded.
    """
    started = time.perf_counter()
    attacker_class = require_autoattack(num_classes)
    device = next(model.parameters()).device
    labels = data.split.labels.to(data.device) if isinstance(data, DecodedSplit) else data.labels
    with full_precision(), eval_mode(model):
        state = _open_state(state_path, _identity(model, data, labels, attack, batch_size, seed))
        attacker = attacker_class(model, device=device, eps=attack.eps, norm=NORMS[attack.norm], seed=seed, version="standard")
        attacker.apgd_targeted.n_target_classes = attacker.fab.n_target_classes = min(9, num_classes - 1)
        if "clean" not in state["stages"]:
            batches = data.epoch(batch_size, generator=None, drop_last=False)
            correct = torch.cat([_correct(model, _plain(images), y) for _, images, y in batches])
            state["robust"] = correct.tolist()
            _finish_stage(state, "clean", state_path, progress)
        for stage in STAGES:
            if stage not in state["stages"]:
                _run_stage(attacker, stage, data, labels, state, batch_size, state_path, progress)
                _finish_stage(state, stage, state_path, progress)
    result = score(torch.tensor(state["robust"]), labels, num_classes, time.perf_counter() - started)
    return result, {"stages": state["stages"], "version": "standard", "pyautoattack": metadata.version("pyautoattack")}


def _run_stage(
    attacker, stage: str, data: ResidentSplit | DecodedSplit, labels: Tensor, state: dict, batch_size: int, path: Path | None,
    progress,
) -> None:  # fmt: skip
    """Attack the images still correct when the stage began, from the batch where the state stopped."""
    if state["survivors"] is None:
        state["survivors"] = [i for i, robust in enumerate(state["robust"]) if robust]
        state["position"] = 0
    survivors = state["survivors"]
    attacker.attacks_to_run = [stage]
    while state["position"] < len(survivors):
        chunk = survivors[state["position"] : state["position"] + batch_size]
        y = labels[chunk]
        # Perturbed images come back for the fooled ones, the originals for the others: the label says which. Neither they nor the
        # batch get a name, which would keep them until the next one is there.
        found = attacker.run_standard_evaluation(_take(data, chunk), y, batch_size=len(chunk))[1]
        for index, held in zip(chunk, (found == y).tolist(), strict=True):
            state["robust"][index] = held
        state["position"] += len(chunk)
        _save(state, path)
        progress(f"AutoAttack {stage}: {state['position']}/{len(survivors)} images, {sum(state['robust'])} robust")


def _finish_stage(state: dict, stage: str, path: Path | None, progress) -> None:
    state["stages"][stage] = 100 * sum(state["robust"]) / len(state["robust"])
    state["survivors"], state["position"] = None, 0
    _save(state, path)
    progress(f"AutoAttack after {stage}: {state['stages'][stage]:.2f} %")


def require_autoattack(num_classes: int):
    """The package's attack. Raises UserError where it is missing, or cannot be run on so few classes."""
    if num_classes < 4:
        raise UserError(f"AutoAttack's targeted DLR loss needs at least 4 classes, this model has {num_classes}")
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UserError('AutoAttack needs the package pyautoattack: pip install "fastanchor[eval]"') from None
    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    return AutoAttack


def _plain(images_u8: Tensor) -> Tensor:
    """fp32 (B, 3, H, W). APGD and Square reshape with view, which wants plain NCHW."""
    return to_float(images_u8).contiguous()


def _take(data: ResidentSplit | DecodedSplit, chosen: list[int]) -> Tensor:
    """Those images, fp32 (B, 3, H, W) on the device. To decode a batch once more a stage is nothing beside attacking it."""
    indices = torch.tensor(chosen)
    if isinstance(data, DecodedSplit):
        return _plain(data.split.gather(indices).to(data.device))
    return _plain(data.images[indices.to(data.device)])


def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) == labels


def _identity(
    model: nn.Module, data: ResidentSplit | DecodedSplit, labels: Tensor, attack: AttackSpec, batch_size: int, seed: int
) -> dict:
    """What must agree for verdicts to be carried over. The digest is one of fp32 images: that of states that there are."""
    digest = hashlib.sha256()
    images = (_plain(images) for _, images, _ in data.epoch(batch_size, generator=None, drop_last=False))
    for tensor in chain(model.state_dict().values(), images, [labels]):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {"fingerprint": digest.hexdigest(), "eps": attack.eps, "norm": attack.norm, "batch_size": batch_size, "seed": seed}


def _open_state(path: Path | None, identity: dict) -> dict:
    new = {"identity": identity, "stages": {}, "robust": [], "survivors": None, "position": 0}
    if path is None or not path.exists():
        return new
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a state of an AutoAttack evaluation; remove it to start anew") from None
    if not isinstance(state, dict) or state.keys() != new.keys():
        raise UserError(f"{path}: not a state of an AutoAttack evaluation; remove it to start anew")
    if state["identity"] != identity:
        differ = ", ".join(name for name in identity if state["identity"].get(name) != identity[name])
        raise UserError(f"{path}: belongs to another evaluation (different {differ}); remove it to start anew")
    return state


def _save(state: dict, path: Path | None) -> None:
    if path is not None:
        write_text(path, json.dumps(state))

"""`fastanchor attack`: adversarial images as files, exact ones for programs and pictures for people."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from fastanchor import environment
from fastanchor.data.encoded import Encoded
from fastanchor.data.judged import judged_split
from fastanchor.data.sources import Split
from fastanchor.data.views import to_float
from fastanchor.errors import UserError
from fastanchor.evaluate.accuracy import eval_mode
from fastanchor.evaluate.protocol import AttackSpec
from fastanchor.files import write_text
from fastanchor.precision import full_precision

if TYPE_CHECKING:
    from fastanchor.train.run import Trained


def write_adversarial(
    trained: Trained, split: Split | Encoded, spec: AttackSpec, out: Path, *, device: torch.device, seed: int
) -> dict:
    """Attack every image of `split`; write OUT/adversarial.npz, OUT/images/*.png and OUT/summary.json; return the summary.

    adversarial.npz: clean uint8 (N, H, W, 3), adversarial fp32 (N, H, W, 3) in [0, 1], labels, clean_predictions and
    adversarial_predictions int64 (N,). The PNG files are rounded to 8 bits, which weakens an attack a little: judge by the npz.
    Raises UserError where `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty")
    attack = spec.build()
    generator = torch.Generator(device).manual_seed(seed)
    originals, adversarial, before, after = [], [], [], []
    with full_precision(), eval_mode(trained.model), torch.no_grad():
        for _, images_u8, labels in judged_split(split, device).epoch(
            trained.config.eval.batch_size, generator=None, drop_last=False
        ):
            originals.append(images_u8.cpu())  # as they come: encoded ones are decoded here alone
            images = to_float(images_u8)
            before.append(trained.model(images).argmax(1))
            perturbed = attack(trained.model, images, labels, generator=generator)
            after.append(trained.model(perturbed).argmax(1))
            adversarial.append(perturbed)
    pictures = torch.cat(adversarial).permute(0, 2, 3, 1).cpu().numpy()
    labels, clean, fooled_as = (x.numpy() for x in (split.labels, torch.cat(before).cpu(), torch.cat(after).cpu()))
    (out / "images").mkdir(parents=True)
    np.savez(
        out / "adversarial.npz", clean=torch.cat(originals).numpy(), adversarial=pictures, labels=labels, clean_predictions=clean,
        adversarial_predictions=fooled_as, class_names=np.array(trained.class_names),
    )  # fmt: skip
    names = [re.sub(r"\W+", "-", name) for name in trained.class_names]
    for i, picture in enumerate(np.rint(pictures * 255).astype(np.uint8)):
        title = f"{i:05d}-true-{names[labels[i]]}-clean-{names[clean[i]]}-adversarial-{names[fooled_as[i]]}.png"
        Image.fromarray(picture).save(out / "images" / title)
    correct = clean == labels
    summary = {
        "attack": spec.describe(),
        "seed": seed,
        "checkpoint": str(trained.path),
        "count": len(labels),
        "correct": int(correct.sum()),
        "fooled": int((correct & (fooled_as != labels)).sum()),
        "environment": environment.describe(device),
    }
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary

"""What the report computes on the model: adversarial images, accuracy against eps, a 2-D map of embeddings.

The model's weights, buffers and training flags, and the global random generators, are as before when a function returns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastanchor.data.arrays import TEST_LIMIT_STREAM, random_state, stratified_choice
from fastanchor.data.sources import Split
from fastanchor.data.views import augment, to_float
from fastanchor.evaluate.accuracy import eval_mode
from fastanchor.evaluate.protocol import AttackSpec, fraction
from fastanchor.models import RobustClassifier
from fastanchor.precision import full_precision

EPS_FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
BATCH = 128
SEED = 0
# Below this share of robust images, in percent, an attack without a real limit counts as having won.
FOOLED = 5.0
# Enough for the shape of a curve; the figures that count are the evaluation's, with all its steps on the whole test set.
MAX_STEPS = 10


@dataclass(frozen=True)
class Attacked:
    """Test images and one attack's answer, on the model's device.

    images_u8 uint8 (N, H, W, 3); clean and adversarial fp32 (N, 3, H, W) in [0, 1]; labels int64 (N,); clean_probabilities and
    adversarial_probabilities fp32 (N, K), softmax of the logits.
    """

    images_u8: Tensor
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_probabilities: Tensor
    adversarial_probabilities: Tensor
    attack: AttackSpec

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def clean_correct(self) -> Tensor:
        """bool (N,)."""
        return self.clean_probabilities.argmax(1) == self.labels

    @property
    def robust(self) -> Tensor:
        """Correct clean and under the attack, bool (N,)."""
        return self.clean_correct & (self.adversarial_probabilities.argmax(1) == self.labels)


@dataclass(frozen=True)
class EpsCurve:
    """Robust accuracy in percent of `count` images at each radius; the last one, `limitless`, is the radius of the check.

    At `limitless` every image can be turned into uniform grey, so that no classifier can be right about more than one class.
    """

    eps: tuple[float, ...]
    accuracy: tuple[float, ...]
    limitless: float
    limitless_accuracy: float
    count: int
    attack: AttackSpec
    commonest: float = 0.0  # share of the most frequent class in percent: a constant answer is right, and robust, that often


@dataclass(frozen=True)
class EmbeddingMap:
    """points (V * N, 2), views stacked in the order of `views`; labels (N,); mean cosine similarities of the embeddings.

    points is None where all embeddings coincide. projected: whether the embeddings are the projection head's.
    """

    views: tuple[str, ...]
    points: np.ndarray | None
    labels: np.ndarray
    projected: bool
    similarity: dict[str, float]


def report_attack(attack: AttackSpec) -> AttackSpec:
    """What the report runs for an evaluation attack: one restart, at most MAX_STEPS steps, each at least eps / 4 long."""
    if attack.steps <= MAX_STEPS:
        return dataclasses.replace(attack, restarts=1)
    name = attack.name.replace(str(attack.steps), str(MAX_STEPS))
    return dataclasses.replace(attack, name=name, steps=MAX_STEPS, step_size=max(attack.step_size, attack.eps / 4), restarts=1)


def attack_images(model: RobustClassifier, split: Split, attack: AttackSpec, *, limit: int, device: torch.device) -> Attacked:
    """One restart of `attack` on at most `limit` images of `split`, class-balanced, always the same ones."""
    chosen = torch.arange(len(split))
    if limit < len(split):
        chosen = torch.from_numpy(stratified_choice(split.labels.numpy(), limit, random_state(SEED, TEST_LIMIT_STREAM)))
    images_u8, labels = split.gather(chosen).to(device), split.labels[chosen].to(device)
    clean = to_float(images_u8)
    with full_precision(), eval_mode(model):
        adversarial = _perturb(model, clean, labels, attack)
        probabilities = _probabilities(model, clean), _probabilities(model, adversarial)
    return Attacked(images_u8, clean, adversarial, labels, *probabilities, attack)


def pick_examples(attacked: Attacked, count: int) -> list[int]:
    """Indices of `count` images, correctly classified ones first, of which every other one is fooled where there are enough.

    Of each kind the classes take turns, so that the first ones show as many classes as there are.
    """
    labels = attacked.labels.tolist()
    robust, correct = attacked.robust.tolist(), attacked.clean_correct.tolist()
    order = _by_turns(labels)
    fooled = [i for i in order if correct[i] and not robust[i]]
    held = [i for i in order if robust[i]]
    take_fooled = min(len(fooled), max(count // 2, count - len(held)))
    chosen = fooled[:take_fooled] + held[: count - take_fooled]
    chosen += [i for i in order if not correct[i]][: count - len(chosen)]
    return chosen


def _by_turns(labels: Sequence[int]) -> list[int]:
    """All indices, first the first of every class, then the second of every class, and so on."""
    seen: dict[int, int] = {}
    keys = []
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        keys.append((seen[label], label, i))
    return [i for _, _, i in sorted(keys)]


def difference_factor(attack: AttackSpec, differences: Tensor) -> float:
    """Magnification at which the largest difference spans the whole range around mid-grey, rounded down to 2 digits."""
    reach = attack.eps if attack.norm == "linf" else float(differences.abs().max())
    if reach <= 0:
        return 1.0
    factor = 0.5 / reach
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return math.floor(factor / unit + 1e-9) * unit


def difference_image(clean: Tensor, adversarial: Tensor, factor: float) -> Tensor:
    """0.5 + factor * (adversarial - clean), clamped to [0, 1]: mid-grey is no difference."""
    return (0.5 + factor * (adversarial - clean)).clamp(0, 1)


def accuracy_against_eps(model: RobustClassifier, attacked: Attacked) -> EpsCurve:
    """Robust accuracy at EPS_FACTORS times the attack's eps, and at a radius without limits.

    The balls are nested, so an image fooled at one radius counts as fooled at every larger one, and one that holds at the
    attack's own eps as holding at every smaller one: the curve cannot rise, and each image is attacked only
    where its fate is open.
    """
    attack = attacked.attack
    limitless = max(4 * attack.eps, 0.5 * (1 if attack.norm == "linf" else math.sqrt(attacked.clean[0].numel())))
    radii = [factor * attack.eps for factor in EPS_FACTORS] + [limitless]
    standing = attacked.clean_correct.clone()
    accuracy = []
    with full_precision(), eval_mode(model):
        for eps in radii:
            if eps == attack.eps:
                standing &= attacked.robust
            elif eps > 0:
                among = ~attacked.robust if eps < attack.eps else standing
                _try_to_fool(model, attacked, attack.with_eps(eps), standing, among)
            accuracy.append(100 * standing.double().mean().item())
    commonest = 100 * attacked.labels.bincount().max().item() / len(attacked)
    return EpsCurve(tuple(radii[:-1]), tuple(accuracy[:-1]), limitless, accuracy[-1], len(attacked), attack, commonest)


def masking_check(curve: EpsCurve) -> tuple[bool, str]:
    """Whether robust accuracy falls as it must where the radius has no real limit, and a sentence that says so in figures."""
    radius = f"eps = {fraction(curve.limitless)}, where every image can be made uniformly grey"
    if curve.accuracy[0] <= FOOLED:
        return True, f"Nothing to check: the model is right about {curve.accuracy[0]:.1f} % of the clean images."
    if curve.limitless_accuracy > max(FOOLED, curve.commonest):
        return False, (
            f"Warning: {curve.limitless_accuracy:.1f} % of the images still hold at {radius}. No classifier can be that robust: "
            "the attack's gradients are masked, or the attack is too weak, and the robust accuracies here are not to be trusted."
        )
    return True, (
        f"Check passed: robust accuracy falls from {curve.accuracy[0]:.1f} % at eps 0 to {curve.accuracy[-1]:.1f} % at 4 times "
        f"the evaluation's eps and to {curve.limitless_accuracy:.1f} % at {radius}. This shows no gradient masking, and does not "
        "prove its absence; AutoAttack is the stronger test."
    )


def _try_to_fool(model: RobustClassifier, attacked: Attacked, attack: AttackSpec, standing: Tensor, among: Tensor) -> None:
    """Attack the images that stand and are `among` these; those that fall are cleared in `standing`, bool (N,)."""
    chosen = (standing & among).nonzero().flatten()
    if len(chosen):
        x, y = attacked.clean[chosen], attacked.labels[chosen]
        standing[chosen] = _probabilities(model, _perturb(model, x, y, attack)).argmax(1) == y


def map_embeddings(model: RobustClassifier, attacked: Attacked, *, projected: bool, augmentation: str, pad: int,
                   limit: int = 300) -> EmbeddingMap:  # fmt: skip
    """t-SNE of the L2-normalised embeddings (after PCA to at most 50 dimensions) of clean, augmented and adversarial images.

    projected: embed by the projection head, else by the backbone's features.
    """
    n = min(limit, len(attacked))
    generator = torch.Generator(attacked.images_u8.device).manual_seed(SEED)
    views = {
        "clean": attacked.clean[:n],
        "augmented": augment(attacked.images_u8[:n], augmentation, generator, pad=pad),
        "adversarial": attacked.adversarial[:n],
    }
    with full_precision(), eval_mode(model), torch.no_grad():
        embedded = {name: F.normalize(_embed(model, view, projected), dim=1) for name, view in views.items()}
    clean, labels = embedded["clean"], attacked.labels[:n]
    different = labels[:, None] != labels[None]
    similarity = {name: F.cosine_similarity(clean, embedded[name]).mean().item() for name in ("augmented", "adversarial")}
    if different.any():
        similarity["other classes"] = (clean @ clean.T)[different].mean().item()
    points = _tsne(torch.cat(list(embedded.values())).double().cpu().numpy())
    return EmbeddingMap(tuple(views), points, labels.cpu().numpy(), projected, similarity)


def _tsne(embeddings: np.ndarray) -> np.ndarray | None:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(embeddings) < 4 or not np.isfinite(embeddings).all() or embeddings.std(axis=0).max() < 1e-6:
        return None
    dimensions = min(50, *embeddings.shape)
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    # One thread: sums in one order, the same map every time; and t-SNE's many tiny parallel loops crawl on a busy machine.
    with threadpool_limits(1):
        reduced = PCA(dimensions, svd_solver="full", random_state=SEED).fit_transform(embeddings)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(reduced)


def _embed(model: RobustClassifier, images: Tensor, projected: bool) -> Tensor:
    pieces = [model(piece, embed=True)[1] if projected else model.features(piece) for piece in images.split(BATCH)]
    return torch.cat(pieces).float()


def _perturb(model: RobustClassifier, images: Tensor, labels: Tensor, attack: AttackSpec) -> Tensor:
    perturb = attack.build()
    generator = torch.Generator(images.device).manual_seed(SEED)
    pieces = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return torch.cat([perturb(model, x, y, generator=generator) for x, y in pieces])


def _probabilities(model: RobustClassifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(piece).float().softmax(1) for piece in images.split(BATCH)])

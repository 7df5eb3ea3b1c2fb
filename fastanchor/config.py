"""Typed configuration of a training run: every setting with its type, default, allowed range and help text.

Fractions such as `8/255` are numbers everywhere. How configurations are read is in `settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec


def parse_number(text: str) -> float:
    """`0.031`, `1e-3` or a fraction such as `8/255`, as a float. Raises ValueError."""
    try:
        numerator, slash, denominator = text.partition("/")
        return float(numerator) / float(denominator) if slash else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


Number = Annotated[
    float,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda args: parse_number(args[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]


@dataclass(frozen=True)
class DataConfig:
    source: str = "digits"
    """digits | cifar10 | cifar100 | cifar100:coarse | folder:PATH | packed:PATH | npz:PATH | synthetic"""
    backend: Literal["auto", "resident", "dali", "torch"] = "auto"
    """How batches reach the device. resident: the whole set on it as uint8 | dali: NVIDIA DALI | torch: worker processes with
    Pillow | auto: resident where the set fits, else dali where it is installed, else torch."""
    workers: int | None = None
    """Threads (dali) or processes (torch) that decode (None: one a core, at most 16)."""
    decoder: Literal["auto", "cpu", "mixed"] = "auto"
    """Where dali decodes files: cpu | mixed: on the GPU | auto: mixed for a GPU."""
    root: str | None = None
    """Folder of downloaded archives (default: $FASTANCHOR_DATA, or ~/.cache/fastanchor)."""
    limit: int | None = None
    """At most this many training and this many test images, class-balanced, chosen by split_seed."""
    val_fraction: Number = 0.1
    """Share of the training set held out for choosing the best checkpoint."""
    split_seed: int = 0
    """Seed of the train / validation split and of --limit; apart from `seed`, so that seeds share one split."""
    skip_broken: bool = False
    """Leave unreadable images of a folder out (counted and listed) instead of stopping."""
    image_size: int | None = None
    """Side in pixels of the images made of a folder's: the largest centred square, resized."""
    classes: str | None = None
    """File that lists the classes of a folder to use, one a line: a subset of ImageNet, say."""
    labels: str | None = None
    """CSV of file,class to check a folder against."""
    sampler: Literal["shuffle", "class_balanced", "m_per_class"] = "shuffle"
    """shuffle: every image once an epoch | class_balanced: every class equally often | m_per_class: batches of per_class images
    each of batch_size / per_class classes, for contrastive losses."""
    per_class: int = 4
    """Images a class in a batch of the sampler m_per_class."""
    extra: str | None = None
    """npz of more training images, generated ones say (memory-mapped), mixed into every batch."""
    extra_share: Number = 0.7
    """Share of a batch that comes from `extra`; an epoch has as many batches as without it."""
    download: bool = False
    """Download a missing archive (needs the extra `vision`)."""
    augment: Literal["crop_flip", "crop", "resized_crop_flip", "simclr", "none"] = "crop_flip"
    """Training augmentation: zero-padded crop, with horizontal flip; resized_crop_flip: a crop of 8 to 100 % of the area,
    resized, and a flip, the custom for ImageNet; simclr: resized crop, flip, colour jitter, greyscale."""
    pad: int = 4
    """Padding of the random crop in pixels."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet18"
    """resnet18 | preactresnet18 | wrn28_10 | wrn34_10 | wrnDEPTH_WIDTH, with the CIFAR stem (3x3, stride 1, no max-pool) |
    resnet50, with the ImageNet stem (7x7, stride 2, max-pool)."""
    width: int | None = None
    """Channels of the first stage (None: as published, 64 for the ResNets, 16 for the wide nets)."""
    head: Literal["mlp", "linear", "identity"] = "mlp"
    """Projection head of the contrastive loss; identity applies the loss to the backbone's features."""
    head_hidden: int = 512
    """Hidden units of the mlp head."""
    head_dim: int = 128
    """Dimensions of the embeddings (mlp and linear heads)."""


@dataclass(frozen=True)
class AttackConfig:
    eps: Number = 8 / 255
    """Radius of the ball in pixel units of [0, 1]; 0 trains on clean images only."""
    step_size: Number = 2 / 255
    """Length of one step, same units."""
    steps: int = 10
    """Gradient steps."""
    objective: Literal["ce", "ce+hsc", "hsc"] = "ce"
    """What the training attack maximises."""
    bn: Literal["eval", "train", "train_frozen"] = "eval"
    """BatchNorm while attacking: running statistics | batch statistics, which move the running ones | batch statistics only."""
    start: Literal["uniform", "gaussian", "zero"] = "uniform"
    """Start noise: uniform in the ball | 0.001 * N(0, 1) | none."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    backend: Literal["auto", "reference", "eager", "compiled", "graphed"] = "auto"
    """auto: the fastest that is right here | eager: on the BN-folded twin | compiled: its step through torch.compile |
    graphed: as one CUDA graph | reference: the plain loop they are tested against."""


@dataclass(frozen=True)
class LossConfig:
    ce_adv: Number = 1.0
    """Weight of the cross-entropy on adversarial images."""
    ce_clean: Number = 0.0
    """Weight of the cross-entropy on the augmented (not attacked) images."""
    hsc: Number = 0.5
    """Weight (lambda) of the hardness-weighted supervised contrastive loss; 0 is plain PGD adversarial training."""
    label_smoothing: Number = 0.0
    """Label smoothing of the cross-entropies that train the network (never of the attack's)."""
    temperature: Number = 0.1
    """Temperature of the contrastive loss."""
    beta: Number = 2.0
    """Hardness of the exp weights: > 0 prefers hard (distant) positives, 0 is SupCon, < 0 prefers easy ones."""
    beta_warmup_epochs: Number = 10.0
    """beta rises linearly from 0 over this many epochs."""
    weight: Literal["exp", "uniform", "pow", "topk"] = "exp"
    """Kind of positive weights."""
    gamma: Number = 1.0
    """Exponent of the pow weights."""
    k: int = 8
    """Number of positives kept by the topk weights."""
    detach_weights: bool = True
    """Treat the weights as constants in the gradient (the exact gradient of a soft-min over positives)."""
    normalizer: Literal["sum", "count"] = "sum"
    """Weights divided by their sum or by the number of positives."""
    denominator: Literal["all", "pairwise", "negatives"] = "all"
    """Which pairs the softmax runs over."""
    hsc_precision: Literal["fp16", "tf32", "ieee"] = "fp16"
    """How the kernels keep the unit rows; ieee is fp32 without tensor cores. Plain PyTorch computes in fp32."""
    views: Literal["aug+adv", "clean+aug+adv"] = "aug+adv"
    """Views that enter the contrastive loss."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """sgd | adamw | lars and lamb: steps scaled layer by layer, for the large batches of contrastive recipes."""
    backend: Literal["auto", "torch", "apex"] = "auto"
    """auto and torch: torch's fused kernels | apex: NVIDIA apex's FusedSGD or FusedLAMB, where a built apex is installed."""
    lr: Number = 0.1
    """Peak learning rate."""
    momentum: Number = 0.9
    """Momentum of sgd and lars."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    beta1: Number = 0.9
    """Decay of the running mean of the gradient (adamw, lamb)."""
    beta2: Number = 0.999
    """Decay of the running mean of its square (adamw, lamb)."""
    eps: Number = 1e-8
    """Added to the root of that mean (adamw, lamb; 1e-6 is usual for lamb)."""
    trust_coefficient: Number = 0.001
    """Length of a layer's step relative to the norm of its weights, at lr 1 (lars)."""
    weight_decay: Number = 5e-4
    """L2 penalty (sgd, lars) or decoupled decay (adamw, lamb); lars and lamb leave biases and normalisation out of it."""
    schedule: Literal["step", "cosine", "cyclic"] = "step"
    """step: x decay at each milestone | cosine: to 0 | cyclic: up linearly to lr over the first `peak` share, then down to 0."""
    milestones: tuple[Number, ...] = (100.0, 105.0)
    """Epochs at which `step` decays."""
    decay: Number = 0.1
    """Factor of `step`."""
    peak: Number = 0.4
    """Share of the training at which `cyclic` reaches lr."""
    warmup_epochs: Number = 0.0
    """Linear warm-up before `step` and `cosine`."""
    clip_grad_norm: Number | None = None
    """Clip the gradient's total norm (None: off)."""
    ema_decay: Number = 0.0
    """Decay a step of the exponential moving average of weights; 0 is off. When on, the average is what is judged and saved."""


@dataclass(frozen=True)
class EngineConfig:
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole training step as one CUDA graph. auto: on a GPU, where it can be captured | on: that or an error | off."""
    compile: bool = False
    """torch.compile the attack's step and the training forward: a minute or more at the start, faster steps after it."""
    kernels: Literal["auto", "on", "off"] = "auto"
    """Triton kernels for the contrastive loss, the attack and the augmentation. auto: on a GPU, where they have agreed with plain
    PyTorch | on: the same, or an error where they do not serve a part that has them (on a CPU: their plain PyTorch counterparts)
    | off. FASTANCHOR_KERNELS=off and =unchecked overrule the agreement."""


@dataclass(frozen=True)
class Stage2Config:
    mode: Literal["none", "alf", "slf"] = "none"
    """Linear classifier on the frozen backbone: none | alf (on adversarial images) | slf (on clean ones)."""
    epochs: int = 25
    """Epochs of stage 2."""
    lr: Number = 0.01
    """Peak learning rate of stage 2."""
    milestones: tuple[Number, ...] = (15.0, 20.0)
    """Epochs of the x0.1 decays."""
    weight_decay: Number = 2e-4
    """L2 penalty of the classifier."""
    batch_size: int = 512
    """Batch size of stage 2."""


@dataclass(frozen=True)
class ValidationConfig:
    attack: str = "pgd10"
    """Attack that chooses the best checkpoint on the validation split (see eval.attacks for the grammar)."""
    every: int = 1
    """Validate every this many epochs (the last epoch always)."""
    limit: int | None = None
    """At most this many validation images."""


@dataclass(frozen=True)
class EvalConfig:
    attacks: tuple[str, ...] = ("fgsm", "pgd20")
    """Attacks on the test set after training: NAME[:key=value,...], as in pgd20:eps=0.031,step_size=0.003,restarts=2.
    Names: fgsm, pgdN, cwN (PGD on the CW margin), autoattack. eps defaults to attack.eps, step_size to eps / 4."""
    batch_size: int = 500
    """Images a forward."""
    limit: int | None = None
    """At most this many test images."""
    report_images: int = 256
    """Test images attacked anew for the report's figures."""


@dataclass(frozen=True)
class Config:
    method: Literal["anchor", "standard"] = "anchor"
    """anchor: adversarial training with the contrastive loss (loss.hsc 0 is PGD-AT); standard: undefended training."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    val: ValidationConfig = field(default_factory=ValidationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    epochs: int = 110
    """Epochs of stage 1."""
    batch_size: int = 128
    """Images a step (the network sees this many a view)."""
    seed: int = 0
    """Seed of weights, batch order, augmentation and attack noise."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of training and training attacks; logits, losses, perturbations and all evaluation are fp32 always.
    fp32 convolutions of the training follow torch's TF32 setting on a GPU; evaluation never does."""
    channels_last: bool = True
    """Memory layout of activations and weights; changes results only by rounding."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run (needs the extra `tensorboard`)."""


# Allowed ranges: dotted key -> (test, what is allowed). Types and choices are checked by the parser.
_positive = (lambda v: v > 0, "> 0")
_not_negative = (lambda v: v >= 0, ">= 0")
_at_least_one = (lambda v: v >= 1, ">= 1")
_each_not_negative = (lambda v: all(x >= 0 for x in v), "a list, each >= 0")
_share = (lambda v: 0 <= v < 1, "in [0, 1)")
RANGES: dict[str, tuple[Any, str]] = {
    "data.limit": _at_least_one,
    "data.val_fraction": (lambda v: 0 < v <= 0.5, "in (0, 0.5]"),
    "data.split_seed": _not_negative,
    "data.image_size": (lambda v: 8 <= v <= 4096, "in [8, 4096]"),
    "data.pad": _not_negative,
    "data.workers": (lambda v: 0 <= v <= 256, "in [0, 256]"),
    "data.per_class": _at_least_one,
    "data.extra_share": (lambda v: 0 < v < 1, "in (0, 1)"),
    "model.width": _at_least_one,
    "model.head_hidden": _at_least_one,
    "model.head_dim": _at_least_one,
    "attack.eps": _not_negative,
    "attack.step_size": _positive,
    "attack.steps": _at_least_one,
    "loss.ce_adv": _not_negative,
    "loss.ce_clean": _not_negative,
    "loss.hsc": _not_negative,
    "loss.label_smoothing": _share,
    "loss.temperature": _positive,
    "loss.beta_warmup_epochs": _not_negative,
    "loss.gamma": _positive,
    "loss.k": _at_least_one,
    "optim.lr": _positive,
    "optim.momentum": _share,
    "optim.beta1": _share,
    "optim.beta2": _share,
    "optim.eps": _positive,
    "optim.trust_coefficient": _positive,
    "optim.weight_decay": _not_negative,
    "optim.milestones": _each_not_negative,
    "optim.decay": _positive,
    "optim.peak": (lambda v: 0 < v < 1, "in (0, 1)"),
    "optim.warmup_epochs": _not_negative,
    "optim.clip_grad_norm": _positive,
    "optim.ema_decay": _share,
    "stage2.epochs": _at_least_one,
    "stage2.lr": _positive,
    "stage2.milestones": _each_not_negative,
    "stage2.weight_decay": _not_negative,
    "stage2.batch_size": _at_least_one,
    "val.every": _at_least_one,
    "val.limit": _at_least_one,
    "eval.attacks": (lambda v: len(v) > 0, "a list of at least one attack"),
    "eval.batch_size": _at_least_one,
    "eval.limit": _at_least_one,
    "eval.report_images": _at_least_one,
    "epochs": _at_least_one,
    "batch_size": _at_least_one,
    "seed": _not_negative,
}

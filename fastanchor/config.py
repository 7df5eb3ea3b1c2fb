"""Typed configuration of a training run: every setting with its type, default, allowed range and help text.

Fractions such as `8/255` are numbers everywhere. `loss` has the settings of the method, each method's own: those here are
ANCHOR's. How configurations are read is in `settings`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

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


# What a value may be: (test, in words). Types and choices are checked by the parser.
Allowed = tuple[Any, str]
POSITIVE: Allowed = (lambda v: v > 0, "> 0")
NOT_NEGATIVE: Allowed = (lambda v: v >= 0, ">= 0")
AT_LEAST_ONE: Allowed = (lambda v: v >= 1, ">= 1")
EACH_NOT_NEGATIVE: Allowed = (lambda v: all(x >= 0 for x in v), "a list, each >= 0")
SHARE: Allowed = (lambda v: 0 <= v < 1, "in [0, 1)")


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
    weak: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """Augmentation of the view that a method with strong ones attacks, as AdvCL does."""
    pad: int = 4
    """Padding of the random crop in pixels."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet18"
    """resnet18 | preactresnet18 | wrn28_10 | wrn34_10 | wrnDEPTH_WIDTH, with the CIFAR stem (3x3, stride 1, no max-pool) |
    resnet50, with the ImageNet stem (7x7, stride 2, max-pool)."""
    width: int | None = None
    """Channels of the first stage (None: as published, 64 for the ResNets, 16 for the wide nets)."""
    head: Literal["mlp", "mlp_bn", "linear", "identity"] = "mlp"
    """Projection head of the contrastive loss; mlp_bn has a BatchNorm before its ReLU; identity applies the loss to the
    backbone's features."""
    head_hidden: int = 512
    """Hidden units of the mlp heads."""
    head_dim: int = 128
    """Dimensions of the embeddings (mlp and linear heads)."""
    view_bn: Literal["mixed", "separate"] = "mixed"
    """BatchNorm in the training forward of several views. mixed: all views are one batch | separate: one forward a view, each
    of which moves the running statistics."""


@dataclass(frozen=True)
class AttackConfig:
    eps: Number = 8 / 255
    """Radius of the ball in pixel units of [0, 1]; 0 trains on clean images only."""
    step_size: Number = 2 / 255
    """Length of one step, same units."""
    steps: int = 10
    """Gradient steps."""
    objective: Literal["ce", "cw", "kl", "ce+hsc", "hsc", "ce+contrastive", "contrastive", "ce+nuclear"] = "ce"
    """What the training attack maximises; each method knows some of them."""
    bn: Literal["eval", "train", "train_frozen"] = "eval"
    """BatchNorm while attacking: running statistics | batch statistics, which move the running ones | batch statistics only."""
    start: Literal["uniform", "bernoulli", "gaussian", "zero"] = "uniform"
    """Start noise: uniform in the ball | a random sign a pixel, times the radius | 0.001 * N(0, 1) | none."""
    start_radius: Number | None = None
    """Radius of uniform and bernoulli start noise (None: eps)."""
    project: bool = True
    """Project on the ball after every step; without it on the pixels' range only, as N-FGSM does."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    backend: Literal["auto", "reference", "eager", "compiled", "graphed"] = "auto"
    """auto: the fastest that is right here | eager: on the BN-folded twin | compiled: its step through torch.compile |
    graphed: as one CUDA graph | reference: the plain loop they are tested against."""


@dataclass(frozen=True)
class LossConfig:
    RANGES: ClassVar[dict[str, Allowed]] = {
        "ce_adv": NOT_NEGATIVE,
        "ce_clean": NOT_NEGATIVE,
        "hsc": NOT_NEGATIVE,
        "label_smoothing": SHARE,
        "temperature": POSITIVE,
        "beta_warmup_epochs": NOT_NEGATIVE,
        "gamma": POSITIVE,
        "k": AT_LEAST_ONE,
    }
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
    awp_gamma: Number = 0.0
    """Adversarial weight perturbation (Wu et al. 2020): how far, relative to each weight's norm, weights move against the loss
    before its gradient is taken; 0 is off."""
    awp_start: Number = 0.0
    """Epoch from which weights are perturbed."""


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
    mode: Literal["none", "alf", "slf", "aff"] = "none"
    """none | a new linear classifier on the frozen backbone, slf: on clean images, alf: on adversarial ones | aff: all weights,
    on adversarial images."""
    loss: Literal["ce", "trades"] = "ce"
    """What aff minimises: cross-entropy on adversarial images | TRADES."""
    beta: Number = 6.0
    """Weight of the divergence in TRADES."""
    epochs: int = 25
    """Epochs of stage 2."""
    lr: Number = 0.01
    """Peak learning rate of stage 2."""
    milestones: tuple[Number, ...] = (15.0, 20.0)
    """Epochs of the decays."""
    decay: Number = 0.1
    """Factor of each decay."""
    weight_decay: Number = 2e-4
    """L2 penalty of what is trained."""
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
class WatchConfig:
    images: int = 0
    """Training images that are attacked after every epoch, to notice catastrophic overfitting; 0 is off."""
    attack: str = "pgd10"
    """Attack on them (see eval.attacks for the grammar)."""
    drop: Number = 20.0
    """Percentage points below its best that their robust accuracy may fall before it counts as collapsed."""
    stop: bool = False
    """End the stage there, instead of warning only; the best epoch so far is kept."""


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
    method: str = "anchor"
    """advcl | anchor | ascl | clead_code | clead_joint | mart | nuat | pgd_at | standard (undefended training) | supcon |
    suprobcon | trades, or the path of a .py file with a method of your own. `loss` has the settings of this one."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    val: ValidationConfig = field(default_factory=ValidationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
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


# Allowed values by dotted key; those of `loss` are in the method's own RANGES.
RANGES: dict[str, Allowed] = {
    "data.limit": AT_LEAST_ONE,
    "data.val_fraction": (lambda v: 0 < v <= 0.5, "in (0, 0.5]"),
    "data.split_seed": NOT_NEGATIVE,
    "data.image_size": (lambda v: 8 <= v <= 4096, "in [8, 4096]"),
    "data.pad": NOT_NEGATIVE,
    "data.workers": (lambda v: 0 <= v <= 256, "in [0, 256]"),
    "data.per_class": AT_LEAST_ONE,
    "data.extra_share": (lambda v: 0 < v < 1, "in (0, 1)"),
    "model.width": AT_LEAST_ONE,
    "model.head_hidden": AT_LEAST_ONE,
    "model.head_dim": AT_LEAST_ONE,
    "attack.eps": NOT_NEGATIVE,
    "attack.step_size": POSITIVE,
    "attack.steps": AT_LEAST_ONE,
    "attack.start_radius": NOT_NEGATIVE,
    "optim.lr": POSITIVE,
    "optim.momentum": SHARE,
    "optim.beta1": SHARE,
    "optim.beta2": SHARE,
    "optim.eps": POSITIVE,
    "optim.trust_coefficient": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.milestones": EACH_NOT_NEGATIVE,
    "optim.decay": POSITIVE,
    "optim.peak": (lambda v: 0 < v < 1, "in (0, 1)"),
    "optim.warmup_epochs": NOT_NEGATIVE,
    "optim.clip_grad_norm": POSITIVE,
    "optim.ema_decay": SHARE,
    "optim.awp_gamma": NOT_NEGATIVE,
    "optim.awp_start": NOT_NEGATIVE,
    "stage2.beta": NOT_NEGATIVE,
    "stage2.decay": POSITIVE,
    "stage2.epochs": AT_LEAST_ONE,
    "stage2.lr": POSITIVE,
    "stage2.milestones": EACH_NOT_NEGATIVE,
    "stage2.weight_decay": NOT_NEGATIVE,
    "stage2.batch_size": AT_LEAST_ONE,
    "val.every": AT_LEAST_ONE,
    "val.limit": AT_LEAST_ONE,
    "watch.images": NOT_NEGATIVE,
    "watch.drop": POSITIVE,
    "eval.attacks": (lambda v: len(v) > 0, "a list of at least one attack"),
    "eval.batch_size": AT_LEAST_ONE,
    "eval.limit": AT_LEAST_ONE,
    "eval.report_images": AT_LEAST_ONE,
    "epochs": AT_LEAST_ONE,
    "batch_size": AT_LEAST_ONE,
    "seed": NOT_NEGATIVE,
}

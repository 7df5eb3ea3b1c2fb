"""What an epoch should cost on a device: the step's FLOPs and bytes, operator by operator, against the device's two ceilings.

    python -m bench.cost [--method anchor|pgd-at] [--batch 128] [--steps 10] ... [--matmul TFLOPS --copy GB/s]

The engine's own operators are run once on tensors without storage (torch's FakeTensorMode) and added up by `Counter`: nothing is
computed, so a prediction for a GPU needs none. Nothing here is measured but the ceilings, where they are not given.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import cases, program
from bench.cost_count import Counter, count_step
from fastanchor import environment
from fastanchor.ceilings import copy_bandwidth, matmul_rate
from fastanchor.config import Config
from fastanchor.errors import UserError
from fastanchor.methods import build_method
from fastanchor.models import build_model

CIFAR_IMAGES, EMA_DECAY = 50_000, 0.999
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = {"anchor": cases.METHODS["ANCHOR"], "pgd-at": cases.METHODS["PGD-AT"]}
# Least value of a flag: BatchNorm needs more than one value a channel, the networks some pixels.
SMALLEST = {"width": 1, "pixels": 8, "images": 1, "batch": 2, "steps": 1, "classes": 2}
LOSS_ROWS, LOSS_FEATURES = (256, 1024, 4096, 16384), 128
# Parts of a step. "products" are convolutions and matrix products, with the bytes that they themselves read and write.
PARTS = (
    "augmentation", "folding of BatchNorm", "attack: forward products", "attack: input-gradient products",
    "attack: elementwise", "training: forward products", "training: gradient products", "training: normalisation, elementwise",
    "losses", "metrics", "update: optimiser, average",
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """A device's ceilings, FLOP/s (2 a multiply-add) and B/s (read and written), and where they come from, in words."""

    matmul: float
    copy: float
    source: str


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes read and written, and the seconds that operators take one after another, each at its own bound."""

    flops: float
    bytes: float
    in_turn_s: float


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of an epoch. parts: by name, of an epoch each; steps_per_epoch: images / batch, not rounded."""

    parts: dict[str, Work]
    rates: Rates
    steps_per_epoch: float

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts.values())

    @property
    def compute_s(self) -> float:
        """Seconds of the products at the matmul rate; a convolution by Winograd's algorithm needs fewer of them."""
        return self.flops / self.rates.matmul

    @property
    def memory_s(self) -> float:
        """Seconds of all traffic at the copy bandwidth; less where tensors stay in a cache or operators are fused."""
        return self.bytes / self.rates.copy

    @property
    def no_overlap_s(self) -> float:
        """The sum of both: nothing is computed while bytes move."""
        return self.compute_s + self.memory_s

    @property
    def full_overlap_s(self) -> float:
        """The longer of both: everything overlaps with everything."""
        return max(self.compute_s, self.memory_s)

    @property
    def in_turn_s(self) -> float:
        """Operators one after another, each at the longer of its own two times: between full and no overlap."""
        return sum(part.in_turn_s for part in self.parts.values())

    def share(self, name: str) -> float:
        """A part's share of `in_turn_s`."""
        return self.parts[name].in_turn_s / self.in_turn_s


def predict(
    config: Config, rates: Rates, *, model: str = "resnet18", width: int | None = None, pixels: int = 32, classes: int = 10,
    images: int = CIFAR_IMAGES, batch: int = 128, gpu: bool = True,
) -> Prediction:  # fmt: skip
    """Predicted cost of an epoch of `images` images in batches of `batch`; the rest as in `count_step`.

    Not in it: launches and the host, kernels below the ceilings, caches (which make traffic cheaper), exponentials.
    """
    steps = images / batch
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    counted = count_step(config, model=model, width=width, pixels=pixels, classes=classes, batch=batch, gpu=gpu)
    for name, flops, moved in counted:
        found = sums[name]
        found[0] += flops
        found[1] += moved
        found[2] += max(flops / rates.matmul, moved / rates.copy)
    return Prediction({name: Work(*(steps * x for x in sums[name])) for name in PARTS if name in sums}, rates, steps)


def loss_work(rows: int, features: int = LOSS_FEATURES, *, precision: str = "bf16", gpu: bool = True) -> tuple[int, int]:
    """FLOPs and bytes of the contrastive loss alone with its gradient, on (rows, features) fp32 embeddings."""
    config = cases.make_config(METHODS["anchor"], 1, precision=precision, kernels="on" if gpu else "off")
    with FakeTensorMode(allow_non_fake_inputs=True), Counter(gpu) as counter:
        embeddings, labels = torch.empty(rows, features).requires_grad_(), torch.empty(rows, dtype=torch.int64)
        before = len(counter.operations)
        build_method(config).contrastive(torch.zeros(()))(embeddings, labels).backward()
    made = counter.operations[before:]
    return sum(flops for _, flops, _ in made), sum(moved for _, _, moved in made)


def make_config(method: str, steps: int, precision: str) -> Config:
    """A configuration of the benchmarks with a weight average: `method` out of METHODS."""
    return cases.make_config(METHODS[method], steps, precision=precision, ema_decay=EMA_DECAY)


def _with_views(config: Config, views: int) -> Config:
    """1 (adversarial: PGD-AT), 2 (and augmented) or 3 (and clean) views in the training forward."""
    named = "clean+aug+adv" if views == 3 else "aug+adv"
    return dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, views=named, hsc=config.loss.hsc if views > 1 else 0.0)
    )


def scaling(config: Config, rates: Rates, size: dict) -> Iterator[tuple[str, Prediction]]:
    """(what is changed, prediction), one thing at a time; size: `predict`'s keywords."""
    batch, classes, steps = size["batch"], size["classes"], config.attack.steps
    yield "as asked for", predict(config, rates, **size)
    for found in (batch // 2, 2 * batch, 4 * batch):
        if found >= SMALLEST["batch"]:
            yield f"batch {found}", predict(config, rates, **size | {"batch": found})
    for found in (1, 2 * steps):
        attack = dataclasses.replace(config.attack, steps=found)
        yield f"steps {found}", predict(dataclasses.replace(config, attack=attack), rates, **size)
    if config.loss.hsc:
        for views in (1, 2, 3):
            yield f"views {views}", predict(_with_views(config, views), rates, **size)
    if size["width"] is not None:
        for found in (max(1, size["width"] // 2), 2 * size["width"]):
            yield f"width {found}", predict(config, rates, **size | {"width": found})
    yield f"classes {10 * classes}", predict(config, rates, **size | {"classes": 10 * classes})


def show(prediction: Prediction) -> None:
    """The table of one epoch by part, and its bounds."""
    rates = prediction.rates
    print(f"{'predicted, an epoch':42}{'TFLOP':>10}{'GB':>10}{'compute s':>11}{'memory s':>10}{'in turn s':>11}{'share':>8}")
    for name, work in prediction.parts.items():
        print(
            f"{name:42}{work.flops / 1e12:10.4g}{work.bytes / 1e9:10.4g}{work.flops / rates.matmul:11.3f}"
            f"{work.bytes / rates.copy:10.3f}{work.in_turn_s:11.3f}{prediction.share(name):8.1%}"
        )
    print(
        f"predicted s/epoch: compute-bound {prediction.compute_s:.3f}, memory-bound {prediction.memory_s:.3f}; "
        f"full overlap {prediction.full_overlap_s:.3f}, operators in turn {prediction.in_turn_s:.3f}, "
        f"no overlap {prediction.no_overlap_s:.3f}"
    )


def show_scaling(config: Config, rates: Rates, size: dict) -> None:
    """How the epoch grows, and the contrastive loss alone with its number of rows."""
    print(f"\n{'predicted, one thing changed':42}{'PFLOP':>10}{'TB':>10}{'in turn s':>11}{'ratio':>8}")
    base = None
    for name, found in scaling(config, rates, size):
        base = base or found.in_turn_s
        print(
            f"{name:42}{found.flops / 1e15:10.4g}{found.bytes / 1e12:10.4g}{found.in_turn_s:11.3f}{found.in_turn_s / base:8.2f}"
        )
    print(f"\n{'predicted, the contrastive loss alone':42}{'GFLOP':>10}{'MB':>10}{'in turn us':>11}")
    for rows in LOSS_ROWS:
        flops, moved = loss_work(rows, precision=config.precision, gpu=size["gpu"])
        longer = max(flops / rates.matmul, moved / rates.copy)
        print(f"{f'N {rows}, D {LOSS_FEATURES}':42}{flops / 1e9:10.4g}{moved / 1e6:10.4g}{1e6 * longer:11.1f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 and a sentence for a value that is none."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="resnet18", help="resnet18, preactresnet18, wrn34_10, ... (default: resnet18)")
    parser.add_argument("--width", type=int, help="channels of the first stage (default: the model's own)")
    for name, value in (("pixels", 32), ("images", CIFAR_IMAGES), ("batch", 128), ("steps", 10), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--method", choices=METHODS, default="anchor")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="whose operators are counted, and whose ceilings measured where they are not given "
                        "(default: this machine's; with ceilings given, cuda)")  # fmt: skip
    parser.add_argument("--matmul", type=float, metavar="TFLOPS", help="ceiling of matrix products, 10^12 FLOP/s")
    parser.add_argument("--copy", type=float, metavar="GB/s", help="ceiling of copying, 10^9 B/s read and written")
    args = parser.parse_args(arguments)
    for name, least in SMALLEST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    if (args.matmul is None) != (args.copy is None):
        parser.error("--matmul and --copy: give both ceilings, or neither to have them measured here")
    for name in ("matmul", "copy"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} {value}: must be a finite number > 0")
    try:
        if args.matmul is None or args.device == "cpu":
            args.device = environment.pick_device(args.device)
        else:
            args.device = torch.device("cuda")
        build_model(args.model, num_classes=args.classes, width=args.width)
    except UserError as error:
        parser.error(str(error))
    return args


def make_rates(args: argparse.Namespace) -> Rates:
    """The ceilings as given, or measured now."""
    if args.matmul is not None:
        return Rates(args.matmul * 1e12, args.copy * 1e9, "given on the command line")
    measured = matmul_rate(args.device, DTYPES[args.precision]), copy_bandwidth(args.device)
    return Rates(*measured, f"measured just now on {environment.device_name(args.device)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parse(arguments)
    rates, gpu = make_rates(args), args.device.type == "cuda"
    config = make_config(args.method, args.steps, args.precision)
    size = {name: getattr(args, name) for name in ("model", "width", "pixels", "classes", "images", "batch")} | {"gpu": gpu}
    # A width to halve and double; wide_resnet's is multiplied by its widening.
    size["width"] = args.width or (64 if "resnet18" in args.model else None)
    print(
        f"predicted, not measured: {args.method}, {args.model}, PGD-{args.steps}, {args.precision}, batch {args.batch}, "
        f"{args.images} images of {args.pixels} x {args.pixels}, as a {'GPU' if gpu else 'CPU'} runs the engine uncompiled"
    )
    speeds = f"{args.precision} products {rates.matmul / 1e12:.4g} TFLOP/s, copying {rates.copy / 1e9:.4g} GB/s"
    print(f"ceilings: {speeds}; {rates.source}\n")
    show(predict(config, rates, **size))
    show_scaling(config, rates, size)
    return 0


if __name__ == "__main__":
    sys.exit(program.run("bench.cost", main))

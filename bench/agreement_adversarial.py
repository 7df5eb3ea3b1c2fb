"""What bench.agreement holds beside each other of adversarial training: TRADES, MART, AWP, and the single-step attacks."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

from bench.agreement_tools import (
    BATCH,
    STEPS,
    Check,
    Watched,
    attacked,
    batch,
    compared,
    configured,
    gradient,
    network,
    our_attack,
    seeded,
    size,
    statements,
    terms,
)
from bench.peers.clones import Session
from fastanchor.config import Config
from fastanchor.methods import build_method
from fastanchor.train.awp import perturbed

# -- TRADES, MART ------------------------------------------------------------------------------------------------------------


def _with_its_attack(session: Session, function: str, file: str, recipe: str, beta: float, known: str | None) -> Iterator[Check]:
    """A loss function that makes its adversary itself: the attack in fp32, then the loss in fp64 on the images it has made."""
    original = getattr(session.module(file), function)
    config = configured(recipe, attack={"eps": 0.031, "step_size": 0.007, "steps": STEPS}, loss={"beta": beta})
    model = network(config, torch.float32)
    images, labels = batch(torch.float32)

    def theirs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and adversarial images, of the same numbers in either precision."""
        watched = Watched(copy.deepcopy(model).to(dtype))
        parameters = list(watched.parameters())
        with session.inside():
            torch.manual_seed(1)
            loss = original(
                watched, images.to(dtype), labels, torch.optim.SGD(parameters, 0.1), step_size=0.007, epsilon=0.031,
                perturb_steps=STEPS, beta=beta,
            )  # fmt: skip
        return loss, gradient(loss, parameters), watched.adversarial(images.to(dtype))

    (_, _, single), (loss, grad, double) = theirs(torch.float32), theirs(torch.float64)
    start = seeded(lambda: 0.001 * torch.randn(images.shape))
    yield attacked(f"attack, {STEPS} steps", single, our_attack(config, model.eval(), start)(images, labels), exact=double)
    model = model.double().train()
    ours = terms(build_method(config), model, {"adv": double, "aug": images.double()}, labels)
    our_grad = gradient(ours, list(model.parameters()))
    yield compared(f"{function}, beta {beta:g}", size(images), loss, grad, ours, our_grad, known)


def trades(session: Session) -> Iterator[Check]:
    """trades.py: trades_loss."""
    yield from _with_its_attack(
        session, "trades_loss", "trades", "trades", 6.0,
        "it forwards x, x' and x again, we x' and x: loss and gradient are the same, x counts once in BatchNorm's running "
        "statistics and not twice",
    )  # fmt: skip


def mart(session: Session) -> Iterator[Check]:
    """mart.py: mart_loss."""
    yield from _with_its_attack(session, "mart_loss", "mart", "mart", 5.0, None)


# -- AWP ---------------------------------------------------------------------------------------------------------------------


def awp(session: Session) -> Iterator[Check]:
    """AT_AWP/utils_awp.py: AdvWeightPerturb, and the loss at the weights that it makes."""
    gamma, file = 0.01, "AT_AWP/utils_awp.py"
    (tiny,) = session.literals(file, "EPS")
    known = {"torch": torch, "nn": nn, "F": F, "OrderedDict": OrderedDict, "EPS": tiny}
    perturb = session.definitions(file, None, known)["AdvWeightPerturb"]
    model = network(configured("pgd_at"))
    images, labels = batch()
    first, proxy, second = (copy.deepcopy(model).train() for _ in range(3))
    with session.inside():
        adversary = perturb(model=first, proxy=proxy, proxy_optim=torch.optim.SGD(proxy.parameters(), 0.01), gamma=gamma)
        adversary.perturb(adversary.calc_awp(inputs_adv=images, targets=labels))
        theirs = F.cross_entropy(first(images), labels)
        their_grad = gradient(theirs, list(first.parameters()))
    parameters = list(second.parameters())
    with perturbed(second, parameters, gamma, lambda: F.cross_entropy(second(images), labels)):
        ours = F.cross_entropy(second(images), labels)
        our_grad = gradient(ours, parameters)
    yield compared(
        "calc_awp, perturb, then cross-entropy", size(images), theirs, their_grad, ours, our_grad,
        "its optimiser moves w + v and then takes v back, ours moves w: its weight decay is that of w + v",
    )  # fmt: skip


# -- single-step attacks -----------------------------------------------------------------------------------------------------


def nuat(session: Session) -> Iterator[Check]:
    """CIFAR10/NuAT_cifar10.py: NucAttack and the step's loss, with the norm in the attack and without."""
    file = "CIFAR10/NuAT_cifar10.py"
    block = statements(session, file, "out = model(data)", "cost = l_ce")
    for turn in (0, 1):
        for dtype in (torch.float32, torch.float64):
            config = configured("nuat")
            model = network(config, dtype)
            images, labels = batch(dtype)
            first = copy.deepcopy(model).train()
            parameters = list(first.parameters())
            namespace: dict[str, Any] = {
                "torch": torch, "Variable": Variable, "zero_gradients": lambda x: None, "TRAIN_BATCH_SIZE": BATCH,
                "loss": nn.CrossEntropyLoss(), "data": images, "target": labels, "model": first, "B_val": 4.0, "Feps": 8.0,
                "Nuc_reg": config.loss.nuclear, "counter": turn, "l_ce": 1.0, "optimizer": torch.optim.SGD(parameters, 0.1),
            }  # fmt: skip
            session.definitions(file, ("NucAttack",), namespace)
            with session.inside():
                torch.manual_seed(1)
                exec(block, namespace)
            theirs, x_adv = namespace["cost"], namespace["adv_data"].detach()
            name = f"{'with' if turn else 'without'} the norm in the attack"
            if dtype is torch.float32:
                noise = (4 / 255) * torch.sign(0.5 - seeded(lambda images=images: torch.rand_like(images)))
                yield attacked(f"NucAttack, {name}", x_adv, _nuat_attack(config, model, noise, turn)(images, labels))
            else:
                ours = terms(build_method(config), model.train(), {"aug": images, "adv": x_adv}, labels)
                grads = gradient(theirs, parameters), gradient(ours, list(model.parameters()))
                yield compared(f"its step's loss, {name}", size(images), theirs, grads[0], ours, grads[1])


def _nuat_attack(config: Config, model: nn.Module, noise: Tensor, turn: int) -> Callable[[Tensor, Tensor], Tensor]:
    method = build_method(config)
    method.heads = method.build(model)
    method.heads.now.fill_(turn)
    adversary = method.adversaries(model, torch.tensor(1e3))["adv"]
    adversary.attack.start, adversary.attack.start_radius = noise, None

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            clean = model.train()(images)  # the training forward, which moves the running statistics that the attack then uses
        return adversary.attack(adversary.model, images, labels, clean=clean)

    return attack


def fgsm_rs(session: Session) -> Iterator[Check]:
    """CIFAR10/train_fgsm.py: the attack of its step, by its defaults."""
    file = "CIFAR10/train_fgsm.py"
    block = statements(session, file, "if args.delta_init != 'previous'", "delta = delta.detach()")
    options = session.defaults(file)
    scaled = types.SimpleNamespace(scale_loss=lambda loss, opt: contextlib.nullcontext(loss))
    clamp = session.definitions("CIFAR10/utils.py", ("clamp",), {"torch": torch})["clamp"]

    def make(_lower: Tensor, _upper: Tensor, _std: Tensor) -> dict[str, Any]:
        return {"args": options, "amp": scaled, "clamp": clamp}

    yield _normalised(block, session, "fgsm_rs", 1.0, options, make)


def nfgsm(session: Session) -> Iterator[Check]:
    """train.py: the attack of its step, by its defaults, which clip nothing."""
    block = statements(session, "train.py", "eta = torch.zeros_like(X)", "delta = delta.detach()")
    tools = session.definitions("utils/attack_utils.py", ("AttackUtils",), {"torch": torch, "F": F, "nn": nn})["AttackUtils"]
    options = session.defaults("train.py")
    options.unif = float(options.unif)

    def make(lower: Tensor, upper: Tensor, std: Tensor) -> dict[str, Any]:
        return {"attack_utils": tools(lower, upper, std), "args": options}

    yield _normalised(block, session, "nfgsm", options.unif, options, make)


def _normalised(
    block: Any, session: Session, recipe: str, unif: float, options: Any, make: Callable[..., dict[str, Any]]
) -> Check:
    """A step's attack on normalised images, in whose units each channel has an eps of its own, beside our recipe's on pixels.

    unif: radius of the start relative to eps. options: the script's, in grey levels. make: what else the statements use.
    """
    config = configured(recipe)
    model = network(config, torch.float32).train()
    images, labels = batch(torch.float32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
    limits, radii = ((0 - mean) / std, (1 - mean) / std), (options.epsilon / 255) / std
    namespace = {
        "torch": torch, "F": F, "model": _Denormalised(copy.deepcopy(model), mean, std), "X": (images - mean) / std, "y": labels,
        "epsilon": radii, "alpha": (options.alpha / 255) / std, "lower_limit": limits[0], "upper_limit": limits[1], "opt": None,
        **make(*limits, std),
    }  # fmt: skip
    with session.inside():
        torch.manual_seed(1)
        exec(block, namespace)
    theirs = images + namespace["delta"] * std

    def draw() -> Tensor:
        noise = torch.zeros_like(images)
        for j in range(3):
            noise[:, j].uniform_(-unif * radii[j].item(), unif * radii[j].item())
        return noise * std

    attack = our_attack(config, model, seeded(draw))
    known = "it normalises images before the attack; eps and step are divided by each channel's std there, pixels here"
    return attacked(f"the step's attack, step {options.alpha:g}/255", theirs, attack(images, labels), known)


class _Denormalised(nn.Module):
    """Our network of pixels where the original gives normalised images."""

    def __init__(self, inner: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.inner, self.mean, self.std = inner, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images * self.std + self.mean)

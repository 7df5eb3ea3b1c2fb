"""What bench.agreement holds beside each other of contrastive methods: ASCL, AdvCL, SupContrast, SupRobCon."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

from bench.agreement_tools import (
    BATCH,
    CLASSES,
    STEPS,
    Check,
    attacked,
    batch,
    compared,
    configured,
    gradient,
    network,
    nudged,
    our_attack,
    seeded,
    size,
    statements,
    terms,
)
from bench.peers.clones import Session
from fastanchor.data.frequency import high_frequencies
from fastanchor.losses.ascl import ASCLLoss
from fastanchor.methods import Outputs, build_method
from fastanchor.methods.advcl import PseudoHeads
from fastanchor.models.bnsets import bn_set

# -- ASCL --------------------------------------------------------------------------------------------------------------------


def ascl_loss(session: Session) -> Iterator[Check]:
    """contrastive_losses_v2.py: soft_lcscl, every selection."""
    original = session.module("contrastive_losses_v2").soft_lcscl
    rows, dim = 4 * BATCH, 16
    labels, predictions = (torch.randint(4, (rows,)) for _ in range(2))
    for distance, name in (("linf", "linf"), ("cosine", "matmul")):
        for selection in ("all", "hard", "soft", "merge", "leaking"):
            hidden = [torch.randn(rows, dim, dtype=torch.float64, requires_grad=True)]
            with session.inside():
                one_hot = [F.one_hot(x, 4).double() for x in (labels, predictions)]
                theirs = original(hidden[0], *one_hot, name, selection, hidden_norm=True, temperature=0.2)
            ours = ASCLLoss(0.2, selection, distance=distance, backend="torch")(hidden[0], labels, predictions)
            yield compared(
                f"soft_lcscl, {selection}, {distance}", f"{rows} x {dim}", theirs, gradient(theirs, hidden), ours,
                gradient(ours, hidden),
            )  # fmt: skip


def ascl_step(session: Session) -> Iterator[Check]:
    """ascl.py: ascl_pgd, given its adversarial images."""
    config = configured("ascl", loss={"ce_clean": 1.0})
    model = network(config)
    images, labels = batch()
    x_adv = nudged(images)
    given: dict[str, Any] = {"torch": torch, "F": F, "np": np}
    for file, names in (("utils.py", ("add_loss",)), ("compact_loss_pt.py", ("kl_loss_with_logits", "my_norm"))):
        found = session.definitions(file, names, {"torch": torch, "F": F, "np": np})
        given |= {name: found[name] for name in names}
    given["soft_lcscl"] = session.module("contrastive_losses_v2").soft_lcscl
    given["pgd_attack"] = lambda *_, **__: (x_adv, None)
    original = session.definitions("ascl.py", ("ascl_pgd",), given)["ascl_pgd"]
    first = _TheirInterface(copy.deepcopy(model)).train()
    with session.inside():
        theirs, _, _ = original(
            first, images, labels, torch.device("cpu"), torch.optim.SGD(first.parameters(), 0.1), dist="linf", neg_type="leaking",
            temperature=0.2, hidden_norm=True, alpha=1.0, beta=1.0, lccomw=0.0, lcsmtw=2.0, gbcomw=1.0, gbsmtw=0.0, confw=0.0,
        )  # fmt: skip
    ours = terms(build_method(config), model.train(), {"aug": images, "adv": x_adv}, labels)
    grads = gradient(theirs, list(first.parameters())), gradient(ours, list(model.parameters()))
    yield compared("ascl_pgd, leaking, linf, all terms", size(images), theirs, grads[0], ours, grads[1])


def ascl_attack(session: Session) -> Iterator[Check]:
    """pgd.py: pgd_attack, in train mode as its training calls it."""
    config = configured("ascl", attack={"steps": STEPS})
    names = ("clamp", "pgd_attack")
    original = session.definitions("pgd.py", names, {"torch": torch, "F": F, "np": np})["pgd_attack"]
    model = network(config, torch.float32).train()
    images, labels = batch(torch.float32)
    options = {"epsilon": 0.031, "step_size": 0.007, "num_steps": STEPS, "loss_type": "ce", "x_min": 0.0, "x_max": 1.0}
    with session.inside():
        torch.manual_seed(1)
        theirs, _ = original(copy.deepcopy(model), images, labels, torch.device("cpu"), options)
    start = seeded(lambda: torch.zeros_like(images).uniform_(-0.031, 0.031))
    yield attacked(
        f"pgd_attack, {STEPS} steps", theirs, our_attack(config, model, start)(images, labels),
        "it forwards once more to choose among restarts, of which it has one: BatchNorm's running statistics move once more",
    )  # fmt: skip


class _TheirInterface(nn.Module):
    """Our network where ASCL's code calls one: model(x, return_z=True) -> logits, latent."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, return_z: bool = False) -> Any:
        return self.inner(images, embed=return_z)


# -- contrastive losses ------------------------------------------------------------------------------------------------------


def advcl(session: Session) -> Iterator[Check]:
    """losses.py: SupConLoss of four views without labels; fr_util.py: generate_high."""
    config = configured("advcl", loss={"pseudo": 0.0, "clusters": [2, 3]})
    method = build_method(config)
    views = {name: torch.randn(BATCH, 16, dtype=torch.float64, requires_grad=True) for name in ("adv", "aug", "aug2", "high")}
    given = list(views.values())
    with session.inside():
        rows = torch.stack([F.normalize(view, dim=1) for view in given], 1)
        theirs = session.module("losses").SupConLoss(temperature=0.5)(rows)
    method.heads = types.SimpleNamespace(targets=torch.zeros(BATCH, 2, dtype=torch.int64), cross_entropy=lambda *_: 0.0)
    labels = torch.stack([torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH)], 1)
    ours = method.loss(Outputs({"adv_ce": given[0]}, views), labels, torch.tensor(0.0))["contrastive"]
    yield compared(
        "SupConLoss, four views", f"{BATCH} x 4 x 16", theirs, gradient(theirs, given), ours, gradient(ours, given),
        "the factor temperature / 0.07 of its loss is our weight loss.contrastive",
    )  # fmt: skip
    images = batch()[0].requires_grad_()
    with session.inside():
        high = session.module("fr_util").generate_high(images, r=4)
    weights = torch.randn_like(high)
    mine = high_frequencies(images, 4)
    sums = (weights * high).sum(), (weights * mine).sum()
    yield compared("generate_high, radius 4", size(images), high, gradient(sums[0], [images]), mine, gradient(sums[1], [images]))


def advcl_attack(session: Session) -> Iterator[Check]:
    """pretraining_advCL.py: AttackPGD, both adversaries of one loop, which forwards the clean views again in every step."""
    clusters = [2, 3, 4, 5, 6]
    config = configured("advcl", loss={"clusters": clusters}, attack={"steps": STEPS, "eps": "8/255", "step_size": "2/255"})
    method = build_method(config)
    model = network(config, torch.float32).train()
    heads = method.heads = PseudoHeads(model.backbone.num_features, tuple(clusters), BATCH)
    heads.targets.copy_(torch.stack([torch.randint(k, (BATCH,)) for k in clusters], 1))
    images, labels = batch(torch.float32)
    t1, t2 = nudged(images), nudged(images)
    namespace = {
        "torch": torch, "nn": nn, "F": F, "generate_high": session.module("fr_util").generate_high,
        "args": types.SimpleNamespace(radius=config.loss.radius, ce_weight=config.loss.pseudo),
    }  # fmt: skip
    original = session.definitions("pretraining_advCL.py", ("AttackPGD",), namespace)["AttackPGD"]
    options = {"random_start": True, "step_size": 2 / 255, "epsilon": 8 / 255, "num_steps": STEPS, "loss_func": "xent"}
    criterion = session.module("losses").SupConLoss(temperature=config.loss.temperature)
    with session.inside():
        torch.manual_seed(1)
        found = original(_ThreeSets(copy.deepcopy(model), heads), options)(t1, t2, images, list(heads.targets.T), criterion)
    starts = seeded(lambda: torch.stack([torch.zeros_like(images).uniform_(-8 / 255, 8 / 255) for _ in range(2)]))
    with torch.no_grad(), bn_set(model, "normal"):
        views = (t1, t2, high_frequencies(images, config.loss.radius))
        fixed = torch.cat([model(view, embed=True)[1] for view in views])
    adversaries = method.adversaries(model, torch.tensor(0.0))
    given = (("adv", found[2], starts[0], fixed), ("adv_ce", found[3], starts[1], heads.targets))
    for name, theirs, start, clean in given:
        adversary = adversaries[name]
        adversary.attack.start, adversary.attack.start_radius = start, None
        ours = adversary.attack(adversary.model, images, labels, clean=clean)
        yield attacked(
            f"AttackPGD, {STEPS} steps: {name}", theirs, ours,
            "it forwards the clean views again in every step, we once: with the batch's statistics the numbers are the same",
        )  # fmt: skip


def advcl_step(session: Session) -> Iterator[Check]:
    """pretraining_advCL.py: the loss of its training step, with the cross-entropy of the pseudo-labels."""
    block = statements(session, "pretraining_advCL.py", "f_proj, f_pred = model(x_cl", "loss = contrast_loss + ce_loss")
    clusters = [2, 3, 4, 5, 6]
    config = configured("advcl", loss={"clusters": clusters})
    method, model = build_method(config), network(config)
    method.heads = PseudoHeads(model.backbone.num_features, tuple(clusters), BATCH).double()
    method.heads.targets.copy_(torch.stack([torch.randint(k, (BATCH,)) for k in clusters], 1))
    images, labels = batch()
    views = {"adv": nudged(images), "adv_ce": nudged(images), "aug": nudged(images), "aug2": nudged(images), "high": images}
    first, first_heads = copy.deepcopy(model).train(), copy.deepcopy(method.heads)
    namespace: dict[str, Any] = {
        "torch": torch, "model": _ThreeSets(first, first_heads), "args": types.SimpleNamespace(ce_weight=config.loss.pseudo),
        "contrast_criterion": session.module("losses").SupConLoss(temperature=config.loss.temperature),
        "ce_criterion": nn.CrossEntropyLoss(ignore_index=-1), "targets": list(method.heads.targets.T),
        "x_cl": views["adv"], "x_ce": views["adv_ce"], "x1": views["aug"], "x2": views["aug2"], "x_HFC": views["high"],
    }  # fmt: skip
    with session.inside():
        exec(block, namespace)
    theirs = namespace["loss"]
    logits, embeddings = {}, {}
    for name, view in views.items():
        with bn_set(model.train(), method.bn_set_of[name]):
            logits[name], embeddings[name] = method.forward(model, view)
    indexed = torch.stack([labels, torch.arange(BATCH)], 1)
    ours = sum(method.loss(Outputs(logits, embeddings), indexed, torch.tensor(0.0)).values())
    grads = (
        gradient(loss, [*net.parameters(), *heads.parameters()])
        for loss, net, heads in ((theirs, first, first_heads), (ours, model, method.heads))
    )
    yield compared("its step's loss, four views and pseudo-labels", size(images), theirs, next(grads), ours, next(grads))


class _ThreeSets(nn.Module):
    """Our network where AdvCL's code calls one with several BatchNorm sets."""

    def __init__(self, inner: nn.Module, heads: nn.Module):
        super().__init__()
        self.inner, self.heads = inner, heads

    def forward(self, images: Tensor, bn_name: str, return_logits: bool = False, **_: Any) -> tuple:
        with bn_set(self.inner, bn_name):
            features = self.inner.features(images)
        projected = F.normalize(self.inner.projection(features), dim=1)
        return (projected, projected, self.heads(features).split(self.heads.clusters, 1)) if return_logits else (projected,) * 2


def supcon(session: Session) -> Iterator[Check]:
    """losses.py: SupConLoss of two views."""
    views = {name: torch.randn(BATCH, 16, dtype=torch.float64, requires_grad=True) for name in ("aug", "aug2")}
    given, labels = list(views.values()), torch.randint(4, (BATCH,))
    for temperature in (0.1, 0.5):
        config = configured("supcon", loss={"temperature": temperature, "scale": temperature / 0.07})
        with session.inside():
            rows = torch.stack([F.normalize(view, dim=1) for view in given], 1)
            theirs = session.module("losses").SupConLoss(temperature=temperature)(rows, labels)
        ours = sum(build_method(config).loss(Outputs({}, views), labels, torch.tensor(0.0)).values())
        yield compared(
            f"SupConLoss, temperature {temperature:g}", f"{BATCH} x 2 x 16", theirs, gradient(theirs, given), ours,
            gradient(ours, given), "its factor temperature / 0.07 is our loss.scale, which its recipe has too",
        )  # fmt: skip


def suprobcon(session: Session) -> Iterator[Check]:
    """suprobcon.py: SupRobConLoss; utils.py: inf_pgd."""
    config = configured("suprobcon", attack={"eps": "8/255", "step_size": "2/255", "steps": STEPS}, loss={"ce_adv": 0.0})
    found = session.definitions("suprobcon.py", ("SupRobConLoss",), {"torch": torch, "nn": nn, "F": F})["SupRobConLoss"]
    views = {name: torch.randn(BATCH, 16, dtype=torch.float64, requires_grad=True) for name in ("aug", "adv")}
    given, labels = list(views.values()), torch.randint(4, (BATCH,))
    with session.inside():
        theirs = found(temperature=config.loss.temperature)(given[0], given[1], labels)
    logits = {"adv": torch.zeros(BATCH, CLASSES, dtype=torch.float64)}
    ours = build_method(config).loss(Outputs(logits, views), labels, torch.tensor(0.0))["contrastive"]
    yield compared("SupRobConLoss", f"2 x {BATCH} x 16", theirs, gradient(theirs, given), ours, gradient(ours, given))

    model = network(config, torch.float32).eval()
    images, labels = batch(torch.float32)
    namespace = {"torch": torch, "Variable": Variable}
    attack = session.definitions("utils.py", ("inf_pgd",), namespace)["inf_pgd"]
    with session.inside():
        torch.manual_seed(1)
        x_adv = attack(model, images, labels, STEPS, 8 / 255, 2 / 255)
    model.zero_grad(set_to_none=True)  # it has left gradients of its attack in the parameters
    noise = seeded(lambda: torch.FloatTensor(images.size()).uniform_(-8 / 255, 8 / 255))
    yield attacked(f"inf_pgd, {STEPS} steps", x_adv, our_attack(config, model, noise)(images, labels))

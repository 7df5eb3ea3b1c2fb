"""bench.agreement: our methods beside the original functions, with small fake clones; real ones where FASTANCHOR_PEERS has them.

The fakes are written from the papers' formulas, with the originals' names, files and arguments; each also in a wrong version,
which must be seen.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from bench import agreement, schema
from bench.agreement import CASES, agree, main, recognise
from bench.agreement_tools import Check, statements
from bench.peers.clones import PeerFailed, Session
from fastanchor.errors import UserError

PEERS = os.environ.get("FASTANCHOR_PEERS")
BOOM = "raise RuntimeError('the top level of the script ran')\n"
TRADES = """
import torch, torch.nn.functional as F
def trades_loss(model, x_natural, y, optimizer, step_size=0.003, epsilon=0.031, perturb_steps=10, beta=1.0, distance='l_inf'):
    model.eval()
    target = F.softmax(model(x_natural), 1).detach()
    x_adv = x_natural + 0.001 * torch.randn(x_natural.shape).cuda()
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = (target * (target.log() - F.log_softmax(model(x_adv), 1))).sum()
        x_adv = x_adv + step_size * torch.autograd.grad(loss, x_adv)[0].sign()
        x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    p, q = F.log_softmax(model(x_natural), 1), F.log_softmax(model(x_adv.detach()), 1)
    return -p.gather(1, y[:, None]).mean() + beta * (p.exp() * (p - q)).sum(1).mean()
"""
MART = """
import torch, torch.nn.functional as F
def mart_loss(model, x_natural, y, optimizer, step_size=0.007, epsilon=0.031, perturb_steps=10, beta=6.0, distance='l_inf'):
    model.eval()
    x_adv = x_natural + 0.001 * torch.randn(x_natural.shape)
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
        x_adv = (x_adv + step_size * gradient.sign() - x_natural).clamp(-epsilon, epsilon).add(x_natural).clamp(0, 1)
    model.train()
    p, q = F.softmax(model(x_natural), 1), F.softmax(model(x_adv.detach()), 1)
    own = torch.nn.functional.one_hot(y, p.shape[1]).bool()
    wrong = q.masked_fill(own, 0).amax(1)
    margin = -torch.log(q[own]) - torch.log(1.0001 - wrong + 1e-12)
    divergence = (p * (torch.log(p) - torch.log(q + 1e-12))).sum(1) * (1.0000001 - p[own])
    return margin.mean() + beta * divergence.mean()
"""
AWP = """
EPS = 1E-20
class AdvWeightPerturb:
    def __init__(self, model, proxy, proxy_optim, gamma):
        self.model, self.gamma = model, gamma
    def calc_awp(self, inputs_adv, targets):
        named = [(n, p) for n, p in self.model.named_parameters() if p.ndim > 1 and 'weight' in n]
        loss = F.cross_entropy(self.model(inputs_adv), targets)
        found = torch.autograd.grad(loss, [p for _, p in named])
        return OrderedDict((n, p.norm() / (g.norm() + EPS) * g) for (n, p), g in zip(named, found))
    def perturb(self, diff):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in diff:
                    parameter.add_(diff[name], alpha=self.gamma)
"""
SUPCON = """
import torch
class SupConLoss:
    def __init__(self, temperature):
        self.t = temperature
    def __call__(self, features, labels=None):
        n, views = features.shape[:2]
        labels = torch.arange(n) if labels is None else labels
        rows, labels = features.transpose(0, 1).flatten(0, 1), labels.repeat(views)
        total = 0.0
        for i in range(len(rows)):
            others = [j for j in range(len(rows)) if j != i]
            logits = rows[others] @ rows[i] / self.t
            total = total - (torch.log_softmax(logits, 0)[labels[others] == labels[i]]).mean()
        return total / len(rows) * (self.t / 0.07)
"""
NFGSM = (
    BOOM
    + """
parser.add_argument('--epsilon', default=8)
parser.add_argument('--alpha', default=8)
parser.add_argument('--unif', default='2.0')
parser.add_argument('--clip', default=-1)
def main():
    for epoch in range(args.epochs):
        for i, (X, y) in enumerate(loader):
            eta = torch.zeros_like(X).cuda()
            for j in range(3):
                eta[:, j].uniform_(-args.unif * epsilon[j].item(), args.unif * epsilon[j].item())
            eta = attack_utils.clamp(eta, attack_utils.lower_limit - X, attack_utils.upper_limit - X).requires_grad_()
            grad = torch.autograd.grad(F.cross_entropy(model(X + eta), y), eta)[0]
            delta = eta + alpha * grad.sign()
            delta = attack_utils.clamp(delta, attack_utils.lower_limit - X, attack_utils.upper_limit - X)
            delta = delta.detach()
            raise RuntimeError('the training step ran')
"""
)
CLAMP = """
class AttackUtils:
    def __init__(self, lower_limit, upper_limit, std):
        self.lower_limit, self.upper_limit = lower_limit, upper_limit
    def clamp(self, X, low, high):
        return torch.max(torch.min(X, high), low)
"""
FAKES = {
    "TRADES": {"trades.py": TRADES, "train_trades_cifar10.py": BOOM},
    "MART": {"mart.py": MART, "train_resnet.py": BOOM},
    "AWP": {"AT_AWP/utils_awp.py": AWP, "trades_AWP/utils_awp.py": BOOM},
    "SupContrast": {"losses.py": SUPCON, "main_supcon.py": BOOM, "networks/resnet_big.py": BOOM},
    "N-FGSM": {"train.py": NFGSM, "utils/attack_utils.py": CLAMP, "experiments.sh": ""},
}
# Where a repository's formula is changed, and what must then not agree.
WRONG = [
    ("TRADES", "trades.py", "(target * (target.log()", "(target.sqrt() * (target.log()", ["attack"]),
    ("TRADES", "trades.py", "+ beta * (p.exp()", "+ 0.999 * beta * (p.exp()", ["trades_loss"]),
    ("TRADES", "trades.py", "p, q = F.log_softmax(model(x_natural), 1)", "p, q = F.log_softmax(model(x_natural), 1).detach()", ["trades_loss"]),
    ("MART", "mart.py", "1.0000001 - p[own]", "1.0000001 - p[own].detach()", ["mart_loss"]),
    ("MART", "mart.py", "step_size * gradient", "-step_size * gradient", ["attack"]),
    ("AWP", "AT_AWP/utils_awp.py", "p.ndim > 1 and", "", ["calc_awp"]),
    ("SupContrast", "losses.py", "self.t / 0.07", "self.t / 0.08", ["SupConLoss", "SupConLoss"]),
    ("N-FGSM", "train.py", "--alpha', default=8", "--alpha', default=10", ["the step's attack"]),
]  # fmt: skip


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def clone_of(tmp_path):
    return lambda name, **changed: write(tmp_path / "clones" / name, FAKES[name] | changed)


@pytest.mark.parametrize("name", FAKES)
def test_ours_agrees_with_a_transcription_in_the_originals_place(clone_of, name):
    rows = agree(recognise(str(clone_of(name))), seed=3)
    assert [row.get("error") for row in rows] == [None] * len(rows)
    assert [row["what"] for row in rows if not row["agrees"]] == []
    assert {row["method"] for row in rows} == {name} and len({row["what"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name, file, before, after, differing", WRONG)
def test_another_formula_is_seen(clone_of, name, file, before, after, differing):
    text = FAKES[name][file]
    assert before in text
    rows = agree(recognise(str(clone_of(name, **{file: text.replace(before, after)}))), seed=3)
    assert [row.get("error") for row in rows] == [None] * len(rows)
    assert [row["what"].partition(",")[0] for row in rows if not row["agrees"]] == differing


def test_the_program_writes_its_table_and_its_json(clone_of, tmp_path, capsys):
    paths = [f"--peer-path={clone_of(name)}" for name in ("SupContrast", "AWP")]
    assert main([*paths, "--out", str(tmp_path / "out")]) == 0
    stored = schema.load(tmp_path / "out" / "agreement.json")
    assert [row["method"] for row in stored["rows"]] == ["SupContrast", "SupContrast", "AWP"]
    row = stored["rows"][-1]
    assert row["agrees"] and row["loss"] < row["tolerance"] == 1e-9 and row["precision"] == "fp64" and row["pixels"] is None
    assert row["commit"] is None and row["written_for"] == CASES["AWP"].commit
    assert str(tmp_path) not in (tmp_path / "out" / "agreement.json").read_text()  # results are there to be shown
    said = capsys.readouterr().out
    assert "agrees" in said and "3 checks, 0 without agreement" in said
    assert "[2] its optimiser moves w + v and then takes v back" in said


def test_a_check_that_fails_is_a_row_and_status_1(clone_of, tmp_path, capsys):
    broken = clone_of("SupContrast", **{"losses.py": "def SupConLoss(temperature):\n    raise KeyError('gone')\n"})
    assert main([f"--peer-path={broken}", f"--peer-path={clone_of('AWP')}", "--out", str(tmp_path / "out")]) == 1
    rows = json.loads((tmp_path / "out" / "agreement.json").read_text())["rows"]
    assert [row["agrees"] for row in rows] == [False, True]
    assert rows[0]["what"] == "supcon" and rows[0]["error"].startswith("PeerFailed: KeyError")
    assert "FAILED" in capsys.readouterr().out


def test_wrong_paths_get_one_sentence(clone_of, tmp_path):
    trades = clone_of("TRADES")
    for text, said in (
        (f"{tmp_path}/nothing", "is no folder"),
        (str(tmp_path), "not one of the known repositories, which have these files: TRADES: trades.py"),
        (f"TRADE={trades}", "TRADE is none of .*; did you mean 'TRADES'"),
        (f"MART={trades}", "lacks a file of MART, which has mart.py, train_resnet.py"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            recognise(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="TRADES is given twice"):
        main([f"--peer-path={trades}", f"--peer-path=TRADES={trades}", "--out", str(tmp_path / "out")])


def test_a_verdict_needs_a_figure_and_none_may_be_nan():
    def verdict(**figures):
        return agreement.row(Check("x", "1", "fp64", 1e-9, **figures))["agrees"]

    assert verdict(loss=1e-9, gradient=0.0)
    assert not verdict(loss=1e-8, gradient=0.0) and not verdict(loss=0.0, gradient=1e-8) and not verdict(pixels=0.1)
    assert not verdict(loss=float("nan")) and not verdict()


def test_statements_are_those_of_one_block(tmp_path):
    write(tmp_path, {"train.py": BOOM + "for i in range(3):\n    if i:\n        a = 1\n        b  =  a\n        c = 3\n"})
    with Session(tmp_path) as session:
        found = {}
        exec(statements(session, "train.py", "b = a", "c ="), {"a": 7}, found)
        assert found == {"b": 7, "c": 3}
        with pytest.raises(PeerFailed, match="has no block from 'c =' to 'b ='"):
            statements(session, "train.py", "c =", "b =")


def test_the_random_state_is_left_as_it_was(clone_of):
    before = torch.get_rng_state()
    agree(recognise(str(clone_of("SupContrast"))), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(PEERS is None, reason="FASTANCHOR_PEERS names no folder with clones")
@pytest.mark.parametrize("name", CASES)
def test_ours_agrees_with_the_original(name):
    folder = Path(PEERS or "") / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    rows = agree(recognise(str(folder)), seed=5)
    assert [row.get("error") for row in rows] == [None] * len(rows)
    assert [row for row in rows if not row["agrees"]] == []

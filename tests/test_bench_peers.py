"""The peers: clones kept apart from ours, pieces of scripts, what is said of wrong paths, rows and ratios, real clones if given.

CI has no clone: small stand-ins with the same file names and signatures are written here. FASTANCHOR_PEERS=DIR, a folder with
clones of the real ones, runs their adapters too and holds what they do beside what the adapter states.
"""

import dataclasses
import importlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from bench import cases, gpu_peers, naive, program
from bench.gpu_common import Bench
from bench.peers import LOSSES, NAMES, REPOSITORIES, __main__, attacks, losses, measure, tables
from bench.peers.adapter import Batches, Case, Variant, Work
from bench.peers.clones import Clone, PeerFailed, Session, cuda_stays_here, other_commit, recognise, recognise_all
from bench.results import OutOfTime, Results
from fastanchor.attacks import PGD
from fastanchor.errors import UserError
from fastanchor.models import mac_count

CPU = torch.device("cpu")
NET = """
import torch.nn as nn
class Net(nn.Module):
    def __init__(self, out=10):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(4, out)
    def forward(self, x, return_z=False):
        z = self.features(x)
        return (self.linear(z), z) if return_z else self.linear(z)
"""
# No loader, no logger and no package that CI lacks; what stands at a script's top level must never run.
BOOM = "raise RuntimeError('the top level of the script ran')\n"
FAKES = {
    "TRADES": {
        "models/__init__.py": "",
        "models/resnet.py": NET + "def ResNet18():\n    return Net()\n",
        "trades.py": """
import torch, torch.nn.functional as F
def trades_loss(model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta):
    model.eval()
    x_adv = x_natural + 0.001 * torch.randn(x_natural.shape).cuda()
    for _ in range(perturb_steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x_natural), 1), reduction='sum')
        x_adv = x_adv + step_size * torch.autograd.grad(loss, x_adv)[0].sign()
        x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    robust = F.kl_div(F.log_softmax(model(x_adv.detach()), 1), F.softmax(model(x_natural), 1), reduction='batchmean')
    return F.cross_entropy(model(x_natural), y) + beta * robust
""",
        "train_trades_cifar10.py": BOOM + """
parser.add_argument('--lr', type=float, default=0.01)
parser.add_argument('--momentum', default=0.9)
parser.add_argument('--weight-decay', '--wd', default=2e-4)
parser.add_argument('--num-steps', default=10)
parser.add_argument('--step-size', default=0.007)
parser.add_argument('--epsilon', default=0.031)
parser.add_argument('--beta', default=6.0)
parser.add_argument('--log-interval', default=100)
def train(args, model, device, train_loader, optimizer, epoch):
    import trades  # lazily, as some do
    for i, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        loss = trades_loss(model=model, x_natural=data, y=target, optimizer=optimizer, step_size=args.step_size,
                           epsilon=args.epsilon, perturb_steps=args.num_steps, beta=args.beta)
        loss.backward()
        optimizer.step()
        print('loss', loss.item(), len(train_loader.dataset))
""",
    },
    "FastAT_Benchmark": {
        "utils/__init__.py": "NAME = 'utils of FastAT'\n",
        "utils/dataset.py": "import numpy, torch\ndef train_transform(image):\n    return torch.tensor(numpy.asarray(image)).permute(2, 0, 1) / 255\n",
        "models/__init__.py": NET,
        "configs/cifar10/common.yaml": "{'class_num': 10, 'num_workers': 0, 'lr': 0.01}",
        "configs/cifar10/pgd_at.yaml": "{'weight_average': False, 'total_epoch': 100}",
        "configs/cifar10/pgd_at_wa.yaml": "{'weight_average': True, 'total_epoch': 100}",
        "main.py": """
import ast, torch
from models import Net
def load_config(*files):
    return {key: value for file in files for key, value in ast.literal_eval(open(file).read()).items()}
def get_model(config, num_classes, device):
    return Net(num_classes).to(device)
def get_optimizer_and_scheduler(model, config, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=config['lr'])
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=config['lr'], total_steps=config['total_epoch'])
""",
        "fast_at/__init__.py": "from .pgd_at import PGD_AT\n",
        "fast_at/pgd_at.py": """
import os, logging, random, time, numpy, torch
from torch.nn.functional import cross_entropy
class PGD_AT:
    def __init__(self, model, config, name, device):
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(0)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.model, self.config, self.total_training_time = model, config, 0.0
        os.makedirs(config['log_dir'])
        logging.getLogger('fake').addHandler(logging.FileHandler(config['log_dir'] + '/output.log'))
    def train(self, opt, scheduler, train_loader, val_loader):
        assert self.config['total_epoch'] == 1
        assert [len(x) for x, _ in val_loader] == [2]
        self.model.train()
        for x, y in train_loader:
            opt.zero_grad()
            cross_entropy(self.model(x), y).backward()
            opt.step()
            self.total_training_time += 0.5
        scheduler.step()
""",
    },
    "ASCL": {
        "ascl.py": "", "mysetting.py": BOOM + "CIFAR10_MEAN = [0.5, 0.5, 0.5]\nCIFAR10_STD = [0.2, 0.2, 0.2]\nparser.add_argument('--dist', default='linf')\n",
        "models.py": NET + """
import torch
Wrapper = lambda CoreModel, NormLayer, ProjLayer: CoreModel
Normalize = lambda mean, std: torch.tensor(mean).cuda()
get_model = lambda ds, model: Net()
get_projection = lambda model, feat_dim: None
def get_optimizer(ds, model, architecture):
    return torch.optim.SGD(model.parameters(), lr=0.1), 0.1
""",
        "mytrain.py": """
import torch.nn.functional as F
def adv_train(model, data_loader, epoch, optimizer, device, log_interval, attack_params, writer):
    assert attack_params['defense'] in ('ascl_pgd', 'pgd_train') and attack_params['alpha'] == 0.0 and attack_params['dist'] == 'linf'
    for x, y in data_loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        writer.add_scalar('loss', 0, len(data_loader.dataset))
    return writer
""",
        "train_cifar10.py": BOOM + """
def normalize(X):
    return (X - mu) / std
def clamp(X, lower, upper):
    return torch.max(torch.min(X, upper), lower)
def attack_pgd(model, X, y, epsilon, alpha, attack_iters, restarts, norm):
    assert norm == 'l_inf'
    delta = clamp(torch.zeros_like(X).cuda(), lower_limit - X, upper_limit - X)
    F.cross_entropy(model(normalize(X + delta)), y).backward()
    return delta
""",
    },
    "AdvCL": {
        "fr_util.py": "def generate_high(Images, r):\n    return Images.cuda()\n", "models/__init__.py": "",
        "losses.py": "class SupConLoss:\n    def __init__(self, temperature): pass\n    def __call__(self, f): return f.square().mean()\n",
        "utils.py": BOOM + "def format_time(s): return str(s)\ndef warmup_learning_rate(*a): pass\ndef progress_bar(i, n, m):\n    sys.stdout.write('=' * term_width)\n",
        "models/resnet_cifar_multibn_ensembleFC.py": "from torchvision.models.utils import gone\n" + NET.replace("import torch.nn as nn", "") + """
def resnet18(bn_names):
    assert bn_names == ['normal', 'pgd', 'pgd_ce']
    return Net(4)
""",
        "pretraining_advCL.py": BOOM + "\n".join(
            f"parser.add_argument('--{name}', type=float, default={value})"
            for name, value in {"nce_t": 0.5, "epsilon": 8, "epoch": 100, "learning_rate": 0.1, "weight_decay": 0.0, "radius": 8}.items()
        ) + """
class AttackPGD(nn.Module):
    def __init__(self, model, config):
        super().__init__()
        self.model, self.num_steps = model, config['num_steps']
    def forward(self, x):
        return generate_high(x, r=args.radius)
def train(epoch):
    net.train()
    total = 0
    for i, (inputs, _, targets, ind) in enumerate(train_loader):
        assert len(inputs) == 3 and len(targets) == 5 and max(t.max() for t in targets) > 10
        optimizer.zero_grad()
        loss = contrast_criterion(model(net(inputs[2])))
        loss.backward()
        optimizer.step()
        total += loss.item()
        progress_bar(i, len(train_loader), '')
    return total / i
""",
    },
    "Super-Fast-Adversarial-Training": {
        "models/__init__.py": "", "models/resnet.py": NET, "attack/__init__.py": "",
        "utils/fast_network_utils.py": "from models.resnet import Net\ndef get_network(network, depth, dataset):\n    return Net().cuda()\n",
        "attack/fastattack.py": """
class Attack:
    def __call__(self, x, y):
        assert self._targeted is False
        return x
def attack_loader(net, attack, eps, steps):
    assert (attack, eps) == ('pgd', 0.03)
    return Attack()
""",
        "fast_pretrain_adv.py": BOOM + "parser.add_argument('--learning_rate', default=0.1)\nparser.add_argument('--weight_decay', default=0.0)\nparser.add_argument('--epoch', default=30)\nparser.add_argument('--eps', default=0.03)\n" + """
def train(net, trainloader, optimizer, lr_scheduler, scaler, attack):
    for i, (x, y) in tqdm(enumerate(trainloader), total=len(trainloader)):
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(net(attack(x.cuda(), y)), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        lr_scheduler.step()
""",
    },
    "SupContrast": {
        "losses.py": "class SupConLoss:\n    def __init__(self, temperature): pass\n    def __call__(self, f, labels): return f.square().mean()\n",
        "networks/__init__.py": "", "networks/resnet_big.py": NET + "def SupConResNet(name):\n    return Net(8)\n",
        "util.py": """
import torch
class AverageMeter: avg = 0
def warmup_learning_rate(*a): pass
def set_optimizer(opt, model):
    return torch.optim.SGD(model.parameters(), lr=opt.learning_rate)
""",
        "main_supcon.py": BOOM + "parser.add_argument('--temp', default=0.07)\nparser.add_argument('--learning_rate', default=0.05)\nparser.add_argument('--method', default='SupCon')\nparser.add_argument('--warm', action='store_true')\n" + """
def train(train_loader, model, criterion, optimizer, epoch, opt):
    assert opt.method == 'SupCon' and opt.warm is False
    for images, labels in train_loader:
        optimizer.zero_grad()
        criterion(model(torch.cat(images)), labels).backward()
        optimizer.step()
    return AverageMeter().avg
""",
    },
    "cifar10-airbench": {"airbench/__init__.py": "", "airbench/utils.py": "", "airbench/lib_airbench94.py": ""},
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def clone_of(tmp_path):
    return lambda name: write(tmp_path / "clones" / name, FAKES[name])


@pytest.fixture
def run(tmp_path):
    return measure.Run(Results(tmp_path / "out", {}, kind="bench.peers"), CPU, batch=2, steps=1, rounds=2, width=4)


def variants_of(name: str, width: int = 4) -> tuple[Variant, ...]:
    """The adapter's, with our side made small."""
    found = importlib.import_module(REPOSITORIES[name].adapter).VARIANTS
    return tuple(dataclasses.replace(v, width=width, steps=1, needs=()) for v in found)


def rows(run) -> dict[str, dict]:
    return {row["name"]: row for row in run.results.rows("peers") if row["name"] == row.get("peer")}


# -- which repository it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_clone_is_recognised_from_its_files_or_named(clone_of, name):
    folder = clone_of(name)
    for text in (str(folder), f"{name}={folder}"):
        found = recognise(text)
        assert (found.name, found.folder, found.commit) == (name, folder.resolve(), None)
    assert list(recognise_all([str(folder)])) == [name]


def test_wrong_paths_get_one_sentence(clone_of, tmp_path):
    trades, fast = clone_of("TRADES"), clone_of("FastAT_Benchmark")
    empty = tmp_path / "empty"
    empty.mkdir()
    for text, said in (
        (f"{tmp_path}/nothing", f"{tmp_path}/nothing is no folder"),
        (str(empty), r"not one of the known repositories.*TRADES: trades.py, train_trades_cifar10.py"),
        (f"TRADE={trades}", "TRADE is none of .*; did you mean 'TRADES'"),
        (f"ASCL={trades}", r"has no ascl.py, which ASCL has"),
        (f"TRADES={tmp_path}/nothing", "is no folder"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            recognise(text)
        assert "\n" not in str(caught.value)
    write(fast, FAKES["TRADES"])
    with pytest.raises(UserError, match="may be FastAT_Benchmark or TRADES; say which, as in FastAT_Benchmark="):
        recognise(str(fast))
    assert recognise(f"TRADES={fast}").name == "TRADES"
    with pytest.raises(UserError, match="TRADES is given twice"):
        recognise_all([str(trades), f"TRADES={fast}"])
    # An equals sign may belong to the path.
    odd = write(tmp_path / "a=b", FAKES["TRADES"])
    assert recognise(str(odd)).folder == odd.resolve()
    assert recognise(f"TRADES={odd}").folder == odd.resolve()


def test_the_commit_is_the_clones_own_and_another_one_is_warned_of(clone_of, monkeypatch):
    folder = clone_of("TRADES")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    clone = recognise(str(folder))
    assert clone.commit == head
    assert other_commit(clone) == f"at {head[:7]}; the adapter was written for 6e8e11b"
    assert other_commit(clone._replace(commit="6e8e11b" + 33 * "0")) is None
    assert "not known" in other_commit(clone._replace(commit=None))
    # A folder inside somebody else's checkout has no commit of its own.
    assert recognise(str(write(folder / "inner", FAKES["TRADES"]))).commit is None


# -- kept apart --------------------------------------------------------------------------------------------------------------


def two_clones(tmp_path):
    for name in ("one", "two"):
        yield write(tmp_path / name, {
            "utils.py": f"NAME = '{name}'\n", "models/__init__.py": f"NAME = '{name}'\n", "models/late.py": f"NAME = 'late {name}'\n",
            "work.py": "import utils\nfrom models import NAME\ndef lazily():\n    from models.late import NAME as late\n    import utils as again\n    return utils.NAME, again.NAME, NAME, late\n",
        })  # fmt: skip


def test_two_clones_and_our_own_modules_of_one_name_live_side_by_side(tmp_path, monkeypatch):
    ours = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", ours)
    monkeypatch.setitem(sys.modules, "models.late", types.ModuleType("models.late"))
    first, second = two_clones(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    with Session(first) as one, Session(second) as two:
        lazily = [session.bound(session.module("work").lazily) for session in (one, two)]
        for _ in range(2):
            assert lazily[0]() == ("one", "one", "one", "late one")
            assert lazily[1]() == ("two", "two", "two", "late two")
            assert sys.modules["utils"] is ours
            assert "work" not in sys.modules
        # One import each: what was loaded is installed again, not loaded again.
        assert one.module("utils") is one.module("utils") is not two.module("utils")
        workdirs = one.workdir, two.workdir
        assert all(path.is_dir() for path in workdirs)
    assert set(sys.modules) == before
    assert sys.path == path
    assert not any(path.exists() for path in workdirs)
    assert not list(tmp_path.rglob("__pycache__")), "nothing is written into a clone"


def test_what_a_clone_sets_for_the_process_is_its_own(tmp_path, capsys):
    folder = write(tmp_path / "clone", {"work.py": """
import logging, os, random, sys, warnings, numpy, torch
def work():
    print('loud'); print('louder', file=sys.stderr); warnings.warn('careful')
    found = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, os.getcwd(), list(sys.argv)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, True
    torch.manual_seed(1); random.seed(1); numpy.random.seed(1)
    os.makedirs('logs', exist_ok=True); os.chdir('logs'); sys.path.append('/nowhere'); sys.argv = ['changed']
    return found
def draw():
    return torch.rand(1).item(), random.random(), numpy.random.rand()
"""})  # fmt: skip

    def state():
        return (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, os.getcwd(), list(sys.argv), list(sys.path),
                torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), sys.dont_write_bytecode)  # fmt: skip

    before = state()
    with Session(folder) as session:
        work, draw = (session.bound(getattr(session.module("work"), name)) for name in ("work", "draw"))
        assert work() == (False, False, str(session.workdir), ["train.py"])
        assert state() == before
        first = draw()
        assert work()[:2] == (True, True), "what it has set, it finds again"
        assert state() == before
        assert draw() == first, "its seeds are its own"
        assert draw() != first, "and its stream goes on"
    assert capsys.readouterr() == ("", "")


def test_a_failure_shows_what_was_printed_and_leaves_nothing_behind(tmp_path):
    folder = write(
        tmp_path / "clone",
        {
            "work.py": "import sys\ndef fail():\n    print('on the way'); 1 / 0\ndef leave():\n    sys.exit(3)\ndef late():\n    import not_there_at_all\n"
        },
    )
    path, cwd = list(sys.path), os.getcwd()
    with Session(folder) as session:
        module = session.module("work")
        with pytest.raises(PeerFailed, match=r"(?s)it had printed:\non the way\nZeroDivisionError: division by zero$"):
            session.bound(module.fail)()
        with pytest.raises(PeerFailed, match="^SystemExit: 3$"):
            session.bound(module.leave)()
        with pytest.raises(PeerFailed, match="No module named 'not_there_at_all'"):
            session.bound(module.late)()

        def out_of_time():
            raise OutOfTime

        with pytest.raises(OutOfTime):
            session.bound(out_of_time)()
        assert (sys.path, os.getcwd()) == (path, cwd)
        assert "work" not in sys.modules
        # Inside already: the outer one sees the error itself.
        with pytest.raises(PeerFailed, match="^ZeroDivisionError: 1$"), session.inside(), session.inside():
            raise ZeroDivisionError("1")


def test_classes_and_functions_are_taken_out_of_a_script_that_would_train(tmp_path):
    folder = write(tmp_path / "clone", {"train.py": BOOM + """
RATE, MEAN = 1, 2
STD = [0.1, -2]
class Base: factor = 2
class Net(Base):
    def value(self): return self.factor * given
def train(): return Net().value() + later
parser.add_argument('-t', '--temp-rate', type=float, default=0.5, metavar='X')
parser.add_argument('--warm', action='store_true')
parser.add_argument('--name', type=str)
parser.add_argument('--levels', default=[1, 2])
""", "broken.py": "def ("})  # fmt: skip
    with Session(folder) as session:
        namespace = session.definitions("train.py", ("Base", "Net", "train"), {"given": 3})
        namespace["later"] = 1
        assert namespace["train"]() == 7
        assert namespace["train"].__code__.co_filename == str(folder / "train.py")
        assert "RATE" not in namespace
        assert {"Base", "Net", "train"} < set(session.definitions("train.py", None, {}))
        assert session.literals("train.py", "STD") == [[0.1, -2]]
        assert vars(session.defaults("train.py")) == {"temp_rate": 0.5, "warm": False, "name": None, "levels": [1, 2]}
        for call, said in (
            (lambda: session.definitions("train.py", ("train", "fit"), {}), "train.py of this clone defines no fit"),
            (lambda: session.literals("train.py", "STD", "GONE"), "train.py of this clone sets no GONE"),
            (lambda: session.definitions("absent.py", None, {}), "absent.py of this clone cannot be read"),
            (lambda: session.defaults("broken.py"), "broken.py of this clone cannot be read"),
        ):
            with pytest.raises(PeerFailed, match=said):
                call()


def test_cuda_stays_here_only_without_a_gpu_and_only_within(monkeypatch):
    methods = torch.Tensor.cuda, nn.Module.cuda
    x, net = torch.ones(1), nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ZeroDivisionError), cuda_stays_here():
        assert x.cuda() is x
        assert x.cuda(non_blocking=True) is x
        assert net.cuda(0) is net
        raise ZeroDivisionError
    assert (torch.Tensor.cuda, nn.Module.cuda) == methods
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cuda_stays_here():
        assert (torch.Tensor.cuda, nn.Module.cuda) == methods


# -- rows --------------------------------------------------------------------------------------------------------------------


def counting(seconds: float, batches: int = 1):
    """A maker of work whose own clock counts `seconds` a call."""
    state = {"clock": 0.0, "calls": 0}

    def call():
        state["clock"] += seconds
        state["calls"] += 1

    return (lambda: Work(call, batches, clock=lambda: state["clock"])), state


def test_ratio_is_the_peers_time_over_ours_for_one_batch(run):
    peer, peer_state = counting(6.0, batches=2)
    ours, _ = counting(0.5)
    run.fill, run.ceiling = 14.0, 1e12
    measure.compare(
        run,
        "peer",
        {"peer": peer, "ours": ours},
        {"peer": {"peer": "peer"}, "ours": {"peer": "peer"}},
        flops=3e9,
        extrapolate=True,
    )
    first, second = run.results.rows("peers")
    assert (first["ms"], first["ratio"], first["batches"], first["clock"]) == (3000.0, 1.0, 2, "its own")
    assert (second["ms"], second["ratio"], second["ratio_range"], second["rounds"]) == (500.0, 6.0, [6.0, 6.0], 2)
    assert second["images_per_s"] == 4.0
    assert second["extrapolated_s_per_epoch"] == pytest.approx(0.5 * 50_000 / 2)
    assert (second["model_tflops"], second["share_of_bf16_matmul"]) == pytest.approx((0.012, 0.012))
    # One call when it is made, one to see how often a turn repeats (14 s of 6 s calls: twice), then two rounds.
    assert peer_state["calls"] == 1 + 1 + 2 * 2


def test_once_the_time_is_over_rounds_are_fewer_but_not_one(run, monkeypatch):
    run.rounds, run.deadline = 5, 0.0
    measure.compare(run, "peer", {"peer": counting(1.0)[0]}, {"peer": {"peer": "peer"}})
    assert run.results.rows("peers")[0]["rounds"] == measure.LEAST_ROUNDS


def test_a_failure_is_a_row_and_the_others_go_on(run):
    def failing(at):
        calls = []

        def call():
            calls.append(1)
            if len(calls) >= at:
                raise RuntimeError("gone wrong")

        return lambda: Work(call)

    names = ("peer", "at once", "later", "fine")
    makers = dict(zip(names, (counting(1.0)[0], failing(1), failing(3), counting(0.5)[0]), strict=True))
    measure.compare(run, "peer", makers, {name: {"peer": "peer"} for name in names})
    found = {row["name"]: row for row in run.results.rows("peers")}
    assert set(found) == set(names)
    for name in ("at once", "later"):
        assert found[name]["error"].strip().endswith("RuntimeError: gone wrong")
    assert found["fine"]["ratio"] == 2.0
    # Without the peer there is nothing to compare with.
    before = len(run.results.rows("peers"))
    for at in (1, 3):
        measure.compare(run, "peer", {"peer": failing(at), "ours": counting(1.0)[0]}, {"peer": {}, "ours": {}})
    later = run.results.rows("peers")[before:]
    assert [row["name"] for row in later] == ["peer", "peer"]
    assert all("gone wrong" in row["error"] for row in later)


def test_a_module_that_is_missing_leaves_out_and_a_broken_import_fails(run, tmp_path):
    folder = write(
        tmp_path / "clone",
        {"absent.py": "import ffcv_that_nobody_has\n", "broken.py": "raise ImportError('no such thing here')\n"},
    )
    made = [Variant(name, lambda session, case, name=name: session.module(name), {}) for name in ("absent", "broken")]
    needing = Variant("needing", made[0].make, {}, needs=("json", "nobody_has_this"))
    on_gpu = Variant("on a GPU", made[0].make, {}, needs_cuda=True)
    measure.measure_clone(run, Clone("TRADES", folder, None), (*made, needing, on_gpu))
    found = rows(run)
    assert found["TRADES: absent"]["left_out"] == "ffcv_that_nobody_has is not installed"
    assert "ImportError: no such thing here" in found["TRADES: broken"]["error"]
    assert found["TRADES: needing"]["left_out"] == "nobody_has_this is not installed"
    assert found["TRADES: on a GPU"]["left_out"] == "needs a CUDA device"
    run.deadline = 0.0
    measure.measure_clone(run, Clone("TRADES", folder, None), (made[0],))
    assert run.results.rows("peers")[-1]["left_out"] == "no time was left"


def test_with_a_gpu_that_is_not_asked_for_clones_are_left_out(run, clone_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    measure.measure_clone(run, Clone("TRADES", clone_of("TRADES"), None))
    assert "--device cpu" in run.results.rows("peers")[-1]["left_out"]


OURS = {"naive, fp32", "second rung (bf16 autocast, channels-last)", "engine, fp32", "engine, bf16"}


@pytest.mark.parametrize("name", [name for name in REPOSITORIES if name != "cifar10-airbench"])
def test_adapters_run_what_looks_like_their_repository(run, clone_of, name):
    if name == "Super-Fast-Adversarial-Training":
        pytest.importorskip("tqdm")
    if name == "FastAT_Benchmark":
        pytest.importorskip("PIL")
    variants = variants_of(name)
    folder = clone_of(name)
    listing = sorted(folder.rglob("*"))
    measure.measure_clone(run, Clone(name, folder, None), variants)
    assert sorted(folder.rglob("*")) == listing, "nothing is written into a clone"
    all_rows = run.results.rows("peers")
    assert [row["error"] for row in all_rows if "error" in row] == []
    assert "not known" in all_rows[0]["warning"]
    for variant in variants:
        own, *ours = [row for row in all_rows if row.get("peer") == f"{name}: {variant.name}"]
        assert own["ms"] > 0
        assert (own["what"], own["counterpart"]) == (variant.what, variant.counterpart)
        assert own["computes"] == {**variant.computes, "differs": list(variant.differs)}
        if variant.counterpart is None:
            assert not ours
            assert own["reason"] == variant.reason
        else:
            assert {row["name"] for row in ours} == OURS
            assert all(row["ratio"] > 0 for row in ours)


def test_fastat_runs_by_its_own_clock_and_the_engine_does_what_it_does(run, clone_of, monkeypatch):
    pytest.importorskip("PIL")
    configs = []
    real = cases.make_step
    monkeypatch.setattr(cases, "make_step", lambda config, *rest: configs.append(config) or real(config, *rest))
    measure.measure_clone(run, Clone("FastAT_Benchmark", clone_of("FastAT_Benchmark"), None), variants_of("FastAT_Benchmark"))
    assert not logging.getLogger("fake").handlers, "its log files went with the temporary folder"
    for name, row in rows(run).items():
        assert row["ms"] == pytest.approx(500.0), name
        assert row["batches"] == (4 if "loader" in name else 1)
    seen = [(config.loss.label_smoothing, config.optim.ema_decay, config.loss.hsc, config.attack.bn) for config in configs]
    assert seen[0::2] == seen[1::2] == [(0.4, 0.0, 0.0, "eval"), (0.4, 0.9995, 0.0, "eval"), *[(0.4, 0.0, 0.0, "eval")] * 2]


def test_ascl_is_compared_with_the_engine_in_its_batchnorm_mode(run, clone_of, monkeypatch):
    modes = []
    real = cases.make_step
    monkeypatch.setattr(cases, "make_step", lambda config, *rest: modes.append(config.attack.bn) or real(config, *rest))
    monkeypatch.setattr(measure, "PGD", lambda *args, bn, **kwargs: modes.append(bn) or PGD(*args, bn=bn, **kwargs))
    measure.measure_clone(run, Clone("ASCL", clone_of("ASCL"), None), variants_of("ASCL"))
    assert modes == ["train"] * 4


def test_airbenchs_loader_is_beside_our_resident_one(run, monkeypatch):
    monkeypatch.setattr(measure, "CIFAR_IMAGES", 9)
    case = Case(CPU, 2, 1, 1)
    work = measure.loader_makers(run, case)["resident"]()
    seen = []
    real = measure.views.augment
    monkeypatch.setattr(measure.views, "augment", lambda *args, **kwargs: seen.append(real(*args, **kwargs)))
    work.call()
    assert work.batches == 4
    assert [tuple(x.shape) for x in seen] == [(2, 3, 32, 32)] * 4


def test_each_adapter_says_what_it_computes():
    for name, known in REPOSITORIES.items():
        assert re.fullmatch(r"[0-9a-f]{7}", known.commit)
        assert known.url.startswith("https://github.com/")
        variants = importlib.import_module(known.adapter).VARIANTS
        assert len({variant.name for variant in variants}) == len(variants)
        for variant in variants:
            assert {"method", "precision"} <= set(variant.computes), (name, variant.name)
            assert variant.differs
            assert (variant.counterpart is None) == (variant.reason is not None)
            assert variant.counterpart in (None, *cases.METHODS)
    assert set(NAMES) == {*REPOSITORIES, *attacks.PEERS}
    assert set(LOSSES) == {name for name in losses.PLAIN if not name.startswith("eager")}


def test_prepared_batches_are_what_a_loader_gives():
    batches = Case(CPU, 3, 1, 2, pixels=8).prepared()
    assert isinstance(batches, Batches)
    assert (len(batches), len(batches.dataset)) == (2, 6)
    for images, labels in batches:
        assert (images.dtype, tuple(images.shape), labels.dtype) == (torch.float32, (3, 3, 8, 8), torch.int64)
        assert images.is_contiguous()
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.std() > 0.2
    channels_last = Case(CPU, 3, 1, 2, pixels=8).prepared(channels_last=True)
    assert channels_last[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, channels_last, strict=True))


# -- attacks -----------------------------------------------------------------------------------------------------------------


def test_torchattacks_computes_what_ours_and_the_naive_loop_do():
    pytest.importorskip("torchattacks")
    model = cases.make_model(8, CPU)
    images_u8, labels = cases.make_batch(8, 16, CPU)
    images = images_u8.permute(0, 3, 1, 2).float().div(255).contiguous()
    torch.manual_seed(3)
    theirs = attacks.PEERS["torchattacks"].make(model, 4)(images, labels)
    torch.manual_seed(3)
    noise = torch.empty_like(images).uniform_(-cases.EPS, cases.EPS)
    numbers = {"eps": cases.EPS, "step_size": cases.STEP_SIZE, "steps": 4}
    for ours in (PGD(**numbers, start=noise)(model, images, labels), naive.attack(model, images, labels, noise, **numbers)):
        # Where a gradient is 0 to rounding its sign is anybody's.
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 2e-3
        assert (ours - images).abs().max() <= cases.EPS + 1e-6
    assert not model.training


def test_our_evaluation_of_one_stage_is_the_peers_verdict():
    pytest.importorskip("pyautoattack")
    model = cases.make_model(4, CPU)
    case = Case(CPU, 12, 1, 1, pixels=16)
    (images, _), *_ = case.prepared()
    data = dataclasses.replace(case).data
    data.labels = attacks.judged_right(model, images)
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    theirs = attacks.PEERS["pyautoattack"].make(model, 2)(images, data.labels)
    hook.remove()
    assert len(forwards) < 20, "two iterations, not the standard's hundred"
    assert 0 < (theirs - images).abs().max() <= cases.EPS + 1e-6
    _, details = attacks.our_evaluation(model, data, 2)()
    assert details["stages"]["clean"] == 100.0
    assert set(details["stages"]) == {"clean", "apgd-ce"}
    expected = 100 * (model(theirs).argmax(1) == data.labels).float().mean().item()
    assert details["stages"]["apgd-ce"] == pytest.approx(expected)
    assert 0 < expected < 100


def test_a_turn_of_several_calls_by_the_peers_own_clock_is_shared_among_them(run):
    spent = []
    run.fill = 0.3
    work = Work(lambda: spent.append(0.1), batches=2, clock=lambda: sum(spent))
    assert measure.take_turns({"theirs": work}, run)["theirs"] == pytest.approx([0.05] * run.rounds)
    assert len(spent) == 1 + 3 * run.rounds


def test_the_share_of_the_ceiling_is_that_of_a_forward_and_an_input_gradient_a_step(run, monkeypatch):
    monkeypatch.setitem(attacks.PEERS, "torchattacks", attacks.PEERS["torchattacks"]._replace(
        needs="json", make=lambda model, steps: lambda images, labels: model(images)))  # fmt: skip
    run.ceiling = 1e12
    measure.measure_attack(run, "torchattacks")
    flops = 4 * run.steps * mac_count(cases.make_model(run.width, CPU), 32)
    for row in run.results.rows("peers"):
        assert row["share_of_bf16_matmul"] == pytest.approx(flops * row["images_per_s"] / run.ceiling)


def test_attacks_take_turns_or_say_what_is_missing(run, monkeypatch):
    fake = attacks.PEERS["torchattacks"]._replace(needs="json", make=lambda model, steps: lambda images, labels: model(images))
    monkeypatch.setitem(attacks.PEERS, "torchattacks", fake)
    monkeypatch.setitem(attacks.PEERS, "pyautoattack", fake._replace(needs="nobody_has_this"))
    measure.measure_all(run, {}, None)
    found = run.results.rows("peers")
    group = [row["name"] for row in found if row["peer"] == "torchattacks"]
    assert group[0] == "torchattacks"
    assert set(group[1:]) == OURS
    left_out = {row["name"]: row["left_out"] for row in found if "left_out" in row}
    assert left_out["pyautoattack"] == "nobody_has_this is not installed"
    assert set(left_out) == {"pyautoattack", *REPOSITORIES}
    assert left_out["TRADES"] == "no clone was given: --peer-path DIR, of https://github.com/yaodongyu/TRADES"


# -- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_writes_table_and_json_and_a_failing_clone_is_one_row(clone_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__.machine, "describe", lambda device: {"device": "a test"})
    good, bad = clone_of("TRADES"), clone_of("SupContrast")
    (bad / "losses.py").write_text("print('before the end')\nraise ValueError('this clone is broken')\n")
    adapter = importlib.import_module("bench.peers.trades")
    monkeypatch.setattr(adapter, "VARIANTS", variants_of("TRADES"))
    out = tmp_path / "out"
    arguments = ["--quick", "--device", "cpu", "--out", str(out), "--only", "SupContrast,TRADES"]
    assert __main__.main([*arguments, "--peer-path", str(bad), "--peer-path", f"TRADES={good}"]) == 1
    said = capsys.readouterr().out
    found = json.loads((out / "peers.json").read_text())
    assert (found["schema"], found["kind"]) == (1, "bench.peers")
    assert {part: end["status"] for part, end in found["parts"].items()} == {"environment": "done", "peers": "done"}
    assert found["settings"]["peer_path"] == ["SupContrast", "TRADES"]
    by_name = {row["name"]: row for row in found["results"]}
    assert by_name["device and ceilings"]["part"] == "environment"
    assert by_name["TRADES: train"]["ms"] > 0
    assert re.search(r"(?s)before the end.*ValueError: this clone is broken", by_name["SupContrast: train"]["error"])
    assert len((out / "peers.jsonl").read_text().splitlines()) == len(found["results"])
    table = said[said.index("peers: ms of one batch") :]
    assert "TRADES: train [step, batch 2]" in table
    assert "no ratio: the engine has no TRADES yet" in table
    assert (
        "SupContrast: train: failed: bench.peers.clones.PeerFailed: ValueError: this clone is broken" not in table.splitlines()[0]
    )
    assert "this clone is broken" in table
    with pytest.raises(UserError, match="holds a run already"):
        __main__.main([*arguments[:-1], "TRADES", "--peer-path", str(good)])
    assert __main__.main([*arguments[:-1], "TRADES", "--peer-path", str(good), "--out", str(tmp_path / "again")]) == 0


def test_bad_input_is_one_sentence_and_exit_2(tmp_path, clone_of, capsys):
    for arguments, said in (
        (["--peer-path", str(tmp_path / "none")], "is no folder"),
        (["--only", "TRADSE"], "did you mean 'TRADES'"),
        (["--only", "TRADES"], "give its clone with --peer-path"),
        (["--only", ""], "--only : must be of"),
        (["--batch", "1"], "--batch 1: must be at least 2"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--device", "tpu"], "tpu"),
    ):
        assert __main__.main([*arguments, "--out", str(tmp_path / "out")]) == 2, arguments
        printed = capsys.readouterr()
        assert said in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_the_help_says_that_a_clone_is_executed(capsys):
    with pytest.raises(SystemExit):
        __main__.parse(["--help"])
    assert "is executed, with your rights" in " ".join(capsys.readouterr().out.split())


def test_the_table_shows_ratios_and_reasons():
    shown = [
        {"name": "X: train", "peer": "X: train", "what": "step", "batch": 8, "ms": 10.0, "ms_range": [9.0, 11.0], "images_per_s": 800.0, "ratio": 1.0, "ratio_range": [1, 1]},
        {"name": "engine, fp32", "peer": "X: train", "what": "step", "batch": 8, "ms": 4.0, "ms_range": [4.0, 4.0], "images_per_s": 2000.0, "ratio": 2.5, "ratio_range": [2.25, 2.75]},
        {"name": "Y", "peer": "Y", "left_out": "because"},
        {"name": "Z", "peer": "Z", "error": "Traceback\nValueError: bad"},
    ]  # fmt: skip
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    tables.show(shown, console)
    text = console.export_text()
    for said in (
        "X: train [step, batch 8]",
        "10 (9 to 11)",
        "2.50 (2.25 to 2.75)",
        "Y: left out: because",
        "Z: failed: ValueError: bad",
    ):
        assert said in text
    tables.show([], console)


# -- bench.gpu ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    made = Bench(Results(tmp_path / "gpu", {}), CPU, [8, 16], quick=True, compile=False, cudnn_benchmark=False, data="synthetic")
    made.peer_paths = []
    return made


def test_the_gpu_part_takes_over_what_the_other_process_has_written(bench, clone_of, monkeypatch):
    clone, other, commands = clone_of("TRADES"), clone_of("SupContrast"), []
    bench.peer_paths = [str(other), str(clone)]
    monkeypatch.setattr(attacks, "missing", lambda needs: f"{needs} is not installed")

    def fake(command, timeout):
        commands.append(command)
        if "TRADES" not in command:
            return 0
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"part": "environment", "name": "device and ceilings", "at_s": 1},
            {"part": "peers", "name": "TRADES: train", "at_s": 2, "ms": 3.0},
        ]
        (folder / "peers.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"part": "pee', encoding="utf-8")
        return code

    monkeypatch.setattr(program, "child", fake)
    bench.deadline = time.perf_counter() + 100
    for given, more in ((1, []), (2, ["bench.peers ended with 2"])):
        code = given
        bench.results.found["results"].clear()
        gpu_peers.run(bench)
        found = bench.results.rows("peers")
        assert [row["error"] for row in found if "error" in row] == more
        assert [(row["name"], row["ms"]) for row in found if "ms" in row] == [("TRADES: train", 3.0)]
        assert not bench.results.rows("environment")
    for command, name, path in zip(commands, ("SupContrast", "TRADES"), (other, clone), strict=False):
        assert command[1:5] == ["-m", "bench.peers", "--only", name]
        assert [command[i + 1] for i, flag in enumerate(command) if flag == "--peer-path"] == [str(path)]
        assert command[command.index("--batch") + 1] == "8" and "--quick" in command
    # An even share of the time for each, less what the last call may take.
    budgets = [int(command[command.index("--budget") + 1]) for command in commands[:2]]
    assert budgets == [pytest.approx(part - gpu_peers.LAST_PEER_SECONDS, abs=2) for part in (50, 100)]

    def late(command, timeout):
        fake(command, timeout)
        if "TRADES" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return 0

    monkeypatch.setattr(program, "child", late)
    bench.results.found["results"].clear()
    gpu_peers.run(bench)
    assert [row.get("left_out", row.get("ms")) for row in bench.results.rows("peers")][2:] == [
        "stopped at the end of this part's time",
        3.0,
    ]


def test_the_gpu_part_says_why_it_begins_nothing(bench, clone_of, monkeypatch):
    monkeypatch.setattr(program, "child", lambda *args: pytest.fail("a process was begun"))
    monkeypatch.setattr(attacks, "missing", lambda needs: f"{needs} is not installed")
    gpu_peers.run(bench)
    bench.peer_paths = [str(clone_of("TRADES"))]
    bench.deadline = 0.0
    gpu_peers.run(bench)
    bench.peer_paths = ["/nowhere/at/all"]
    gpu_peers.run(bench)
    said = [row["left_out"] for row in bench.results.rows("peers")]
    absent = ["torchattacks is not installed", "pyautoattack is not installed"]
    assert said[:5] == ["none was given with --peer-path", *absent, *absent]
    assert said[5].endswith("s were left") and "is no folder" in said[6]


# -- the real ones -----------------------------------------------------------------------------------------------------------

PEERS = os.environ.get("FASTANCHOR_PEERS")
REAL = [
    (name, variant.name) for name, known in REPOSITORIES.items() for variant in importlib.import_module(known.adapter).VARIANTS
]
BATCH, STEPS, CALLS = 8, 2, 6


@pytest.fixture(scope="module")
def torchvision():
    """Torchvision, with stand-ins for the compiled operators where its build does not fit the torch that is installed."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(50):
        try:
            yield importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            absent = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library.define(f"{absent[1]}(Tensor x) -> Tensor")


@pytest.mark.skipif(PEERS is None, reason="FASTANCHOR_PEERS names no folder with clones")
@pytest.mark.parametrize(("name", "variant"), REAL, ids=[" ".join(pair) for pair in REAL])
def test_a_real_clone_does_what_its_adapter_states(request, name, variant):
    folder = Path(PEERS) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    variant = next(v for v in importlib.import_module(REPOSITORIES[name].adapter).VARIANTS if v.name == variant)
    if variant.needs_cuda and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    absent = [reason for module in variant.needs if (reason := attacks.missing(module))]
    if absent:
        pytest.skip(absent[0])
    if "torchvision" in variant.needs:
        request.getfixturevalue("torchvision")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = variant.steps or STEPS
    case = Case(device, BATCH, steps, 1, width=variant.width or 8)
    assert recognise(str(folder)).name == name
    torch.manual_seed(0)
    with Session(folder) as session:
        work = variant.make(session, case)
        if work.model is None:
            work.call()
            return
        seen = []
        hook = work.model.register_forward_pre_hook(
            lambda model, inputs: seen.append((model.training, inputs[0].detach().clone()))
        )
        before = [p.detach().clone() for p in work.model.parameters()]
        work.call()
        hook.remove()
        # Of another size are the two images that FastAT's trainer validates on.
        forwards = [(training, x) for training, x in seen if len(x) % BATCH == 0]
        for mode, training in (("eval", False), ("train", True)):
            each, besides = variant.forwards.get(mode, (0, 0))
            count = sum(t is training for t, _ in forwards)
            assert count == (each * steps + besides) * work.batches, f"{count} forwards in {mode} mode"
        if variant.what == "step" and variant.computes["attack"] and name != "AdvCL" and "loader" not in variant.name:
            (images, _), *_ = case.prepared()
            distances = [(x - images).abs().max().item() for _, x in forwards]
            # 0.031 and 8 / 255; TRADES starts from Gaussian noise that it does not clamp.
            assert 0.01 < max(distances) <= 8 / 255 + 1e-5
            assert all(-0.006 < x.min() and x.max() < 1.006 for _, x in forwards)
        assert work.clock is None or work.clock() > 0
        losses = [_loss(work, case, work.call()) for _ in range(CALLS)]
        changed = [not torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True)]
        if variant.what == "attack":
            assert not any(changed)
        else:
            assert any(changed)
            assert min(losses[1:]) < losses[0], losses


@torch.no_grad()
def _loss(work: Work, case: Case, returned: object) -> float:
    """What the peer's own function returned as its loss, else the cross-entropy of the training batch in train mode."""
    if isinstance(returned, tuple):
        returned = returned[0]
    if isinstance(returned, float):
        return returned
    (images, labels), *_ = case.prepared()
    kept = {key: value.clone() for key, value in work.model.state_dict().items()}
    try:
        return nn.functional.cross_entropy(work.model.train()(images).float(), labels).item()
    except NotImplementedError:  # AdvCL's network wants to be told which BatchNorm
        return float("nan")
    finally:
        work.model.load_state_dict(kept)

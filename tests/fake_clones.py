"""Stand-ins for the repositories that bench.peers knows, with their file names and signatures: tests have no clones."""

import dataclasses
import importlib
from pathlib import Path

import torch

from bench.peers import REPOSITORIES, measure
from bench.peers.adapter import Variant
from bench.results import Results

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


# What is timed beside a clone: the engine, and where the naive code computes the same that too.
ENGINE = {"engine, fp32", "engine, bf16"}
OURS = {"naive, fp32", "second rung (bf16 autocast, channels-last)", *ENGINE}

# Fixtures where a test file says so: clone_of = pytest.fixture(fake_clones.clone_of).


def clone_of(tmp_path):
    return lambda name: write(tmp_path / "clones" / name, FAKES[name])


def run(tmp_path):
    return measure.Run(Results(tmp_path / "out", {}, kind="bench.peers"), CPU, batch=2, steps=1, rounds=2, width=4)


def variants_of(name: str, width: int = 4) -> tuple[Variant, ...]:
    """The adapter's, with our side made small."""
    found = importlib.import_module(REPOSITORIES[name].adapter).VARIANTS
    return tuple(dataclasses.replace(v, width=width, steps=1, needs=()) for v in found)


def rows(run) -> dict[str, dict]:
    return {row["name"]: row for row in run.results.rows("peers") if row["name"] == row.get("peer")}

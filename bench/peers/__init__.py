"""The peers: other people's code that ours is timed beside, run as it is. What they are, in one place; nothing heavy is imported.

Three kinds: contrastive losses (`losses`) and attacks (`attacks`) that a package index has, and repositories that a user has
cloned (`clones`, with one small file an adapter). None of their code is in this repository.
"""

from __future__ import annotations

from typing import NamedTuple


class Repository(NamedTuple):
    """A public repository. commit: what its adapter was written for; adapter: module; files: those it is recognised by."""

    url: str
    commit: str
    adapter: str
    files: tuple[str, ...]


REPOSITORIES = {
    "FastAT_Benchmark": Repository(
        "https://github.com/fzjcdt/FastAT_Benchmark",
        "b99c0de",
        "bench.peers.fastat",
        ("fast_at/pgd_at.py", "configs/cifar10/pgd_at.yaml", "main.py"),
    ),
    "TRADES": Repository(
        "https://github.com/yaodongyu/TRADES",
        "6e8e11b",
        "bench.peers.trades",
        ("trades.py", "train_trades_cifar10.py"),
    ),
    "ASCL": Repository(
        "https://github.com/tuananhbui89/ASCL", "ca78d7b", "bench.peers.ascl", ("ascl.py", "mytrain.py", "mysetting.py")
    ),
    "AdvCL": Repository(
        "https://github.com/LijieFan/AdvCL",
        "24cb7a6",
        "bench.peers.advcl",
        ("pretraining_advCL.py", "models/resnet_cifar_multibn_ensembleFC.py", "fr_util.py"),
    ),
    "Super-Fast-Adversarial-Training": Repository(
        "https://github.com/ByungKwanLee/Super-Fast-Adversarial-Training",
        "14772fd",
        "bench.peers.superfast",
        ("fast_pretrain_adv.py", "attack/fastattack.py"),
    ),
    "SupContrast": Repository(
        "https://github.com/HobbitLong/SupContrast",
        "66a8fe5",
        "bench.peers.supcontrast",
        ("main_supcon.py", "networks/resnet_big.py", "losses.py"),
    ),
    "cifar10-airbench": Repository(
        "https://github.com/KellerJordan/cifar10-airbench",
        "f1c599c",
        "bench.peers.airbench",
        ("airbench/utils.py", "airbench/lib_airbench94.py"),
    ),
}
# Packages by the name that rows give them; what each computes is in bench.peers.attacks and bench.peers.losses.
ATTACKS = ("torchattacks", "pyautoattack")
LOSSES = ("SupContrast", "pytorch-metric-learning", "memeff", "inf-cl")
NAMES = (*ATTACKS, *REPOSITORIES)

"""Clones: which repository one is, what is said of wrong paths, its code kept apart from ours, pieces of scripts."""

import os
import random
import subprocess
import sys
import types

import fake_clones
import numpy as np
import pytest
import torch
from fake_clones import BOOM, FAKES, write
from torch import nn

from bench.peers import REPOSITORIES
from bench.peers.clones import PeerFailed, Session, cuda_stays_here, other_commit, recognise, recognise_all
from bench.results import OutOfTime
from fastanchor.errors import UserError

clone_of = pytest.fixture(fake_clones.clone_of)


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

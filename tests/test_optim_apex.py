"""The guard before NVIDIA apex, on packages laid out as apex, as its namesake and as half of apex; parity where it is installed."""

import dataclasses
import importlib
import math
import sys

import pytest
import torch

from fastanchor.config import OptimConfig
from fastanchor.errors import UserError
from fastanchor.train.apex import BUILD, build_apex, find_apex
from fastanchor.train.optim import build_optimizer, capturable, load_optimizer, set_learning_rate, state_tensors

EXPLODES = "raise ImportError('cannot import name UnencryptedCookieSessionFactoryConfig')\n"
RECORDER = """
import torch
class Recorder(torch.optim.SGD):
    def __init__(self, params, **settings):
        self.settings = settings
        super().__init__(params, lr=settings["lr"])
    def zero_grad(self):
        raise AssertionError("apex's zero_grad takes no argument")
class FusedSGD(Recorder): pass
class FusedLAMB(Recorder): pass
"""


def lay_out(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


PYRAMID = {"apex/__init__.py": EXPLODES, "apex/models.py": "", "apex/lib/__init__.py": ""}
PYTHON_ONLY = {
    "apex/__init__.py": EXPLODES,
    "apex/optimizers/__init__.py": EXPLODES,
    "apex/optimizers/fused_sgd.py": EXPLODES,
    "apex/multi_tensor_apply/__init__.py": EXPLODES,
}
WHOLE = PYTHON_ONLY | {"amp_C.py": ""}
LOADS = WHOLE | {"apex/__init__.py": "", "apex/optimizers/__init__.py": RECORDER}


@pytest.fixture
def path_of(tmp_path, monkeypatch):
    """A function that puts a layout of files where, and the only place where, packages are looked for."""
    for name in [n for n in sys.modules if n in ("apex", "amp_C") or n.startswith("apex.")]:
        monkeypatch.delitem(sys.modules, name)

    def put(files, only=True):
        lay_out(tmp_path, files)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *([] if only else sys.path)])
        if only:
            monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
        importlib.invalidate_caches()
        return tmp_path

    yield put
    for name in [n for n in sys.modules if n in ("apex", "amp_C") or n.startswith("apex.")]:
        del sys.modules[name]


def is_one_sentence_with_the_build_line(text):
    return BUILD in text and "\n" not in text and ". " not in text.replace(BUILD, "")


@pytest.mark.parametrize("files", [{}, {"apex/README.md": "a checkout", "apex/apex/__init__.py": ""}], ids=["absent", "a folder"])
def test_no_apex(path_of, files):
    path_of(files)
    found, what = find_apex()
    assert not found and what.startswith("NVIDIA apex is not installed; build it: ") and is_one_sentence_with_the_build_line(what)


@pytest.mark.parametrize("files", [PYRAMID, {"apex.py": EXPLODES}], ids=["package", "module"])
def test_the_namesake_is_recognised_and_not_run(path_of, files):
    root = path_of(files)
    found, what = find_apex()
    assert not found and what.startswith(f"{root / next(iter(files))} is not NVIDIA apex but an unrelated package of that name")
    assert "pip uninstall apex" in what and is_one_sentence_with_the_build_line(what)


def test_apex_without_its_extension_is_recognised_and_not_run(path_of):
    root = path_of(PYTHON_ONLY)
    found, what = find_apex()
    assert not found and what.startswith(f"NVIDIA apex in {root / 'apex'} was built without its CUDA extension amp_C")
    assert is_one_sentence_with_the_build_line(what)


@pytest.mark.parametrize("missing", ["apex/optimizers/fused_sgd.py", "apex/multi_tensor_apply/__init__.py"])
def test_both_marks_of_the_real_one_are_needed(path_of, missing):
    path_of({name: text for name, text in WHOLE.items() if name != missing})
    assert "unrelated package" in find_apex()[1]


def test_a_whole_apex_is_found_and_not_run(path_of):
    root = path_of(WHOLE)
    assert find_apex() == (True, str(root / "apex"))
    assert not any(n == "amp_C" or n.split(".")[0] == "apex" for n in sys.modules)


def make_parameters(device="cpu"):
    g = torch.Generator().manual_seed(0)
    conv, matrix = torch.randn(8, 5, 3, 3, generator=g).to(memory_format=torch.channels_last), torch.randn(7, 4, generator=g)
    return [torch.nn.Parameter(v.to(device)) for v in (conv, torch.randn(9, generator=g), matrix)]


@pytest.mark.parametrize("files", [{}, PYRAMID, PYTHON_ONLY], ids=["absent", "namesake", "python only"])
def test_building_without_a_real_apex_says_what_is_there(path_of, files):
    path_of(files, only=False)
    if not files and find_apex()[0]:
        pytest.skip("apex is installed")
    with pytest.raises(UserError) as error:
        build_apex("sgd", make_parameters(), OptimConfig(backend="apex"))
    assert str(error.value) == f"optim.backend = apex: {find_apex()[1]}"


def test_an_apex_that_does_not_load_is_said(path_of):
    root = path_of(WHOLE, only=False)
    with pytest.raises(UserError) as error:
        build_apex("sgd", make_parameters(), OptimConfig(backend="apex"))
    assert f"the apex in {root / 'apex'} does not load (cannot import name Unencrypted" in str(error.value)
    assert is_one_sentence_with_the_build_line(str(error.value))


def test_fused_sgd_gets_its_settings_and_its_state(path_of):
    path_of(LOADS, only=False)
    config = OptimConfig(backend="apex", lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.02)
    parameters = make_parameters()
    optimizer = build_apex("sgd", iter(parameters), config)
    assert type(optimizer).__name__ == "FusedSGD"
    assert optimizer.settings == {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True)] == [True] * 3
    for p in parameters:
        buffer = optimizer.state[p]["momentum_buffer"]
        assert not buffer.any() and buffer.stride() == p.stride()
    assert not capturable(optimizer)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.zero_grad(set_to_none=True)
    assert parameters[0].grad is None


def test_fused_lamb_gets_its_settings_and_its_state(path_of):
    path_of(LOADS, only=False)
    config = OptimConfig(name="lamb", backend="apex", lr=0.3, beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.02)
    parameters = make_parameters()
    optimizer = build_apex("lamb", parameters, config)
    assert type(optimizer).__name__ == "FusedLAMB"
    assert optimizer.settings == {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-4, "max_grad_norm": math.inf}
    assert [(len(g["params"]), g["weight_decay"], g["step"]) for g in optimizer.param_groups] == [(2, 0.02, 0), (1, 0.0, 0)]
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in parameters)


def test_numbers_are_set_and_loaded_as_numbers(path_of):
    path_of(LOADS, only=False)
    config = OptimConfig(name="lamb", backend="apex")
    optimizer = build_apex("lamb", make_parameters(), config)
    set_learning_rate(optimizer, 0.7)
    assert [g["lr"] for g in optimizer.param_groups] == [0.7, 0.7]
    for value in state_tensors(optimizer):
        value.fill_(2.0)
    for group in optimizer.param_groups:
        group["step"] = 5
    other = build_apex("lamb", make_parameters(), config)
    load_optimizer(other, optimizer.state_dict())
    assert [(g["lr"], g["step"], type(g["step"])) for g in other.param_groups] == [(0.7, 5, int)] * 2
    assert all((value == 2).all() for value in state_tensors(other)) and len(state_tensors(other)) == 6


def test_fused_lamb_without_weight_decay_is_refused():
    with pytest.raises(UserError, match=r"its FusedLAMB scales no layer where optim.weight_decay = 0; use torch"):
        build_apex("lamb", make_parameters(), OptimConfig(name="lamb", backend="apex", weight_decay=0.0))


def test_apex_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="its kernels run on CUDA devices only, not on cpu; use torch"):
        build_optimizer(make_parameters(), OptimConfig(backend="apex"))


@pytest.mark.gpu
@pytest.mark.skipif(not find_apex()[0], reason="NVIDIA apex is not installed")
@pytest.mark.parametrize("name, nesterov", [("sgd", False), ("sgd", True), ("lamb", False)])
def test_apex_agrees_with_torch(name, nesterov):
    config = OptimConfig(name=name, lr=0.05, nesterov=nesterov, weight_decay=0.01)
    runs = []
    for backend in ("torch", "apex"):
        parameters = make_parameters("cuda")
        optimizer = build_optimizer(parameters, dataclasses.replace(config, backend=backend))
        g = torch.Generator("cuda").manual_seed(1)
        for lr in (0.05, 0.05, 0.01):
            set_learning_rate(optimizer, lr)
            for p in parameters:
                p.grad = torch.empty_like(p).normal_(generator=g)
            optimizer.step()
        runs.append(parameters)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)

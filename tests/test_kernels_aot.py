"""The kernels compiled ahead of time without a GPU: spills, shared memory, tensor-core instructions; and their two test benches.

`python -m bench.aot` compiles every row of the table for every architecture; here are the hardest variants of a part of them.
"""

import importlib
import json
import pkgutil
import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastanchor.kernels import augment, bn_fold, config, epilogue, heads, noise, pgd, supcon_launch
from fastanchor.kernels.supcon_launch import Options
from interpreter import interpreted

from bench import aot
from fastanchor import kernels

PRECISIONS = supcon_launch.PRECISIONS
# What a case of the table costs most registers with, and what runs most; the others are left to the command.
HARDEST = ("worst", "all")
CASES = [
    (90, "fp16", 128), (90, "fp16", 256), (90, "fp16", 512), (90, "tf32", 256), (90, "ieee", 128),
    (80, "fp16", 256), (86, "fp16", 128), (89, "tf32", 128), (100, "fp16", 128),
]  # fmt: skip


@pytest.mark.parametrize("arch, precision, d", CASES)
def test_rows_of_the_table(arch, precision, d):
    for label, launch in aot.supcon_cases(arch, [d], HARDEST, [precision]):
        row = aot.measured(label, launch)
        assert not aot.faults(row), row


def test_one_exp_of_the_softmax_and_one_of_the_weight_for_each_pair():
    cases = [case for d in (128, 256) for case in aot.supcon_cases(90, [d], ["default"], ["fp16"]) if "BM" in case[1].arguments]
    assert len(cases) > 4
    for label, launch in cases:
        row = aot.measured(label, launch)
        pairs = launch.arguments["BM"] * launch.arguments["BN"] // (32 * row["warps"])
        assert not aot.faults(row) and row["ex2"] <= 2 * pairs, row


def test_row_kernels_and_the_kernels_on_images_and_logits():
    arch = 90
    most = {"linf_kernel": 64, "l2_sums_kernel": 64, "l2_apply_kernel": 64, "augment_kernel": 64, "fold_kernel": 64}
    rows = [case for case in aot.supcon_cases(arch, [512], ["default"], ["fp16"]) if "BM" not in case[1].arguments]
    assert len(rows) >= 5
    for label, launch in [*rows, *aot.other_cases(arch)]:
        found = aot.compile_launch(launch, arch)
        assert not aot.faults(label | found), (label, found["spilled"])
        assert found["registers"] <= most.get(label["kernel"], 128), label
        if label["kernel"] in ("linf_kernel", "l2_sums_kernel", "l2_apply_kernel"):
            assert "ld.global.v4" in found["ptx"], label
        if label["kernel"] == "linf_kernel":
            # The interpreter's minimum and maximum keep NaN whatever they are told; a GPU's do with .NaN alone.
            assert "max.NaN.f32" in found["ptx"] and not re.search(r"(max|min)\.f32", found["ptx"])


# Options, arguments beyond labels, rows, features, dtype, views. What the interpreter forgives, the compiler may not: types of
# branches, integers that are 1 (which Triton makes constants), pointers of other types.
OPTIONS = [
    ({"weight": "uniform", "denominator": "negatives", "reduction": "mean_all"}, ("anchors",), 130, 32, torch.float32, 3),
    ({"detach_weights": False, "normalizer": "count", "reduction": "sum"}, ("beta",), 130, 32, torch.float16, 3),
    ({"reduction": "none", "detach_keys": True}, ("anchors",), 130, 32, torch.bfloat16, 3),
    ({"weight": "topk", "k": 1, "denominator": "pairwise"}, ("views", "denominator_mask"), 130, 20, torch.float32, 1),
    ({"weight": "topk", "k": 5, "temperature": 0.01}, ("ref_embeddings", "ref_labels"), 130, 32, torch.float32, 3),
    ({"denominator": "pairwise", "detach_weights": False, "selection": "hard"}, ("predictions",), 130, 32, torch.float32, 3),
    ({"hard_negative_beta": 1.0, "selection": "soft", "normalizer": "count"}, ("predictions",), 130, 32, torch.float32, 3),
    ({"selection": "leaking", "temperature": 0.02, "weight": "pow"}, ("predictions", "instances"), 130, 32, torch.float32, 3),
    ({"detach_weights": False}, ("views", "positive_coef"), 1, 1, torch.float32, 1),
    ({"precision": "tf32", "reduction": "mean_all"}, ("ref_embeddings", "ref_labels"), 1, 1, torch.float32, 3),
]


@pytest.mark.parametrize("options, given, n, d, dtype, n_views", OPTIONS)
def test_every_option_compiles(options, given, n, d, dtype, n_views):
    for launch in aot.supcon_launches(90, n, d, Options(**options), given, dtype, n_views):
        aot.compile_launch(launch, 90)


def test_the_command_compiles_every_kernel_there_is():
    """By the kernels' own sources: what no other jit function calls is a kernel."""
    recorded = {label["kernel"] for label, _ in [*aot.supcon_cases(90, [128], precisions=["fp16"]), *aot.other_cases(90)]}
    functions = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        functions |= {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    called = {name for function in functions.values() for name in function.fn.__code__.co_names}
    assert {name.strip("_") for name in functions if name not in called} == recorded


def test_every_supported_case_has_a_tile_and_every_row_a_case():
    used = set()
    for kernel in ("row_stats", "gradient"):
        for arch in config.SHARED_LIMIT:
            for n in (1, 4096, 65536):
                for d in (16, 32, 64, 128, 256, 512):
                    assert config.row(kernel, arch, "fp16", d, n, False)
                    for precision in PRECISIONS:
                        found = [config.row(kernel, arch, precision, d, n, heavy) for heavy in (False, True)]
                        assert d > 128 or all(found), (kernel, arch, precision, d)
                        used |= set(found)
    assert used - {None} == set(config.TABLE)
    assert config.tile("gradient", 86, "ieee", 512, 100, False) is None


@pytest.mark.parametrize(
    "capability, arch", [((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 89)]
)  # fmt: skip
def test_every_capability_has_the_rows_of_a_card_with_no_more_memory(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert config.architecture(torch.device("cuda")) == arch


def test_the_command(monkeypatch, tmp_path, capsys):
    cases = [
        case for case in aot.supcon_cases(90, [64], ["default"], ["fp16"]) if case[0]["kernel"] in ("row_stats", "row_roles")
    ]
    monkeypatch.setattr(aot, "supcon_cases", lambda arch: cases)
    monkeypatch.setattr(aot, "other_cases", lambda arch: [])
    assert aot.main(["--arch", "90", "--json", str(tmp_path / "aot.json")]) == 0
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "aot.json").read_text())
    assert f"triton {triton.__version__}" in said and "0 with faults" in said and kept["triton"] == triton.__version__
    assert [row["kernel"] for row in kept["rows"]] == [label["kernel"] for label, _ in cases]
    stats = next(row for row in kept["rows"] if row["kernel"] == "row_stats")
    assert stats["wgmma"] > 0 and stats["registers"] > 0 and stats["faults"] == []
    monkeypatch.setitem(config.SHARED_LIMIT, 90, 1024)
    assert aot.main(["--arch", "90"]) == 1 and "bytes of shared memory, 1024 allowed" in capsys.readouterr().out


def test_launchers_refuse_the_cpu_outside_the_interpreter():
    images, logits = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5)
    labels, seed = torch.zeros(2, dtype=torch.int64), torch.tensor([1])
    store, offsets = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    fold = bn_fold.Fold(images, torch.zeros_like(images), None, None, None, None, None, None, 1e-5)
    for call in (
        lambda: pgd.pgd_step(images, images, images, 0.1, 0.1),
        lambda: pgd.pgd_step(images, images, images, 0.1, 0.1, "l2"),
        lambda: noise.start_noise(images, 0.1, seed),
        lambda: augment.augment(store, offsets, None),
        lambda: augment.augment_random(store, seed),
        lambda: heads.label_head("ce", logits, labels),
        lambda: heads.kl_head(logits, logits),
        lambda: bn_fold.bn_fold(bn_fold.FoldTable([fold])),
        lambda: epilogue.epilogue_(images),
        lambda: supcon_launch.forward(logits, labels, Options()),
    ):
        with pytest.raises(ValueError, match="is on cpu: Triton kernels need CUDA tensors"):
            call()


def test_the_interpreter_leaves_everything_as_it_was():
    """Also after a launch that fails, and the language already between launches. (Triton adds names of its own to modules.)"""
    language, patched = (tl, tl.core, tl.math, tl.standard, tl.tensor), (heads, noise, augment)
    before = {part: dict(vars(part)) for part in (*language, *patched)}

    def kept(*parts):
        return all(vars(part)[name] is value for part in parts for name, value in before[part].items())

    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with interpreted(heads, augment):
        replaced = (heads._label_kernel, augment.philox, noise.philox)
        assert not any(isinstance(value, triton.JITFunction) for value in replaced) and augment.philox is noise.philox
        heads.label_head("ce", logits, labels)
        with pytest.raises(TypeError, match="missing"):
            heads._label_kernel[(1,)](logits)
        assert kept(*language)
    assert kept(*language, *patched)

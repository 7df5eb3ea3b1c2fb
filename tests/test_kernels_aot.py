"""Every tile of the kernels' table, compiled ahead of time without a GPU: spills, shared memory, tensor-core instructions.

The worst case of a row is compiled (attached pow weights; with instances where it serves view matrices) and, in fp16, the default.
"""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from fastanchor.kernels import config, supcon
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = {"n", "n_pad", "n_pad_key", "n_key", "n_views", "span", "split", "n_features"}
PADDED = {"n_pad", "n_pad_key", "span"}  # multiples of 16, and Triton specialises on that
NUMBERS = {"beta", "gamma", "log2_per_tau", "inv_tau", "scale", "tau", "gain", "inv_tau_gain"}
DEFAULTS = {"WEIGHT": "exp", "BETA_TENSOR": False, "NEGATIVES": False, "SELF": True, "INSTANCES": False, "VIEWS": False,
            "DETACHED": True, "SYMMETRIC": True, "COUNT": False, "ANCHORS": False, "PER_ROW": False, "TF32": False,
            "REDUCTION": "mean_valid", "BLOCK": 1024}  # fmt: skip
WORST = {"WEIGHT": "pow", "DETACHED": False}


def compile_kernel(name, arch, precision, warps, stages, types=None, **constants):
    """types: of arguments where they differ from the usual; "1" is an integer that is 1, which Triton makes a constant."""
    kernel = getattr(supcon, name)
    constants = {**DEFAULTS, "DOT": "ieee" if precision == "ieee" else "tf32", **constants}
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        elif argument.startswith("ids"):
            signature[argument] = "*i32"
        elif argument == "labels":
            signature[argument] = "*i64"
        else:
            signature[argument] = "*fp16" if argument in ("z", "z_key") and precision == "fp16" else "*fp32"
        signature[argument] = (types or {}).get(argument, signature[argument])
        if signature[argument] == "1":
            signature[argument], constants[argument] = "constexpr", 1
        # Without these the compiler sees unaligned pointers and makes another kernel than the one that will run.
        if signature[argument].startswith("*") or argument in PADDED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})


def resources(compiled, folder):
    """Registers, spilled bytes of a thread, shared bytes of a block, and counts of instructions."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "ex2": ptx.count("ex2.approx"),
    }


def cases():
    """One case for each row, its oldest architecture and sm_90."""
    for row in config.TABLE:
        for arch in {90, row.archs[0]} & set(row.archs):
            where = f"{row.kernel}-sm{arch}-{row.precision}-{row.max_d}{'-views' * row.views}{'-small' * row.small}"
            yield pytest.param(row, arch, WORST | {"VIEWS": row.views, "INSTANCES": row.views}, id=f"{where}-worst")
            if row.precision == "fp16" and not row.views:
                yield pytest.param(row, arch, {}, id=f"{where}-default")


@pytest.mark.parametrize("row, arch, flags", list(cases()))
def test_row_of_the_table(row, arch, flags, tmp_path, capsys):
    tile = row.tile
    flags = {**flags, "D": row.max_d, "BM": tile.rows, "BN": tile.columns}
    found = resources(compile_kernel(row.kernel, arch, row.precision, tile.warps, tile.stages, **flags), tmp_path)
    kind = "default" if len(flags) == 3 else "worst"
    with capsys.disabled():
        shape = f"{tile.rows}x{tile.columns} {tile.warps}w {tile.stages}s"
        name = f"{row.kernel} sm_{arch} {row.precision} D={row.max_d}{' views' * row.views}"
        print(f"\n| {name} | {kind} | {shape} | {' | '.join(map(str, found.values()))} |", end="")
    assert found["spilled"] == 0
    assert found["shared"] <= min(config.SHARED_LIMIT[a] for a in row.archs)
    if row.precision != "ieee":
        assert found["wgmma" if arch == 90 else "mma"] > 0
    if kind == "default":
        # One exp of the softmax and one of the weight for each pair; where the accumulator of a wide D needs more warps than the
        # similarity tile has rows for, two warps do the same pairs.
        pairs = tile.rows * tile.columns // (32 * tile.warps)
        assert found["ex2"] <= 2 * pairs * (1 if row.max_d <= 256 else 2)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["normalize", "finish_rows", "reduce_rows", "row_roles", "finish_gradient"])
def test_row_kernels(name, arch, tmp_path):
    found = resources(
        compile_kernel(name, arch, "fp16", 4, 3, D=512, ROWS=4 if "D" in getattr(supcon, name).arg_names else 128), tmp_path
    )
    assert found["spilled"] == 0 and found["registers"] <= 128


PAIR_VARIANTS = [
    ({"WEIGHT": "uniform", "NEGATIVES": True}, {}),
    ({"BETA_TENSOR": True, "DETACHED": False}, {"beta": "*fp32"}),
    ({"SELF": False, "SYMMETRIC": False, "INSTANCES": True}, {}),
    ({"SELF": False, "SYMMETRIC": False, "VIEWS": True, "DETACHED": False}, {}),
    ({}, {"n_key": "1"}),
    ({"VIEWS": True}, {"n_views": "1"}),
]
ROW_VARIANTS = [
    ("normalize", {"TF32": True}, {"u": "*bf16", "labels": "*i32"}),
    ("normalize", {}, {"u": "*fp16", "labels": "*u8", "n": "1", "n_features": "1"}),
    ("finish_rows", {"COUNT": True, "ANCHORS": True}, {"anchors": "*i8", "split": "1", "n": "1"}),
    ("reduce_rows", {"REDUCTION": "mean_all", "ANCHORS": True}, {"anchors": "*i8"}),
    ("reduce_rows", {"REDUCTION": "mean_all"}, {"n": "1"}),
    ("reduce_rows", {"REDUCTION": "sum"}, {}),
    ("row_roles", {"COUNT": True, "DETACHED": False, "PER_ROW": True}, {}),
    ("row_roles", {"DETACHED": False}, {"n": "1"}),
    ("finish_gradient", {"PER_ROW": True}, {"u": "*bf16", "du": "*bf16", "split": "1"}),
]


@pytest.mark.parametrize("flags, types", PAIR_VARIANTS)
@pytest.mark.parametrize("name", ["row_stats", "gradient"])
def test_every_option_compiles(name, flags, types):
    """What the interpreter forgives, the compiler may not: types of branches, integers that are 1, pointers of other types."""
    compile_kernel(name, 90, "fp16", 4, 2, types, D=32, BM=64, BN=32, **flags)


@pytest.mark.parametrize("name, flags, types", ROW_VARIANTS)
def test_every_option_of_the_row_kernels_compiles(name, flags, types):
    compile_kernel(name, 90, "fp32", 4, 3, types, D=32, ROWS=64 if name in ("normalize", "finish_gradient") else 128, **flags)


def test_every_supported_case_has_a_tile():
    for kernel in ("row_stats", "gradient"):
        for d in (16, 32, 64, 128, 256, 512):
            for n in (1, 4096, 65536):
                assert all(config.tile(kernel, arch, "fp16", d, n, False) for arch in config.SHARED_LIMIT)
                assert all(config.tile(kernel, 90, precision, min(d, 256), n, False) for precision in ("tf32", "ieee"))
                assert all(config.tile(kernel, arch, "fp16", min(d, 256), n, True) for arch in config.SHARED_LIMIT)
    assert config.tile("gradient", 86, "ieee", 512, 100, False) is None

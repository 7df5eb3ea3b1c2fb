"""The kernels compiled without a GPU, each as its launcher would start it: registers, spills, shared memory, instructions.

    python -m bench.aot [--arch 80,86,89,90,100] [--json FILE]

Launchers run on tensors without memory and their launches are recorded; Triton's compiler and its ptxas do the rest. Exits with 1
if a kernel runs out of registers, does not fit, or multiplies matrices without the tensor cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import pkgutil
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from fastanchor.kernels import augment, bn_fold, config, epilogue, heads, limits, noise, pgd, supcon_launch
from fastanchor.kernels.supcon_launch import Options
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import program
from fastanchor import kernels
from fastanchor.errors import UserError
from fastanchor.files import make_place

META = torch.device("meta")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
# Of the instructions in PTX. tcgen05 is the tensor core of sm_100; cp_async loads to shared memory while others compute.
COUNTED = {
    "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma", "ex2": r"ex2\.approx",
    "cp_async": r"cp\.async\.c[ag]",
}  # fmt: skip
TENSOR_CORE = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
# Where ptxas may spill some bytes with registers left, to have more programs at a time; anywhere else a spill is a fault.
FEW_BYTES = {86: 16, 89: 16}
COLUMNS = (
    "kernel", "arch", "variant", "precision", "D", "tile", "warps", "stages", "registers", "spilled", "shared", *COUNTED
)  # fmt: skip


class Launch(NamedTuple):
    """kernel, its arguments by name, options (num_warps, num_stages, maxnreg)."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


# --- recording and compiling -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches of the kernels of `fastanchor.kernels` go to the list and nowhere else; tensors may be on any device."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for info in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"{kernels.__name__}.{info.name}")
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(value, launches)))
        yield launches


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            # By the kernel's own list: an argument that is missing fails here, as it would on a GPU.
            self.launches.append(Launch(self.kernel, {name: given[name] for name in self.kernel.arg_names}, options))

        return launch


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """registers, spilled bytes of a thread, shared bytes of a block, instructions by name, and the ptx itself, on sm_`arch`.

    Types, divisibility by 16 and integers that are 1 are taken from the arguments as a call on a GPU takes them: without them the
    compiler makes another kernel than the one that runs. spilled is the stack: spills, and arrays indexed at run time.
    """
    signature, constants, divisible = {}, {}, []
    constexprs = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    for position, (name, value) in enumerate(launch.arguments.items()):
        if name in constexprs or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # torch's allocator aligns to 512 bytes.
            divisible += [position] if value.storage_offset() * value.itemsize % 16 == 0 else []
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [position] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    attributes = {(position,): [["tt.divisibility", 16]] for position in divisible}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"], "shared": compiled.metadata.shared,
        **{name: len(re.findall(pattern, ptx)) for name, pattern in COUNTED.items()}, "ptx": ptx,
    }  # fmt: skip


# --- what the launchers launch -----------------------------------------------------------------------------------------------


def supcon_launches(
    arch: int, n: int, d: int, options: Options, given: Iterable[str] = (), dtype=torch.float32, n_views: int = 3
) -> list[Launch]:
    """Forward and backward of n rows of d features on an `arch` GPU, with the arguments named in `given` (see `_argument`)."""
    u = torch.empty((n, d), dtype=dtype, device=META)
    pairs = {name: _argument(name, n, d, n_views) for name in ("labels", *given)}
    beta = pairs.pop("beta", 2.0)
    upstream = torch.empty(n if options.reduction == "none" else (), device=META)
    with recording() as launches, _on(arch):
        supcon_launch.loss_and_grad(u, options=options, beta=beta, upstream=upstream, keys_gradient=True, **pairs)
    return launches


def _on(arch: int) -> contextlib.AbstractContextManager:
    return mock.patch.object(config, "architecture", lambda device: arch)


def _argument(name: str, n: int, d: int, n_views: int) -> Tensor:
    if name == "beta":
        return torch.empty((), device=META)
    if name in ("positive_coef", "denominator_mask"):
        return torch.empty((n_views, n_views), device=META)
    if name == "ref_embeddings":
        return torch.empty((n, d), device=META)
    return torch.empty(n, dtype=torch.bool if name == "anchors" else torch.int64, device=META)


# Options of a variant, and arguments. The default is what runs most, the others are what costs most registers.
ATTACHED = {"weight": "pow", "detach_weights": False}
SELECTED = {**ATTACHED, "temperature": 0.01, "selection": "merge"}
VIEWS = ("views", "positive_coef", "denominator_mask", "instances")
KEYS = ("ref_embeddings", "ref_labels", "ref_instances")
OF_ALL = ("beta", "predictions", *VIEWS)
VARIANTS = {
    "default": ({}, ()),
    "worst": (ATTACHED, ("instances",)),
    "keys": (ATTACHED, ("instances", *KEYS)),
    "views": (ATTACHED, VIEWS),
    "topk": ({"weight": "topk", "k": limits.MAX_K}, ()),
    "pairwise": ({**ATTACHED, "denominator": "pairwise"}, ()),
    "all": ({**SELECTED, "hard_negative_beta": 1.0}, OF_ALL),
    "all keys": ({**SELECTED, "hard_negative_beta": 1.0}, (*OF_ALL, *KEYS, "ref_views", "ref_predictions")),
    "all pairwise": ({**SELECTED, "denominator": "pairwise"}, OF_ALL),
}


def supcon_cases(
    arch: int,
    widths: Iterable[int] = (128, 256, 512),
    variants: Iterable[str] = tuple(VARIANTS),
    precisions: Iterable[str] = supcon_launch.PRECISIONS,
) -> Iterator[tuple[dict, Launch]]:
    """What to compile for every row of the table that serves `arch`, with its name: kernel, arch, variant, precision, D, tile.

    The kernels that work row by row come with the default variant.
    """
    seen = []
    for precision, d, n, variant in itertools.product(precisions, widths, (config.SMALL_N, 2 * config.SMALL_N), variants):
        changed, given = VARIANTS[variant]
        options = Options(precision=precision, **changed)
        with _on(arch):
            served, _ = supcon_launch.supported(options, d, torch.float32, views="views" in given)
        # Where it is to be hard, a number of rows that no power of two divides.
        for launch in supcon_launches(arch, n - (variant != "default"), d, options, given) if served else ():
            label = {"kernel": launch.kernel.__name__, "arch": arch, "variant": variant, "precision": precision}
            label |= {"D": launch.arguments.get("D"), "tile": launch.arguments.get("ROWS")}
            if "BM" in launch.arguments:
                label["tile"] = f"{launch.arguments['BM']}x{launch.arguments['BN']}"
            elif variant not in ("default", "topk", "pairwise"):
                continue
            if launch.arguments.get("AS_ANCHORS") is False:
                label["variant"] += ", to the keys"
            label |= {"warps": launch.options["num_warps"], "stages": launch.options.get("num_stages")}
            if label not in seen:
                seen.append(label)
                yield label, launch


def other_cases(arch: int) -> Iterator[tuple[dict, Launch]]:
    """The kernels on images, logits and weights, at CIFAR-10's and ImageNet's shapes, with all of their options."""

    def cases(call, variant, dtype, **arguments):
        with recording() as launches:
            call(**arguments)
        for launch in launches:
            label = {"kernel": launch.kernel.__name__.strip("_"), "arch": arch, "variant": variant, "precision": dtype, "D": None}
            yield label | {"tile": launch.arguments.get("BLOCK"), "warps": launch.options["num_warps"], "stages": None}, launch

    last = torch.empty((256, 3, 32, 32), device=META).contiguous(memory_format=torch.channels_last)
    low, seed = last.bfloat16(), torch.empty(1, dtype=torch.int64, device=META)
    for norm in noise.NORMS:
        step = {"x_adv": last, "images": last, "eps": 8 / 255, "step_size": 2 / 255, "norm": norm}
        yield from cases(pgd.pgd_step, norm, "fp32", gradient=last, **step)
        yield from cases(pgd.pgd_step, f"{norm}, with bf16 copy", "bf16", gradient=low, low=low, **step)
        for kind in noise.KINDS:
            start = {"eps": 8 / 255, "seed": seed, "kind": kind, "norm": norm}
            yield from cases(noise.start_noise, f"{norm} {kind}", "fp32", images=last, **start)
            planar = {"images": last.contiguous(), "low": low.contiguous()}
            yield from cases(noise.start_noise, f"{norm} {kind}, planar, with bf16 copy", "bf16", **planar, **start)
    wide = torch.empty((128, 64, 32, 32), device=META).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        name, out = POINTERS[dtype].strip("*"), wide.to(dtype)
        bias = out[0, :, 0, 0].contiguous()
        yield from cases(epilogue.epilogue_, "bias, residual, ReLU", name, out=out, bias=bias, residual=out)
        yield from cases(epilogue.epilogue_, "bias, ReLU, planar", name, out=out.contiguous(), bias=bias)
        yield from cases(epilogue.relu_backward, "", name, gradient=out, out=out)
    store = torch.empty((50_000, 32, 32, 3), dtype=torch.uint8, device=META)
    index = torch.empty(256, dtype=torch.int64, device=META)
    drawn = {"offsets": torch.empty((2, 256), dtype=torch.int64, device=META), "mirrored": index.bool()}
    yield from cases(augment.augment, "gather, with bf16 copy", "bf16", images_u8=store, index=index, low=low, **drawn)
    yield from cases(augment.augment_random, "gather", "fp32", images_u8=store, index=index, seed=seed)
    for classes, dtype in ((10, torch.float32), (1000, torch.float32), (1000, torch.bfloat16)):
        name = POINTERS[dtype].strip("*")
        logits = torch.empty((256, classes), dtype=dtype, device=META)
        for kind in heads.KINDS:
            yield from cases(heads.label_head, f"{kind}, {classes} classes", name, kind=kind, logits=logits, labels=index)
        arguments = {"logits": logits, "clean_logits": logits, "clean_gradient": logits}
        yield from cases(heads.kl_head, f"{classes} classes", name, **arguments)
    for dtype in (torch.float32, torch.bfloat16):
        weight, vector = torch.empty(64, 64, 3, 3), torch.empty(64)
        layer = bn_fold.Fold(weight, weight.to(dtype), None, vector.to(dtype), vector, vector, vector, vector, 1e-5)
        yield from cases(bn_fold.bn_fold, "", POINTERS[dtype].strip("*"), table=bn_fold.FoldTable([layer]))


# --- the table ---------------------------------------------------------------------------------------------------------------


def measured(label: dict, launch: Launch) -> dict[str, Any]:
    """A line of the table: `label` with what the compiler made of it."""
    found = compile_launch(launch, label["arch"])
    del found["ptx"]
    return {**label, **found}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a line of the table, in words."""
    said = []
    if row["spilled"] > FEW_BYTES.get(row["arch"], 0) or (row["spilled"] and row["registers"] == 255):
        said.append(f"{row['spilled']} bytes spilled")
    if row["shared"] > (limit := config.SHARED_LIMIT[row["arch"]]):
        said.append(f"{row['shared']} bytes of shared memory, {limit} allowed")
    if "x" in str(row["tile"]) and row["precision"] != "ieee" and not row[TENSOR_CORE[row["arch"]]]:
        said.append(f"no {TENSOR_CORE[row['arch']]}")
    return said


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    every = ",".join(map(str, config.SHARED_LIMIT))
    parser.add_argument("--arch", default=every, help="such as 80,90 for sm_80 and sm_90; default: all")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    chosen = parser.parse_args(arguments)
    archs = [arch for arch in config.SHARED_LIMIT if str(arch) in chosen.arch.split(",")]
    if len(archs) != len(chosen.arch.split(",")):
        parser.error(f"--arch {chosen.arch}: must be some of {', '.join(map(str, config.SHARED_LIMIT))}")
    try:
        if chosen.json:
            make_place(chosen.json)
    except UserError as error:
        parser.exit(2, f"bench.aot: {error}\n")
    about = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    print(f"Ahead-of-time compilation, no GPU: {', '.join(f'{name} {version}' for name, version in about.items())}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    rows = []
    for arch in archs:
        for label, launch in [*supcon_cases(arch), *other_cases(arch)]:
            row = measured(label, launch)
            rows.append(row | {"faults": faults(row)})
            cells = ("" if row[name] is None else str(row[name]) for name in COLUMNS)
            print(f"| {' | '.join(cells)} |{' '.join(rows[-1]['faults'])}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({**about, "gpu": None, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print()
    for arch in archs:
        mine = [row for row in rows if row["arch"] == arch]
        most = {name: max(row[name] for row in mine) for name in ("registers", "shared")}
        print(
            f"sm_{arch}: {len(mine)} compiled, {sum(bool(row['faults']) for row in mine)} with faults; at most "
            f"{most['registers']} registers, {most['shared']} of {config.SHARED_LIMIT[arch]} bytes shared"
        )
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(program.run("bench.aot", main))

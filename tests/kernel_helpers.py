"""Kernels without a GPU: a module's launchers run by Triton's interpreter, and the kernels they launch compiled ahead of time.

TRITON_INTERPRET=1 would turn every kernel of the process, torch.compile's too, into an interpreted one for good. Here a private
copy of one module gets interpreted kernels, and Triton's language is patched for the length of a launch only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import subprocess
import tempfile
import types
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def interpreted(name: str) -> types.ModuleType:
    """A copy of the module whose launchers run their kernels, and the jit functions these call, on CPU tensors."""
    module = _copy(name)
    for key, function in _kernels(module).items():
        setattr(module, key, _Interpreted(function.fn))
    # The interpreter patches, and restores after a launch, the language modules that it finds among a kernel's globals. Of
    # tl.core, which tl.sum and its like are written in, it would restore nothing otherwise.
    module._language_core = tl.core
    return module


class Recorded(types.SimpleNamespace):
    """One launch: kernel, args (as bound by name), options (num_warps and others)."""


def recorded(name: str) -> tuple[types.ModuleType, list[Recorded]]:
    """A copy of the module whose launchers launch nothing, and the list of what they would have launched."""
    module, launches = _copy(name), []
    # The kernels themselves are the imported module's, where the jit functions that they call are still what they are.
    for key, function in _kernels(importlib.import_module(name)).items():
        setattr(module, key, _Recorder(function, launches))
    return module, launches


def compile_launch(arch: str, launch: Recorded) -> dict[str, int]:
    """Compile a recorded launch as a call on that GPU would: types, divisibility by 16 and ones taken from its arguments."""
    signature, constants, divisible = {}, {}, []
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    for position, (name, value) in enumerate(launch.args.items()):
        if name in constexprs or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            divisible.append(position)  # torch's allocator aligns to 512 bytes
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [position] if value % 16 == 0 else []
        else:
            signature[name] = "fp32"
    attributes = {(position,): [["tt.divisibility", 16]] for position in divisible}
    return compile_for(arch, launch.kernel, signature, constants, attributes=attributes, **launch.options)


def compile_for(arch: str, kernel, signature: dict, constexprs: dict, num_warps: int = 4, attributes=None, **options) -> dict:
    """Registers, spill (stack and local bytes) and shared memory of a kernel compiled for "sm_80" or "sm_90"; its ptx as well."""
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        said = subprocess.run([_TOOLS / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"], "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
    }  # fmt: skip


class _Interpreted(InterpretedFunction):
    def run(self, *args, grid, warmup, **kwargs):
        with _language_interpreted():
            return super().run(*args, grid=grid, warmup=warmup, **kwargs)

    def __call__(self, *args, **kwargs):
        # A kernel's call of another function: the base class would patch the language anew for each, slowly, and restore nothing.
        return self.rewrite()(*args, **kwargs)


class _Recorder:
    def __init__(self, kernel, launches: list[Recorded]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            ordered = {name: given[name] for name in self.kernel.arg_names}
            self.launches.append(Recorded(kernel=self.kernel, args=ordered, options=options, grid=grid))

        return launch


@contextlib.contextmanager
def _language_interpreted():
    """tl.sum, tl.max and others are jit functions themselves: interpreted for as long as this is open."""
    held = {name: value for name, value in vars(tl).items() if isinstance(value, triton.JITFunction)}
    for name, value in held.items():
        setattr(tl, name, _Interpreted(value.fn))
    try:
        yield
    finally:
        for name, value in held.items():
            setattr(tl, name, value)


def _copy(name: str) -> types.ModuleType:
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernels(module: types.ModuleType) -> dict[str, triton.JITFunction]:
    return {key: value for key, value in vars(module).items() if isinstance(value, triton.JITFunction)}

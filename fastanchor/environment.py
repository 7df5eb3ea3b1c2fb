"""What a result was made with: versions, device, commit. Written beside every run, evaluation and benchmark."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from fastanchor.errors import UserError

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scikit-learn", "pillow", "pyautoattack", "matplotlib", "tensorboard",
            "nvidia-dali-cuda120", "nvidia-dali-cuda130")  # fmt: skip


def pick_device(name: str) -> torch.device:
    """auto: cuda where there is one, else cpu. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    return device


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that matters here, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU: {_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def describe(device: torch.device) -> dict:
    """Plain values that say what produced a result."""
    from fastanchor import __version__

    return {
        "fastanchor": __version__,
        "commit": _commit(),
        "command": _command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
    }


def _command() -> str:
    """The command line without the folder of the program, which is this machine's affair; a module as `python -m` names it."""
    program = [Path(sys.argv[0]).name]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and program[0] == Path(module.origin or "").name:
        program = ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*(["fastanchor"] if program[-1] in ("cli.py", "fastanchor.cli") else program), *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Commit of the source tree the package runs from, with a `+` where it has changes; None for an installed copy."""
    folder = Path(__file__).resolve().parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True, env=environment
        )
        return run.stdout.strip()

    try:
        # Inside another project's checkout (a virtual environment there, say) the commit would be that project's.
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_flags() -> set[str]:
    """The processor's feature flags, empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())

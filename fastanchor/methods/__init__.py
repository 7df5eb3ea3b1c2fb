"""Training methods: one short file each, on one engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

from fastanchor.config import Config
from fastanchor.errors import UserError, did_you_mean
from fastanchor.methods.advcl import AdvCL
from fastanchor.methods.anchor import Anchor
from fastanchor.methods.ascl import Ascl
from fastanchor.methods.base import Adversary, Method, Outputs, Runner, build_attack
from fastanchor.methods.clead import CleadJoint
from fastanchor.methods.clead_code import CleadCode
from fastanchor.methods.finetune import FullStage, LinearStage
from fastanchor.methods.mart import Mart
from fastanchor.methods.nuat import NuAT
from fastanchor.methods.pgd_at import PGDAT
from fastanchor.methods.standard import Standard
from fastanchor.methods.supcon import SupCon
from fastanchor.methods.suprobcon import SupRobCon
from fastanchor.methods.trades import Trades

METHODS: dict[str, type[Method]] = {
    "advcl": AdvCL, "anchor": Anchor, "ascl": Ascl, "clead_code": CleadCode, "clead_joint": CleadJoint, "mart": Mart,
    "nuat": NuAT, "pgd_at": PGDAT, "standard": Standard, "supcon": SupCon, "suprobcon": SupRobCon, "trades": Trades,
}  # fmt: skip
# Stage 2 by stage2.mode, unless the method has one of its own.
STAGE2: dict[str, type[Method]] = {"slf": LinearStage, "alf": LinearStage, "aff": FullStage}
_files: dict[Path, type[Method]] = {}


def is_file(name: str) -> bool:
    """Whether `name` is that of a file with a method, not of a method of the package."""
    return name.endswith(".py")


def method_class(name: str) -> type[Method]:
    """The class of a method, by its name or by the path of a Python file that defines one; the file is run. Raises UserError."""
    if is_file(name):
        path = Path(name).resolve()
        if path not in _files:
            _files[path] = _load(path, name)
        return _files[path]
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise UserError(f"method = {name}: must be one of {', '.join(METHODS)}, or the path of a .py file{hint}")
    return METHODS[name]


def title_of(config: Config) -> str:
    """The method's name for people. A method in a file is not loaded for it: it goes by its file's name then."""
    path = Path(config.method)
    found = _files.get(path.resolve()) if is_file(config.method) else method_class(config.method)
    title = path.stem if found is None else found.describe(config)
    return f"{title} + AWP" if config.optim.awp_gamma > 0 else title


def is_defended(config: Config) -> bool:
    """Whether the method trains on adversarial images; one in a file is taken to, and not loaded."""
    return is_file(config.method) or bool(method_class(config.method).objectives)


def _load(path: Path, name: str) -> type[Method]:
    if not path.is_file():
        raise UserError(f"method = {name}: no such file")
    # A name that no module has: dataclasses look their module up by it, where annotations are kept as text.
    spec = importlib.util.spec_from_file_location(f"fastanchor method {path}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise UserError(f"method = {name}: the file cannot be run: {type(error).__name__}: {error}") from error
    found = [
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        raise UserError(f"method = {name}: must define one subclass of fastanchor.methods.Method, has {len(found)}")
    _check_class(found[0], name)
    return found[0]


def _check_class(found: type[Method], name: str) -> None:
    """What a method of one's own easily lacks, said before anything is trained. Raises UserError."""
    settings = found.Settings
    if not dataclasses.is_dataclass(settings) or not settings.__dataclass_params__.frozen:
        raise UserError(f"method = {name}: Settings must be a frozen dataclass")
    for entry in dataclasses.fields(settings):
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise UserError(f"method = {name}: {entry.name} of Settings must have a default")
    if found.loss is Method.loss:
        raise UserError(f"method = {name}: {found.__name__} must define loss(self, out, labels, progress)")


def build_method(config: Config, stage: int = 1) -> Method:
    """The method of a configuration in its first or second stage."""
    found = method_class(config.method)
    if stage == 1:
        return found(config)
    method = (found.second(config) or STAGE2[config.stage2.mode])(config)
    if not found.objectives and config.stage2.mode == "slf":
        # Nothing was ever attacked: robust accuracy would choose the epoch by noise.
        method.selects = "clean"
    return method


__all__ = [
    "METHODS", "Adversary", "Method", "Outputs", "Runner", "build_attack", "build_method", "is_defended", "is_file",
    "method_class", "title_of",
]  # fmt: skip

"""The grammar of evaluation attacks: `NAME[:key=value,...]`, such as `pgd20:eps=0.031,step_size=0.003,restarts=2`.

Every number that decides a robust accuracy is in the parsed form and printed with it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from fastanchor.attacks import PGD
from fastanchor.config import parse_number
from fastanchor.errors import UserError, did_you_mean

GRAMMAR = "fgsm, pgdN, cwN (N steps) or autoattack, then optionally :key=value,... out of eps, step_size, restarts, start, norm"
STARTS = ("uniform", "zero")
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class AttackSpec:
    """One evaluation attack, fully stated. eps and step_size in pixel units of [0, 1]."""

    name: str
    eps: float
    step_size: float
    steps: int
    objective: str = "ce"
    start: str = "uniform"
    restarts: int = 1
    norm: str = "linf"

    def build(self) -> PGD:
        """One restart of the attack in evaluation form: fp32, running BatchNorm statistics."""
        # A judged number comes from plain torch: the kernels' gradients are its own only to rounding.
        return PGD(self.eps, self.step_size, self.steps, self.objective, "eval", self.start, self.norm, kernels="off")

    def with_eps(self, eps: float) -> AttackSpec:
        """The same attack at another radius, its step in the same proportion."""
        scale = self.step_size / self.eps if self.eps else 1.0 if self.name == "fgsm" else 0.25
        return dataclasses.replace(self, eps=eps, step_size=max(eps * scale, 1e-8))

    def text(self) -> str:
        """The attack in the grammar with nothing left to a default: `parse_attack` reads it back to an equal one."""
        stated = f"{self.name}:eps={self.eps!r},norm={self.norm}"
        if self.name == "autoattack":
            return stated
        return f"{stated},step_size={self.step_size!r},restarts={self.restarts},start={self.start}"

    def key(self) -> str:
        """A file name that differs where the attack differs."""
        parts = [self.name, self.norm, f"eps{_exact(self.eps)}"]
        if self.name != "autoattack":
            parts += [f"step{_exact(self.step_size)}", self.start, f"x{self.restarts}"]
        return "-".join(parts)

    def describe(self) -> str:
        """For tables: `PGD-20 (eps 8/255, step 2/255, uniform start, 1 restart)`."""
        if self.name == "autoattack":
            return f"AutoAttack standard (eps {fraction(self.eps)}, {self.norm})"
        title = {"ce": "PGD", "cw": "CW"}[self.objective] + f"-{self.steps}" if self.name != "fgsm" else "FGSM"
        restarts = f"{self.restarts} restart{'s' if self.restarts > 1 else ''}"
        norm = "" if self.norm == "linf" else f", {self.norm}"
        start = "no random" if self.start == "zero" else self.start
        return f"{title} (eps {fraction(self.eps)}, step {fraction(self.step_size)}, {start} start, {restarts}{norm})"


def fraction(value: float) -> str:
    """A radius as people write it: `8/255` where it is a whole number of grey levels, else decimal."""
    levels = value * 255
    return f"{round(levels)}/255" if 0 < value < 1 and abs(levels - round(levels)) < 1e-6 else f"{value:.4g}"


def _exact(value: float) -> str:
    """A radius for file names, without loss: `8_255`, else the shortest decimal that reads back the same."""
    levels = round(value * 255)
    return f"{levels}_255" if levels and value == levels / 255 else repr(float(value))


def parse_attack(text: str, *, default_eps: float) -> AttackSpec:
    """Parse one attack; eps defaults to `default_eps`, step_size to eps / 4 (fgsm: eps). Raises UserError."""
    name, _, tail = text.strip().partition(":")
    match = re.fullmatch(r"(pgd|cw)([0-9]+)", name)
    if name not in ("fgsm", "autoattack") and (match is None or int(match[2]) < 1):
        hint = did_you_mean(name, ["fgsm", "pgd20", "cw20", "autoattack"])
        raise UserError(f"attack {text!r}: {name!r} is not known{hint}; write {GRAMMAR}")
    options = _options(
        text, tail, allowed=("eps", "norm") if name == "autoattack" else ("eps", "step_size", "restarts", "start", "norm")
    )
    eps = options.get("eps", default_eps)
    return AttackSpec(
        name=name,
        eps=eps,
        step_size=options.get("step_size", eps if name == "fgsm" else eps / 4) or 1e-8,
        steps=int(match[2]) if match else 1,
        objective="cw" if match and match[1] == "cw" else "ce",
        start=options.get("start", "zero" if name == "fgsm" else "uniform"),
        restarts=options.get("restarts", 1),
        norm=options.get("norm", "linf"),
    )


def _options(text: str, tail: str, allowed: tuple[str, ...]) -> dict:
    found: dict = {}
    for part in filter(None, tail.split(",")):
        key, equals, value = part.strip().partition("=")
        key = key.replace("-", "_")
        if key not in allowed or not equals:
            raise UserError(
                f"attack {text!r}: {part!r} is not understood{did_you_mean(key, allowed)}; allowed here: {', '.join(allowed)}"
            )
        choices = {"start": STARTS, "norm": NORMS}.get(key)
        try:
            found[key] = value if choices else int(value) if key == "restarts" else parse_number(value)
        except ValueError:
            kind = "whole number" if key == "restarts" else "number"
            raise UserError(f"attack {text!r}: {key} = {value!r} is not a {kind}") from None
        if choices and value not in choices:
            raise UserError(f"attack {text!r}: {key} = {value!r}: must be one of {', '.join(choices)}")
        if not choices and not {"restarts": 1, "eps": 0}.get(key, 1e-8) <= found[key] < math.inf:
            raise UserError(
                f"attack {text!r}: {key} = {value}: must be {'>= 1' if key == 'restarts' else '>= 0' if key == 'eps' else '> 0'}"
            )
    return found

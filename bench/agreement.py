"""Our methods beside the functions that their authors published, on the same tensors and weights.

    python -m bench.agreement --peer-path [NAME=]DIR [--peer-path ...] [--out DIR] [--seed N]

For each clone: the original loss, and where it can be taken apart its attack step, against ours: difference of the loss, of the
gradient, of the adversarial pixels. fp64 where the code allows, else fp32. A clone given by --peer-path is EXECUTED, with your
rights: name only code that you trust. It runs in a temporary folder, on the CPU. Results: a table, and DIR/agreement.json.
Exit status 1 where one does not agree within its tolerance, or could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import agreement_adversarial as adversarial
from bench import agreement_contrastive as contrastive
from bench import program
from bench.agreement_tools import Case, Check
from bench.peers.clones import Clone, Session, commit_of
from fastanchor import environment
from fastanchor.errors import UserError, did_you_mean
from fastanchor.files import make_folder, write_text

DEFAULT_OUT = Path("runs/bench-agreement")
CASES = {
    "TRADES": Case("6e8e11b", ("trades.py", "train_trades_cifar10.py"), (adversarial.trades,)),
    "MART": Case("2d83e17", ("mart.py", "train_resnet.py"), (adversarial.mart,)),
    "AWP": Case("a7acf5d", ("AT_AWP/utils_awp.py", "trades_AWP/utils_awp.py"), (adversarial.awp,)),
    "ASCL": Case(
        "ca78d7b",
        ("ascl.py", "contrastive_losses_v2.py", "compact_loss_pt.py"),
        (contrastive.ascl_loss, contrastive.ascl_step, contrastive.ascl_attack),
    ),
    "AdvCL": Case(
        "24cb7a6",
        ("pretraining_advCL.py", "losses.py", "fr_util.py"),
        (contrastive.advcl, contrastive.advcl_step, contrastive.advcl_attack),
    ),
    "SupContrast": Case("66a8fe5", ("main_supcon.py", "networks/resnet_big.py", "losses.py"), (contrastive.supcon,)),
    "SupRobCon": Case("14dbb56", ("suprobcon.py", "gradualwarmup.py", "utils.py"), (contrastive.suprobcon,)),
    "NuAT": Case("8962290", ("CIFAR10/NuAT_cifar10.py",), (adversarial.nuat,)),
    "N-FGSM": Case("0a9e4f0", ("train.py", "utils/attack_utils.py", "experiments.sh"), (adversarial.nfgsm,)),
    "fast_adversarial": Case("54f7287", ("CIFAR10/train_fgsm.py", "CIFAR10/train_free.py"), (adversarial.fgsm_rs,)),
}


def recognise(text: str) -> Clone:
    """The clone that a --peer-path names, from its files, or NAME=DIR. UserError where that is not clear."""
    name, equals, rest = text.partition("=")
    if not equals or os.sep in name or Path(text).is_dir():
        name, rest = "", text
    folder = Path(rest).expanduser()
    if name and name not in CASES:
        raise UserError(f"--peer-path {text}: {name} is none of {', '.join(CASES)}{did_you_mean(name, CASES)}")
    if not folder.is_dir():
        raise UserError(f"--peer-path {text}: {folder} is no folder")
    fitting = [key for key in ([name] if name else CASES) if all((folder / file).is_file() for file in CASES[key].files)]
    if name and not fitting:
        raise UserError(f"--peer-path {text}: {folder} lacks a file of {name}, which has {', '.join(CASES[name].files)}")
    if not fitting:
        known = "; ".join(f"{key}: {', '.join(case.files)}" for key, case in CASES.items())
        raise UserError(f"--peer-path {text}: not one of the known repositories, which have these files: {known}")
    if len(fitting) > 1:
        raise UserError(f"--peer-path {text}: may be {' or '.join(fitting)}; say which, as in {fitting[0]}={rest}")
    return Clone(fitting[0], folder.resolve(), commit_of(folder))


def agree(clone: Clone, seed: int) -> list[dict[str, Any]]:
    """The rows of one clone; one that its code, or ours, cannot finish is a row with `error`."""
    case = CASES[clone.name]
    about = {"method": clone.name, "commit": clone.commit, "written_for": case.commit}
    rows, random = [], torch.get_rng_state()
    with Session(clone.folder) as session:
        for check in case.checks:
            torch.manual_seed(seed)
            try:
                rows += [about | row(found) for found in check(session)]
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                said = str(error).strip().splitlines() or [""]
                rows.append(about | {"what": check.__name__, "agrees": False, "error": f"{type(error).__name__}: {said[-1]}"})
    torch.set_rng_state(random)
    return rows


def row(check: Check) -> dict[str, Any]:
    """What is written of a check. Differences are relative: |theirs - ours| / |theirs|; of pixels, the share that differs."""
    found = {"loss": check.loss, "gradient": check.gradient, "pixels": check.pixels}
    given = {name: value for name, value in found.items() if value is not None}
    return {
        "what": check.what,
        "size": check.size,
        "precision": check.precision,
        **found,
        "tolerance": check.tolerance,
        "agrees": bool(given) and all(value <= check.tolerance for value in given.values()),
        "known": check.known,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, and below it the differences that are known, with their reasons."""
    table = Table("method", "what", "size", "precision", "loss", "gradient", "pixels", "tolerance", "verdict")
    for found in rows:
        values = [found.get(name) for name in ("loss", "gradient", "pixels", "tolerance")]
        shown = ["" if value is None else f"{value:.1e}" for value in values]
        verdict = "FAILED" if "error" in found else "agrees" if found["agrees"] else "DIFFERS"
        note = f" [{_number(rows, found)}]" if found.get("known") else ""
        table.add_row(found["method"], found["what"] + note, found.get("size", ""), found.get("precision", ""), *shown, verdict)
    console.print(table, markup=False)
    for known in _known(rows):
        console.print(f"[{_known(rows).index(known) + 1}] {known}", markup=False, soft_wrap=True)
    for found in rows:
        if "error" in found:
            console.print(f"{found['method']}, {found['what']}: {found['error']}", markup=False, soft_wrap=True)


def _known(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(found["known"] for found in rows if found.get("known")))


def _number(rows: list[dict[str, Any]], found: dict[str, Any]) -> int:
    return _known(rows).index(found["known"]) + 1


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, or 1 where something does not agree. Raises UserError for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.agreement", description=__doc__.split("\n\n")[0],
        epilog="A clone given by --peer-path is executed, with your rights: name only code that you trust.",
    )  # fmt: skip
    parser.add_argument("--peer-path", action="append", required=True, metavar="[NAME=]DIR", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--seed", type=int, default=0, help="of the tensors and weights (default: 0)")
    args = parser.parse_args(arguments)
    clones: dict[str, Clone] = {}
    for text in args.peer_path:
        clone = recognise(text)
        if clone.name in clones:
            raise UserError(f"--peer-path {text}: {clone.name} is given twice, first as {clones[clone.name].folder}")
        clones[clone.name] = clone
    make_folder(args.out)
    rows = [found for clone in clones.values() for found in agree(clone, args.seed)]
    described = environment.describe(torch.device("cpu"))
    described["command"] = f"python -m bench.agreement --seed {args.seed}, with clones of {', '.join(clones)}"
    path = args.out / "agreement.json"
    found = {"schema": 1, "kind": "agreement", "seed": args.seed, "environment": described, "rows": rows}
    write_text(path, json.dumps(found, indent=2) + "\n")
    show(rows, Console(width=170, highlight=False))
    failed = sum(not found["agrees"] for found in rows)
    print(f"{path}: {len(rows)} checks, {failed} without agreement", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(program.run("bench.agreement", main))

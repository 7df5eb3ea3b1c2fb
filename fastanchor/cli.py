"""The command line: `fastanchor train | eval | attack | report | compare | data | bench-data | doctor`.

Bad input is answered with one line on stderr and exit status 2; an interrupted training says how to go on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastanchor import cli_bench, cli_data, cli_doctor
from fastanchor.errors import UserError, did_you_mean
from fastanchor.files import slug

COMMANDS = ("train", "eval", "attack", "report", "compare", "data", "bench-data", "doctor")


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except UserError as error:
        print(f"fastanchor: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader (head, less) has gone. Point stdout at nothing, so that the interpreter's last flush does not fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if error.filename is None:
            raise
        print(f"fastanchor: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        hint = f"; {interrupt}" if str(interrupt) else ""
        print(f"\nfastanchor: interrupted{hint}", file=sys.stderr)
        return 128 + signal.SIGINT


def _dispatch(argv: list[str]) -> int:
    from fastanchor import __version__

    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}; commands: {', '.join(COMMANDS)}")
    parser = _Parser(prog="fastanchor", description="Train and judge adversarially robust image classifiers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastanchor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS), required=True, parser_class=_Parser)
    for name, add in (("train", _add_train), ("eval", _add_eval), ("attack", _add_attack), ("report", _add_report),
                      ("compare", _add_compare), ("data", cli_data.add_data), ("bench-data", cli_bench.add_bench_data),
                      ("doctor", cli_doctor.add_doctor)):  # fmt: skip
        add(commands, name)
    settings: list[str] = []
    if argv[:1] in (["train"], ["compare"], ["bench-data"]):
        argv, settings = _split_settings(argv, cli_bench.OWN_FLAGS if argv[0] == "bench-data" else OWN_FLAGS)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments, settings)


SHORT = {
    "--data": "--data.source", "--limit": "--data.limit", "--skip-broken": "--data.skip-broken", "--classes": "--data.classes",
}  # fmt: skip
OWN_FLAGS = {"--out": 1, "--resume": 1, "--help": 0, "-h": 0}


def _split_settings(argv: list[str], own_flags: dict[str, int]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and the configuration's flags (short forms written out) with their values."""
    own, settings = argv[:1], []
    target, room = own, 1  # the positional argument comes first
    for arg in argv[1:]:
        if arg.startswith("--") or arg == "-h":
            name, equals, value = arg.partition("=")
            if name in own_flags:
                target, room = own, 0 if equals else own_flags[name]
                own.append(arg)
            else:
                target, room = settings, sys.maxsize
                settings.append(SHORT.get(name, name) + equals + value)
        elif target is own and room == 0:
            own.append(arg)
        else:
            target.append(arg)
            room -= 1
    return own, settings


def _add_train(commands, name: str) -> None:
    from fastanchor.settings import recipe_names

    parser = commands.add_parser(
        name, add_help=False, help="train a recipe, judge the model, write a report",
        usage="fastanchor train RECIPE [--data SOURCE] [--out RUN] [--limit N] [--epochs N] [--seed N] [--attack.eps 8/255] ...\n"
              "       fastanchor train --resume RUN",
        epilog=f"Recipes: {', '.join(recipe_names())}, a method's name (its CIFAR-10 recipe), or a .yaml file. "
               "`fastanchor train RECIPE --help` lists every setting with the recipe's values.",
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", metavar="RECIPE")
    parser.add_argument("--out", metavar="RUN", help="folder of the run (default: runs/RECIPE-TIME)")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run; everything is taken from it")
    parser.add_argument("-h", "--help", action="store_true", help="this text, or with RECIPE every setting")
    parser.set_defaults(run=_train, parser=parser)


def _train(arguments, settings: list[str]) -> int:
    from fastanchor.settings import load_recipe, parse_flags

    if arguments.help:
        if arguments.recipe:
            parse_flags([*settings, "--help"], load_recipe(arguments.recipe))
        arguments.parser.print_help()
        return 0
    if arguments.resume:
        if arguments.recipe or arguments.out or settings:
            extra = arguments.recipe or (settings[0] if settings else "--out")
            raise UserError(f"--resume takes everything from the run; leave out {extra}")
        path, config = Path(arguments.resume), None
    else:
        if not arguments.recipe:
            raise UserError("train needs a RECIPE, or --resume RUN (see fastanchor train --help)")
        config = parse_flags(settings, load_recipe(arguments.recipe))
        stem = Path(arguments.recipe).name.removesuffix(".yaml")
        path = Path(arguments.out or f"runs/{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    from fastanchor.pipeline import train_and_judge
    from fastanchor.train.progress import Reporter
    from fastanchor.train.run import RunDir

    run = RunDir(path)
    if config is None:
        config = run.open()
    try:
        results = train_and_judge(config, run, resume=bool(arguments.resume), reporter=Reporter(log=path / "train.log"))
    except KeyboardInterrupt:
        begun = (path / "config.yaml").exists()
        raise KeyboardInterrupt(f"nothing is lost: fastanchor train --resume {path}" if begun else "nothing was begun") from None
    _print_results(results, str(path))
    return 0


def _add_eval(commands, name: str) -> None:
    parser = commands.add_parser(name, help="judge a run or a checkpoint", allow_abbrev=False)
    parser.add_argument("model", metavar="RUN|CHECKPOINT")
    parser.add_argument("--attack", action="append", metavar="ATTACK",
                        help="fgsm, pgdN, cwN or autoattack, with options: pgd20:eps=0.031,step_size=0.003,restarts=2 "
                             "(several: repeat; default: the recipe's)")  # fmt: skip
    parser.add_argument(
        "--eps", metavar="EPS", help="radius of attacks that do not state one, such as 8/255 (default: the recipe's)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a forward")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the start noise (default 0)")
    parser.add_argument("--out", metavar="DIR", help="folder of the JSON results (default: the run's eval folder)")
    _add_data_options(parser)
    parser.set_defaults(run=_eval)


def _add_data_options(parser) -> None:
    parser.add_argument("--data", metavar="SOURCE", help="test images from another source than the model's own")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N test images, class-balanced")
    parser.add_argument(
        "--image-size", "--data.image-size", type=int, metavar="N",
        help="side of the images made of a folder's (default: as in the model's training)",
    )  # fmt: skip
    parser.add_argument("--classes", "--data.classes", metavar="FILE", help="the classes of a folder and their order, one a line")
    parser.add_argument(
        "--skip-broken", "--data.skip-broken", action="store_true", help="leave unreadable images of a folder out"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")


def _load(arguments):
    """The model, its images (of --data, where given) and the device."""
    import dataclasses

    from fastanchor import environment
    from fastanchor.pipeline import check_classes, load_images
    from fastanchor.train.run import load_trained

    device = environment.pick_device(arguments.device)
    trained = load_trained(arguments.model, device)
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed = {arguments.seed}: must be in [0, 2^63)")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit = {arguments.limit}: must be >= 1")
    data = trained.config.data
    if arguments.data:
        folder = arguments.data.startswith("folder:")
        size, classes = (data.image_size, data.classes) if folder else (None, None)
        data = dataclasses.replace(data, source=arguments.data, limit=None, image_size=size, classes=classes, labels=None)
    data = dataclasses.replace(
        data, skip_broken=data.skip_broken or arguments.skip_broken, extra=None,
        image_size=arguments.image_size or data.image_size, classes=arguments.classes or data.classes,
    )  # fmt: skip
    try:
        images = load_images(dataclasses.replace(trained.config, data=data), device)
    except UserError as error:
        if arguments.data or arguments.command == "report":
            raise
        raise UserError(f"{error} ({arguments.model} was trained on these images; --data SOURCE judges on others)") from None
    check_classes(trained, images)
    return trained, images, device


def _eval(arguments, _settings) -> int:
    import dataclasses

    from fastanchor.evaluate.protocol import parse_attack
    from fastanchor.pipeline import judge
    from fastanchor.train.progress import Reporter

    trained, images, device = _load(arguments)
    eps = _number(arguments.eps, "--eps") if arguments.eps else trained.config.attack.eps
    specs = [parse_attack(text, default_eps=eps) for text in arguments.attack or trained.config.eval.attacks]
    if arguments.batch_size is not None:
        if arguments.batch_size < 1:
            raise UserError(f"--batch-size = {arguments.batch_size}: must be >= 1")
        evaluation = dataclasses.replace(trained.config.eval, batch_size=arguments.batch_size)
        trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, eval=evaluation))
    out = Path(arguments.out) if arguments.out else _results_folder(arguments)
    results = judge(trained, images, specs, out, device, Reporter(), limit=arguments.limit, seed=arguments.seed)
    _print_results(results, str(trained.path))
    return 0


def _results_folder(arguments) -> Path:
    """RUN/eval, or a folder in it for other images or another seed: a partial figure never takes the place of a full one."""
    given = Path(arguments.model)
    folder = given / "eval" if given.is_dir() else given.with_name(f"{given.stem}-eval")
    parts = [slug(arguments.data)] if arguments.data else []
    parts += [f"limit{arguments.limit}"] if arguments.limit else []
    parts += [f"seed{arguments.seed}"] if arguments.seed else []
    return folder / "-".join(parts) if parts else folder


def _number(text: str, name: str) -> float:
    from fastanchor.config import parse_number

    try:
        value = parse_number(text)
    except ValueError:
        raise UserError(f"{name} = {text}: must be a number, such as 0.031 or 8/255") from None
    if not 0 <= value < float("inf"):
        raise UserError(f"{name} = {text}: must be >= 0")
    return value


def _add_attack(commands, name: str) -> None:
    parser = commands.add_parser(name, help="write adversarial images", allow_abbrev=False)
    parser.add_argument("model", metavar="RUN|CHECKPOINT")
    parser.add_argument(
        "--attack", default="pgd20", metavar="ATTACK", help="as in fastanchor eval, but not autoattack (default pgd20)"
    )
    parser.add_argument("--eps", metavar="EPS", help="radius where the attack does not state one (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the start noise (default 0)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the images, new or empty")
    _add_data_options(parser)
    parser.set_defaults(run=_attack)


def _attack(arguments, _settings) -> int:
    from fastanchor.evaluate.adversarial import write_adversarial
    from fastanchor.evaluate.protocol import parse_attack

    trained, images, device = _load(arguments)
    eps = _number(arguments.eps, "--eps") if arguments.eps else trained.config.attack.eps
    spec = parse_attack(arguments.attack, default_eps=eps)
    if spec.name == "autoattack":
        raise UserError("attack autoattack: it is an evaluation; use fastanchor eval, or pgdN, cwN, fgsm here")
    split = images.test if arguments.limit is None else images.test.subset(arguments.limit)
    summary = write_adversarial(trained, split, spec, Path(arguments.out), device=device, seed=arguments.seed)
    fooled = f"{summary['fooled']} of {summary['correct']} correctly classified images fooled"
    print(f"{spec.describe()}: {fooled} ({summary['count']} images)")
    print(f"images: {arguments.out}")
    return 0


def _add_report(commands, name: str) -> None:
    parser = commands.add_parser(name, help="write report.html of a run", allow_abbrev=False)
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="test images attacked for the figures (default: eval.report_images)"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    parser.set_defaults(run=_report, data=None, skip_broken=False, image_size=None, classes=None, seed=0)


def _report(arguments, _settings) -> int:
    from fastanchor.evaluate.report import build_report
    from fastanchor.train.run import RunDir

    run = RunDir(arguments.model)
    run.open(judged=True)
    trained, images, device = _load(arguments)
    out = Path(arguments.out) if arguments.out else run.path / "report.html"
    limit = arguments.limit or trained.config.eval.report_images
    print(f"report: {build_report(trained, run, images, out=out, limit=limit, device=device)}")
    return 0


def _add_compare(commands, name: str) -> None:
    from fastanchor.compare import plan_names

    parser = commands.add_parser(
        name,
        add_help=False,
        help="several runs in one table",
        usage="fastanchor compare PLAN [--out DIR] [--epochs N ...]",
        epilog=f"Plans: {', '.join(plan_names())}, or a .yaml file. Settings after PLAN apply to every run.",
    )
    parser.add_argument("plan", nargs="?", metavar="PLAN")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs (default: runs/PLAN); finished runs in it are kept")
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.set_defaults(run=_compare, parser=parser)


def _compare(arguments, settings: list[str]) -> int:
    from fastanchor.compare import load_plan, run_plan
    from fastanchor.train.progress import Reporter

    if arguments.help:
        arguments.parser.print_help()
        return 0
    if not arguments.plan:
        raise UserError("compare needs a PLAN (see fastanchor compare --help)")
    plan = load_plan(arguments.plan)
    out = Path(arguments.out or f"runs/{Path(arguments.plan).name.removesuffix('.yaml')}")
    try:
        summary = run_plan(plan, out, Reporter(), settings)
    except KeyboardInterrupt:
        again = shlex.join(["fastanchor", "compare", arguments.plan, "--out", str(out), *settings])
        raise KeyboardInterrupt(f"nothing is lost, the same command goes on where it stopped: {again}") from None
    _print_comparison(summary, out)
    return 1 if any(row["failed"] for row in summary["rows"]) else 0


def _print_results(results: list[dict], title: str) -> None:
    """The table that ends `train` and `eval`."""
    table = Table("attack", "accuracy %", "images", title=title, title_justify="left")
    table.add_row("none (clean)", f"{results[0]['clean_accuracy']:.2f}", str(results[0]["count"]))
    for result in results:
        table.add_row(result["description"], f"{result['robust_accuracy']:.2f}", str(result["count"]))
        for stage, accuracy in result.get("stages", {}).items():
            table.add_row(f"  after {stage}", f"{accuracy:.2f}", "")
    _wide_console().print(table, highlight=False)


def _print_comparison(summary: dict, out: Path) -> None:
    """The table that ends `compare`, what belongs to it, and where it all lies."""
    from fastanchor.evaluate.compare_page import cells, headings, name_of, remarks

    table = Table("run", *headings(summary, short=True), title=summary["title"], title_justify="left")
    for row in summary["rows"]:
        table.add_row(name_of(summary, row), *cells(summary, row))
    console = _wide_console()
    page = f"page: {out}/compare.html; " if (out / "compare.html").is_file() else ""
    console.print(f"\n{page}reports: {out}/*/report.html; figures: {out}/compare.json; table to paste: {out}/compare.md")
    console.print(table, highlight=False)
    for line in (f"attacks: {'; '.join(summary['attacks'])}", *remarks(summary)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _wide_console() -> Console:
    """A pipe has no width of its own: there a table is never folded."""
    from fastanchor.train.progress import PipeConsole

    console = PipeConsole()
    return console if console.is_terminal else PipeConsole(width=200)


if __name__ == "__main__":
    sys.exit(main())

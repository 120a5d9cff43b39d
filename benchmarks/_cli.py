"""Command line: ``python -m basinax.benchmarks {compare,claims,landscape,speed}``.

Mistakes are answered in one line with exit code 2; an interruption keeps what is
finished and exits with 130.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import threadpoolctl
from rich.console import Console

from basinax.benchmarks import (
    _claims,
    _compare,
    _draw,
    _landscape,
    _report,
    _speed,
    _table,
)
from basinax.benchmarks._optimizers import OPTIMIZERS
from basinax.benchmarks._tasks import TASKS, Options, Usage

INTERRUPTED, MISTAKE = 130, 2
PROGRAM = "python -m basinax.benchmarks"
WIDTH = 100  # of tables when the output is not a terminal


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"error: {message} (see {self.prog} --help)\n")


def _one_blas_thread() -> threadpoolctl.threadpool_limits:
    """Keep the linear algebra library to one thread within a ``with`` block.

    Its threads spin while they wait for one another; next to XLA's own they only get in
    the way of matrices as small as those of the tasks.
    """
    return threadpoolctl.threadpool_limits(limits=1, user_api="blas")


def _folder(path: Path) -> Path:
    """Create a folder for results before any work is done for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Usage(f"--out {path}: {error.strerror}") from error
    return path


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_compare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    tasks = "\n".join(f"  {name:<18}{about}" for name, (_, about) in TASKS.items())
    optimizers = "\n".join(f"  {n:<18}{e.note}" for n, e in OPTIMIZERS.items())
    parser = commands.add_parser(
        "compare",
        help="train optimizers on real data under one protocol",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train optimizers on the same task under the same budget: search "
        "a learning-rate\ngrid on a validation split, report several fresh seeds on a "
        "test split.\nWrites results.json, figures and a self-contained report.html.",
        epilog=f"""\
tasks:
{tasks}

optimizers:
{optimizers}

examples:
  {PROGRAM} compare
  {PROGRAM} compare --optimizers adamw,spectra_adamw --seeds 20
  {PROGRAM} compare --task bytes --steps 500 --optimizers signum,spectra_signum
  {PROGRAM} compare --task bytes --data-dir ~/notes --out results/notes
""",
    )
    add = parser.add_argument
    add("--task", default="digits", metavar="NAME", help="default: digits")
    add(
        "--optimizers",
        type=_names,
        metavar="A,B,...",
        help="names separated by commas (default: all)",
    )
    add("--seeds", type=int, metavar="N", help="seeds to report (digits 5, others 3)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="training steps (digits 300, bytes 200, others 400)",
    )
    add(
        "--grid",
        type=int,
        metavar="N",
        help="learning rates to try, the N central ones of five (digits 5, others 3)",
    )
    add("--threshold", type=float, metavar="C", help="SPECTRA threshold (default 4)")
    add("--target", type=float, metavar="LOSS", help="validation loss to reach")
    add(
        "--surface",
        type=int,
        metavar="N",
        help="points per axis of the loss surfaces, 0 for none (21, bytes 7)",
    )
    add("--out", type=Path, metavar="DIR", help="default: results/TASK")
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="own data: IDX files for digits and multi-fashion, text for bytes",
    )
    add("--width", type=int, metavar="N", help="model width (128, parity 100)")
    add("--depth", type=int, metavar="N", help="hidden layers (2, bytes 4)")
    add("--sequence", type=int, metavar="N", help="bytes per sequence (default 128)")
    add("--batch-size", type=int, metavar="N", help="digits 64, bytes 8, others all")
    add("--modulus", type=int, metavar="P", help="of the task modular (default 59)")
    add(
        "--fraction",
        type=float,
        metavar="F",
        help="share of the examples to train on, modular and parity (default 0.5)",
    )
    add(
        "--quick",
        action="store_true",
        help="a look in well under a minute: 2 seeds, 3 learning rates, 100 steps",
    )
    parser.set_defaults(command=_compare_command)


def _compare_command(args: argparse.Namespace, console: Console) -> int:
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise Usage(f"--data-dir {args.data_dir}: no such folder")
    positive = ("width", "depth", "sequence", "batch_size", "modulus", "fraction")
    for name in (*positive, "threshold", "target"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise Usage(f"--{name.replace('_', '-')} {value:g}: must be positive")
    quick = args.quick
    settings = _compare.Settings(
        task=args.task,
        optimizers=args.optimizers,
        seeds=args.seeds if args.seeds is not None or not quick else 2,
        steps=args.steps if args.steps is not None or not quick else 100,
        grid=args.grid if args.grid is not None or not quick else 3,
        threshold=args.threshold,
        target=args.target,
        surface=args.surface if args.surface is not None or not quick else 11,
        options=Options(
            args.data_dir,
            args.width,
            args.depth,
            args.sequence,
            args.batch_size,
            args.modulus,
            args.fraction,
        ),
        command=args.typed,
    )
    study = _compare.prepare(settings)
    out = _folder(args.out or Path("results") / study.task.name)
    console.print(f"[bold]{study.task.title}[/], {study.plan.steps} steps")
    with _one_blas_thread():
        results = _compare.compare(study, settings, out, console)
    figures = _draw.draw_all(results, out)
    report = _report.write_report(results, figures, out)
    console.print()
    for table in _table.tables(results):
        _table.show(table, console)
    where = f"{report} (also results.json and {len(figures)} figures)"
    if results["complete"]:
        console.print(f"Report: {where}", highlight=False, markup=False, soft_wrap=True)
        return 0
    done = f"{len(results['optimizers'])} of {len(study.entries)} optimizers"
    console.print(
        f"Interrupted: {done} finished; wrote {where}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return INTERRUPTED


def _add_claims(commands: "argparse._SubParsersAction[_Parser]") -> None:
    claims = "\n".join(f"  {n:<18}{c.about}" for n, c in _claims.CLAIMS.items())
    parser = commands.add_parser(
        "claims",
        help="put a paper's headline phenomena to the test",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Reproduce or refute what a paper says, each time with a control "
        "run.",
        epilog=f"""\
claims:
{claims}

examples:
  {PROGRAM} claims
  {PROGRAM} claims spectra --full
  {PROGRAM} claims samo --seeds 10
""",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="which claims (default: all)")
    add("--full", action="store_true", help="include the parts that take minutes")
    add("--seeds", type=int, metavar="N", help="seeds of each part (default: its own)")
    add(
        "--out",
        type=Path,
        default=Path("results/claims"),
        metavar="DIR",
        help="default: results/claims",
    )
    parser.set_defaults(command=_claims_command)


def _claims_command(args: argparse.Namespace, console: Console) -> int:
    _claims.choose(args.names)
    if args.seeds is not None and args.seeds < 1:
        raise Usage(f"--seeds {args.seeds}: needs at least one")
    with _one_blas_thread():
        _claims.run(
            args.names,
            _folder(args.out),
            console,
            full=args.full,
            command=args.typed,
            seeds=args.seeds,
        )
    return 0


def _add_landscape(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "landscape",
        help="measure the curvature of one model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a task's model briefly with AdamW, or load one, and report "
        "the curvature of\nits training loss: eigenvalues, trace, spectral density, "
        "sharpness, edge of\nstability, loss surfaces. Writes landscape.json, figures "
        "and a self-contained\nreport.html.",
        epilog=f"""\
examples:
  {PROGRAM} landscape
  {PROGRAM} landscape --task bytes --steps 100
  {PROGRAM} landscape --steps 1000 --save model.npz
  {PROGRAM} landscape --checkpoint model.npz --probes 32
""",
    )
    add = parser.add_argument
    add("--task", default="digits", metavar="NAME", help="default: digits")
    add("--steps", type=int, metavar="N", help="training steps (default: the task's)")
    add("--rate", type=float, metavar="R", help="peak learning rate (0.001)")
    add("--seed", type=int, default=0, metavar="N", help="of model and probes (0)")
    add("--checkpoint", type=Path, metavar="FILE", help="load this instead of training")
    add("--save", type=Path, metavar="FILE", help="write the model there, .npz")
    add("--eigenvalues", type=int, default=10, metavar="K", help="largest ones (10)")
    add("--probes", type=int, default=8, metavar="N", help="of the density (8)")
    add(
        "--lanczos-steps",
        type=int,
        default=60,
        metavar="N",
        help="products per probe of the density (60)",
    )
    add("--surface", type=int, metavar="N", help="points per axis, 0 for none (21)")
    add("--width", type=int, metavar="N", help="model width")
    add("--depth", type=int, metavar="N", help="hidden layers")
    add("--out", type=Path, metavar="DIR", help="default: results/landscape/TASK")
    parser.set_defaults(command=_landscape_command)


def _landscape_command(args: argparse.Namespace, console: Console) -> int:
    counts = ("steps", "eigenvalues", "probes", "lanczos_steps", "width", "depth")
    for name in ("rate", *counts):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise Usage(f"--{name.replace('_', '-')} {value:g}: must be positive")
    if args.surface is not None and args.surface != 0 and args.surface < 3:
        raise Usage(f"--surface {args.surface}: needs at least 3, or 0 for none")
    if args.save is not None and args.checkpoint is not None:
        raise Usage("--save with --checkpoint: there is nothing new to save")
    settings = _landscape.Settings(
        task=args.task,
        options=Options(width=args.width, depth=args.depth),
        steps=args.steps,
        rate=args.rate,
        seed=args.seed,
        eigenvalues=args.eigenvalues,
        probes=args.probes,
        lanczos_steps=args.lanczos_steps,
        surface=args.surface,
        checkpoint=args.checkpoint,
        save=args.save,
        command=args.typed,
    )
    task = _landscape.prepare(settings)
    out = _folder(args.out or Path("results") / "landscape" / task.name)
    with _one_blas_thread():
        _landscape.run(task, settings, out, console)
    return 0


def _add_speed(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parts = "\n".join(f"  {name:<12}{p.about}" for name, p in _speed.PARTS.items())
    parser = commands.add_parser(
        "speed",
        help="time kernels, losses and instruments against their peers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Micro-benchmarks, interleaved with a peer.",
        epilog=f"""\
parts:
{parts}

examples:
  {PROGRAM} speed
  {PROGRAM} speed clip --shapes 256x1024,768x3072 --rounds 21
""",
    )
    add = parser.add_argument
    add(
        "--shapes",
        type=_names,
        metavar="MxN,...",
        help="default: three small shapes; on accelerators also those of a "
        "160M-parameter transformer",
    )
    add("--methods", type=_names, metavar="A,B,...", help="default: all")
    add("--kappa", type=float, default=15.0, help="largest singular value over c (15)")
    add("--rounds", type=int, default=9, metavar="N", help="timings per cell (9)")
    add("parts", nargs="*", metavar="PART", help="default: all but peers")
    add("--logits", metavar="BxC", help="samples x classes of the losses (1024x32000)")
    add(
        "--out",
        type=Path,
        default=Path("results/speed"),
        metavar="DIR",
        help="default: results/speed",
    )
    parser.set_defaults(command=_speed_command)


def _speed_command(args: argparse.Namespace, console: Console) -> int:
    study = _speed.prepare(
        args.parts, args.shapes, args.methods, args.kappa, args.rounds, args.logits
    )
    _speed.run(study, _folder(args.out), console, command=args.typed)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog=PROGRAM,
        description="Comparisons on real data, tests of papers' claims, and "
        "micro-benchmarks for basinax.",
        epilog=f"Start with: {PROGRAM} compare",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_claims(commands)
    _add_landscape(commands)
    _add_speed(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.typed = shlex.join([*PROGRAM.split(), *words])
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        return args.command(args, console)
    except Usage as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED

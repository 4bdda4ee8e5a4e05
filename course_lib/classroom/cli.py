"""The command line: ``python -m course_lib list | run | claims | readme | doctor | bench``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from course_lib.classroom.parameters import CourseError

__all__ = ["main"]

PROGRAM = "python -m course_lib"

_RUN_EXAMPLES = f"""examples:
  {PROGRAM} run                                   every chapter on the embedded digits
  {PROGRAM} run 02 05 --dataset mnist --jobs 2    two chapters on MNIST, at once
  {PROGRAM} run pruning --seed 3 -p NAME=VALUE    any parameter of a chapter's parameters cell
  {PROGRAM} run --resume                          go on after an interruption
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success; 1 if a chapter, a claim or a check failed; 2 for something to correct in what was asked; 130
        after Ctrl-C (128 + the signal's number).
    """
    for stream in (sys.stdout, sys.stderr):
        # A console without Greek letters shows a question mark instead of ending the run.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        code = options.action(options)
        sys.stdout.flush()
        return code
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Without this, the interpreter complains at its own end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="A course on neural-network compression: run its chapters, see what they prove."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    listing = commands.add_parser("list", help="the chapters: article sections, reading and run time")
    listing.set_defaults(action=_list)

    run = commands.add_parser(
        "run",
        help="execute chapters and collect their claims",
        description="Execute chapters, each in a kernel of its own, and collect their claims. Everything that was "
        "asked is checked before the first kernel starts. Exit code 1 if a chapter fails; the others still run.",
        epilog=_RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("chapters", nargs="*", metavar="CHAPTER", help="02, pruning or 02_pruning (default: all)")
    run.add_argument("--dataset", help="digits (default, needs no network), mnist, fashion_mnist, kmnist or cifar10")
    run.add_argument("--profile", help="quick (default) or full: more seeds, longer training")
    run.add_argument("--seed", help="seed of the first replica, an integer from 0 (default: 0)")
    run.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the chapters' parameters cells; may be repeated",
    )
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="chapters at once; they share the cores")
    run.add_argument(
        "--resume", action="store_true", help="skip chapters executed before with this source and these parameters"
    )
    run.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the executed notebooks (build/course/DATASET-PROFILE)"
    )
    run.add_argument("--store", action="store_true", help="store the outputs in notebooks/ itself, without run data")
    run.add_argument(
        "--timeout", type=int, default=3600, metavar="S", help="seconds that a cell may take (3600; 0 for no limit)"
    )
    run.set_defaults(action=_run)

    claims = commands.add_parser(
        "claims",
        help="every claim, what was measured, whether it holds",
        description="Every claim of executed notebooks. Exit code 1 if one fails, or a notebook carries an error.",
    )
    claims.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="executed notebooks or folders (default: the newest run)"
    )
    claims.add_argument("--json", action="store_true", help="as JSON")
    claims.set_defaults(action=_claims)

    doctor = commands.add_parser("doctor", help="check this installation and say how to mend it")
    doctor.add_argument("--fast", action="store_true", help="leave out starting a kernel")
    doctor.set_defaults(action=_doctor)

    bench = commands.add_parser("bench", help="our batched training against the usual loop, side by side")
    bench.set_defaults(action=_bench)

    readme = commands.add_parser(
        "readme",
        help="put the stored chapters' picture and claims into README.md",
        description="Lift the Pareto figure and every claim from the stored chapters into README.md and docs/. "
        "With --check, change nothing and exit with 1 if something is not up to date.",
    )
    readme.add_argument("--check", action="store_true", help="only say what is not up to date")
    readme.set_defaults(action=_readme)

    for command in (listing, run, claims, readme):
        command.add_argument(
            "--notebooks", type=Path, metavar="DIR", help="folder of the chapters (the course's own notebooks/)"
        )
    return parser


def _notebooks(options: argparse.Namespace) -> Path:
    from course_lib.classroom.chapters import notebooks_folder

    return options.notebooks or notebooks_folder()


def _list(options: argparse.Namespace) -> int:
    from course_lib.classroom.chapters import chapter_paths, load_chapter
    from course_lib.classroom.display import show_table

    chapters = [load_chapter(path) for path in chapter_paths(_notebooks(options))]
    rows = [[c.name, c.title, ", ".join(c.sections) or "-", _number(c.minutes), _number(c.seconds)] for c in chapters]
    show_table(["chapter", "title", "article sections", "reading min", "run s"], rows)
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _run(options: argparse.Namespace) -> int:
    from course_lib.classroom.plan import RunOptions, make_plan
    from course_lib.classroom.runner import Interrupted, run_chapters

    plan = make_plan(
        RunOptions(
            notebooks=_notebooks(options),
            chapters=options.chapters,
            dataset=options.dataset,
            profile=options.profile,
            seed=options.seed,
            assignments=options.parameter,
            output=options.output,
            jobs=options.jobs,
            timeout=options.timeout,
            resume=options.resume,
            store=options.store,
        )
    )
    try:
        return run_chapters(plan)
    except Interrupted as interrupted:
        print(f"interrupted by {interrupted}: everything was stopped; unfinished outputs were removed", file=sys.stderr)
        return interrupted.exit_code


def _claims(options: argparse.Namespace) -> int:
    from course_lib.classroom.claims import show_claims

    return show_claims(options.paths, _notebooks(options), json_wanted=options.json)


def _readme(options: argparse.Namespace) -> int:
    from course_lib.classroom.readme import refresh_readme

    notebooks = _notebooks(options).resolve()
    stale = refresh_readme(notebooks.parent, notebooks, check=options.check)
    for name in stale:
        print(f"{name}: {'not up to date; `make readme` mends it' if options.check else 'brought up to date'}")
    if not stale:
        print("README.md and its picture are up to date")
    return 1 if stale and options.check else 0


def _doctor(options: argparse.Namespace) -> int:
    from course_lib.classroom.doctor import examine

    return examine(fast=options.fast)


def _bench(options: argparse.Namespace) -> int:
    from course_lib.classroom.bench import main as bench

    return bench()

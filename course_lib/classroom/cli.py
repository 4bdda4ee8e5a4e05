"""The command line: ``python -m course_lib lab | fresh | list | run | claims | practice | doctor | ...``."""

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from timeit import timeit

from course_lib.classroom import reports
from course_lib.classroom.lessons import CourseError, find_lessons, notebooks_folder

__all__ = ["main"]

MALICE = (
    "Runs the code of every notebook against our checks, each in a process with a limit of time and memory and a "
    "scratch folder. That guards against accidents, not against malice: where you cannot trust the notebooks, run it "
    "in a container, or as a user who owns nothing."
)
EXAMPLE = "For instance `run 02 05.1 --dataset mnist --jobs 2`: a chapter and a lesson on MNIST, two at once."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 for success; 1 if a lesson, a claim or a check failed; 2 for something to correct in what was
    asked; 128 + the signal's number after one, such as 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A console without Greek letters shows a question mark instead of ending the run.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(argv)
        if options.command is None:
            parser.print_help()
            return 0
        if options.command == "lab":
            options.flags = rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as leaving:
        return int(leaving.code or 0)
    chosen = vars(options)
    del chosen["command"]
    try:
        # A lesson runs in its own folder: what these name is meant from here.
        for name in ("COURSE_DATA", "COURSE_CACHE", "COURSE_SMOLLM"):
            if (given := os.path.expanduser(os.environ.get(name, ""))).startswith("~"):
                raise CourseError(f"{name} is {given!r}, and there is no such home here: write its path out")
            os.environ |= {name: os.path.abspath(given)} if given else {}
        code = chosen.pop("action")(**chosen)
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
    told = "A course on neural-network compression: run its lessons, see what they prove."
    parser = argparse.ArgumentParser(prog="python -m course_lib", description=told)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, action: Callable | str, help: str, among=commands, **more) -> argparse.ArgumentParser:
        made = among.add_parser(name, help=help, **{"description": f"{help[0].upper()}{help[1:]}."} | more)
        made.set_defaults(action=_elsewhere(action) if isinstance(action, str) else action)
        made.add_argument("--notebooks", type=Path, metavar="DIR", default=notebooks_folder(), help="the lessons")
        return made

    told = "open JupyterLab on a copy of the lessons; all other options are JupyterLab's own"
    lab = command("lab", "workcopy.open_lab", told)
    told = "bring single notebooks of that copy back; yours are kept under another name"
    fresh = command("fresh", "workcopy.bring_back", told)
    fresh.add_argument("words", nargs="*", metavar="NOTEBOOK", help="02, 02.4, holding_the_zeros, 02_pruning/practice")
    fresh.add_argument("--yes", action="store_true", help="do not ask first")
    for made in (lab, fresh):
        made.allow_abbrev = False  # or JupyterLab's --no-... would be taken for --notebooks
        work = notebooks_folder().with_name("work")
        made.add_argument("--work", type=Path, metavar="DIR", default=work, help="the copy (work/, beside the lessons)")
    listing = command("list", _list, "the lessons: article sections, reading and run time")
    listing.add_argument("--paths", action="store_true", help="only their paths")
    told = "execute lessons and count their claims; exit code 1 if one fails"
    run = command("run", "runner.run_lessons", told, epilog=EXAMPLE)
    again = command("replicate", _replicate, "run lessons under several seeds and tell in docs/claims.md what held")
    for made in (run, again):
        made.add_argument("lessons", nargs="*", metavar="LESSON", help="02, 02.4, pruning ... (default: all)")
        made.add_argument("--dataset", help="digits (default, needs no network), mnist, fashion_mnist, kmnist, cifar10")
        made.add_argument("--profile", help="quick (default) or full: more seeds, longer training")
        made.add_argument("--jobs", type=int, default=1, metavar="N", help="lessons at once; they share the cores")
    run.add_argument("--seed", help="of the first replica, an integer from 0 (default: 0)")
    run.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (build/course/DATASET-PROFILE)")
    run.add_argument("--resume", action="store_true", help="leave out what was executed before from the same bytes")
    run.add_argument("--store", action="store_true", help="store the outputs in notebooks/ itself, cleaned")
    run.add_argument("--timeout", type=int, default=3600, metavar="S", help="seconds for a cell (3600; 0: no limit)")
    again.add_argument("--seeds", default="0 1 2 3 4", help="one run each (default: %(default)s)")
    claims = command("claims", reports.show_claims, "every claim and what was measured; exit code 1 if one is false")
    claims.add_argument("paths", nargs="*", type=Path, help="notebooks, folders (default: the newest run)")
    practice = commands.add_parser("practice", help="the practice notebooks: generate, grade")
    parts = practice.add_subparsers(required=True)
    made = command("generate", _generate, "write notebooks/NN_name/practice.ipynb from notebooks/solutions/", parts)
    made.add_argument("--check", action="store_true", help="change nothing; exit code 1 if one is not up to date")
    told = "grade a folder of notebooks; this runs the code in them"
    grade = command("grade", _grade, told, parts, description=MALICE)
    grade.add_argument("folder", type=Path, help="with *.ipynb, also in folders of it; or one notebook")
    grade.add_argument("--output", type=Path, metavar="CSV", help="default: FOLDER/grades.csv; what is there goes on")
    grade.add_argument("--chapter", metavar="NN", help="default: the one whose tasks a notebook has")
    grade.add_argument("--jobs", type=int, metavar="N", help="notebooks at once (default: one a core)")
    grade.add_argument("--seconds", type=float, default=20, metavar="S", help="for a cell or a check (20)")
    grade.add_argument("--memory", type=float, default=4, metavar="GB", help="for a notebook (4)")
    doctor = command("doctor", _doctor, "check this installation and say how to mend it")
    doctor.add_argument("--fast", action="store_true", help="leave out starting a kernel and reading data sets")
    doctor.add_argument("--room", type=int, metavar="N", help="and what a teacher of N learners must know beforehand")
    command("bench", _bench, "batched training and kd_loss against the usual ways, side by side")
    command("readme", _readme, "put a picture and a claim of each chapter into README.md")
    return parser


def _elsewhere(name: str) -> Callable[..., int]:
    """A function of another module of the classroom, which is imported when it is asked for."""
    module, _, function = name.partition(".")
    return lambda **options: getattr(import_module(f"course_lib.classroom.{module}"), function)(**options)


def _list(notebooks: Path, paths: bool) -> int:
    found = find_lessons(notebooks)
    if paths:
        print("\n".join(reports.shown_path(lesson.path) for lesson in found))
        return 0
    rows = []
    for lesson in found:
        try:
            lesson = lesson.read()
            told = (lesson.title, ", ".join(lesson.sections), lesson.minutes, lesson.seconds)
        except CourseError as error:
            told = (f"not readable: {error}", "", "", "")
        rows.append((lesson.number, *("-" if text in (None, "") else str(text) for text in told)))
    reports.show_table(("lesson", "title", "article sections", "reading min", "run s"), rows)
    return 0


def _replicate(notebooks: Path, seeds: str, **options) -> int:
    from course_lib.classroom.runner import run_lessons

    run = partial(run_lessons, notebooks, resume=True, **options)
    told = [options["dataset"] or "digits", *({options["profile"]} - {None, "quick"})]
    return reports.replicate(notebooks, seeds.replace(",", " ").split(), "-".join(told), run)


def _readme(notebooks: Path) -> int:
    for name in reports.refresh_readme(notebooks):
        print(f"{name}: brought up to date")
    return 0


def _generate(notebooks: Path, check: bool) -> int:
    from course_lib.classroom.practice import generate

    stale = generate(notebooks, check=check)
    print("\n".join(map(str, stale)) or "all practice notebooks are up to date")
    return int(check and bool(stale))


def _grade(**options) -> int:
    from course_lib.classroom.grading import grade

    print(f"written: {grade(**options)}")
    return 0


def _doctor(fast: bool, room: int | None, notebooks: Path) -> int:
    from course_lib.classroom.doctor import examine
    from course_lib.classroom.room import room_for

    return examine({} if room is None else {"room": room_for(room)}, fast=fast)


def _bench(notebooks: Path) -> int:
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))
    met = True
    for name, (slow, fast, calls, bound) in bench_pairs().items():
        # In turn, so that a busy moment hits both; the first warms up.
        ratios = [timeit(slow, number=calls) / timeit(fast, number=calls) for _ in range(4)][1:]
        ratio, least = statistics.median(ratios), bound > 2
        met &= ratio >= bound if least else ratio <= bound
        wanted = f"at {'least' if least else 'most'} {bound:g}x is wanted"
        print(f"{name}: {ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}); {wanted}", flush=True)
    return 0 if met else 1


def bench_pairs() -> dict[str, tuple[Callable, Callable, int, float]]:
    """What ``bench`` times: numerator, denominator, calls a round, and the bound of their ratio."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div
    from torch.utils.data import DataLoader, TensorDataset

    from course_lib.lab.data import load_dataset
    from course_lib.lab.models import build_model
    from course_lib.lab.replicas import fit_replicas
    from course_lib.lab.training import TrainConfig
    from course_lib.methods.distillation import kd_loss

    data, epochs, seeds = load_dataset("digits"), 2, range(32)

    def build(name: str, seed: int):
        return build_model(name, data.input_shape, data.num_classes, seed=seed)

    def loop(name: str) -> None:  # what the usual tutorial does
        for seed in seeds:
            model = build(name, seed)
            loader = DataLoader(TensorDataset(data.train.images, data.train.labels), batch_size=64, shuffle=True)
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
            for images, labels in (batch for _ in range(epochs) for batch in loader):
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()

    def batched(name: str) -> None:
        fit_replicas(partial(build, name), seeds, data.train, TrainConfig(epochs=epochs, batch_size=64))

    student, teacher = torch.randn(2, 128, 10, generator=torch.Generator().manual_seed(0))
    student, labels = student.requires_grad_(), torch.arange(128) % 10

    def bare() -> None:
        soft = kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
        0.5 * cross_entropy(student, labels) + 0.5 * 16 * soft

    told, ours = "a loop over 32 trainings against one batched pass", partial(kd_loss, temperature=4.0, alpha=0.5)
    return {
        f"mlp32, {told}": (partial(loop, "mlp32"), partial(batched, "mlp32"), 1, 8.0),
        f"cnn_student, {told}": (partial(loop, "cnn_student"), partial(batched, "cnn_student"), 1, 3.0),
        "kd_loss against the bare formula": (partial(ours, student, teacher, labels), bare, 500, 1.3),
    }

"""Plan: what a run was asked for, checked by name and value before anything is touched or started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.classroom import outputs
from course_lib.classroom.chapters import Chapter, chapter_paths, load_chapter, select
from course_lib.classroom.parameters import CourseError, Parameter, check_known_names, convert, merge

__all__ = ["Plan", "RunOptions", "make_plan"]


@dataclass(frozen=True)
class RunOptions:
    """What ``python -m course_lib run`` was asked for; None where nothing was given.

    Attributes:
        chapters: words that name chapters, none for all.
        notebooks: the folder of the chapters.
        dataset, profile, seed: texts for the parameters that every chapter shares, where it has them.
        assignments: ``NAME=VALUE`` texts for any parameter.
        output: folder for the executed notebooks.
        jobs: how many chapters at once. timeout: seconds a cell, 0 for no limit.
        resume: skip chapters whose output is current. store: execute with defaults and store in ``notebooks``.
    """

    notebooks: Path
    chapters: Sequence[str] = ()
    dataset: str | None = None
    profile: str | None = None
    seed: str | None = None
    assignments: Sequence[str] = ()
    output: Path | None = None
    jobs: int = 1
    timeout: int = 3600
    resume: bool = False
    store: bool = False


@dataclass(frozen=True)
class Plan:
    """A run that was checked: nothing has been touched or started yet.

    Attributes:
        chapters: what to execute, with each one's parameters. folder: where partial and failed notebooks go, and
            finished ones too unless they are stored.
    """

    options: RunOptions
    chapters: list[tuple[Chapter, dict[str, Any]]]
    folder: Path

    def final(self, chapter: Chapter) -> Path:
        """Where the finished chapter goes."""
        return chapter.path if self.options.store else outputs.final_path(self.folder, chapter)


def make_plan(options: RunOptions) -> Plan:
    """Choose the chapters and check every name and value, before any kernel starts.

    Raises:
        CourseError: an unknown chapter or parameter, a value that does not fit, options that exclude each other.
    """
    common = {"dataset": options.dataset, "profile": options.profile, "seed": options.seed}
    given, explicit = merge(common, options.assignments)
    if options.store and (given or options.resume or options.output):
        raise CourseError("--store executes with the default parameters into notebooks/: it takes chapters and --jobs")
    if options.jobs < 1 or options.timeout < 0:
        raise CourseError(f"--jobs must be at least 1 and --timeout at least 0, got {options.jobs}, {options.timeout}")
    if options.output and options.output.resolve() == options.notebooks.resolve():
        raise CourseError("--output must not be the folder of the chapters themselves; --store is what writes there")
    chapters = [load_chapter(path) for path in select(chapter_paths(options.notebooks), list(options.chapters))]
    check_known_names(explicit, (name for chapter in chapters for name in chapter.parameters))
    planned = []
    for chapter in chapters:
        defaults = {name: parameter.default for name, parameter in chapter.parameters.items()}
        texts = {name: text for name, text in given.items() if name in defaults}
        values = {name: convert(chapter.parameters[name], text) for name, text in texts.items()}
        planned.append((chapter, defaults | values))
    _check_common(given)
    build = options.notebooks.resolve().parent / "build"
    run_name = f"{given.get('dataset', 'digits')}-{given.get('profile', 'quick')}"
    folder = build / "store" if options.store else (options.output or build / "course" / run_name)
    return Plan(options, planned, folder.absolute())


def _check_common(given: dict[str, str]) -> None:
    # Also where no selected chapter has the parameter: a wrong value never passes in silence.
    for name, kind, default in (("dataset", "str", "digits"), ("profile", "str", "quick"), ("seed", "int", 0)):
        if name in given:
            convert(Parameter(name, kind, default), given[name])

"""Reports: what executed lessons claim, printed, put into README.md, and compared over seeds and data sets."""

import base64
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from course_lib.classroom.lessons import CourseError, find_lessons, given_value, read_notebook
from course_lib.files import write_file

__all__ = ["claims_of", "count_claims", "refresh_readme", "replicate", "show_claims", "show_table", "shown_path"]
__all__ += ["watched"]

# The ledger's own, repeated here: importing it would load torch for a command that only reads files.
MIME = "application/vnd.compression-course.claims+json"
MARKS = {"holds": "✓", "fails": "✗", "not here": "–"}
VERDICTS = {"held": "✓", "not": "✗", "undecided": "?"}
KEPT = ("lesson", "sentence", "holds", "verdict", "measured", "expected", "parts")
PICTURE = Path("docs", "pareto.png")
START, END = "<!-- measured: begin (made by `make readme`) -->", "<!-- measured: end -->"


def claims_of(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The claims in the outputs of executed notebooks, in order; a later one replaces an earlier one of its id.

    Each is as the ledger wrote it, and has the ``path`` of its notebook and whether its cell is tagged ``headline``.
    """
    found = {}
    for path in paths:
        for cell in read_notebook(path)[0]["cells"]:
            for output in cell.get("outputs", ()):
                stored = (output.get("data") or {}).get(MIME, {"claims": []})
                for claim in stored.get("claims", [None]) if isinstance(stored, dict) else [None]:
                    texts = ("id", "sentence", "status", "measured")
                    if not isinstance(claim, dict) or any(not isinstance(claim.get(name), str) for name in texts):
                        raise CourseError(f"{path}: a claim is damaged: {str(claim)[:100]}")
                    about = {"path": path, "headline": "headline" in cell["metadata"]["tags"]}
                    found[path, claim["id"]] = claim | about
    return list(found.values())


def count_claims(claims: Sequence[dict[str, Any]]) -> str:
    """The claims counted, in one line."""
    holds, fails, elsewhere = (sum(claim["status"] == status for claim in claims) for status in MARKS)
    return f"{len(claims)} claims: {holds} hold, {fails} fail, {elsewhere} do not hold here"


def show_claims(paths: Sequence[Path], notebooks: Path) -> int:
    """Print the claims of executed notebooks or folders of them (by default the newest run, else the stored lessons).

    Returns 1 if a claim is false or a lesson did not run to its end, else 0.
    """
    runs = [p for p in (notebooks.resolve().parent / "build" / "course").glob("*") if any(p.rglob("*.ipynb"))]
    newest = max(runs, key=lambda run: max(p.stat().st_mtime for p in run.rglob("*.ipynb")), default=notebooks)
    paths = paths or [newest]
    files = [f for path in paths for f in (_executed(path) if path.is_dir() else [path])]
    claims = claims_of(files)
    errors = [f"{shown_path(file)} did not run to its end" for file in files if file.stem.endswith("-failed")]
    places = ", ".join(map(shown_path, paths))
    if not claims and not errors:
        raise CourseError(f"no claims in {places}: run `python -m course_lib run` first")
    print(f"claims of {places}")
    show_table(("", "claim", "sentence", "measured"), [_row(claim) for claim in claims])
    print("\n".join([*errors, count_claims(claims)]))
    return 1 if errors or any(claim["status"] == "fails" for claim in claims) else 0


def refresh_readme(notebooks: Path, *, check: bool = False) -> list[str]:
    """Bring the part between two marks of README.md, beside the notebooks, up to date, and say what was not.

    It has a claim of each chapter, the first whose cell is tagged ``headline``, else its first, and the picture of the
    cell tagged ``readme-figure``. ``check`` changes nothing. A stored claim that is false is a CourseError.
    """
    root, lessons = notebooks.resolve().parent, find_lessons(notebooks)
    rows, wanted, headlines = ["| chapter | one of its claims | measured |", "|---|---|---|"], {}, {}
    for lesson in lessons:
        for claim in claims_of([lesson.path]):
            if claim["status"] == "fails":
                raise CourseError(f"{lesson.name} is not fit to be shown: its stored claim {claim['id']} is false")
            chapter = lesson.place.parts[0].removesuffix(".ipynb").partition("_")[2].replace("_", " ").capitalize()
            link = f"[{lesson.number[:2]} {chapter}](notebooks/{lesson.place.as_posix()})"
            row = f"| {link} | {_cell(claim['sentence'])} | {_cell(claim['measured'])} |"
            headlines.setdefault(lesson.number[:2], []).append((not claim["headline"], row))
    rows += [min(claims, key=lambda one: one[0])[1] for claims in headlines.values()]
    pictures = [picture for lesson in lessons for picture in _pictures(lesson.path)]
    if len(pictures) > 1:
        raise CourseError(f"one cell with one picture may be tagged 'readme-figure', got {len(pictures)}")
    for data, alt in pictures:
        wanted[root / PICTURE] = data
        rows[:0] = [f"![{alt}]({PICTURE.as_posix()})", ""]
    made = "\n\n".join([START, "\n".join(rows), END])
    text = (root / "README.md").read_text(encoding="utf-8")
    text, places = re.subn(re.escape(START) + r".*?" + re.escape(END), lambda _: made, text, flags=re.DOTALL)
    if places != 1:
        raise CourseError(f"README.md needs one place between {START!r} and {END!r}")
    wanted[root / "README.md"] = text.encode()
    stale = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    for path in [] if check else stale:
        path.parent.mkdir(exist_ok=True)
        write_file(path, wanted[path])
    return [path.relative_to(root).as_posix() for path in stale]


def replicate(notebooks: Path, seeds: Sequence[str], name: str, run: Callable[..., int]) -> int:
    """Run lessons under several seeds, and write into docs/claims.md where each claim held.

    Results go to ``build/replicate/<name>-<seed>/``, and ``name`` is that of the data set and of any profile but quick.
    What they claim is kept in docs/claims.json, so that another seed or name adds a column; a claim reworded since, or
    of a lesson that fails now, counts as not run. ``run`` is called with ``seed`` and ``output``, the folder of its
    results, and returns an exit code, as this does: 1 if a lesson did not reach its end.
    """
    root, code = notebooks.resolve().parent, 0
    kept = root / "docs" / "claims.json"
    if not (numbers := dict.fromkeys(given_value("seed", seed) for seed in seeds)):
        raise CourseError('--seeds takes at least one, such as "0 1 2"')
    try:
        runs = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    except ValueError as error:
        raise CourseError(f"{kept} is damaged: {error}; mend it, or delete it and run all seeds again") from None
    kept.parent.mkdir(exist_ok=True)
    for seed in numbers:
        folder = root / "build" / "replicate" / f"{name}-{seed}"
        if (ended := run(seed=str(seed), output=folder)) > 1:
            return ended
        lessons = find_lessons(notebooks)
        failed = {x.number for x in lessons if (folder / x.place.with_name(f"{x.path.stem}-failed.ipynb")).is_file()}
        code |= bool(failed)
        done = [path for x in lessons if x.number not in failed and (path := folder / x.place).is_file()]
        fresh, before = claims_of(done), runs.get(f"{name} {seed}", {})
        column = {id: c for id, c in before.items() if c["lesson"] not in failed}
        runs[f"{name} {seed}"] = column | {c["id"]: {n: c.get(n) for n in KEPT} for c in fresh}
        write_file(kept, (json.dumps(runs, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
        titles = {lesson.number: lesson.read().title for lesson in lessons}
        write_file(kept.with_suffix(".md"), claims_page(runs, titles, {c["id"]: c["sentence"] for c in fresh}).encode())
    print(f"written: {shown_path(kept.with_suffix('.md'))}")
    return code


def claims_page(runs: dict[str, dict[str, dict]], titles: dict[str, str], now: dict[str, str]) -> str:
    """The table of claims by runs as Markdown, a section a lesson, and how many hold on every run of the default data.

    ``runs``: for each run, named ``"<dataset> <seed>"``, its claims by id. ``titles``: of the lessons by number, in
    order. ``now``: today's sentences by id, where they are known.
    """
    names = sorted(runs, key=lambda name: (not name.startswith("digits "), name.split()[0], int(name.split()[1])))
    lines, counts, covered = [], {"held": 0, "all": 0}, []
    for number, title in titles.items():
        rows = []
        for id in dict.fromkeys(id for name in names for id, c in runs[name].items() if c["lesson"] == number):
            sentence = now.get(id) or next(runs[name][id]["sentence"] for name in names[::-1] if id in runs[name])
            same = {n: c for n in names if (c := runs[n].get(id)) and c["sentence"] == sentence}
            own = [c for name, c in same.items() if name.startswith("digits ")]
            counts["all"] += bool(own)
            counts["held"] += bool(own) and all(c["holds"] for c in own)
            for parts in zip(*(c["parts"] or () for c in own), strict=False) if len(own) > 1 else ():
                middle = sum(part["value"] for part in parts) / len(parts)
                covered += [part["low"] <= middle <= part["high"] for part in parts if part["low"] < part["high"]]
            aside = next((f" *Expected, not seen: {c['expected']}.*" for c in same.values() if c["expected"]), "")
            told = [f"{VERDICTS[same[n]['verdict']]} {same[n]['measured']}" if n in same else "" for n in names]
            rows.append("| " + " | ".join(map(_cell, [sentence + aside, *told])) + " |")
        if rows:
            lines += [f"\n## {number} {title}\n", f"| claim | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            lines += rows
    head = f"Of {counts['all']} claims {counts['held']} hold in every run on the default data (digits)."
    share = f" Of {len(covered)} intervals {sum(covered)} contain the mean over these runs." if covered else ""
    marks = ", ".join(f"{mark} {name}" for name, mark in VERDICTS.items())
    legend = f"Each column is a run: data set and seed. {marks}"
    return "\n".join(["# Where each claim held", "", f"{head}{share} {legend}.", *lines]) + "\n"


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: long texts fold in a terminal, and elsewhere nothing is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(" ".join(cell.split())) for cell in row))
    Console(width=None if watched() else 10_000).print(table)


def watched() -> bool:
    """Whether standard output is a terminal that a person looks at and that can redraw a line."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative where it lies under the current folder."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _executed(folder: Path) -> list[Path]:
    """The lessons in a folder, and those that failed."""
    failed = sorted(folder.rglob("*-failed.ipynb"))
    lessons = []
    with suppress(CourseError) if failed else nullcontext():
        lessons = find_lessons(folder)
    return [*(lesson.path for lesson in lessons), *failed]


def _row(claim: dict[str, Any]) -> tuple[str, str, str, str]:
    aside = f" (expected, not seen: {claim['expected']})" if claim.get("expected") else ""
    note = f" ({claim['note']})" if claim.get("note") else ""
    measured = f"{claim['measured']}{note} [{claim.get('dataset')}, {claim.get('profile')}]"
    return MARKS.get(claim["status"], "?"), claim["id"], claim["sentence"] + aside, measured


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _pictures(path: Path) -> list[tuple[bytes, str]]:
    """PNG and alternative text of the pictures in the cell tagged ``readme-figure``."""
    found = []
    for cell in read_notebook(path)[0]["cells"]:
        for output in cell.get("outputs", ()) if "readme-figure" in cell["metadata"]["tags"] else ():
            text = "".join((output.get("data") or {}).get("text/html", ""))
            if tag := re.search(r'<img alt="([^"]*)"[^>]*src="data:image/png;base64,([^"]+)"', text):
                found.append((base64.b64decode(tag[2]), html.unescape(tag[1])))
    return found

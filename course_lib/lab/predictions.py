"""The reader's own forecasts: an answer and a confidence under a *Predict first*, and how well they were calibrated.

Nothing waits for them: without a person at the keyboard no box is shown, and a lesson goes on without an answer.
"""

import json
import os
from pathlib import Path

import numpy as np

from course_lib.files import cache_folder, write_file

__all__ = ["ANSWERS", "ask", "keep", "kept", "own_calibration"]

_RIGHT = """
    00-1 b
    01.2-1 b, 01.2-2 c, 01.2-3 b
    02.1-1 d, 02.1-2 a, 02.2-1 d, 02.3-1 d, 02.3-2 b, 02.4-1 a, 02.4-2 c, 02.5-1 c, 02.5-2 c
    03.1-1 d, 03.1-2 a, 03.1-3 b, 03.2-1 a, 03.2-2 c, 03.2-3 b, 03.3-1 b, 03.3-2 c, 03.4-1 a, 03.4-2 d
    03.5-1 c, 03.5-2 b
    04.1-1 a, 04.1-2 b, 04.2-1 c, 04.2-2 a, 04.3-1 b, 04.3-2 d, 04.4-1 a
    05.1-1 c, 05.2-1 a, 05.2-2 b, 05.3-1 c, 05.4-1 d
    06.1-1 d, 06.1-2 c, 06.2-1 a, 06.2-2 b, 06.3-1 b, 06.3-2 b, 06.4-1 b
    07.1-1 a, 07.1-2 b, 07.2-1 d, 07.2-2 c, 07.3-1 c, 07.3-2 b, 07.4-1 b, 07.4-2 d
    08.1-1 a, 08.1-2 b, 08.2-1 c, 08.2-2 c, 08.3-1 c, 08.3-2 a, 08.3-3 c, 08.3-4 b, 08.4-1 b, 08.4-2 b
"""
ANSWERS = dict(entry.split() for entry in _RIGHT.replace("\n", ",").split(",") if entry.strip())
"""Question -> the option that was measured; a test holds it against the lessons' folded answers."""

FEWEST = 5


def _file() -> Path:
    return cache_folder("predictions", own=True) / "mine.json"


def kept() -> dict[str, tuple[str, float]]:
    """What the reader has answered so far: question -> (option, confidence in [0, 1])."""
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {q: (str(option), float(confidence)) for q, (option, confidence) in found.items() if q in ANSWERS}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # nothing there, or nothing to be read: the reader starts anew


def keep(question: str, option: str, confidence: float) -> None:
    """Remember an answer; the last one to a question counts."""
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_file(_file(), json.dumps({**kept(), question: (option, float(confidence))}).encode())


def ask(question: str, options: str = "abc") -> None:
    """Show a box for an answer and a confidence, if a person is there to fill it in.

    Raises:
        KeyError: a question that :data:`ANSWERS` does not hold.
    """
    ANSWERS[question]
    if os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED"):
        return
    import ipywidgets as widgets
    from IPython.display import display

    # A row of boxes fits a small window.
    whole, narrow, slim = {"flex": "none", "width": "auto"}, {"width": "17em"}, {"description_width": "auto"}
    option = widgets.ToggleButtons(options=list(options), style={"button_width": "3em"}, layout=whole)
    chance = round(100 / len(options))
    sure = widgets.IntSlider(
        value=max(50, chance), min=chance, max=100, step=5, description="sure (%)", style=slim, layout=narrow
    )
    button, said = widgets.Button(description="keep", layout=whole), widgets.Label("an answer is optional")

    def clicked(_) -> None:
        try:
            keep(question, option.value, sure.value / 100)
            said.value = f"kept: {option.value}, {sure.value} % sure"
        except OSError as error:
            said.value = f"not kept: {error}"

    button.on_click(clicked)
    display(widgets.HBox([option, sure, button, said], layout={"flex_flow": "row wrap"}))


def own_calibration() -> None:
    """Draw the reader's reliability diagram and print the Brier score, once there are enough answers.

    The score is the mean squared distance between confidence and truth (1 if the option was right, else 0).
    """
    mine = kept()
    if len(mine) < FEWEST:
        print(f"{len(mine)} of {len(ANSWERS)} predictions kept so far; the diagram needs {FEWEST}.")
        return
    import matplotlib.pyplot as plt

    from course_lib.evidence.plots import COLORS, show

    sure = np.array([confidence for _, confidence in mine.values()])
    right = np.array([ANSWERS[q] == option for q, (option, _) in mine.items()])
    figure, ax = plt.subplots(figsize=(4.8, 3.8))
    for low, high in zip(np.arange(0, 1, 0.2), np.arange(0.2, 1.2, 0.2), strict=True):
        inside = (sure > low + 1e-9) & (sure <= high + 1e-9)
        if inside.any():
            ax.bar((low + high) / 2, right[inside].mean(), 0.18, color=COLORS["sky"])
            ax.plot(sure[inside].mean(), right[inside].mean(), "o", color=COLORS["blue"])
            ax.text((low + high) / 2, 0.02, f"{inside.sum()}", ha="center")
    ax.plot([0, 1], [0, 1], "--", color="black", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="how sure you were", ylabel="share that was right", title="You")
    show(figure, alt="Your own reliability diagram: the share of right answers for each range of confidence.")
    brier = np.mean((sure - right) ** 2)
    print(f"{len(mine)} predictions, {right.mean():.0%} right at {sure.mean():.0%} sure; Brier score {brier:.2f}")

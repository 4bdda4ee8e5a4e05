"""Pictures in one style: colours that survive colour-blindness and a beamer, intervals drawn, and a text for each."""

import io

import numpy as np

__all__ = ["COLORS", "band", "dots", "family_tree", "heat_map", "interval_bars", "show", "use_style"]

COLORS = {
    "black": "#000000",
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermillion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "grey": "#7F7F7F",
}
"""Okabe and Ito's palette (2008), and a grey for what only serves as a background."""


def use_style() -> None:
    """Set the course's look for every figure of this process: sizes for a beamer, light grid, no box."""
    import matplotlib as mpl
    from cycler import cycler

    order = ("blue", "orange", "green", "vermillion", "purple", "sky", "black")
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=[COLORS[name] for name in order]),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "figure.constrained_layout.use": True,
            "figure.dpi": 90,
            "figure.figsize": (7.0, 4.0),
            "font.size": 10.5,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.linewidth": 2.0,
        }
    )


def show(figure, *, alt: str) -> None:
    """Display ``figure`` as a PNG with the alternative text ``alt``, and close it.

    Raises:
        ValueError: ``alt`` says next to nothing; a reader who cannot see the picture needs a sentence.
    """
    if len(alt.split()) < 4:
        raise ValueError(f"alt must be a sentence that says what the picture shows, got {alt!r}")
    import matplotlib.pyplot as plt
    from IPython.display import display

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    bundle = {"image/png": buffer.getvalue(), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def band(ax, x, samples, *, label: str | None = None, color: str | None = None, level: float = 0.95, **line):
    """Draw the mean of ``samples`` [seeds, len(x)] over ``x`` and its t interval at ``level`` as a band.

    Raises:
        ValueError: ``samples`` is not a table with one row a seed (at least two) and one column for each ``x``.
    """
    from scipy import stats

    x, samples = np.asarray(x, dtype=float), np.asarray(samples, dtype=float)
    if samples.ndim != 2 or samples.shape[1] != len(x) or len(samples) < 2:
        raise ValueError(f"samples must have shape [seeds >= 2, {len(x)}], one column for each x; got {samples.shape}")
    mean = samples.mean(axis=0)
    half = stats.t.ppf((1 + level) / 2, len(samples) - 1) * samples.std(axis=0, ddof=1) / len(samples) ** 0.5
    (drawn,) = ax.plot(x, mean, label=label, color=color, **line)
    ax.fill_between(x, mean - half, mean + half, color=drawn.get_color(), alpha=0.2, linewidth=0)
    return drawn


def interval_bars(ax, labels, intervals, *, colors=None) -> None:
    """Draw one :class:`~course_lib.evidence.statistics.Interval` a row: a dot at the mean, a bar for the interval."""
    colors = colors or [COLORS["blue"]] * len(labels)
    for row, (interval, color) in enumerate(zip(intervals, colors, strict=True)):
        ax.plot([interval.low, interval.high], [row, row], color=color, linewidth=3, solid_capstyle="butt")
        ax.plot([interval.mean], [row], "o", color=color, markersize=7)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def dots(ax, values, *, color: str = COLORS["blue"]) -> None:
    """Draw each of ``values`` as a dot over the x axis, equal ones stacked: a histogram that hides nothing."""
    places, counts = np.unique(np.round(np.asarray(values, dtype=float), 6), return_counts=True)
    for place, count in zip(places, counts, strict=True):
        ax.plot([place] * count, range(1, count + 1), "o", color=color, markersize=8)
    ax.set_ylim(0, counts.max() + 1)


def family_tree(root: str, branches: dict[str, tuple[str, list[str]]], note: str):
    """Draw ``root`` with one branch a key of ``branches`` → (colour name, two leaves), and ``note`` below; a figure."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9.5, 4.2))
    ax.set(xlim=(0, 12), ylim=(0.2, 4.6))
    ax.axis("off")

    def box(x: float, y: float, text: str, color: str) -> None:
        look = {"boxstyle": "round,pad=0.4", "facecolor": COLORS[color], "edgecolor": "none", "alpha": 0.35}
        ax.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=look)

    def line(start: tuple[float, float], end: tuple[float, float]) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-", "color": "0.5"})

    box(6.0, 4.2, root, "grey")
    centres = np.linspace(0, 12, 2 * len(branches) + 1)[1::2]
    for x, (text, (color, leaves)) in zip(centres, branches.items(), strict=True):
        line((6.0, 3.95), (x, 3.15))
        box(x, 2.8, text, color)
        for dx, leaf in zip(np.linspace(-1, 1, len(leaves)), leaves, strict=True):
            line((x, 2.45), (x + dx, 1.75))
            box(x + dx, 1.4, leaf, color)
    ax.text(6.0, 0.5, note, ha="center", fontsize=10, style="italic")
    return figure


def heat_map(ax, values, rows, columns, *, fmt: str = ".1f", best: bool = True) -> None:
    """Draw ``values`` [rows, columns] as coloured cells with their numbers, the largest marked by a star.

    Raises:
        ValueError: ``values`` is no table with one row and one column for each label.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"values must have shape ({len(rows)}, {len(columns)}) to fit the labels, got {values.shape}")
    ax.imshow(values, cmap="cividis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for place, value in np.ndenumerate(values):
        star = " ★" if best and place == np.unravel_index(values.argmax(), values.shape) else ""
        ink = "white" if value < middle else "black"
        ax.text(place[1], place[0], f"{value:{fmt}}{star}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(columns)), [f"{c:g}" if isinstance(c, float) else c for c in columns])
    ax.set_yticks(range(len(rows)), [f"{r:g}" if isinstance(r, float) else r for r in rows])
    ax.grid(False)

"""A study as a script of its own, to be killed, or to run beside another: folder, log, pause, cells, result."""

import sys

import study_cells

from course_lib.lab.study import make_grid, run_study


def grid_of(log, pause, cells):
    """The cells that the script and the test beside it share."""
    return make_grid({"m": [1, 2]}, range(int(cells) // 2), log=str(log), pause=float(pause))


if __name__ == "__main__":
    folder, log, pause, cells, result = sys.argv[1:]
    run_study(grid_of(log, pause, cells), work=study_cells.logged, folder=folder, save=result)

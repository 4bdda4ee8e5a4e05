"""Work for the tests of studies: functions that a worker process imports by name."""

import os
import time
from pathlib import Path


def quick(trial):
    """No time at all."""
    return {"double": 2 * trial.level + trial.seed, "name": trial.method}


def logged(trial):
    """Leaves a line in the file ``log`` when it starts, and takes ``pause`` seconds."""
    options = dict(trial.options)
    with open(options["log"], "a") as file:
        file.write(f"{trial.method} {trial.level} {trial.seed} {os.getpid()}\n")
    time.sleep(options.get("pause", 0.0))
    return {"value": trial.seed * 10}


def moody(trial):
    """Logs, and then does what its method says: fails while ``log.bad`` is there, exits, dies, dies once, goes well."""
    result = logged(trial)
    log = Path(dict(trial.options)["log"])
    if trial.method == "fails" and log.with_suffix(".bad").exists():
        raise ValueError(f"no luck with {trial.level}")
    if trial.method == "exits":
        raise SystemExit("enough")
    if trial.method == "dies":
        os._exit(3)
    if trial.method == "dies_once" and not log.with_suffix(f".{trial.seed}.dead").exists():
        log.with_suffix(f".{trial.seed}.dead").touch()
        os._exit(3)
    return result


def surroundings(trial):
    """What a worker sees of its process."""
    import torch

    return {"threads": torch.get_num_threads(), "cache": os.environ.get("COURSE_CACHE")}


def odd(trial):
    """Returns what a row can and cannot hold, by method."""
    import numpy as np
    import torch

    return {
        "object": {"x": object()},
        "taken": {"seed": 3},
        "option": {"width": 3},
        "none": None,
        "good": {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.arange(2), "d": True, "e": None, "f": [1, "x"]},
    }[trial.method]

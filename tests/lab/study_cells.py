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
    import signal

    import torch

    return {
        "threads": torch.get_num_threads(),
        "cache": os.environ.get("COURSE_CACHE"),
        "deaf": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "pid": os.getpid(),
    }


def refuses():
    """What a worker should start with."""
    raise RuntimeError("this worker does not want to start")


def odd(trial):
    """Returns what no row can hold, by method."""
    import numpy as np
    import torch

    return {
        "list": [1],
        "array": {"x": np.zeros(2)},
        "taken": {"seed": 3},
        "option": {"width": 3},
        "unnamed": {7: 3},
        "scalars": {
            "a": np.float32(0.5),
            "b": torch.tensor(3),
            "c": np.int64(4),
            "d": True,
            "e": None,
            "f": float("nan"),
        },
    }[trial.method]


def training(trial):
    """A small network trained for a third of a second or so: what a cell of a real grid does."""
    import torch

    from course_lib.lab.data import Split
    from course_lib.lab.models import build_model
    from course_lib.lab.training import TrainConfig, fit

    started = time.process_time()
    generator = torch.Generator().manual_seed(trial.seed)
    images = torch.randn(1024, 1, 8, 8, generator=generator)
    split = Split(images, (images.mean(dim=(1, 2, 3)) > 0).long())
    history = fit(build_model("mlp128", (1, 8, 8), 2, seed=trial.seed), split, TrainConfig(epochs=trial.level))
    return {"loss": history.train_loss[-1], "cpu": time.process_time() - started}

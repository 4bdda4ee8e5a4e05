"""A room of thirty: processes on one read-only data folder and one shared cache, some of them killed at bad moments.

Where the test may (as root), every learner is a user of their own. ``python test_room.py FOLDER`` is the room itself:
it forks after importing, so that thirty learners cost little more than one.
"""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEARNERS, WEIGHTS, MOMENTS = 30, ("teacher", "student"), ("training", "storing .safetensors", "storing .sha256")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a room is forked, which Windows cannot")
def test_thirty_learners_and_six_accidents():
    from data_files import idx_files, write

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        write(room / "data" / "MNIST" / "raw", idx_files(train=400, test=40))
        for name in ("cache", "answers", "deaths"):
            (room / name).mkdir()
            (room / name).chmod(0o777)
        (room / "log").touch()
        (room / "log").chmod(0o666)
        room.chmod(0o755)
        for path in (room / "data").rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.read_bytes() for path in (room / "data").rglob("*") if path.is_file()}
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, folder], env=env, capture_output=True, check=True, timeout=200)

        answers = [json.loads(path.read_text()) for path in (room / "answers").iterdir()]
        assert not [answer["error"] for answer in answers if "error" in answer]
        log = Counter((room / "log").read_text().splitlines())
        accidents = {f"killed {moment} {name}" for name in WEIGHTS for moment in MOMENTS}
        assert {line for line in log if line.startswith("killed")} == accidents
        assert len(answers) == LEARNERS - len(accidents)
        assert len({json.dumps(answer, sort_keys=True) for answer in answers}) == 1, (
            "all have the same data and weights"
        )
        for name in WEIGHTS:
            # One that was killed at it, two whose result was lost with them, and the one that all others loaded.
            assert (log[f"begun {name}"], log[f"trained {name}"]) == (4, 3)
        assert {path: path.read_bytes() for path in (room / "data").rglob("*") if path.is_file()} == before
        kept = [path for path in (room / "cache").iterdir() if not path.name.startswith(".")]
        assert Counter(path.suffix for path in kept) == {".safetensors": 2, ".sha256": 2, ".lock": 2}
        assert all(path.stat().st_mode & stat.S_IROTH for path in kept), "a class must be able to read them"
        for path in kept:
            if path.suffix == ".sha256":
                data = path.with_suffix("").read_bytes()
                assert path.read_text().split()[0] == hashlib.sha256(data).hexdigest()
    assert time.monotonic() - started < 120


def learner(room):
    """Load the data and get two trained networks; fingerprints of all three."""
    from course_lib.lab.checkpoints import train_or_load
    from course_lib.lab.data import load_dataset
    from course_lib.lab.models import build_model
    from course_lib.lab.training import TrainConfig, fit

    real_replace = os.replace
    split = load_dataset("mnist", root=room / "data", download=False).train
    answer = {"data": hashlib.sha256(split.images.numpy().tobytes()).hexdigest()}

    def log(text):
        with open(room / "log", "a") as file:
            file.write(f"{text}\n")

    def accident(moment):
        """Whoever is the first to come to this moment does not get beyond it."""
        try:
            os.close(os.open(room / "deaths" / moment, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        log(f"killed {moment}")
        os.kill(os.getpid(), signal.SIGKILL)

    for name in WEIGHTS:

        def train(model, name=name):
            log(f"begun {name}")
            fit(model, split, TrainConfig(epochs=1))
            time.sleep(0.3)  # meanwhile everybody else arrives
            accident(f"training {name}")
            log(f"trained {name}")

        def replace(source, target, name=name):
            accident(f"storing {Path(target).suffix} {name}")
            real_replace(source, target)

        os.replace = replace
        seed = WEIGHTS.index(name)
        model = train_or_load(
            name,
            lambda seed=seed: build_model("mlp32", (1, 28, 28), 10, seed=seed),
            train,
            key={"data": split, "seed": seed},
            folder=room / "cache",
        )
        os.replace = real_replace
        state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        answer[name] = hashlib.sha256(state).hexdigest()
    return answer


def main(room):
    """Fork the learners and wait for them. What they need is imported before: their users may not read a library."""
    import filelock  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo  # noqa: F401

    import course_lib.lab.checkpoints
    import course_lib.lab.training  # noqa: F401

    own_users = os.geteuid() == 0 and all(path.stat().st_mode & stat.S_IXOTH for path in (ROOT, *ROOT.parents))
    for number in range(LEARNERS):
        if os.fork():
            continue
        try:
            os.umask(0o022)
            if own_users:
                os.setuid(20_000 + number)
            answer = learner(room)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        (room / "answers" / f"{number}.json").write_text(json.dumps(answer))
        os._exit(0)
    for _ in range(LEARNERS):
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

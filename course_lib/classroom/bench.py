"""``python -m course_lib bench``: our batched training against the loop that every tutorial writes, side by side."""

import statistics as st
import time
from collections.abc import Callable

__all__ = ["main", "measure", "tutorial_loop"]

TARGETS = {"mlp32": 8.0, "cnn_student": 3.0}
REPLICAS, EPOCHS, BATCH = 32, 2, 64


def tutorial_loop(name: str, data, seeds: range, epochs: int) -> list:
    """One model after another, a DataLoader over a TensorDataset, Adam: what the usual tutorial does."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from course_lib.lab.models import build_model

    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = build_model(name, data.input_shape, data.num_classes, seed=seed)
        loader = DataLoader(TensorDataset(data.train.images, data.train.labels), batch_size=BATCH, shuffle=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        models.append(model)
    return models


def measure(name: str, *, replicas: int = REPLICAS, epochs: int = EPOCHS, rounds: int = 3) -> dict[str, list[float]]:
    """Seconds of both ways, in turn, ``rounds`` times after a warm-up: ``{"loop": [...], "batched": [...]}``."""
    from course_lib.lab.data import load_dataset
    from course_lib.lab.models import build_model
    from course_lib.lab.replicas import fit_replicas
    from course_lib.lab.training import TrainConfig

    data = load_dataset("digits")
    config = TrainConfig(epochs=epochs, batch_size=BATCH)

    def batched(seeds: range) -> list:
        def make(seed: int):
            return build_model(name, data.input_shape, data.num_classes, seed=seed)

        return fit_replicas(make, seeds, data.train, config)

    ways: dict[str, Callable] = {
        "loop": lambda seeds: tutorial_loop(name, data, seeds, epochs),
        "batched": batched,
    }
    for way in ways.values():
        way(range(1))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            started = time.perf_counter()
            way(range(replicas))
            seconds[label].append(time.perf_counter() - started)
    return seconds


def main(*, rounds: int = 3) -> int:
    """Print the table; 0 if both targets are met on this machine, else 1."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))
    threads = torch.get_num_threads()
    print(f"{REPLICAS} networks, {EPOCHS} epochs of digits each, {rounds} rounds in turn, {threads} threads")
    print(f"{'model':<12} {'loop, one by one':>17} {'batched':>9} {'ratio (min-max)':>22} {'target':>7}")
    met = True
    for name, target in TARGETS.items():
        seconds = measure(name, rounds=rounds)
        ratios = [slow / fast for slow, fast in zip(seconds["loop"], seconds["batched"], strict=True)]
        middle = st.median(ratios)
        met &= middle >= target
        loop, ours = st.median(seconds["loop"]), st.median(seconds["batched"])
        spread = f"{middle:.1f}x ({min(ratios):.1f}-{max(ratios):.1f})"
        print(f"{name:<12} {loop:>15.2f} s {ours:>7.2f} s {spread:>22} {target:>6.0f}x")
    print("both targets met" if met else "a target was missed on this machine")
    return 0 if met else 1

"""What every test shares: a folder of its own for caches, one thread, and the digits once."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def digits():
    """The embedded data with the default seed."""
    from course_lib.lab.data import load_dataset

    return load_dataset("digits")


@pytest.fixture(scope="session")
def few(digits):
    """130 training images: enough for a few steps with a smaller last batch."""
    return digits.train.subset(range(130))

"""What every test shares: a folder of its own for caches, one thread, and the digits once."""

import os
import shutil

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    own = tmp_path_factory.mktemp("own")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **options: own / name)


@pytest.fixture(scope="session")
def digits():
    """The embedded data with the default seed."""
    from course_lib.lab.data import load_dataset

    return load_dataset("digits")


@pytest.fixture(scope="session")
def few(digits):
    """130 training images: enough for a few steps with a smaller last batch."""
    return digits.train.subset(range(130))


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; a test that needs it is skipped where there is none."""
    names = os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"
    programs = filter(None, map(shutil.which, names))
    if not (program := next(programs, None)):
        pytest.skip("no Chromium: install it (`apt-get install chromium`), or name its program in CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup-dev")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    # Not longer than a module: while it runs, other tests could not have an event loop of their own.
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=quiet)
        yield opened
        opened.close()

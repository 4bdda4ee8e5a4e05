"""What the doctor tells a teacher about a room, and that it is measured."""

import psutil
from small_lessons import course, write_notebook

from course_lib.classroom import room


def test_the_doctor_tells_what_a_room_needs(monkeypatch, tmp_path):
    gigabyte, free = 10**9, psutil.virtual_memory().available
    monkeypatch.setattr(room, "_kernel", lambda lesson: [1.3 * gigabyte, 0.3 * gigabyte, 30.0])
    monkeypatch.setattr(room, "SERVER", f"print({gigabyte})")
    monkeypatch.setattr(room.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "mine").touch(mode=0o600)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    many = int(free / gigabyte)
    code, text, _ = course("doctor", "--fast", "--room", many)
    assert code == 0
    assert (
        f"1000 MB a kernel that runs 1_which_weights, 1000 MB a server, 300 MB shared by all: {0.3 + 2 * many:.1f} GB"
        in text
    )
    assert "warn  memory" in text
    assert f"started by all at once it takes {many * 10} s" in text
    assert f"chmod -R a+rX {tmp_path}, and a+x the folders above it: others do not get into {tmp_path}" in text
    (tmp_path / "MNIST" / "mine").chmod(0o644)
    (tmp_path / "MNIST").chmod(0o700)
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "MNIST"))
    assert f"others do not get into {tmp_path}/MNIST\n" in course("doctor", "--fast", "--room", 1)[1]
    (tmp_path / "MNIST").chmod(0o755)
    tmp_path.chmod(0o700)
    assert f"others do not get into {tmp_path}\n" in course("doctor", "--fast", "--room", 1)[1]
    assert "ok    memory" in course("doctor", "--fast", "--room", 1)[1] or free < 3 * gigabyte


def test_a_kernel_is_measured_at_its_largest(tmp_path):
    big = write_notebook(tmp_path / "01_big.ipynb", "x = bytes([1]) * 300_000_000; del x", "sum(range(10**7))")
    most, shared, seconds = room._kernel(big)
    assert 350e6 < most < 700e6
    assert 0 <= shared < most
    assert 0.1 < seconds < 60


def test_no_room_without_a_learner():
    code, _, err = course("doctor", "--fast", "--room", "0")
    assert (code, "at least 1, got 0" in err) == (2, True)

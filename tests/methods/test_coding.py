"""The front door leads to every room."""

from course_lib.methods import coding


def test_the_public_names_are_there():
    assert {"huffman_code", "save_compressed", "load_compressed"} <= set(coding.__all__)
    for name in coding.__all__:
        assert getattr(coding, name).__module__.startswith("course_lib.methods.")

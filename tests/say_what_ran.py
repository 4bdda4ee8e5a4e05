"""The last lines of ``make test``: what it ran, from the reports that pytest wrote into ``build/``."""

from pathlib import Path
from xml.etree import ElementTree

BUILD = Path(__file__).parents[1] / "build"


def counted(name):
    """Test cases, how many of them were skipped, and the seconds, of a report."""
    suites = ElementTree.parse(BUILD / name).getroot().iter("testsuite")
    numbers = [(int(s.get("tests")), int(s.get("skipped")), float(s.get("time"))) for s in suites]
    return [sum(column) for column in zip(*numbers, strict=True)]


if __name__ == "__main__":
    tests, skipped, seconds = counted("test-library.xml")
    cells, _, more = counted("test-lessons.xml")
    print("make test ran, without a failure:")
    print("  ruff:    style and formatting of the whole tree")
    print(f"  pytest:  {tests} tests of the library and of the stored lessons, {skipped} skipped, in {seconds:.0f} s")
    print(f"  nbval:   {cells} cells of the lessons once more, in {more:.0f} s")

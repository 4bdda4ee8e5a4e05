"""Fetching with torchvision's own download code, with an end to waiting and one readable error."""

import contextlib
import errno
import io
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError

from course_lib.lab.formats import DataError
from course_lib.lab.sources import Source

__all__ = ["NETWORK_TIMEOUT_S", "NO_SPACE", "call_again", "fetch_files"]

NETWORK_TIMEOUT_S = 10.0
"""How long one answer of a server may take; torchvision itself would wait for ever."""

NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""The errors of a full disk: no space, file too large, quota exceeded."""

_LOCAL = NO_SPACE | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EIO}
# The socket timeout and the standard error stream belong to the whole process, so one download at a time.
_PROCESS = threading.Lock()


def call_again(source: Source) -> str:
    """The call that an error tells its reader to repeat."""
    return f"load_dataset({source.name!r}, download=True)"


def fetch_files(source: Source, stage: Path, missing: list[str]) -> str:
    """Let torchvision fetch the missing files into the stage, address by address.

    Torchvision's ``mirrors``, ``resources`` and ``url`` are read now; ``$COURSE_MIRROR`` replaces the addresses and
    leaves the checksums.

    Returns:
        The address that served.

    Raises:
        DataError: no address served; the text has a line for each.
        OSError: the stage cannot be written.
    """
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, source.torchvision_name)
    mirror = os.environ.get("COURSE_MIRROR", "").rstrip("/") or None
    problems = []
    for address, only in source.attempts(dataset, missing, mirror):
        # Its constructor would also load the data, which is read from the files here; a subclass of the same name
        # keeps torchvision's folder and its own class untouched.
        single = type(dataset.__name__, (dataset,), only)
        fetcher = single.__new__(single)
        fetcher.root = str(stage)
        try:
            with _PROCESS, _network_timeout(), _quiet():
                fetcher.download()
            return address
        except Exception as error:  # torchvision lets pass whatever urllib, http, gzip and tarfile raise
            if isinstance(error, OSError) and not isinstance(error, URLError) and error.errno in _LOCAL:
                raise
            problems.append(f"  {address}: {_reason(error)}")
            _close_connections(error)
    problems = problems or ["  no address to fetch it from"]
    mend = "unset COURSE_MIRROR to use the published addresses" if mirror else "set COURSE_MIRROR to one that you reach"
    raise DataError(
        f"{source.name} could not be downloaded; nothing was changed.\n" + "\n".join(problems) + "\n"
        f"Check the network and call {call_again(source)} again; or copy {', '.join(source.archives)} into "
        f"{stage.parent}; or {mend}. Without a network: load_dataset('digits')."
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"^Error downloading (\S+): Tried .+?,? got: ", r"\1: ", text)
    if isinstance(error, TimeoutError):
        return f"no answer for {NETWORK_TIMEOUT_S:g} s"
    if not isinstance(error, RuntimeError | URLError):
        text = f"{type(error).__name__}: {text}"
    return text.replace("File not found or corrupted.", "arrived damaged or incomplete (its MD5 is not the expected)")


def _close_connections(error: BaseException | None) -> None:
    """Close what an HTTP error keeps open: torchvision collects such errors, and a leak would show much later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, HTTPError):
            error.close()
        error = error.__context__


@contextlib.contextmanager
def _network_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _quiet() -> contextlib.AbstractContextManager:
    """torchvision's progress bars for a person who watches, in a terminal or a notebook, and silence otherwise."""
    unattended = os.environ.get("CI") or os.environ.get("COURSE_UNATTENDED")
    terminal = getattr(sys.stderr, "isatty", bool)()
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not unattended and (terminal or hasattr(shell, "kernel")):
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())

"""Small data sets in the published formats, and a mirror on the loopback interface that serves them."""

import contextlib
import gzip
import hashlib
import io
import pickle
import re
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from course_lib.lab.download import DataError, obtain

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_NAMES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def idx_bytes(array: np.ndarray) -> bytes:
    """IDX as LeCun's page describes it, written without the library."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_arrays(train: int = 100, test: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.permutation(np.arange(count) % 10).astype(np.uint8)
    return arrays


def idx_files(**sizes: int) -> dict[str, bytes]:
    return {name: idx_bytes(array) for name, array in idx_arrays(**sizes).items()}


def cifar_files(batch: int = 20, protocol: int = 2, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    files = {}
    for name in CIFAR_NAMES:
        pixels = rng.integers(0, 256, (batch, 3072), dtype=np.uint8)
        content = {"batch_label": name, "labels": [int(i) % 10 for i in rng.permutation(batch)], "data": pixels}
        files[name] = pickle.dumps(content, protocol)
    files["batches.meta"] = pickle.dumps({"label_names": [str(k) for k in range(10)]}, protocol)
    return files


def tar_gz(files: dict[str, bytes], folder: str = "cifar-10-batches-py") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def gz(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in files.items()}


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def listing(root: Path) -> dict[str, bytes | None]:
    """Everything below the root but locks, with content: equal listings mean that nothing was touched."""
    paths = [path for path in sorted(root.rglob("*")) if path.suffix != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


class Mirror:
    """Serves ``files`` (path -> bytes); ``fetched`` counts the requests that were for a file's content."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.fetched = files, Counter()
        self.gate = threading.Event()  # answers may go out
        self.gate.set()
        self.cut: set[str] = set()  # paths whose body stops half-way
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.lstrip("/")
                # torchvision first asks where a redirect leads, with a GET that it labels as HEAD.
                if self.headers.get("Method") != "HEAD":
                    mirror.fetched[path] += 1
                mirror.gate.wait(30)
                body = mirror.files.get(path)
                with contextlib.suppress(OSError):
                    if body is None:
                        self.send_error(404)
                        return
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if path in mirror.cut else body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


RAW = "MNIST/raw"
CIFAR = "cifar-10-batches-py"
FILES = idx_files()
ARCHIVES = gz(FILES)
BATCHES = cifar_files()
TAR = tar_gz(BATCHES)


def refused(root, *says, name="mnist", **options):
    """The error's text, once it is sure that the one error came and nothing below the root has changed."""
    before = listing(root) if root.is_dir() else None
    with pytest.raises(DataError) as caught:
        obtain(name, root, **options)
    text = str(caught.value)
    for piece in says:
        assert re.search(piece, text), f"{piece!r} is not in: {text}"
    if before is not None:
        assert listing(root) == before
    return text

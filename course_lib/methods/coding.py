"""From few distinct weights to few bytes: the third stage of Deep Compression (Han, Mao, Dally 2016).

:mod:`~course_lib.methods.huffman` gives frequent symbols short words, :mod:`~course_lib.methods.codebook` makes many
weights share few values, :mod:`~course_lib.methods.arrays` and :mod:`~course_lib.methods.scaled` turn arrays into
bytes, and :mod:`~course_lib.methods.container` puts them into one checked file.
"""

from course_lib.methods.arrays import pack_bits, unpack_bits
from course_lib.methods.codebook import Codebook, kmeans_codebook, share_weights
from course_lib.methods.container import (
    CompressedFileError,
    StoredTensor,
    load_compressed,
    read_contents,
    save_compressed,
)
from course_lib.methods.huffman import entropy_bits, huffman_code, huffman_decode, huffman_encode
from course_lib.methods.layers import plain

__all__ = [
    "Codebook",
    "CompressedFileError",
    "StoredTensor",
    "entropy_bits",
    "huffman_code",
    "huffman_decode",
    "huffman_encode",
    "kmeans_codebook",
    "load_compressed",
    "pack_bits",
    "plain",
    "read_contents",
    "save_compressed",
    "share_weights",
    "unpack_bits",
]

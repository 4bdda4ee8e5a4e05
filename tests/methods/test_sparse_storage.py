"""Sparse weights as bytes: written, measured, read back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.methods.sparse_storage import LAYOUTS, pack_weight, unpack_weight


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from(LAYOUTS), st.integers(0, 9)
)
def test_every_layout_comes_back_exactly(shape, density, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    data = pack_weight(weight, layout)
    back = unpack_weight(data)
    assert back.shape == weight.shape
    assert back.dtype is torch.float32
    assert torch.equal(back, weight)
    total, kept, rows = weight.numel(), int((weight != 0).sum()), shape[0]
    body = {"dense": 4 * total, "bitmap": -(-total // 8) + 4 * kept, "csr": 4 * (rows + 1) + 6 * kept}
    assert len(data) == 2 + 4 * len(shape) + body[layout]


@pytest.mark.parametrize(("columns", "size"), [(65_536, 2), (65_537, 4)])
def test_columns_take_as_many_bytes_as_they_need(columns, size):
    weight = torch.zeros(2, columns)
    weight[0, -1], weight[1, 3] = 1.5, -2.5
    assert torch.equal(unpack_weight(pack_weight(weight, "csr")), weight)
    assert len(pack_weight(weight, "csr")) == 10 + 4 * 3 + (size + 4) * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_bytes_are_refused(layout):
    data = pack_weight(torch.eye(5), layout)
    for wrong in (data[:-1], data + b"\0", b"", b"\x09" + data[1:], data[:3], b"\0\0", b"\0\1\0\0\0\0"):
        with pytest.raises(ValueError, match="packed weight"):
            unpack_weight(wrong)


def test_a_column_out_of_range_is_refused():
    data = bytearray(pack_weight(torch.eye(2), "csr"))
    data[10 + 12] = 7
    with pytest.raises(ValueError, match="do not fit shape"):
        unpack_weight(bytes(data))


@pytest.mark.parametrize(("weight", "layout", "error", "text"), [
    (torch.ones(2), "coo", ValueError, "'dense', 'bitmap', 'csr', got 'coo'"),
    (torch.ones(2).double(), "csr", TypeError, "float32 tensor, got torch.float64"),
    ([1.0], "csr", TypeError, "got list"), (torch.tensor(1.0), "csr", ValueError, r"shape \(\)"),
    (torch.ones(0, 3), "csr", ValueError, r"shape \(0, 3\)"),
])  # fmt: skip
def test_clear_errors(weight, layout, error, text):
    with pytest.raises(error, match=text):
        pack_weight(weight, layout)

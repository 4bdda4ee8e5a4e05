"""One file, exact weights: any state, any damage."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from course_lib.methods import container
from course_lib.methods.codebook import kmeans_codebook, plain, share_weights
from course_lib.methods.container import CompressedFileError, load_compressed, read_contents, save_compressed
from course_lib.methods.qat import fake_quantized


def holder(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def emptied(model):
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    return blank


def bits_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)


def round_trip(model, path):
    size = save_compressed(model, path)
    assert size == path.stat().st_size
    loaded = emptied(model)
    assert load_compressed(path, loaded) is loaded
    for (name, tensor), back in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert tensor.shape == back.shape, name
        assert torch.equal(bits_of(tensor), bits_of(back)), name
    return size


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.cnw"


def lenet(inputs=784):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


SPECIAL = [0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, 2.0**-126]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=16)), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_any_weights_come_back(tmp_path_factory, shape, dtype, values, seed):
    choose = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))
    tensor = (torch.tensor(values, dtype=torch.float64)[choose] + 0.0).to(dtype)
    if 2 * int((tensor == 0).sum()) > tensor.numel():
        tensor = tensor.masked_fill(tensor == 0, 0.0)
    round_trip(holder(weight=tensor), tmp_path_factory.mktemp("any") / "net.cnw")


@pytest.mark.parametrize("dtype", container.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (4, 3, 2, 2)])
def test_every_dtype_comes_back(dtype, shape, path):
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(0))
    round_trip(holder(x=raw.to(torch.uint8).view(dtype).reshape(shape)), path)


def test_batch_norm_buffers_scalars_and_an_empty_model(path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU())
    net(torch.randn(8, 1, 6, 6))
    round_trip(net, path)
    round_trip(nn.Sequential(), path)


def test_views_and_transposed_parameters(path):
    round_trip(holder(x=torch.randn(5, 3).T, y=torch.randn(10)[::2], z=torch.randn(3, 1).expand(3, 4).clone()), path)


def test_minus_zero_is_kept_except_among_many_zeros(path):
    some, most = torch.tensor([-0.0, 0.0, 1.0, -1.0]), torch.tensor([-0.0, 0.0, -0.0, -1.0])
    save_compressed(holder(some=some, most=most), path)
    loaded = load_compressed(path, holder(some=torch.ones(4), most=torch.ones(4)))
    assert torch.equal(bits_of(loaded.some), bits_of(some))
    assert torch.equal(loaded.most, most)
    assert not torch.signbit(loaded.most[:3]).any()


def test_sizes_of_dense_quantized_and_pruned_networks(path):
    net = lenet()
    dense = sum(t.numel() * 4 for t in net.state_dict().values())
    assert round_trip(net, path) < dense + 250
    for bits, share in ((8, 0.26), (4, 0.13), (2, 0.06)):
        for per_channel in (True, False):
            quantized = plain(fake_quantized(net, weight_bits=bits, per_channel=per_channel))
            assert round_trip(quantized, path) < share * dense
            assert {c.encoding.split(",")[0] for c in read_contents(path) if len(c.shape) > 1} == {"integers"}
    for parameter in net.parameters():
        if parameter.dim() > 1:
            kept = parameter.abs() > parameter.abs().flatten().quantile(0.92) if parameter.numel() < 2**20 else None
            # A mask that is multiplied leaves minus zeros: they must not cost a bit each.
            parameter.data *= kept
    save_compressed(plain(share_weights(net, 5)), path)
    assert path.stat().st_size < dense / 40


def test_codebook_bits_store_a_clustered_copy(path):
    net, before = lenet(20), None
    before = copy.deepcopy(net.state_dict())
    small = save_compressed(net, path, codebook_bits=3)
    loaded = load_compressed(path, emptied(net))
    assert torch.equal(loaded[1].weight, kmeans_codebook(net[1].weight, 3).values())
    assert torch.equal(loaded[1].bias, net[1].bias)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert small < 0.2 * save_compressed(net, path)
    with pytest.raises(ValueError, match="from 1 to 8"):
        save_compressed(net, path, codebook_bits=9)


def test_contents_say_what_is_inside(path):
    size = save_compressed(lenet(20), path)
    contents = read_contents(path)
    assert [c.name for c in contents] == [f"{i}.{kind}" for i in (1, 3, 5) for kind in ("weight", "bias")]
    assert contents[0].shape == (300, 20)
    assert contents[0].dtype == torch.float32
    assert contents[0].encoding == "raw"
    assert sum(c.stored_bytes for c in contents) < size


def tiny():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].weight.data *= net[0].weight > 0.2
    net[2].weight.data.sign_()
    return net


def unchanged_after(model, call, error=CompressedFileError, text=None):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        call()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_truncated_at_any_length(path):
    save_compressed(tiny(), path)
    whole, model = path.read_bytes(), emptied(tiny())
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        unchanged_after(model, lambda: load_compressed(path, model), text="truncated|empty|not|damaged")
    path.write_bytes(whole + b"\0")
    unchanged_after(model, lambda: load_compressed(path, model), text="longer than it says")


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_flipped(path, flip):
    save_compressed(tiny(), path)
    whole, model = path.read_bytes(), emptied(tiny())
    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ flip]) + whole[k + 1 :])
        unchanged_after(model, lambda: load_compressed(path, model))


def test_foreign_and_future_files(path, tmp_path):
    model = emptied(tiny())
    for content, text in (
        (b"", "is empty"),
        (b"PK\x03\x04 a zip archive", "starts with"),
        (b"\x93CN", "truncated to 3 bytes"),
        (b"\x93CNW", "truncated to 4 bytes"),
    ):
        path.write_bytes(content)
        unchanged_after(model, lambda: load_compressed(path, model), text=text)
    save_compressed(tiny(), path)
    whole = bytearray(path.read_bytes())
    whole[4] = 2
    whole[-8:] = container.digest(bytes(whole[:-8]))
    path.write_bytes(whole)
    unchanged_after(model, lambda: load_compressed(path, model), text=r"format version 2.*reads version 1")
    unchanged_after(model, lambda: load_compressed(tmp_path, model), text="is a folder")
    unchanged_after(model, lambda: load_compressed(tmp_path / "nothing", model), error=FileNotFoundError)


def sealed(body):
    whole = container.MAGIC + bytes([container.VERSION]) + container.varint(len(body)) + body
    return whole + container.digest(whole)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "cannot be read"),
        (b"\x00\x00", "1 bytes too many"),
        (b"\x01\x01x\x63\x00\x01\x00", "cannot be read"),
        (b"\x01\x01x\x00\x01\x03\x01\x00", "x cannot be decoded"),
        (b"\x01\x01x\x04\x01\x03\x04\x00\x00\x01\x02", "x cannot be read|x: "),
        (b"\x02" + 2 * b"\x01x\x00\x01\x03\x01\x00", "a name appears twice"),
    ],
)
def test_well_sealed_nonsense(path, body, text):
    path.write_bytes(sealed(body))
    model = holder(x=torch.ones(3))
    unchanged_after(model, lambda: load_compressed(path, model), text=text)


def test_a_truth_value_must_be_zero_or_one(path):
    path.write_bytes(sealed(b"\x01\x01x\x04\x01\x03\x04\x00\x00\x01\x02"))
    model = holder(x=torch.ones(3, dtype=torch.bool))
    unchanged_after(model, lambda: load_compressed(path, model), text="neither 0 nor 1")


def test_another_network(path):
    save_compressed(tiny(), path)
    for other, text in (
        (
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
            r"2.weight: torch.float32 \[2, 4\] in the file",
        ),
        (nn.Sequential(nn.Linear(6, 4)), "in the file, nothing in the model; and 3 more"),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2)), "nothing in the file"),
        (tiny().half(), "torch.float16"),
    ):
        unchanged_after(other, lambda other=other: load_compressed(path, other), text=text)


def test_states_that_cannot_be_stored(path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    for model in (Extra(2, 2), holder(x=torch.ones(3).to_sparse()), nn.Linear(2, 2, device="meta")):
        with pytest.raises(TypeError, match=r"not a tensor|only dense tensors"):
            save_compressed(model, path)
    assert not path.exists()


def test_writing_is_atomic(path, tmp_path, monkeypatch):
    save_compressed(tiny(), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(container.os, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_compressed(lenet(20), path)
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["net.cnw"]
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_compressed(tiny(), tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_compressed(tiny(), tmp_path / "no" / "net.cnw")


def test_the_same_model_gives_the_same_bytes_and_ordinary_permissions(path, tmp_path):
    save_compressed(tiny(), path)
    save_compressed(tiny(), str(tmp_path / "again.cnw"))
    assert path.read_bytes() == (tmp_path / "again.cnw").read_bytes()
    (tmp_path / "plain").write_bytes(b"")
    assert os.stat(path).st_mode == os.stat(tmp_path / "plain").st_mode


def test_a_file_is_read_in_another_process(path):
    save_compressed(tiny(), path)
    code = f"from course_lib.methods.coding import read_contents; print(len(read_contents({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(len(tiny().state_dict()))


@pytest.mark.parametrize("kind", ["codebook", "sparse", "integers"])
def test_without_huffman_every_index_has_a_fixed_width_and_the_weights_are_the_same(path, kind):
    net = lenet(64)
    for p in net.parameters():
        nn.init.normal_(p)  # evenly spread weights would leave Huffman nothing to gain
    net = plain(fake_quantized(net, weight_bits=4) if kind == "integers" else share_weights(net, 3))
    if kind == "sparse":
        with torch.no_grad():
            for p in net.parameters():
                p[torch.rand_like(p) < 0.9] = 0
    coded = save_compressed(net, path)
    fixed = save_compressed(net, path, huffman=False)
    assert coded < fixed == path.stat().st_size
    if kind == "codebook":  # 3 bits a weight, and next to nothing else
        weights = {e.name: e.stored_bytes for e in read_contents(path)}
        assert 3 * 64 * 300 / 8 <= weights["1.weight"] <= 3 * 64 * 300 / 8 + 50
    loaded = load_compressed(path, emptied(net))
    for (name, tensor), back in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, back), name

"""What may be copied, converted and walked, and what is refused by name."""

import functools
import math
import types
import weakref

import numpy as np
import pytest
import torch
from small_nets import Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from course_lib import gate
from course_lib.evidence.measure import count_parameters, sparsity, stored_bytes
from course_lib.gate import UnsupportedModel, chain_steps, copy_model, eval_mode, new_like, replace_layers


def doubled(name, layer):
    return new_like(layer, type(layer), layer.weight.detach() * 2)


def mlp(*between):
    return nn.Sequential(nn.Linear(4, 4), *between, nn.Linear(4, 2))


def with_(change, model=None):
    model = mlp() if model is None else model
    change(model)
    return model


# --- values ----------------------------------------------------------------------------------------------------------


def test_shares_and_whole_numbers():
    assert gate.share_of(np.float32(0.5), "s") == 0.5
    assert type(gate.whole_number(np.int8(3), "n", 3, 3)) is int
    for bad, error in (
        (1, ValueError),
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match=r"s must be .*in \[0, 1\), got"):
            gate.share_of(bad, "s")
    for bad, error in ((0, ValueError), (4, ValueError), (True, TypeError), (2.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"n must be an integer from 1 to 3, got {bad}"):
            gate.whole_number(bad, "n", 1, 3)


@pytest.mark.parametrize(("given", "wanted"), [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float32),
    (torch.float64, torch.float64), (torch.int64, torch.float64),
])  # fmt: skip
def test_real_tensors_in_a_precision_that_loses_nothing(given, wanted):
    value = gate.real_tensor(torch.tensor([1.0, -2.0]).to(given), "x")
    assert value.dtype is wanted
    assert value.tolist() == [1.0, -2.0]


@pytest.mark.parametrize(("bad", "error", "text"), [
    ([1.0], TypeError, "x must be a tensor, got list"),
    (torch.ones(2, dtype=torch.bool), TypeError, "x must hold real numbers, got dtype torch.bool"),
    (torch.ones(2, dtype=torch.complex64), TypeError, "real numbers"),
    (torch.ones(0, 3), ValueError, r"x is empty, shape \(0, 3\)"),
    (torch.tensor([math.inf, math.nan, 1]), ValueError, "x has 2 NaN or infinite entries of 3"),
])  # fmt: skip
def test_real_tensors_refused(bad, error, text):
    with pytest.raises(error, match=text):
        gate.real_tensor(bad, "x")
    assert gate.real_tensor(torch.tensor([math.inf]), "x", finite=False).isinf()
    with pytest.raises(ValueError, match="x has 1 NaN entries of 2"):
        gate.real_tensor(torch.tensor([math.inf, math.nan]), "x", finite=False)


# --- modes and copies ------------------------------------------------------------------------------------------------


def test_eval_mode_restores_each_module_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    with eval_mode(model) as same:
        assert not any(m.training for m in same.modules())
    with pytest.raises(ValueError, match="2D"), eval_mode(model):
        model(torch.ones(1))
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_copy_shares_inside_and_nothing_outside():
    layer = nn.Linear(4, 4)
    model = with_(lambda m: setattr(m[0], "weight", layer.weight), nn.Sequential(nn.Linear(4, 4), layer, layer))
    copy = copy_model(model)
    assert copy[0].weight is copy[1].weight
    assert copy[1] is copy[2]
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copy.parameters()}
    traced = torch.fx.symbolic_trace(nn.Sequential(*[nn.ReLU()] * 500))
    for kind in (traced, nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), nn.TransformerEncoderLayer(2, 1, 2)):
        assert copy_model(kind).state_dict().keys() == kind.state_dict().keys()
    assert isinstance(copy_model(Net(fn=functools.partial(F.relu), plain=lambda x: F.relu(x), method=math.sqrt)), Net)


def closure(model):
    model.forward = lambda x: model[0](x)


def captured(model):
    layer = model[0]
    model.steps = {"first": [functools.partial(lambda f, x: layer(f(x)), F.relu)]}


MODULE = nn.ReLU()

COPIES = {
    "compiled": (lambda: nn.Sequential(torch.compile(mlp(), backend="eager")), "'0'.*torch.compile.*_orig_mod"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(mlp())), "'0'.*give the module that was scripted"),
    "parallel": (lambda: nn.DataParallel(mlp()), "the model.*give model.module"),
    "torch prune": (lambda: with_(lambda m: prune.l1_unstructured(m[1], "weight", 0.5)), "'1'.*weight.*prune.remove"),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))), "'0'.*weight.*parametriz"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(2)), "'0'.*run the model once"),
    "hook": (lambda: with_(lambda m: m[1].register_forward_hook(print)), r"'1'.*hook.*handle.remove\(\)"),
    "backward hook": (lambda: with_(lambda m: m[1].register_full_backward_hook(print)), "'1'.*hook"),
    "pre-hook": (lambda: with_(lambda m: m.register_forward_pre_hook(print)), "the model.*hook"),
    "gradient hook": (lambda: with_(lambda m: m[0].weight.register_hook(print)), "'0'.*lose the hook on its weight"),
    "later hook": (lambda: with_(lambda m: m[0].bias.register_post_accumulate_grad_hook(print)), "hook on its bias"),
    "closure": (lambda: with_(closure), "'forward' is a function that holds a Sequential"),
    "closure, deep": (lambda: with_(captured), "'steps'.*Linear"),
    "global": (lambda: Net(act=lambda x: MODULE(x)), "'act' is a function that holds a ReLU"),
    "default": (lambda: with_(lambda m: setattr(m, "f", lambda x, w=m.w: x), Net(w=nn.Linear(2, 2))), "'f'.*Linear"),
    "weak": (lambda: with_(lambda m: setattr(m, "to", weakref.ref(m.w)), Net(w=nn.Linear(2, 2))), "'to'.*Linear"),
    "computed tensor": (lambda: Net(kept=nn.Linear(2, 2).weight * 2), "this Net: deepcopy says"),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit.script")
def test_what_a_copy_would_get_wrong(kind):
    make, text = COPIES[kind]
    model = make()
    with pytest.raises(UnsupportedModel, match=f"cannot bake .*{text}"):
        copy_model(model, "bake")
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got list"):
        copy_model([model])


# --- replacing -------------------------------------------------------------------------------------------------------


def test_layers_are_replaced_where_they_stand_and_the_original_stays():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sequential(nn.Flatten(), shared.eval(), nn.ReLU(), shared)).eval()
    seen, x = [], torch.rand(3, 2, 1, 1)
    new = replace_layers(model, lambda name, layer: seen.append(name) or doubled(name, layer))
    assert seen == ["0", "1.1"]
    assert new[1][1] is new[1][3]
    assert not any(m.training for m in new.modules())
    assert torch.equal(new[0].weight, model[0].weight * 2)
    assert new(x).shape == (3, 4)
    assert isinstance(replace_layers(shared, doubled), nn.Linear)
    skipped = replace_layers(model, doubled, skip=["1"])
    assert torch.equal(skipped[1][1].weight, shared.weight)
    assert list(gate.weight_layers(model)) == ["0", "1.1"]


def test_new_like_takes_all_settings():
    conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False, padding_mode="circular").double().requires_grad_(False)
    new, x = new_like(conv, nn.Conv2d, conv.weight), torch.rand(2, 4, 6, 6).double()
    assert torch.equal(new(x), conv(x))
    assert not new.weight.requires_grad
    assert new.bias is None
    assert new.weight is not conv.weight


class Tied(nn.Module):
    def __init__(self, table=False):
        super().__init__()
        self.a = nn.Embedding(4, 4) if table else nn.Linear(4, 4)
        self.b, self.c = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_tied_weights_stay_tied():
    model = Tied()
    new = replace_layers(model, doubled)
    assert new.a.weight is new.b.weight is not new.c.weight
    assert torch.equal(new.b.weight, model.a.weight * 2)
    table = replace_layers(Tied(table=True), lambda n, layer: new_like(layer, nn.Linear, layer.weight), skip=["a"])
    assert table.b.weight is table.a.weight
    for convert, skip in ((doubled, ["b"]), (lambda n, layer: doubled(n, layer) if n == "a" else layer, [])):
        with pytest.raises(UnsupportedModel, match="its weight is shared, treat both alike"):
            replace_layers(model, convert, skip=skip)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class Named(nn.Linear):
    """A class of its own that computes as nn.Linear does."""


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def product(self, x):
        return F.linear(x.to(self.layer.weight.device), self.layer.weight)

    def forward(self, x):
        return self.product(x)


class AsksDevice(ByHand):
    def product(self, x):
        return self.layer(x.to(self.layer.weight.dtype))


LEFT_OUT = {
    "attention": (nn.MultiheadAttention(4, 2), "'0' .*reads the weights"),
    "own forward": (Masked(4, 4), "'0' .Masked.*forward of its own"),
    "by hand": (ByHand(), "'0' .ByHand.*reads the weights"),
    "own instance": (with_(lambda m: setattr(m, "forward", torch.relu), nn.Linear(4, 4)), "'0' .Linear.*forward"),
    "conv1d": (nn.Conv1d(4, 2, 1), "'0.weight' would stay as it is"),
    "recurrent": (nn.LSTM(4, 2), "'0.weight_.*skip=.'0',"),
    "embedding": (nn.Embedding(4, 2), "'0.weight' would stay"),
    "matrix": (Net(kernel=nn.Parameter(torch.ones(2, 2)), a=nn.ReLU()), "'0.kernel' would stay.*skip=.'0.kernel',"),
    "list": (with_(lambda m: setattr(m, "all", [m.a]), Net(a=nn.Linear(2, 2))), "'all' keeps a layer"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_would_be_left_out_in_silence(kind):
    part, text = LEFT_OUT[kind]
    model = nn.Sequential(part, nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match=f"cannot convert {text}" if text.startswith("'0' ") else text):
        replace_layers(model, doubled)
    if kind != "by hand":
        assert torch.equal(replace_layers(model, doubled, skip=["0"])[1].weight, model[1].weight * 2)


def test_what_may_stay():
    fine = [nn.LayerNorm([2, 3]), nn.BatchNorm2d(3), nn.PReLU(3), nn.GroupNorm(1, 2), AsksDevice(), Named(2, 2)]
    fine.append(Net(scale=nn.Parameter(torch.ones(3, 1, 1)), token=nn.Parameter(torch.ones(1, 1, 4))))
    new = replace_layers(nn.Sequential(*fine), lambda name, layer: new_like(layer, nn.Linear, layer.weight * 0))
    assert new[4].layer.weight.count_nonzero() == new[5].weight.count_nonzero() == 0


def test_nothing_to_replace_and_unknown_names():
    with pytest.raises(UnsupportedModel, match="ReLU has no linear or convolution layer"):
        replace_layers(nn.ReLU(), doubled)
    for skip in (["2"], "0"):
        with pytest.raises(ValueError, match="skip must be a collection of names in the model"):
            replace_layers(mlp(), doubled, skip=skip)


# --- chains ----------------------------------------------------------------------------------------------------------


def test_a_chain_lists_a_module_as_often_as_it_is_used():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), relu, nn.Sequential(nn.Linear(2, 2), nn.Sequential(relu)), relu)
    steps = chain_steps(model)
    assert [name for name, _ in steps] == ["0", "1", "2.0", "2.1.0", "3"]
    assert [step is relu for _, step in steps] == [False, True, False, True, True]


class Backwards(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flip(1))


class Leaky(nn.ReLU):
    def forward(self, x):
        return x


@pytest.mark.parametrize(("model", "text"), [
    (nn.Linear(2, 2), "cannot write the model .Linear"), (ByHand(), "cannot write the model .ByHand"),
    (Backwards(nn.Linear(2, 2)), "cannot write the model .Backwards"), (mlp(Leaky()), "cannot write '1' .Leaky"),
    (mlp(nn.Sequential(nn.MultiheadAttention(4, 2))), "cannot write '1.0' .MultiheadAttention"),
    (with_(lambda m: m[0].register_forward_hook(print)), "cannot write '0' .Linear.: its hook"),
])  # fmt: skip
def test_what_is_no_chain(model, text):
    with pytest.raises(UnsupportedModel, match=text):
        chain_steps(model, "write")


def by_its_weight(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Borrowing(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.out = how, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.how == "a function of the module":
            return self.out(by_its_weight(self.fc, x))
        return self.out((lambda layer: F.linear(x, layer.weight))(self.fc))


@pytest.mark.parametrize("how", ["a function of the module", "a lambda"])
def test_a_weight_that_is_read_elsewhere_is_not_left_in_float(how):
    with pytest.raises(UnsupportedModel, match="reads the weights of its layers"):
        replace_layers(Borrowing(how), doubled)


def test_a_forward_put_onto_an_instance_is_read():
    def forward(self, x):
        return F.linear(x, self[0].weight)

    model = mlp()
    model.forward = types.MethodType(forward, model)
    with pytest.raises(UnsupportedModel, match="reads the weights of its layers"):
        replace_layers(model, doubled)


@pytest.mark.parametrize("layer", [nn.Conv1d(1, 1, 9), nn.Embedding(100, 1), nn.ConvTranspose1d(1, 1, 9)])
def test_a_layer_with_one_channel_is_not_left_out(layer):
    with pytest.raises(UnsupportedModel, match="this kind of layer is not known"):
        replace_layers(nn.Sequential(layer, nn.Linear(4, 2)), doubled)


@pytest.mark.filterwarnings("ignore")
def test_packed_integers_are_named():
    packed = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    for look in (copy_model, lambda m: replace_layers(m, doubled), count_parameters, sparsity, stored_bytes):
        with pytest.raises(UnsupportedModel, match=r"packed by torch\.ao"):
            look(packed)


def test_two_parameters_in_one_memory_are_named():
    tied = mlp()
    tied[1].weight.data = tied[0].weight.data[:2]
    for look in (copy_model, count_parameters, stored_bytes):
        with pytest.raises(UnsupportedModel, match=r"0\.weight and 1\.weight"):
            look(tied)
    flat = nn.utils.parameters_to_vector(mlp().parameters())
    apart = mlp()
    nn.utils.vector_to_parameters(flat, apart.parameters())  # neighbours in one vector share nothing
    assert copy_model(apart)[0].weight.data_ptr() != apart[0].weight.data_ptr()


def test_a_compiled_module_is_copied_plain():
    model = mlp()
    model.compile(backend="eager")
    torch.testing.assert_close(copy_model(model)(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_zeros_behind_a_mask_of_torch_are_not_counted_as_weights():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.9)
    for look in (sparsity, lambda m: count_parameters(m, nonzero=True)):
        with pytest.raises(UnsupportedModel, match=r"prune\.remove"):
            look(model)
    assert count_parameters(model) == count_parameters(mlp())

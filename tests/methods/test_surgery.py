"""Surgery against the masked network and against torch-pruning; whatever is coupled is refused by name."""

import copy
import warnings

import numpy as np
import pytest
import torch
from small_nets import Net, settle
from torch import fx, nn
from torch.nn import functional as F

from course_lib.gate import UnsupportedModel
from course_lib.methods.surgery import CouplingError, recalibrate_batchnorm, remove_neurons


def masked_outputs(model, gate_name, keep, x, times=1, tile=False):
    """Outputs when the removed neurons' activations are set to zero where they leave module ``gate_name``."""

    def hook(module, inputs, output):
        mask = torch.zeros(tile or output.shape[1] // times)
        mask[keep] = 1
        mask = mask.repeat(output.shape[1] // tile) if tile else mask.repeat_interleave(times)
        return output * mask.view(1, -1, *[1] * (output.dim() - 2))

    handle = model.get_submodule(gate_name).register_forward_hook(hook)
    try:
        return model(x)
    finally:
        handle.remove()


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(32)),
        *(nn.Linear(32, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)),
    )


@pytest.mark.parametrize(("layer", "gate", "keep", "times"), [
    ("0", "2", [0, 2, 5], 1), ("4", "10", [1, 2, 3, 7], 4), ("11", "13", [0, 9], 1), ("4", "10", [6], 4),
])  # fmt: skip
def test_conv_net_equals_the_masked_network_and_torch_pruning(layer, gate, keep, times):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning

    model, x = settle(conv_net()), torch.randn(5, 2, 8, 8)
    small, reference = remove_neurons(model, layer, keep), copy.deepcopy(model)
    torch.testing.assert_close(small(x), masked_outputs(model, gate, keep, x, times), rtol=1e-5, atol=1e-5)
    first = reference.get_submodule(layer)
    gone = [i for i in range(len(first.weight)) if i not in keep]
    conv = isinstance(first, nn.Conv2d)
    cut = torch_pruning.prune_conv_out_channels if conv else torch_pruning.prune_linear_out_channels
    graph = torch_pruning.DependencyGraph().build_dependency(reference, example_inputs=x)
    graph.get_pruning_group(first, cut, idxs=gone).prune()
    assert small.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(small.state_dict()[name], theirs) for name, theirs in reference.state_dict().items())


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.GELU(), nn.PReLU(7), nn.PReLU(), nn.BatchNorm1d(7), nn.LogSigmoid()])
def test_an_activation_that_moves_zero_is_removed_with_its_neuron(act):
    model, x = settle(nn.Sequential(nn.Linear(4, 7), act, nn.Linear(7, 2))), torch.randn(3, 4)
    small = remove_neurons(model, "0", [0, 3, 6])
    torch.testing.assert_close(small(x), masked_outputs(model, "1", [0, 3, 6], x))


def test_gradients_are_those_of_the_masked_network():
    model, x, keep = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2)), torch.randn(3, 4), [1, 2, 6]
    small = remove_neurons(model, "0", keep)
    masked_outputs(model, "1", keep, x).square().sum().backward()
    small(x).square().sum().backward()
    torch.testing.assert_close(small[0].weight.grad, model[0].weight.grad[keep])
    torch.testing.assert_close(small[2].weight.grad, model[2].weight.grad[:, keep])


def test_features_of_a_sequence_flatten_the_other_way_round():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)), torch.randn(6, 4, 3)
    small = remove_neurons(model, "0", [0, 4])
    torch.testing.assert_close(small(x), masked_outputs(model, "2", [0, 4], x, tile=5))


FLAT = {
    "method": lambda x: x.flatten(1), "function": lambda x: torch.flatten(x, start_dim=1),
    "shape": lambda x: x.reshape(x.shape[0], -1), "view": lambda x: x.contiguous().view(x.size(0), -1),
    "size": lambda x: x.view((x.size()[0], -1)),
}  # fmt: skip


@pytest.mark.parametrize("flat", FLAT)
def test_functions_methods_and_several_readers(flat):
    def forward(self, x):
        x = F.relu_(self.norm(self.conv(x)))
        x = 2 * (x * torch.sigmoid(x)) + 0.5
        x = self.gate(F.max_pool2d(F.dropout(x, 0.1, self.training), 2))
        left, right = FLAT[flat](x), FLAT[flat](x)
        return self.left(left) + self.right(right).tanh() + self.pooled(x.mean((-1, 2)))

    layers = {"left": nn.Linear(64, 3), "right": nn.Linear(64, 3), "pooled": nn.Linear(4, 3)}
    model = settle(Net(forward, conv=nn.Conv2d(1, 4, 3, padding=1), norm=nn.BatchNorm2d(4), **layers))
    x = torch.randn(2, 1, 8, 8)
    small = remove_neurons(model, "conv", torch.tensor([True, False, False, True]))
    torch.testing.assert_close(small(x), masked_outputs(model, "gate", [0, 3], x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("conv", "dims"), [(nn.Conv1d, 2), (nn.Conv3d, (4, 2, -2))])
def test_other_dimensions(conv, dims):
    n = 1 if conv is nn.Conv1d else 3
    pool = {1: F.avg_pool1d, 3: F.avg_pool3d}[n]
    model = Net(lambda s, x: s.b(s.gate(pool(s.a(x), 2).mean(dims))), a=conv(1, 4, 3), b=nn.Linear(4, 3))
    x = torch.randn(2, 1, *[8] * n)
    torch.testing.assert_close(remove_neurons(model, "a", [1, 2])(x), masked_outputs(model, "gate", [1, 2], x))


@pytest.mark.parametrize("training", [True, False])
def test_a_reader_of_the_other_mode_is_cut_as_well(training):
    def forward(self, x):
        self.seen = x = torch.relu(self.body(x))  # what forward keeps must not be left in the new model
        return self.head(x) + self.aux(x) if self.training else self.head(x)

    model = Net(forward, body=nn.Linear(3, 6), head=nn.Linear(6, 2), aux=nn.Linear(6, 2)).train(training)
    small = remove_neurons(model, "body", [1, 2])
    assert small.training is training
    assert small.aux.in_features == small.head.in_features == 2
    assert not any(isinstance(value, fx.Proxy) for m in (model, small) for value in vars(m).values())
    assert small.train()(torch.randn(2, 3)).shape == (2, 2)


def test_the_model_and_everything_about_it_is_left_alone():
    model = settle(conv_net().double()).train()
    model[4].requires_grad_(False)
    model[1].eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    small = remove_neurons(model, "4", [7, 0])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes == [m.training for m in small.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.dtype is torch.float64 for p in small.parameters())
    assert (small[4].out_channels, small[5].num_features, small[10].num_features, small[11].in_features) == (2, 2, 8, 8)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}
    again = remove_neurons(small, "0", [0, 1])
    again(torch.randn(5, 2, 8, 8).double()).sum().backward()
    assert all(p.grad.shape == p.shape for p in again.parameters() if p.requires_grad)


@pytest.mark.parametrize("keep", [
    *(torch.tensor([1, 0, 1, 0, 0, 0]).bool(), [True, False, True, False, False, False], torch.tensor([2, 0])),
    *((0, 2), range(0, 4, 2), np.array([0, 2], dtype=np.int32), [np.int64(0), np.int64(2)], {0, 2}),
    np.array([True, False, True, False, False, False]),
])  # fmt: skip
def test_masks_and_indices_say_the_same(keep):
    model = conv_net()
    assert torch.equal(remove_neurons(model, "0", keep)[0].weight, model[0].weight[[0, 2]])


@pytest.mark.parametrize(("layer", "keep", "error", "text"), [
    ("conv0", [0], ValueError, "no layer is called 'conv0'; the closest"), ("", [0], ValueError, "is a Sequential"),
    ("1", [0], ValueError, "'1' is a BatchNorm2d: neurons can be removed from Linear and Conv"),
    ("0", [], ValueError, "all 6 neurons of '0' would be removed"), ("0", [False] * 6, ValueError, "all 6 neurons"),
    ("0", [True] * 5, ValueError, r"each of the 6 neurons, got shape \(5,\)"),
    ("0", [True], ValueError, r"each of the 6 neurons, got shape \(1,\)"),
    ("0", [1, 0, 1, 0, 1, 1], ValueError, "6 given, 2 distinct .*dtype bool"),
    ("0", [0, 6], ValueError, r"outside \[0, 6\): \[6\]"), ("0", [-1, 5], ValueError, r"outside \[0, 6\): \[-1\]"),
    ("0", [0.5], TypeError, "dtype torch.float32"), ("0", [[0, 1]], ValueError, "one dimension"),
])  # fmt: skip
def test_bad_arguments(layer, keep, error, text):
    with pytest.raises(error, match=text):
        remove_neurons(conv_net(), layer, keep)


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


def ab(forward, a=None, b=None, **more):
    return Net(forward, a=a or nn.Linear(4, 4), b=b or nn.Linear(4, 4), **more)


def chain(*layers):
    return nn.Sequential(*layers)


def tied(net):
    net.b.weight = net.a.weight
    return net


def relu(x):
    return x.softmax(-1)


fx.wrap("relu")


class Swish(nn.ReLU):
    def forward(self, x):
        return x * x.mean()


def changed(change):
    net = chain(LIN(4, 4), nn.ReLU(), LIN(4, 2))
    change(net)
    return net


def residual(s, x):
    h = torch.relu(s.a(x))
    return h + s.b(h)


C4, LIN, CONV1 = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear, nn.Conv1d
COUPLED = {
    "residual, read": (lambda: ab(residual), "those of 'b' in add .*residual"),
    "a ceiling a channel": (
        lambda: ab(lambda s, x: s.b(s.a(x).clamp(max=s.k)), conv(1, 4), conv(4, 2), k=C4), "'k' in .*for each neuron",
    ),
    "concatenation": (lambda: ab(lambda s, x: torch.cat([s.a(x), s.b(x)], 1)), "concatenated with those of 'b'"),
    "depthwise reader": (lambda: chain(conv(1, 4), nn.ReLU(), conv(4, 4, groups=4)), r"'2' is a depthwise .*=4"),
    "grouped layer": (lambda: chain(conv(4, 8, groups=2), conv(8, 2)), "it is a grouped convolution"),
    "shared layer": (lambda: ab(lambda s, x: s.a(torch.relu(s.a(x)))), "'a'.* called more than once"),
    "shared reader": (lambda: ab(lambda s, x: s.b(s.b(s.a(x)))), "'b' is a shared layer"),
    "tied weight": (lambda: tied(ab(lambda s, x: s.b(s.a(x)))), "a weight of 'a' is shared with 'b.weight'"),
    "weight read by hand": (lambda: ab(lambda s, x: F.linear(s.b(s.a(x)), s.a.weight)), "'a.weight' is shared"),
    "logits": (lambda: chain(LIN(4, 4), nn.ReLU()), "outputs of the whole model"),
    "layer norm": (lambda: chain(LIN(4, 6), nn.LayerNorm(6), LIN(6, 2)), "'1' is a LayerNorm"),
    "softmax": (lambda: ab(lambda s, x: s.b(s.a(x).softmax(1))), "forward calls softmax"),
    "somebody's relu": (lambda: ab(lambda s, x: s.b(relu(s.a(x)))), r"forward calls .*test_surgery.relu"),
    "a subclass": (lambda: chain(LIN(4, 4), Swish(), LIN(4, 2)), "forward calls mean"),
    "a forward of its own": (
        lambda: changed(lambda n: setattr(n[1], "forward", relu)), "'1' has a forward of its own",
    ),
    "fixed view": (
        lambda: ab(lambda s, x: s.b(s.a(x).view(-1, 64)), conv(1, 4), LIN(64, 2)), r"view .*write x.flatten\(1\)",
    ),
    "keepdim": (lambda: ab(lambda s, x: s.b(s.a(x).mean((2, 3), True)), conv(1, 4), conv(4, 1)), "calls mean"),
    "one dimension": (lambda: ab(lambda s, x: s.b(s.a(x).mean((2, 3))), nn.Conv3d(1, 4, 1)), "calls mean"),
    "linear on pixels": (lambda: chain(conv(1, 4), LIN(4, 2)), "reads the last axis"),
    "conv after linear": (lambda: chain(LIN(4, 3), nn.Conv1d(3, 2, 1)), "no feature map"),
    "pool after linear": (lambda: chain(LIN(4, 4), nn.AvgPool1d(2), LIN(2, 2)), "'1' pools over the neurons"),
    "pool over channels": (
        lambda: ab(lambda s, x: s.b(F.max_pool2d(s.a(x), 2)), CONV1(1, 4, 1), CONV1(2, 2, 1)), "pool2d .*pools over",
    ),
    "norm of tokens": (lambda: ab(lambda s, x: s.b(s.n(s.a(x))), n=nn.BatchNorm1d(4)), r"'n'.*x.flatten\(1\)"),
    "sizes that do not fit": (lambda: chain(LIN(4, 4), nn.BatchNorm1d(8), LIN(4, 2)), "'1' has 8 inputs"),
    "before and after flatten": (
        lambda: ab(lambda s, x: s.b((h := s.a(x)).flatten(1) + h), conv(1, 4)), "before and after flattening",
    ),
    "untraceable": (lambda: ab(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else x), "forward of Net cannot be traced"),
    "unused": (lambda: ab(lambda s, x: s.b(x)), "never calls it"),
    "hook": (lambda: changed(lambda n: n[1].register_forward_hook(relu)), r"'1' .*hook.*handle.remove"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COUPLED)
def test_couplings_are_refused_by_name(kind):
    make, text = COUPLED[kind]
    model = make()
    layer = "0" if isinstance(model, nn.Sequential) else "a"
    with pytest.raises(
        CouplingError, match=f"cannot remove neurons of '{layer}': .*{text}.*use torch-pruning"
    ) as caught:
        remove_neurons(model, layer, [0, 1])
    assert isinstance(caught.value, ValueError)
    assert caught.value.layer == layer


def test_a_part_of_a_composite_layer_is_refused():
    with pytest.raises(CouplingError, match="never calls it"):
        remove_neurons(chain(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), "0.linear1", [0, 1])


def test_a_norm_of_features_behind_a_flatten_is_cut():
    model = settle(ab(lambda s, x: s.b(s.gate(s.n(s.a(x.flatten(1))))), n=nn.BatchNorm1d(4)))
    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(remove_neurons(model, "a", [3])(x), masked_outputs(model, "gate", [3], x))


# --- BatchNorm after surgery -----------------------------------------------------------------------------------------


def test_recalibrated_statistics_are_those_of_the_images():
    small, images = remove_neurons(settle(conv_net()), "0", [0, 1]).train(), torch.randn(40, 2, 8, 8)
    small[7].p = 1.0  # a dropout that were on would be seen
    before, new = copy.deepcopy(small.state_dict()), recalibrate_batchnorm(small, images)
    assert all(m.training for m in new.modules())
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    changed = {name for name, value in new.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{n}.running_{kind}" for n in (1, 5, 10, 12) for kind in ("mean", "var")}
    x = images
    for layer, made in zip(small.eval(), new, strict=True):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            dims = [0, 2, 3][: x.dim() - 1]
            torch.testing.assert_close(made.running_mean, x.mean(dims))
            torch.testing.assert_close(made.running_var, x.var(dims))
            assert made.momentum == 0.1
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        else:
            x = layer(x)


class Frozen(nn.BatchNorm1d):
    def forward(self, x):
        return self.eval() and super().forward(x)


@pytest.mark.parametrize(("model", "images", "error", "text"), [
    (nn.Linear(2, 2), torch.rand(3, 2), UnsupportedModel, "no BatchNorm"),
    (nn.BatchNorm1d(2, track_running_stats=False), torch.rand(3, 2), UnsupportedModel, "no BatchNorm"),
    (chain(Frozen(2)), torch.rand(3, 2), UnsupportedModel, "0 saw nothing or stays in eval mode"),
    (nn.BatchNorm1d(2), torch.tensor([[1.0, float("nan")]] * 2), ValueError, "images has 2 NaN"),
    (nn.BatchNorm1d(2), torch.rand(1, 2), ValueError, "more than 1 value"),
])  # fmt: skip
def test_recalibration_refused(model, images, error, text):
    with pytest.raises(error, match=text):
        recalibrate_batchnorm(model, images)

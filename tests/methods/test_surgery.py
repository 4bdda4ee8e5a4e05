"""Surgery against the masked network and against torch-pruning; whatever is coupled is refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from course_lib.methods.pruning import CouplingError, prune_
from course_lib.methods.pruning import remove_neurons as from_pruning
from course_lib.methods.surgery import remove_neurons


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorms statistics and affine terms that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


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
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


@pytest.mark.parametrize(
    ("layer", "gate", "keep", "times"),
    [("0", "2", [0, 2, 5], 1), ("4", "10", [1, 2, 3, 7], 4), ("11", "13", [0, 9], 1), ("4", "10", [6], 4)],
)
def test_conv_net_equals_the_masked_network(layer, gate, keep, times):
    model, x = settle(conv_net()), torch.randn(5, 2, 8, 8)
    small = remove_neurons(model, layer, keep)
    torch.testing.assert_close(small(x), masked_outputs(model, gate, keep, x, times), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert small.get_submodule(layer).weight.shape[0] == len(keep)
    assert repr(small) != repr(model)


def test_zeroing_batchnorm_rows_is_the_same_mask():
    model, x = settle(conv_net()), torch.randn(5, 2, 8, 8)
    small = remove_neurons(model, "0", [1, 4])
    with torch.no_grad():
        for i in (0, 2, 3, 5):
            for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
                tensor[i] = 0
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.Softplus(), nn.PReLU(7), nn.PReLU()])
def test_an_activation_that_moves_zero_is_removed_with_its_neuron(act):
    model, x = nn.Sequential(nn.Linear(4, 7), act, nn.Linear(7, 2)), torch.randn(3, 4)
    small = remove_neurons(model, "0", [0, 3, 6])
    torch.testing.assert_close(small(x), masked_outputs(model, "1", [0, 3, 6], x))


def test_two_layers_one_after_the_other_and_training_goes_on():
    model, x = settle(conv_net()), torch.randn(5, 2, 8, 8)
    small = remove_neurons(remove_neurons(model, "0", [0, 1]), "4", [3, 4, 5])
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


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


class Functional(nn.Module):
    """Everything written as functions and methods, with two readers of the same channels."""

    def __init__(self, flat: str):
        super().__init__()
        self.conv, self.norm, self.flat = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), flat
        self.gate = nn.Identity()
        self.left, self.right = nn.Linear(64, 3), nn.Linear(64, 3)
        self.pooled = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = 2 * (x * torch.sigmoid(x)) + 0.5
        x = self.gate(F.max_pool2d(F.dropout(x, 0.1, self.training), 2))
        pooled = x.mean((2, 3))
        if self.flat == "method":
            x = x.flatten(1)
        elif self.flat == "function":
            x = torch.flatten(x, start_dim=1)
        elif self.flat == "shape":
            x = x.reshape(x.shape[0], -1)
        else:
            x = x.contiguous().view(x.size(0), -1)
        return self.left(x) + self.right(x).tanh() + self.pooled(pooled)


@pytest.mark.parametrize("flat", ["method", "function", "shape", "view"])
def test_functions_methods_and_several_readers(flat):
    model, x = settle(Functional(flat)), torch.randn(2, 1, 8, 8)
    small = remove_neurons(model, "conv", torch.tensor([True, False, False, True]))
    assert type(small) is Functional
    torch.testing.assert_close(small(x), masked_outputs(model, "gate", [0, 3], x), rtol=1e-5, atol=1e-5)


class TwoHeads(nn.Module):
    """Its second head is read while training only."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return self.head(x) + self.aux(x) if self.training else self.head(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_reader_of_the_other_mode_is_cut_as_well(training):
    small = remove_neurons(TwoHeads().train(training), "body", [1, 2])
    assert small.training is training
    assert small.aux.in_features == small.head.in_features == 2
    assert small.train()(torch.randn(2, 3)).shape == (2, 2)


@pytest.mark.parametrize(("layer", "keep"), [("0", [0, 2, 5]), ("4", [1, 2, 3, 7]), ("11", [0, 4, 9])])
def test_equals_torch_pruning(layer, keep):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning

    model, x = settle(conv_net()), torch.randn(4, 2, 8, 8)
    small, reference = remove_neurons(model, layer, keep), copy.deepcopy(model)
    gone = [i for i in range(model.get_submodule(layer).weight.shape[0]) if i not in keep]
    conv = isinstance(model.get_submodule(layer), nn.Conv2d)
    cut = torch_pruning.prune_conv_out_channels if conv else torch_pruning.prune_linear_out_channels
    graph = torch_pruning.DependencyGraph().build_dependency(reference, example_inputs=x)
    graph.get_pruning_group(reference.get_submodule(layer), cut, idxs=gone).prune()
    for (name, ours), (other, theirs) in zip(small.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(small(x), reference(x))


def test_the_model_and_everything_about_it_is_left_alone():
    model = settle(conv_net().double()).train()
    model[4].requires_grad_(False)
    model[1].eval()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    small = remove_neurons(model, "4", [7, 0])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model[4].out_channels == 8
    assert [m.training for m in model.modules()] == modes == [m.training for m in small.modules()]
    assert not small[4].weight.requires_grad
    assert small[11].weight.requires_grad
    assert all(p.dtype is torch.float64 for p in small.parameters())
    assert torch.equal(small[4].weight, model[4].weight[[0, 7]])
    assert (small[4].out_channels, small[5].num_features, small[10].num_features, small[11].in_features) == (2, 2, 8, 8)
    kept = {id(p) for p in model.parameters()}
    assert not any(id(p) in kept for p in small.parameters())


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([True, False, True, False, False, False]),
        [True, False, True, False, False, False],
        torch.tensor([2, 0]),
        (0, 2),
        range(0, 4, 2),
        torch.tensor([0, 2], dtype=torch.int32).numpy(),
    ],
)
def test_masks_and_indices_say_the_same(keep):
    model = settle(conv_net())
    expected = remove_neurons(model, "0", [0, 2]).state_dict()
    given = remove_neurons(model, "0", keep).state_dict()
    assert all(torch.equal(expected[k], given[k]) for k in expected)


def test_keeping_all_gives_an_equal_copy():
    model = settle(conv_net())
    small = remove_neurons(model, "4", range(8))
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "keep", "error", "text"),
    [
        ("conv0", [0], ValueError, "no layer is called 'conv0'; the closest"),
        ("0.weight", [0], ValueError, "the closest: 0"),
        ("", [0], ValueError, "is a Sequential"),
        ("1", [0], ValueError, "'1' is a BatchNorm2d: neurons can be removed from Linear and Conv"),
        ("0", [], ValueError, "all 6 neurons of '0' would be removed"),
        ("0", [False] * 6, ValueError, "all 6 neurons"),
        ("0", [True] * 5, ValueError, "each of the 6 neurons, got 5"),
        ("0", [0, 0], ValueError, "repeats"),
        ("0", [1, 0, 1, 0, 1, 1], ValueError, "dtype bool"),
        ("0", [0, 6], ValueError, r"outside \[0, 6\): \[6\]"),
        ("0", [-1], ValueError, r"outside \[0, 6\)"),
        ("0", [0.5], TypeError, "dtype torch.float32"),
        ("0", [[0, 1]], ValueError, "one dimension"),
    ],
)
def test_bad_arguments(layer, keep, error, text):
    model = conv_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        remove_neurons(model, layer, keep)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_no_module_and_no_layer():
    with pytest.raises(TypeError, match="got list"):
        remove_neurons([1], "0", [0])
    with pytest.raises(ValueError, match="no Linear or Conv layer"):
        remove_neurons(nn.Sequential(nn.ReLU()), "fc", [0])


class Net(nn.Module):
    """``forward`` is the function it is given; layers by name."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


def tied():
    net = Net(lambda s, x: s.b(s.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.b.weight = net.a.weight
    return net


def pruned_by_torch():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    torch_prune.l1_unstructured(net[2], "weight", 0.5)
    return net


COUPLED = {
    "residual, read": (
        lambda: Net(lambda s, x: (h := torch.relu(s.a(x))) + s.b(h), a=conv(1, 4), b=conv(4, 4)),
        "a",
        "those of 'b' in add .*residual",
    ),
    "residual, written": (
        lambda: Net(lambda s, x: (h := torch.relu(s.a(x))) + s.b(h), a=conv(1, 4), b=conv(4, 4)),
        "b",
        "meet those of 'relu' in add",
    ),
    "gate": (lambda: Net(lambda s, x: s.a(x) * s.b(x), a=conv(1, 4), b=conv(1, 4)), "a", "those of 'b' in mul"),
    "concatenation": (
        lambda: Net(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv(1, 4), b=conv(1, 4)),
        "a",
        "concatenated with those of 'b'",
    ),
    "depthwise reader": (
        lambda: nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 4, groups=4), conv(4, 2)),
        "0",
        r"'2' is a depthwise convolution \(groups=4\)",
    ),
    "grouped layer": (
        lambda: nn.Sequential(conv(4, 8, groups=2), nn.ReLU(), conv(8, 2)),
        "0",
        r"it is a grouped convolution \(groups=2\)",
    ),
    "shared layer": (
        lambda: Net(lambda s, x: s.a(torch.relu(s.a(x))), a=nn.Linear(4, 4)),
        "a",
        "'a'.* called more than once",
    ),
    "shared reader": (
        lambda: Net(lambda s, x: s.b(torch.relu(s.b(torch.relu(s.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "a",
        "'b' is a shared layer",
    ),
    "shared batchnorm": (
        lambda: Net(lambda s, x: s.b(s.n(s.a(s.n(x)))), a=conv(4, 4), b=conv(4, 4), n=nn.BatchNorm2d(4)),
        "a",
        "'n' is a shared layer",
    ),
    "tied weight": (tied, "a", "a weight of 'a' is shared with 'b.weight'"),
    "weight read by hand": (
        lambda: Net(lambda s, x: F.linear(s.b(torch.relu(s.a(x))), s.a.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "a",
        "'a.weight' is shared",
    ),
    "logits": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "0", "outputs of the whole model"),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        "0",
        "'1' is a LayerNorm",
    ),
    "softmax": (
        lambda: Net(lambda s, x: s.b(s.a(x).softmax(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "a",
        "forward calls softmax",
    ),
    "transposed reader": (
        lambda: nn.Sequential(conv(1, 4), nn.ConvTranspose2d(4, 2, 2)),
        "0",
        "'1' is a ConvTranspose2d",
    ),
    "fixed view": (
        lambda: Net(lambda s, x: s.b(s.a(x).view(-1, 64)), a=conv(1, 4), b=nn.Linear(64, 2)),
        "a",
        "forward calls view",
    ),
    "part of the channels": (
        lambda: Net(lambda s, x: s.b(s.a(x)[:, :2]), a=conv(1, 4), b=conv(2, 2)),
        "a",
        "forward calls getitem",
    ),
    "linear on pixels": (lambda: nn.Sequential(conv(1, 4), nn.Linear(4, 2)), "0", "reads the last axis"),
    "conv after linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 1)), "0", "no feature map"),
    "pool after linear": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.AvgPool1d(2), nn.Linear(2, 2)),
        "0",
        "'1' pools over the neurons",
    ),
    "sizes that do not fit": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(8), nn.Linear(4, 2)),
        "0",
        "'1' has 8 inputs",
    ),
    "before and after flatten": (
        lambda: Net(lambda s, x: s.b((h := s.a(x)).flatten(1) + h), a=conv(1, 4), b=nn.Linear(4, 2)),
        "a",
        "before and after flattening",
    ),
    "untraceable": (
        lambda: Net(lambda s, x: s.b(s.a(x)) if x.sum() > 0 else s.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        "a",
        "forward of Net cannot be traced",
    ),
    "unused": (lambda: Net(lambda s, x: s.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), "a", "never calls it"),
    "composite": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 2)),
        "0.linear1",
        "never calls it",
    ),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2)),
        "0",
        "weight of '0' is computed by a parametrization",
    ),
    "reader under torch prune": (pruned_by_torch, "0", "weight of '2' is computed by a parametrization"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "0", "lazy layer"),
}


@pytest.mark.parametrize("kind", COUPLED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_couplings_are_refused_by_name(kind):
    make, layer, text = COUPLED[kind]
    with pytest.raises(CouplingError, match=text) as caught:
        remove_neurons(make(), layer, [0, 1])
    assert f"cannot remove neurons of '{layer}'" in str(caught.value)
    assert "use torch-pruning (https://github.com/VainF/Torch-Pruning)" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert caught.value.layer == layer


def test_score_and_surgery_are_separate():
    assert from_pruning is remove_neurons
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    prune_(model, 0.5)
    keep = model[0].weight.norm(dim=1).topk(4).indices
    assert remove_neurons(model, "0", keep)[0].weight.shape == (4, 4)

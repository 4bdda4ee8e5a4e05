import pytest
import torch

from course_lib.lab.models import MODELS, build_model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_forward_gives_logits(name, shape):
    model = build_model(name, shape, 7, seed=0)
    assert model.training
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_deep_compression_counts():
    # Han et al. 2016 quote 266K and 431K weights for these two networks on 28×28 images.
    count = {n: sum(p.numel() for p in build_model(n, (1, 28, 28), 10).parameters()) for n in ("lenet300", "lenet5")}
    assert count == {"lenet300": 266_610, "lenet5": 431_080}


def test_seed_decides_weights_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    a, b, c = (build_model("mlp32", (1, 8, 8), 10, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.fc1.weight, b.fc1.weight)
    assert not torch.equal(a.fc1.weight, c.fc1.weight)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(1)
    a = build_model("mlp8", (1, 8, 8), 10)
    torch.manual_seed(1)
    b = build_model("mlp8", (1, 8, 8), 10)
    assert torch.equal(a.fc1.weight, b.fc1.weight)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("lenet30", (1, 8, 8), 10), "did you mean 'lenet300'"),
        (("transformer", (1, 8, 8), 10), "there are: lenet300"),
        (("mlp32", (8, 8), 10), "three positive integers"),
        (("mlp32", (1, 0, 8), 10), "three positive integers"),
        (("mlp32", (1, 8, 8), 1), "at least 2"),
        (("lenet5", (1, 3, 8), 10), "at least 4×4"),
    ],
)
def test_bad_input_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        build_model(*arguments)

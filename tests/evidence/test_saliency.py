import copy

import pytest
import torch
from torch import nn

from course_lib.evidence.saliency import (
    MAPS,
    completeness_gap,
    gradient_input_map,
    gradient_map,
    integrated_gradient_map,
    occlusion_map,
    rank_correlation,
    reset_layers,
    smooth_gradient_map,
)


def network(seed=0, channels=2, smooth=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Tanh() if smooth else nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(6 * 30, 4),
        ).double()
        model[1].running_mean.normal_()
    return model


def batch(n=5, channels=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, 5, 6, generator=g, dtype=torch.float64), torch.arange(n) % 4


def linear(seed=0, channels=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 30, 4)).double()


@pytest.mark.parametrize("name", MAPS)
def test_a_map_leaves_the_model_and_the_random_numbers_alone(name):
    model, (images, target) = network(), batch()
    model.train()
    model[1].eval()
    model(images).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    state, before, drawn = copy.deepcopy(model.state_dict()), images.clone(), torch.get_rng_state()
    images.requires_grad_()
    found = MAPS[name](model, images, target)
    assert found.shape == (5, 5, 6)
    assert not found.requires_grad
    assert images.grad is None
    assert torch.equal(images, before)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_works_where_gradients_are_off_and_on_frozen_weights(name):
    model, (images, target) = network(), batch()
    wanted = MAPS[name](model, images, target)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(MAPS[name](model, images, target), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(MAPS[name](model, images + 0, target).clone(), wanted)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "SmoothGrad"])
def test_images_of_a_batch_do_not_see_each_other(name):
    model, (images, target) = network(), batch()
    images[:, :, 0, 0] = -9.0  # every image holds the batch's darkest pixel: the default baseline is the same
    whole = MAPS[name](model, images, target)
    for i in range(5):
        torch.testing.assert_close(MAPS[name](model, images[i : i + 1], target[i : i + 1])[0], whole[i])


def test_gradient_equals_finite_differences():
    model, (images, target) = network().eval(), batch(2)
    wanted, step = torch.zeros_like(images), 1e-5
    with torch.no_grad():
        for place in torch.cartesian_prod(*(torch.arange(n) for n in images.shape)):
            n, place = int(place[0]), tuple(place.tolist())
            up, down = images.clone(), images.clone()
            up[place] += step
            down[place] -= step
            wanted[place] = (model(up) - model(down))[n, target[n]] / (2 * step)
    torch.testing.assert_close(gradient_map(model, images, target), wanted.abs().amax(1), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        gradient_input_map(model, images, target), (wanted * images).sum(1), atol=1e-8, rtol=1e-6
    )


def test_on_a_linear_model_every_method_gives_its_weights():
    model, (images, target) = linear(), batch()
    weight = model[1].weight.detach()[target].reshape(images.shape)
    torch.testing.assert_close(gradient_map(model, images, target), weight.abs().amax(1))
    torch.testing.assert_close(smooth_gradient_map(model, images, target, samples=3), weight.abs().amax(1))
    torch.testing.assert_close(gradient_input_map(model, images, target), (weight * images).sum(1))
    for steps in (1, 7):
        found = integrated_gradient_map(model, images, target, baseline=0.5, steps=steps)
        torch.testing.assert_close(found, (weight * (images - 0.5)).sum(1))
    one = occlusion_map(model, images, target, size=1, baseline=0.5)
    torch.testing.assert_close(one, (weight * (images - 0.5)).sum(1))


def test_smooth_gradient_is_the_mean_over_the_noise_it_says():
    model, (images, target) = network().eval(), batch()
    g = torch.Generator().manual_seed(7)
    spread = 0.3 * (images.flatten(1).amax(1) - images.flatten(1).amin(1))
    total = torch.zeros_like(images)
    for _ in range(4):
        # The noise is drawn in the images' shape and the default type, as the library says.
        x = (images + spread[:, None, None, None] * torch.randn(images.shape, generator=g).double()).requires_grad_()
        model(x).gather(1, target[:, None]).sum().backward()
        total += x.grad
    found = smooth_gradient_map(model, images, target, noise=0.3, samples=4, seed=7)
    torch.testing.assert_close(found, (total / 4).abs().amax(1))
    torch.testing.assert_close(smooth_gradient_map(model, images, target, noise=0), gradient_map(model, images, target))
    assert torch.equal(found, smooth_gradient_map(model, images, target, noise=0.3, samples=4, seed=7))
    assert not torch.equal(found, smooth_gradient_map(model, images, target, noise=0.3, samples=4, seed=8))


@pytest.mark.parametrize("baseline", [None, 0.0, torch.full((2, 1, 1), -1.5)])
def test_integrated_gradients_are_complete_and_more_so_with_more_steps(baseline):
    model, (images, target) = network(), batch()
    gaps = []
    for steps in (2, 8, 64):
        found = integrated_gradient_map(model, images, target, baseline=baseline, steps=steps)
        gaps.append(completeness_gap(model, images, target, found, baseline=baseline).max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3
    model.eval()
    black = images.amin(dim=(0, 2, 3))[:, None, None] if baseline is None else baseline
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images) + black)).gather(1, target[:, None])[:, 0]
    assert change.abs().max() > 0.1
    torch.testing.assert_close(found.sum(dim=(1, 2)), change, atol=1e-3, rtol=0)


def test_occlusion_equals_a_loop_of_squares():
    model, (images, target) = network(), batch(3)
    model.eval()
    size, stride = 3, 2
    for n in range(3):
        total, times = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 6)
        for top in (0, 2):
            for left in (0, 2, 3):
                covered = images[n : n + 1].clone()
                covered[:, :, top : top + size, left : left + size] = -1.0
                with torch.no_grad():
                    drop = (model(images[n : n + 1]) - model(covered))[0, target[n]]
                total[top : top + size, left : left + size] += drop
                times[top : top + size, left : left + size] += 1
        found = occlusion_map(model, images, target, size=size, stride=stride, baseline=-1.0)
        torch.testing.assert_close(found[n], total / times)


def test_occlusion_needs_no_gradient_and_the_others_say_so():
    (images, target), weight = batch(), linear()[1].weight.detach()

    def integer(x):
        return (x.flatten(1).round().long() @ (10 * weight).round().long().T).double()

    assert occlusion_map(integer, images, target).abs().sum() > 0

    class Wrapped(nn.Module):
        def forward(self, x):
            return integer(x)

    with pytest.raises(ValueError, match="occlusion_map needs none"):
        gradient_map(Wrapped(), images, target)


def test_reset_layers_forgets_from_the_output_backwards():
    model = network()
    model.train()
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    names = [("0.weight", "0.bias"), ("1.running_mean",), ("5.weight", "5.bias")]
    for last in range(4):
        fresh = reset_layers(model, last=last)
        changed = [not any(torch.equal(fresh.state_dict()[n], before[n]) for n in group) for group in names]
        assert changed == [i >= 3 - last for i in range(3)]
        assert fresh.training
    assert torch.equal(reset_layers(model)[5].weight, reset_layers(model, last=3)[5].weight)
    assert not torch.equal(reset_layers(model)[5].weight, reset_layers(model, seed=1)[5].weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_random_network_gives_another_map_and_the_same_network_the_same():
    model, (images, target) = network(), batch(20)
    own = gradient_map(model, images, target)
    assert rank_correlation(own, gradient_map(copy.deepcopy(model), images, target)).min() == pytest.approx(1.0)
    assert rank_correlation(own, gradient_map(reset_layers(model), images, target)).mean() < 0.5


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_reset_layers_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"1 \(Odd\) has no reset_parameters"):
        reset_layers(nn.Sequential(nn.Linear(2, 2), Odd()))
    reset_layers(nn.Sequential(Odd(), nn.Linear(2, 2)), last=1)
    for last in (-1, 4, 1.0, True):
        with pytest.raises(ValueError, match="last must be from 0 to 3"):
            reset_layers(network(), last=last)


X, Y = batch()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("images", "target", "error", "text"),
    [
        (X.numpy(), Y, TypeError, "images must be a floating-point tensor .* got ndarray"),
        (X.long(), Y, TypeError, "got dtype torch.int64"),
        (X[0], Y, ValueError, r"images must be \[N, C, H, W\].* got shape \(2, 5, 6\)"),
        (X[:0], Y[:0], ValueError, r"got shape \(0, 2, 5, 6\)"),
        (X, Y.int(), TypeError, "target must be an int64 tensor .* got dtype torch.int32"),
        (X, 3, TypeError, "target must be an int64 tensor .* got int"),
        (X, Y[:2], ValueError, r"target must have shape \(5,\) .* got \(2,\)"),
        (X, Y + 1, ValueError, r"got 1 to 4 and logits of shape \(1, 4\)"),
        (X, Y - 1, ValueError, "got -1 to 2"),
    ],
)
def test_bad_input_is_refused_in_words_and_the_mode_stays(name, images, target, error, text):
    model = network()
    model.train()
    with pytest.raises(error, match=text):
        MAPS[name](model, images, target)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (smooth_gradient_map, {"samples": 0}, "samples must be an integer of at least 1, got 0"),
        (smooth_gradient_map, {"noise": -0.1}, "noise must be a share .* got -0.1"),
        (smooth_gradient_map, {"noise": float("nan")}, "got nan"),
        (integrated_gradient_map, {"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
        (integrated_gradient_map, {"baseline": torch.zeros(3, 1, 1)}, r"\(3, 1, 1\) does not broadcast"),
        (occlusion_map, {"size": 6}, "at most the image's side, 5.* got size 6"),
        (occlusion_map, {"size": 2, "stride": 3}, "got size 2 and stride 3"),
        (occlusion_map, {"stride": 0}, "stride must be an integer of at least 1, got 0"),
    ],
)
def test_options_must_fit(function, options, text):
    with pytest.raises(ValueError, match=text):
        function(network(), X, Y, **options)

"""Does a probability mean what it says? Calibration error, reliability diagrams, and the one number that repairs most.

Everything here is post-processing: it looks at logits or probabilities that a finished model gave. What is fitted
(a temperature, a bias) is fitted on *validation* data and then applied to test data unchanged.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Reliability",
    "calibration_floor",
    "expected_calibration_error",
    "fit_class_bias",
    "fit_temperature",
    "reliability",
]

_BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram as numbers: one entry a bin of confidence.

    Attributes:
        edges: ``[bins + 1]`` from 0 to 1; bin m holds the confidences in (edges[m], edges[m + 1]].
        confidence: ``[bins]`` mean confidence in the bin, NaN where it is empty.
        accuracy: ``[bins]`` share of right answers in the bin, NaN where it is empty.
        count: ``[bins]`` int64, images in the bin.
    """

    edges: Tensor
    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error in [0, 1]: |accuracy − confidence|, weighted by the bins' counts."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gap * self.count).sum() / self.count.sum())


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """Sort images into bins by confidence (their largest probability), and look how often each bin is right.

    Args:
        probabilities: floating point ``[N, K]``, N ≥ 1, each row adding up to 1.
        labels: int64 ``[N]``, from 0 to K − 1.
        bins: number of bins of equal width, at least 1.

    Raises:
        TypeError: probabilities not floating point, labels not int64.
        ValueError: shapes that do not fit, no image, rows that are no distributions, labels out of range, no bin.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2; their bins, closed on the right.

    >>> diagram = reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), bins=2)
    >>> diagram.count.tolist(), diagram.accuracy.tolist()
    ([0, 2], [nan, 0.5])
    """
    _check("probabilities", probabilities, labels)
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1, got {bins!r}")
    rows = probabilities.detach().double()
    off = (rows.sum(dim=1) - 1).abs().max().item()
    tolerance = 1e-5 + 4 * rows.shape[1] * torch.finfo(probabilities.dtype).eps
    if rows.min() < 0 or off > tolerance:
        raise ValueError(
            f"probabilities must be at least 0 and add up to 1 in each row, got a minimum of {rows.min().item():g} and "
            f"a sum that is off by {off:g}; are these logits?"
        )
    confidence, predicted = rows.max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=rows.device)
    where = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    count = torch.bincount(where, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=rows.device)
    sums[0].index_add_(0, where, confidence)
    sums[1].index_add_(0, where, (predicted == labels).double())
    mean_confidence, accuracy = sums / count
    return Reliability(edges, mean_confidence, accuracy, count)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, weighted by how many images each holds.

    Arguments and errors are those of :func:`reliability`.

    Returns:
        A number in [0, 1]; 0 means that of the answers given with 80 % confidence 80 % are right, and so on. It depends
        on ``bins``, and with few images it is above 0 even for a perfectly calibrated model.

    Source: Guo et al. 2017, equation 3 (15 bins).

    >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
    0.25
    """
    return reliability(probabilities, labels, bins=bins).error


def calibration_floor(probabilities: Tensor, *, bins: int = 15, draws: int = 100, seed: int = 0) -> float:
    """The mean expected calibration error that chance alone gives to these probabilities if they are exactly right.

    Labels are drawn from the stated probabilities themselves, so the model is perfectly calibrated by construction, and
    its error is measured on as many images as there are. An error near this floor is no evidence of miscalibration.

    Args:
        probabilities: floating point ``[N, K]``, as for :func:`reliability`.
        bins: as for :func:`expected_calibration_error`.
        draws: simulated sets of labels, at least 1.
        seed: of the simulation; torch's global generator is left alone.

    Returns:
        A number in [0, 1] that falls about like 1/√N.

    Raises:
        TypeError, ValueError: as in :func:`reliability`; fewer than one draw.

    Source: the consistency resampling of Bröcker & Smith 2007, "Increasing the Reliability of Reliability Diagrams".

    >>> calibration_floor(torch.full((100, 2), 0.5)) > calibration_floor(torch.full((10_000, 2), 0.5))
    True
    """
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be an integer of at least 1, got {draws!r}")
    images = len(probabilities) if isinstance(probabilities, Tensor) and probabilities.dim() == 2 else 0
    zeros = torch.zeros(images, dtype=torch.int64)
    reliability(probabilities, zeros, bins=bins)  # refuses what is no table of probabilities before anything is drawn
    rows = probabilities.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        labels = torch.multinomial(rows, 1, generator=generator).squeeze(1)
        total += expected_calibration_error(probabilities.detach().cpu(), labels, bins=bins)
    return total / draws


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(z / T) gives ``labels`` the highest likelihood.

    The mean negative log-likelihood is convex in 1/T, so its slope has one zero, which is found by bisection in
    float64: no starting point, no learning rate, the same answer every time.

    Args:
        logits: floating point ``[N, K]``, N ≥ 1, K ≥ 2, finite; a *validation* set's.
        labels: int64 ``[N]``, from 0 to K − 1.

    Returns:
        T > 0. Above 1 the model was overconfident. Dividing by T never changes the order of a row's logits, so accuracy
        stays what it was. The search spans a factor of 10,000 either side of the logits' own spread (their root mean
        square about each row's mean); its edge is what comes back where the likelihood has no maximum: the lower one if
        every label has the largest logit, the upper one if the logits are worse than a guess. Logits that are all equal
        give 1.

    Raises:
        TypeError: logits not floating point, labels not int64.
        ValueError: shapes that do not fit, no image, one class, NaN or infinity, labels out of range.

    Source: Guo et al. 2017, section 4.2, "temperature scaling".

    >>> z = torch.tensor([[4.0, 0.0]]).expand(4, 2)
    >>> round(fit_temperature(z, torch.tensor([0, 0, 0, 1])), 4)  # 3 of 4 right: softmax(z / T) must say 0.75
    3.641
    """
    _check("logits", logits, labels)
    z = logits.detach().double()
    z = z - z.mean(dim=1, keepdim=True)
    spread = z.pow(2).mean().sqrt()
    if spread == 0:
        return 1.0
    z = z / spread
    right = z.gather(1, labels[:, None]).squeeze(1)

    def slope(log_scale: float) -> float:
        """Of the negative log-likelihood by 1/T, at spread/T = exp(log_scale)."""
        expected = (torch.softmax(z * math.exp(log_scale), dim=1) * z).sum(dim=1)
        return float((expected - right).mean())

    widest = math.log(1e4)
    log_scale = _bisect(slope, -widest, widest)
    return float(spread / math.exp(log_scale))


def fit_class_bias(logits: Tensor, labels: Tensor, class_index: int) -> float:
    """The bias b that, added to the logit of one class, gives ``labels`` the highest likelihood.

    For a class that a student never saw: its bias has sunk, the features that tell it apart need not have. At the
    optimum the class's mean probability equals its share among the labels.

    Args:
        logits: floating point ``[N, K]``, N ≥ 1, K ≥ 2, finite; a *validation* set's.
        labels: int64 ``[N]``; both the class and others must occur.
        class_index: from 0 to K − 1.

    Returns:
        b in units of logits (natural logarithm of odds).

    Raises:
        TypeError, ValueError: as in :func:`fit_temperature`; a class index out of range; labels without the class or
            without any other.

    Source: after Hinton, Vinyals & Dean 2015, section 3, who chose the bias by errors on the test set; this does not.

    >>> z = torch.tensor([[0.0, 0.0]]).expand(4, 2)
    >>> round(fit_class_bias(z, torch.tensor([0, 0, 0, 1]), 0), 4)  # log(3/4 : 1/4)
    1.0986
    """
    _check("logits", logits, labels)
    classes = logits.shape[1]
    if not isinstance(class_index, int) or isinstance(class_index, bool) or not 0 <= class_index < classes:
        raise ValueError(f"class_index must be an integer from 0 to {classes - 1}, got {class_index!r}")
    share = (labels == class_index).double().mean().item()
    if share in (0.0, 1.0):
        raise ValueError(
            f"labels must hold class {class_index} and others, got a share of {share:g}: no bias fits them best"
        )
    z = logits.detach().double()
    others = z.clone()
    others[:, class_index] = -torch.inf
    log_odds = z[:, class_index] - others.logsumexp(dim=1)

    def slope(bias: float) -> float:
        return float(torch.sigmoid(log_odds + bias).mean()) - share

    # Beyond this, every image's probability is on one side of the share.
    reach = float(log_odds.abs().max()) + 50.0
    return _bisect(slope, -reach, reach)


def _bisect(rising, low: float, high: float) -> float:
    """Where a rising function crosses 0, or the end that is nearer to it."""
    if rising(low) >= 0:
        return low
    if rising(high) <= 0:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check(name: str, rows: Tensor, labels: Tensor) -> None:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        given = f"dtype {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name} must be a floating-point tensor [N, K], got {given}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = f"dtype {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor [N] of class indices, got {given}")
    if rows.dim() != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise ValueError(f"{name} must be [N, K] with N >= 1 images and K >= 2 classes, got shape {tuple(rows.shape)}")
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"labels must have shape ({len(rows)},) to fit {name}, got {tuple(labels.shape)}")
    if not torch.isfinite(rows).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(rows)).sum())} NaN or infinite values")
    if labels.min() < 0 or labels.max() >= rows.shape[1]:
        raise ValueError(
            f"labels must run from 0 to {rows.shape[1] - 1} for {rows.shape[1]} classes, got {labels.min().item()} to "
            f"{labels.max().item()}"
        )

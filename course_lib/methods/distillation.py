"""Knowledge distillation from logits: the loss of Hinton et al. (2015), its decoupled form, mutual learning.

Each loss is a pure function on tensors ``[N, K]`` that goes down; ``*_terms`` returns the same loss with its parts by
name, so that a training can plot each. All work under ``torch.func.vmap``. The teacher's logits never carry a gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib.methods.distillation_checks import (
    check_labelled,
    check_labels,
    check_logits,
    check_pair,
    check_weight,
)
from course_lib.methods.distillation_teacher import frozen, precompute_logits
from course_lib.methods.temperature import check_temperature, log_softmax_with_temperature

__all__ = [
    "KnowledgeDistillation",
    "decoupled_kd_loss",
    "decoupled_kd_terms",
    "frozen",
    "kd_loss",
    "kd_terms",
    "mutual_learning_loss",
    "precompute_logits",
    "soft_target_loss",
]


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor) -> Tensor:
    """T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)), summed over classes and averaged over images ("batchmean").

    The gradient of the KL term by a student logit is (q_i − p_i) / T, and q − p itself shrinks like 1/T. T² takes both
    back, so that one learning rate and one alpha serve every temperature.

    Args:
        student_logits: floating point ``[N, K]``, N ≥ 1, K ≥ 2.
        teacher_logits: the same shape; must not require a gradient.
        temperature: above 0, the same for both (a tensor without dimensions serves a grid under ``vmap``).

    Returns:
        A scalar in nats, at least 0; 0 where the two distributions agree.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that differ, an empty batch, NaN or infinity, teacher logits with a gradient, a temperature
            that is not above 0.

    Source: Hinton, Vinyals & Dean 2015, section 2.

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> soft_target_loss(z, z, temperature=4.0)
    tensor(0.)
    """
    check_temperature(temperature)
    check_pair(student_logits, teacher_logits)
    log_p = log_softmax_with_temperature(teacher_logits, temperature)
    log_q = log_softmax_with_temperature(student_logits, temperature)
    return _divergence(log_p, log_q) * temperature**2


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor,
    labelled: Tensor | None = None,
) -> Tensor:
    """(1 − α) · CE(y, softmax(z_s)) + α · T² · KL(softmax(z_t / T) ‖ softmax(z_s / T)).

    ``alpha`` weighs the soft term: 0 is exactly cross-entropy, 1 is exactly :func:`soft_target_loss`. (Beware when
    comparing code: some projects let alpha weigh the hard term.)

    Args:
        student_logits, teacher_logits, temperature: as in :func:`soft_target_loss`.
        labels: int64 ``[N]``, from 0 to K − 1. Cross-entropy always uses T = 1.
        alpha: in [0, 1] (a tensor without dimensions serves a grid under ``vmap``).
        labelled: bool ``[N]``, for a transfer set whose labels are only partly known: cross-entropy is the mean over
            the images marked here (0 in a batch without any), the soft term still the mean over all. What ``labels``
            holds elsewhere is never read. ``None``: every label counts.

    Returns:
        A scalar in nats, at least 0, ready for ``backward()``. :func:`kd_terms` gives its parts by name.

    Raises:
        TypeError, ValueError: as in :func:`soft_target_loss`; labels of another dtype, shape or range; alpha outside
            [0, 1]; ``labelled`` that is not bool or has another shape.

    Source: Hinton, Vinyals & Dean 2015, section 2.

    >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])
    >>> kd_loss(student, teacher, torch.tensor([0]), temperature=2.0, alpha=0.5)
    tensor(0.3371)
    """
    terms = kd_terms(student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha, labelled=labelled)
    return terms["loss"]


def kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor,
    labelled: Tensor | None = None,
) -> dict[str, Tensor]:
    """:func:`kd_loss` by name: ``"loss"``, and unweighted ``"ce"`` and ``"soft"`` (which carries its T²).

    All three are there whatever alpha is, so that a curve of the one that is not trained can be drawn too.
    """
    check_weight("alpha", alpha, most=1.0)
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature)
    ce = _cross_entropy(student_logits, labels, labelled)
    # A weight of 0 takes its term out of the sum altogether, so that the two ends are exact, gradients included.
    if not isinstance(alpha, Tensor) and alpha in (0, 1):
        loss = soft if alpha else ce
    else:
        loss = (1 - alpha) * ce + alpha * soft
    return {"loss": loss, "ce": ce, "soft": soft}


def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
) -> Tensor:
    """T² · (α · TCKD + β · NCKD): the soft term taken apart into "the right class or not" and "which wrong class".

    With p_y the teacher's probability of the right class, KL(p ‖ q) = TCKD + (1 − p_y) · NCKD for each image. A sure
    teacher thus silences the second term, which carries its knowledge about similar classes; here ``beta`` sets its
    weight for good. Cross-entropy is not part of it: add it with the weight you want.

    Args:
        student_logits, teacher_logits, labels, temperature: as in :func:`kd_loss`.
        alpha: weight of the target-class term, at least 0 (1 in the paper).
        beta: weight of the non-target-class term, at least 0 (8 for most pairs in the paper).

    Returns:
        A scalar in nats, at least 0. :func:`decoupled_kd_terms` gives its parts by name.

    Raises:
        TypeError, ValueError: as in :func:`kd_loss`; a negative alpha or beta.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7.

    >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    >>> decoupled_kd_loss(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=0.0)
    tensor(0.1661)
    """
    return decoupled_kd_terms(student_logits, teacher_logits, labels, temperature=temperature, alpha=alpha, beta=beta)[
        "loss"
    ]


def decoupled_kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
) -> dict[str, Tensor]:
    """:func:`decoupled_kd_loss` by name: ``"loss"``; ``"target"`` and ``"nontarget"`` unweighted, with their T²."""
    check_temperature(temperature)
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_pair(student_logits, teacher_logits)
    check_labels(labels, student_logits)
    is_target = torch.arange(student_logits.shape[1], device=labels.device) == labels[:, None]
    target_p, other_p = _decouple(teacher_logits, temperature, is_target)
    target_q, other_q = _decouple(student_logits, temperature, is_target)
    scale = temperature**2
    target = _divergence(target_p, target_q) * scale
    nontarget = _divergence(other_p, other_q, ignore=is_target) * scale
    return {"loss": alpha * target + beta * nontarget, "target": target, "nontarget": nontarget}


def mutual_learning_loss(
    student_logits: Tensor, peer_logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """CE(y, student) + T² · KL(peer ‖ student): one student's loss when two students teach each other.

    Call it once a student with the roles exchanged and add the two up. The peer is a teacher for the moment: its logits
    are detached here, so each call trains one student only.

    Args:
        student_logits, peer_logits: floating point ``[N, K]``; the peer's may require a gradient, none reaches it.
        labels: int64 ``[N]``.
        temperature: above 0; the paper uses 1.

    Returns:
        A scalar in nats, at least 0.

    Raises:
        TypeError, ValueError: as in :func:`kd_loss`.

    Source: Zhang et al. 2018, "Deep Mutual Learning", equation 4.
    """
    check_logits("peer_logits", peer_logits)
    soft = soft_target_loss(student_logits, peer_logits.detach(), temperature=temperature)
    check_labels(labels, student_logits)
    return F.cross_entropy(student_logits, labels) + soft


@dataclass(frozen=True, eq=False)
class KnowledgeDistillation:
    """:func:`kd_terms` over a table of teacher logits: a loss for ``fit`` whose teacher has answered once and for all.

    Attributes:
        teacher_logits: ``[N, K]``, row i for image i of the split that is trained on (see :func:`precompute_logits`).
        temperature: above 0.
        alpha: weight of the soft term, in [0, 1].
        labelled: bool ``[N]``, the images whose label counts; ``None`` means all.

    Called with the batch's logits ``[B, K]``, labels ``[B]`` and positions ``index`` ``[B]`` in the split; returns the
    terms by name. Right only where image i never changes: with random augmentation the teacher must see the same view
    as the student (Beyer et al. 2022), so no table can serve.
    """

    teacher_logits: Tensor
    temperature: float = 4.0
    alpha: float = 0.9
    labelled: Tensor | None = None

    def __post_init__(self):
        check_temperature(self.temperature)
        check_weight("alpha", self.alpha, most=1.0)
        check_pair(self.teacher_logits.detach(), self.teacher_logits)
        if self.labelled is not None:
            check_labelled(self.labelled, len(self.teacher_logits))

    def __call__(self, logits: Tensor, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        rows = self.teacher_logits[index]
        known = None if self.labelled is None else self.labelled[index]
        return kd_terms(logits, rows, labels, temperature=self.temperature, alpha=self.alpha, labelled=known)


def _cross_entropy(logits: Tensor, labels: Tensor, labelled: Tensor | None) -> Tensor:
    """Mean cross-entropy over all images, or over those that are marked."""
    if labelled is None:
        check_labels(labels, logits)
        return F.cross_entropy(logits, labels)
    check_labelled(labelled, len(logits))
    if isinstance(labels, Tensor) and labels.shape == labelled.shape:
        labels = labels.masked_fill(~labelled, 0)  # a placeholder such as -1 is no class
    check_labels(labels, logits)
    each = F.cross_entropy(logits, labels, reduction="none").masked_fill(~labelled, 0.0)
    return each.sum() / labelled.sum().clamp_min(1)


def _divergence(log_p: Tensor, log_q: Tensor, *, ignore: Tensor | None = None) -> Tensor:
    """Σ p (log p − log q) over classes, mean over images; the entries marked in ``ignore`` count as 0."""
    difference = log_p - log_q
    if ignore is not None:
        difference = difference.masked_fill(ignore, 0.0)
    return (log_p.exp() * difference).sum(dim=1).mean()


def _decouple(logits: Tensor, temperature: float | Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N, 2]`` of right class against rest, and ``[N, K]`` within the rest (−inf at the target)."""
    log_p = log_softmax_with_temperature(logits, temperature)
    others = log_p.masked_fill(is_target, -torch.inf)
    # 1 − p_y would round to 0 for a sure teacher; the sum over the others in log space does not.
    rest = others.logsumexp(dim=1)
    target = log_p.masked_fill(~is_target, 0.0).sum(dim=1)
    return torch.stack([target, rest], dim=1), torch.log_softmax(others, dim=1)

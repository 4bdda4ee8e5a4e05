import pytest
import torch

from course_lib.lab.data import Split
from course_lib.lab.loop import epoch_batches
from course_lib.lab.models import build_model
from course_lib.lab.training import TrainConfig, evaluate, fit
from course_lib.lab.transfer import answer_table, draw_labels, label_mask, teach
from course_lib.methods.distillation import KnowledgeDistillation

CONFIG = TrainConfig(epochs=2, batch_size=8)


@pytest.fixture
def pool():
    g = torch.Generator().manual_seed(0)
    return Split(torch.randn(24, 1, 4, 4, generator=g), torch.arange(24) % 3)


def student(seed):
    return build_model("mlp8", (1, 4, 4), 3, seed=seed)


def test_labels_are_drawn_in_equal_shares_by_the_seed(pool):
    drawn = draw_labels(pool, 9, 3, seed=1)
    assert pool.labels[drawn].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert len(set(drawn.tolist())) == 9
    assert torch.equal(drawn, draw_labels(pool, 9, 3, seed=1))
    assert not torch.equal(drawn, draw_labels(pool, 9, 3, seed=2))


@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_the_draw_is_not_the_order_of_an_epoch(pool, seed):
    drawn = set(draw_labels(pool, 12, 3, seed=seed).tolist())
    for epoch in range(3):
        (order,) = epoch_batches(24, 24, seed, epoch)
        balanced = [order[pool.labels[order] == k][:4] for k in range(3)]
        assert drawn != set(torch.cat(balanced).tolist())


@pytest.mark.parametrize(
    ("count", "text"), [(10, "multiple of the 3"), (0, "got 0"), (27, "class 0 has 8 images, needed are 9")]
)
def test_a_draw_that_cannot_be_equal_is_refused(pool, count, text):
    with pytest.raises(ValueError, match=text):
        draw_labels(pool, count, 3, seed=0)


def test_the_mask_marks_what_was_drawn():
    mask = label_mask(5, [torch.tensor([4, 1]), torch.tensor([0, 2])])
    assert mask.nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 2]]


def test_answers_on_one_split_or_on_one_each(pool):
    models = [student(0), student(1)]
    table = answer_table(models, pool)
    torch.testing.assert_close(table[1], evaluate(models[1], pool).logits)
    halves = [pool.subset(range(12)), pool.subset(range(12, 24))]
    torch.testing.assert_close(answer_table(models, halves)[1], table[1, 12:])


def test_each_student_of_each_group_is_the_one_that_fit_would_give(pool):
    g = torch.Generator().manual_seed(1)
    tables = torch.randn(2, 2, 24, 3, generator=g)
    labelled = label_mask(24, [draw_labels(pool, 6, 3, seed=s) for s in (5, 6)])
    hidden = Split(pool.images, pool.labels.clone())
    groups = teach(student, [5, 6], hidden, list(tables), labelled, CONFIG, temperature=[1.0, 4.0], alpha=[0.0, 0.7])
    for group, table, temperature, alpha in zip(groups, tables, (1.0, 4.0), (0.0, 0.7), strict=True):
        for model, seed, rows, known in zip(group, (5, 6), table, labelled, strict=True):
            one = student(seed)
            fit(one, pool, CONFIG, loss_fn=KnowledgeDistillation(rows, temperature, alpha, known), seed=seed)
            for a, b in zip(model.parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_labels_do_not_reach_a_student(pool):
    table = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(1))
    labelled = label_mask(24, [draw_labels(pool, 6, 3, seed=0)])
    scrambled = Split(pool.images, torch.where(labelled[0], pool.labels, 0))
    results = [
        teach(student, [0], split, [table], labelled, CONFIG, temperature=2.0, alpha=0.5)[0][0]
        for split in (pool, scrambled)
    ]
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tables": [torch.zeros(2, 24, 3)]}, r"R = 1 seeds, got \(2, 24, 3\)"),
        ({"labelled": torch.ones(1, 23, dtype=torch.bool)}, r"and \(1, 23\)"),
        ({"alpha": [0.1, 0.2]}, "alpha must be one number or one for each of 1 groups"),
        ({"alpha": 1.5}, "alphas in"),
        ({"temperature": 0.0}, "temperatures must be above 0"),
        ({"temperature": float("nan")}, "temperatures must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(pool, change, text):
    given = {"tables": [torch.zeros(1, 24, 3)], "labelled": torch.ones(1, 24, dtype=torch.bool)}
    given |= {"temperature": 2.0, "alpha": 0.5} | change
    numbers = {name: given.pop(name) for name in ("temperature", "alpha")}
    with pytest.raises(ValueError, match=text):
        teach(student, [0], pool, given["tables"], given["labelled"], CONFIG, **numbers)

import pytest
import torch

from lightning_clamp import _rows, fit_clamp
from lightning_clamp._rows import (
    as_rows,
    is_dense,
    item_blocks,
    log_softmax,
    merged,
    merged_batches,
    row_blocks,
    softmax,
)
from lightning_clamp.losses import focal_loss
from lightning_clamp.metrics import NegativeLogLikelihood, class_margin, negative_log_likelihood
from tests.scenarios import calibrated_logits


def test_class_outputs_are_rows_already():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    rows = as_rows(logits, target)
    assert torch.equal(rows.logits, logits)
    assert rows.item.tolist() == [0, 1, 2, 3]


def test_dense_outputs_become_one_row_per_scored_pixel():
    logits = torch.randn(2, 3, 4, 5)
    target = torch.randint(3, (2, 4, 5))
    target[1, 2, 3] = 255
    rows = as_rows(logits, target, ignore_index=255)
    assert rows.logits.shape == (39, 3)
    assert rows.n_items == 2
    position = 1 * 20 + 0 * 5 + 4
    assert torch.equal(rows.logits[position], logits[1, :, 0, 4])
    assert rows.per_item(torch.ones(39)).tolist() == [20, 19]


@pytest.mark.parametrize(
    ("logit_shape", "target_shape", "dense"),
    [
        ((4,), (4,), False),
        ((4, 1), (4,), False),
        ((4,), (4, 1), False),
        ((4, 1), (4, 1), False),
        ((4, 1, 2, 3), (4, 2, 3), True),
        ((4, 2, 3), (4, 1, 2, 3), True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_one_logit_heads_become_two_classes(logit_shape, target_shape, dense, dtype):
    logits, target = torch.randn(logit_shape), torch.randint(2, target_shape).to(dtype)
    rows = as_rows(logits, target, task="binary")
    torch.testing.assert_close(rows.logits.softmax(1)[:, 1], logits.flatten().sigmoid())
    assert rows.target.dtype == torch.int64
    assert is_dense(logits, "binary") == dense


@pytest.mark.parametrize("places", [(), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_each_label_of_an_item_is_a_row(places, dtype):
    logits, target = torch.randn(4, 3, *places), torch.randint(2, (4, 3, *places)).to(dtype)
    rows = as_rows(logits, target, task="multilabel")
    torch.testing.assert_close(rows.logits.softmax(1)[:, 1], logits.sigmoid().flatten())
    assert torch.equal(rows.target.reshape(target.shape), target.long())
    assert torch.equal(rows.label.reshape(logits.shape)[:, 1], torch.ones(4, *places).long())
    assert torch.equal(rows.item.reshape(logits.shape)[3], torch.full((3, *places), 3))
    assert is_dense(logits, "multilabel")


def test_labels_of_an_item_are_left_out_one_by_one():
    logits, target = torch.randn(2, 3), torch.tensor([[0.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    rows = as_rows(logits, target, task="multilabel", ignore_index=-1)
    assert rows.target.tolist() == [0, 1, 1]
    assert rows.label.tolist() == [0, 2, 2]
    assert rows.item.tolist() == [0, 0, 1]
    joined = next(merged([rows, rows]))
    assert joined.label.tolist() == [0, 2, 2, 0, 2, 2]
    assert joined.item.tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize(("task", "shape"), [("multilabel", (3, 4, 50)), ("multiclass", (3, 50)), ("binary", (3, 50))])
def test_blocks_have_the_rows_of_the_batch(task, shape, monkeypatch):
    logits, target = torch.randn(3, 4, 50)[:, : shape[1] if task == "multilabel" else 4], torch.randint(2, shape)
    logits = logits[:, 0] if task == "binary" else logits
    whole = as_rows(logits, target, task=task, ignore_index=0)
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 64)
    for blocks in (row_blocks, item_blocks):
        parts = list(blocks(logits, target, task=task, ignore_index=0))
        assert len(parts) > 2
        told = [torch.stack([part.logits[:, 1], *_labels(part)]) for part in parts]
        assert sorted(torch.cat(told, 1).T.tolist()) == sorted(
            torch.stack([whole.logits[:, 1], *_labels(whole)]).T.tolist()
        )


def _labels(rows):
    return [rows.target.float(), *([] if rows.label is None else [rows.label.float()])]


@pytest.mark.parametrize(("logit_shape", "target_shape"), [((4, 3), (4, 1)), ((4, 3, 2, 5), (4, 1, 2, 5))])
def test_class_indices_may_have_an_axis_of_length_1_for_the_class(logit_shape, target_shape):
    logits, target = torch.randn(logit_shape), torch.randint(3, target_shape)
    for one, other in zip(as_rows(logits, target)[:3], as_rows(logits, target.squeeze(1))[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(class_margin(logits, target).squeeze(1), class_margin(logits, target.squeeze(1)))
    assert focal_loss(logits, target) == focal_loss(logits, target.squeeze(1))
    assert negative_log_likelihood(logits, target) == negative_log_likelihood(logits, target.squeeze(1))


WAYS_OUT = {
    "token classifier": ((4, 7, 3), (4, 7), r"return logits.transpose\(1, 2\)"),
    "channels last": ((4, 8, 9, 3), (4, 8, 9), r"return logits.movedim\(-1, 1\)"),
    "quarter size": ((4, 3, 8, 8), (4, 32, 32), r"of its size, torch.nn.functional.interpolate\(logits, \(32, 32\)\)"),
    "volume": ((4, 3, 2, 2, 2), (4, 4, 4, 4), r"interpolate\(logits, \(4, 4, 4\)\)"),
    "last axis of 1": ((4, 3, 8, 8), (4, 8, 8, 1), r"use target.squeeze\(-1\)"),
    "one-hot, channels last": ((4, 3, 8, 9), (4, 8, 9, 3), r"target.argmax\(-1\)"),
    "pooled, not flattened": ((4, 3, 1, 1), (4,), r"return logits.flatten\(1\)"),
    "nothing to say": ((4, 3), (5,), r"need a target of shape \(4,\), got \(5,\)\.$"),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS_OUT)
def test_shapes_that_do_not_fit_come_with_the_way_out(case):
    logit_shape, target_shape, message = WAYS_OUT[case]
    with pytest.raises(ValueError, match=message) as caught:
        as_rows(torch.randn(logit_shape), torch.zeros(target_shape))  # of no dtype that fits: shapes come first
    assert "\n" not in str(caught.value)


def tokens(length, *, n=600):
    """Logits ``(n, 5, length)`` that are three times too large, and their labels."""
    logits, y = calibrated_logits(n * length)
    return 3 * logits.reshape(n, length, 5).transpose(1, 2), y.reshape(n, length)


IDENTITY = torch.nn.Identity()


def test_where_no_batch_tells_the_axis_of_the_classes_it_is_asked_for():
    logits, y = tokens(5)
    with pytest.raises(
        ValueError, match=r"fit together in two ways, .* logits.transpose\(1, 2\) .* target.unsqueeze\(1\)"
    ):
        fit_clamp(IDENTITY, [(logits.transpose(1, 2), y)], grids=())
    said = fit_clamp(IDENTITY, [(logits, y.unsqueeze(1))], grids=())
    assert float(said.clamp.temperature) == pytest.approx(3, rel=0.1)
    told = fit_clamp(IDENTITY, [(logits, y), tokens(7, n=100)], grids=())
    assert float(told.clamp.temperature) == pytest.approx(3, rel=0.1)
    image = torch.randn(40, 4, 4, 4), torch.randint(4, (40, 4, 4))
    with pytest.raises(ValueError, match=r"fit together in two ways, .* logits.movedim\(-1, 1\)"):
        fit_clamp(IDENTITY, [image], grids=())


def test_metrics_say_where_the_axis_of_the_classes_was_not_told(recwarn):
    logits, y = tokens(5, n=20)
    with pytest.warns(
        UserWarning, match=r"negative_log_likelihood took axis 1 for the classes. Logits of shape \(20, 5, 5\)"
    ):
        negative_log_likelihood(logits, y)
    negative_log_likelihood(logits, y.unsqueeze(1))
    metric = NegativeLogLikelihood()
    metric.update(logits, y)
    metric.update(*tokens(3, n=20))
    metric.compute()
    assert not recwarn


def test_levels_of_an_ordinal_head_are_binary():
    """CORAL: one logit per threshold, trained on whether the class lies above it."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 1, generator=generator) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    u = torch.rand(2000, 1, generator=generator)
    levels = (u < z.sigmoid()).float()
    rank = levels.sum(1).long()
    with pytest.raises(ValueError, match=r"the label 4, .* per threshold .* say task=\"binary\"") as caught:
        fit_clamp(IDENTITY, [(3 * z, rank)], grids=())
    assert "ignore_index" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r'\(2000, 4\): for several labels per item, each yes or no, say task="multilabel"'
    ):
        fit_clamp(IDENTITY, [(3 * z, levels)], grids=())
    result = fit_clamp(IDENTITY, [(3 * z, levels)], task="binary", method="temperature")
    assert float(result.clamp.temperature) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("logits", "target", "task", "error", "message"),
    [
        (torch.randn(4, 1), torch.zeros(4).long(), "multiclass", ValueError, 'say task="binary"'),
        (torch.randn(4, 3), torch.eye(4)[:, :3].long(), "multiclass", ValueError, "one-hot"),
        (torch.randn(4, 3), torch.zeros(4), "multiclass", TypeError, r"got torch.float32; use target.long\(\)"),
        (
            torch.randn(4, 3, 2),
            torch.zeros(4).long(),
            "multiclass",
            ValueError,
            r"target of shape \(4, 2\), got \(4,\)",
        ),
        (torch.randn(4), torch.zeros(4), "multiclass", ValueError, r'one value per class .* say task="binary"'),
        (torch.randn(4, 3), torch.eye(4)[:, :3], "multiclass", ValueError, r"one-hot .* target.argmax\(1\)"),
        (torch.randn(4, 3), torch.zeros(4).long(), "binary", ValueError, "one logit per target"),
        (torch.randn(4), torch.full((4,), 0.5), "binary", ValueError, "soft labels"),
        (torch.randn(4, 3), torch.full((4, 3), 0.5), "multilabel", ValueError, "soft labels"),
        (torch.randn(4, 3), torch.full((4, 3), torch.nan), "multilabel", ValueError, r"got nan: .*nan_to_num\(-1\)"),
        (torch.randn(4, 3), torch.zeros(4).long(), "multilabel", ValueError, r'\(4,\); .* say task="multiclass"'),
        (torch.randn(4), torch.zeros(4), "multilabel", ValueError, r'one logit per item say task="binary"'),
        (
            torch.randn(4, 3),
            torch.ones(4, 3),
            "multiclass",
            ValueError,
            r'\(4, 3\): for several .* say task="multilabel"',
        ),
        (
            torch.zeros(4, 3).long(),
            torch.zeros(4).long(),
            "multiclass",
            TypeError,
            "float tensor of logits, got torch.int64",
        ),
        (torch.randn(4, 3), [0, 1, 2, 0], "multiclass", TypeError, "must be a tensor, got list"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(logits, target, task, error, message):
    with pytest.raises(error, match=message):
        as_rows(logits, target, task=task)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 2)], ids=["classes", "dense"])
def test_batches_of_any_size_are_laid_out_in_blocks_of_whole_items(monkeypatch, shape):
    monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", 14)
    logits = torch.arange(torch.Size(shape).numel()).reshape(shape).float()
    target = torch.randint(3, (7, *shape[2:]), generator=torch.Generator().manual_seed(0))
    target[2] = target[-1] = 9  # items without a row
    whole = as_rows(logits, target, ignore_index=9)
    expected = whole.per_item(whole.logits)
    for size in (1, 3, 7):
        parts = [as_rows(a, b, ignore_index=9) for a, b in zip(logits.split(size), target.split(size), strict=True)]
        blocks = list(merged(parts))
        assert max(block.logits.numel() for block in blocks) <= 18  # about 14: items have no row, or two
        assert len(blocks) < 7
        assert torch.equal(torch.cat([block.target for block in blocks]), whole.target)
        assert torch.equal(torch.cat([block.per_item(block.logits) for block in blocks]), expected)


def test_blocks_of_whole_items_say_which_label_each_row_is(monkeypatch):
    monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", 14)
    whole = as_rows(torch.zeros(7, 3), torch.zeros(7, 3), task="multilabel")
    blocks = list(merged([whole]))
    assert len(blocks) > 1
    assert torch.equal(torch.cat([block.label for block in blocks]), torch.arange(3).repeat(7))


@pytest.mark.parametrize("n_classes", [2, 10, 40])
def test_a_softmax_is_the_same_whether_rows_or_columns_lie_together(n_classes):
    logits = 50 * torch.randn(300, n_classes, generator=torch.Generator().manual_seed(0)).double()
    logits[::7, 0] = -torch.inf
    (rows,) = merged([as_rows(logits, torch.zeros(300, dtype=torch.long)).doubled()])
    assert rows.logits.stride() == ((1, 300) if n_classes < 40 else (n_classes, 1))
    torch.testing.assert_close(log_softmax(rows.logits).exp(), logits.softmax(1))
    torch.testing.assert_close(softmax(rows.logits), logits.softmax(1))
    assert bool(log_softmax(rows.logits).isfinite().all())


def test_batches_are_joined_up_to_a_block_and_not_across_layouts(monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 60)
    sizes = [(4, 3), (4, 3), (12, 3), (4, 3), (4, 3, 2), (4, 3, 2), (30, 3), (1, 3)]
    batches = [(torch.full(size, float(k)), torch.full((size[0], *size[2:]), k)) for k, size in enumerate(sizes)]
    joined = list(merged_batches(batches))
    assert [tuple(logits.shape) for logits, _ in joined] == [(20, 3), (4, 3), (8, 3, 2), (30, 3), (1, 3)]
    for part in (0, 1):
        values = [batch[part].flatten() for batch in batches]
        torch.testing.assert_close(torch.cat([batch[part].flatten() for batch in joined]), torch.cat(values))
    assert [len(target) for _, target in joined] == [len(logits) for logits, _ in joined]

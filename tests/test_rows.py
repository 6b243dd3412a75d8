import pytest
import torch

from lightning_clamp._rows import as_rows, is_dense


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
        (torch.randn(4), torch.zeros(4).long(), "multiclass", ValueError, r"shape \(N, C\)"),
        (torch.randn(4, 3), torch.zeros(4).long(), "binary", ValueError, "one logit per target"),
        (torch.randn(4), torch.full((4,), 0.5), "binary", ValueError, "soft labels"),
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

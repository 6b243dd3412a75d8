"""Several labels per item: what the record and its table say of all of them, and of each."""

import math
from dataclasses import replace

import pytest
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.by_label import LabelMetrics
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.metrics import (
    BootstrapSums,
    accuracy,
    expected_calibration_error,
    negative_log_likelihood,
    paired_bootstrap,
    reliability_curve,
)
from lightning_clamp.report import figures, scalars

FUNCTIONS = {"nll": negative_log_likelihood, "ece": expected_calibration_error, "accuracy": accuracy}
OPTIONS = {"task": "multilabel", "ignore_index": -1}


def half_known(n=600, k=5):
    """Logits that need another temperature for each label; of label 1 a tenth is known, of label 3 nothing."""
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    target = (torch.rand(n, k, generator=generator) < truth.sigmoid()).long()
    target[n // 10 :, 1] = -1
    target[:, 3] = -1
    return truth * torch.linspace(1, 4, k), target


@pytest.fixture(scope="module")
def result():
    z, target = half_known()
    return fit_clamp(torch.nn.Identity(), [(z[:250], target[:250]), (z[250:], target[250:])], grids=(), **OPTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_record_has_the_metrics_of_each_label_and_their_mean(result, name):
    z, target = half_known()
    for side, logits, total in (
        (result.by_label.before, z, result.before),
        (result.by_label.after, result.clamp.scale(z), result.after),
    ):
        expected = FUNCTIONS[name](logits, target, average="none", **OPTIONS)
        torch.testing.assert_close(side[name], expected, equal_nan=True)
        assert side[name].isnan().tolist() == [False, False, False, True, False]
        assert total[name] == pytest.approx(float(expected.nanmean()))
    change = result.change[name]
    assert change.value == pytest.approx(result.after[name] - result.before[name])
    assert not math.isnan(change.low)
    assert change.low <= change.high


def test_the_diagram_is_of_all_entries_and_of_the_worst_label(result):
    z, target = half_known()
    labels = result.by_label
    assert labels.entries.tolist() == [600, 60, 600, 0, 600]
    assert set(labels.worst) == {0, 2, 4}
    ece = labels.after["ece"][torch.tensor(labels.worst)].tolist()
    assert ece == sorted(ece, reverse=True)
    worst = labels.worst[0]
    pairs = zip(
        (result.reliability, labels.reliability), ((z, target), (z[:, [worst]], target[:, [worst]])), strict=True
    )
    for (before, _), (logits, labelled) in pairs:
        torch.testing.assert_close(before, reliability_curve(logits, labelled, **OPTIONS), equal_nan=True)
    after = labels.reliability[1].calibration_error()
    assert float(after) == pytest.approx(float(labels.after["ece"][worst]))


def test_the_interval_of_a_mean_over_labels_is_that_of_weighted_entries():
    """Of labels that are known of different items the mean weighs entries, and the interval is the normal one's."""
    z, target = half_known(4000)
    sums = [BootstrapSums(num_labels=5, **OPTIONS) for _ in range(2)]
    for metric, scale in zip(sums, (1.0, 0.5), strict=True):
        metric.update(scale * z, target)
    known = (target >= 0).double()
    weight = (known / known.sum(0)).nan_to_num(0) / 4
    entry = [
        F.binary_cross_entropy_with_logits(s * z, target.clamp(min=0).double(), reduction="none") for s in (1, 0.5)
    ]
    of_item = ((entry[1] - entry[0] - (known * (entry[1] - entry[0])).sum(0) / known.sum(0).clamp(min=1)) * weight).sum(
        1
    )
    found = paired_bootstrap(*(metric.compute() for metric in sums), resamples=4000)["nll"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(of_item.square().sum().sqrt()), rel=0.08)


def test_many_labels_are_resampled_some_at_a_time(monkeypatch):
    z, target = half_known()
    sums = [BootstrapSums(num_labels=5, **OPTIONS) for _ in range(2)]
    for metric, scale in zip(sums, (1.0, 0.5), strict=True):
        metric.update(scale * z, target)
    whole = paired_bootstrap(*(metric.compute() for metric in sums))
    monkeypatch.setattr("lightning_clamp.metrics.bootstrap._LABELS_AT_ONCE", 2)
    parts = paired_bootstrap(*(metric.compute() for metric in sums))
    for name, interval in whole.items():
        assert parts[name] == pytest.approx(interval, abs=1e-12)


@pytest.mark.slow
def test_of_many_labels_each_has_fewer_blocks(monkeypatch):
    sizes = []
    register = BootstrapSums.add_sums
    monkeypatch.setattr(
        BootstrapSums, "add_sums", lambda self, name, *shape: (sizes.append(shape), register(self, name, *shape))
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 600, generator=generator)
    target = (torch.rand(z.shape, generator=generator) < z.sigmoid()).float()
    result = fit_clamp(torch.nn.Identity(), [(2 * z, target)], method="temperature", task="multilabel")
    assert set(sizes) == {(64, 47)}
    assert result.by_label.entries.shape == (600,)


def test_the_table_has_the_worst_first_and_counts_the_others(result):
    lines = str(result).splitlines()
    assert lines[6] == "above: means over 5 labels"
    table = lines[7:]
    worst = result.by_label.worst
    assert table[0].split()[:3] == ["label,", "worst", "first"]
    assert [line.split()[:2] for line in table[1:4]] == [[str(label), "600"] for label in worst]
    assert table[-1] == "too few known entries to say (below 100): 2 of 5 labels"
    named = result.by_label.table(["loop", "even", "prime", "tall", "odd"], most=1).splitlines()
    assert named[1].startswith(["loop", "even", "prime", "tall", "odd"][worst[0]])
    assert f"{float(result.by_label.before['nll'][worst[0]]):.4f}" in named[1]
    assert named[2] == "and 2 more"
    with pytest.raises(ValueError, match="`names` must have one name per label, 5, got 2"):
        result.by_label.table(["loop", "even"])


def test_it_is_saved_and_comes_back(result):
    again = CalibrationResult.from_state(result.to_state())
    assert str(again) == str(result)
    torch.testing.assert_close(again.by_label.reliability[0], result.by_label.reliability[0], equal_nan=True)
    for side in ("before", "after"):
        for name, values in getattr(result.by_label, side).items():
            torch.testing.assert_close(getattr(again.by_label, side)[name], values, equal_nan=True)


def test_of_few_samples_no_label_is_called_the_worst():
    z, target = half_known(50)
    few = fit_clamp(torch.nn.Identity(), [(z, target)], method="temperature", **OPTIONS)
    assert few.by_label.worst == []
    assert few.by_label.reliability is None
    assert LabelMetrics.from_state(few.by_label.to_state()).reliability is None
    assert str(few).endswith("too few known entries to say (below 100): 5 of 5 labels")


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_other_tasks_have_no_labels(task):
    z, target = half_known()
    pair = (torch.stack([-z[:, 4], z[:, 4]], 1), target[:, 4]) if task == "multiclass" else (z[:, 4], target[:, 4])
    result = fit_clamp(torch.nn.Identity(), [pair], method="temperature", task=task)
    assert result.by_label is None
    assert "label" not in str(result)
    assert CalibrationResult.from_state(result.to_state()).by_label is None


def test_the_numbers_and_pictures_of_the_labels_have_their_log_keys(result):
    numbers = {key for key in scalars(result) if key[-1].isdigit()}
    assert numbers == {
        f"calibration/{when}/{name}_{label}"
        for when in ("before", "after")
        for name in ("nll", "ece")
        for label in (0, 2, 4)
    }
    assert scalars(result)["calibration/after/ece_2"] == float(result.by_label.after["ece"][2])
    drawn = figures(result)
    assert set(drawn) == {"reliability", "reliability_worst_label"}
    assert drawn["reliability_worst_label"].axes[0].get_title() == f"label {result.by_label.worst[0]}"
    for figure in drawn.values():
        plt.close(figure)


def test_of_hundreds_of_labels_only_the_means_are_logged(result):
    many = {name: values.repeat(21) for name, values in result.by_label.after.items()}
    labels = replace(result.by_label, before=many, after=many, entries=result.by_label.entries.repeat(21))
    assert not any(key[-1].isdigit() for key in scalars(replace(result, by_label=labels)))


def test_sums_of_no_labels_say_so():
    metric = BootstrapSums()
    metric.update(torch.randn(5, 3), torch.zeros(5).long())
    with pytest.raises(ValueError, match=r'These sums are of no labels: BootstrapSums\(task="multilabel"'):
        _ = metric.compute().by_label

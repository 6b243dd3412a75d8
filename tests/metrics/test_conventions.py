"""What users of torchmetrics expect of every metric: pictures, wrappers, collections, modules that are scripted."""

import pytest
import torch
from matplotlib import pyplot as plt

from tests.metrics.test_metrics import METRICS, make
from tests.scenarios import calibrated_logits


class Holder(torch.nn.Module):
    """A module that holds a metric."""

    def __init__(self, metric):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.metric = metric

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_value_and_its_course_are_drawn_where_one_likes(metric_class):
    logits, target = calibrated_logits(300)
    metric = make(metric_class)
    course = [metric(logits[part], target[part]) for part in torch.arange(300).split(100)]
    figure, axes = plt.subplots(1, 2)
    for ax, value in zip(axes, (course[0], course), strict=True):
        assert metric.plot(value, ax=ax) == (figure, ax)
        assert ax.lines
    figure, ax = metric.plot()
    assert ax in figure.axes
    plt.close("all")


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_module_that_holds_it_is_scripted(metric_class):
    holder = Holder(make(metric_class))
    x = torch.randn(3, 2)
    assert torch.equal(torch.jit.script(holder)(x), holder(x))

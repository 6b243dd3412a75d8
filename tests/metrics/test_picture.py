import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from lightning_clamp.metrics import ReliabilityDiagram, plot_reliability
from tests.scenarios import calibrated_logits


def curve(scale=1.0, n=500, n_bins=15):
    diagram = ReliabilityDiagram(n_bins)
    logits, target = calibrated_logits(n)
    diagram.update(scale * logits, target)
    return diagram.compute()


def filled(value):
    return int((torch.atleast_1d(value.counts) > 0).sum())


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("n_bins", [1, 15])
def test_a_bar_per_filled_bin_and_the_shares_below(n_bins):
    diagram = ReliabilityDiagram(n_bins)
    logits, target = calibrated_logits(500)
    diagram.update(3 * logits, target)
    _, ax = diagram.plot()
    value = diagram.compute()
    common = ax.containers[0]
    assert len(common) == filled(value)
    reached = torch.minimum(torch.atleast_1d(value.accuracy), torch.atleast_1d(value.confidence))
    heights = [bar.get_height() for bar in common]
    assert heights == pytest.approx(reached[torch.atleast_1d(value.counts) > 0].tolist())
    (strip,) = ax.child_axes
    assert sum(bar.get_height() for bar in strip.patches) == pytest.approx(1)
    assert (strip.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_gaps_are_coloured_by_their_sign():
    for scale, name in ((4.0, "over-confident"), (0.3, "under-confident")):
        _, ax = plot_reliability(curve(scale, n=20_000))
        labels = ax.get_legend_handles_labels()[1]
        assert name in labels
        value = curve(scale, n=20_000)
        gap = (value.confidence - value.accuracy)[value.counts > 0]
        signed = gap[gap > 0] if scale > 1 else -gap[gap < 0]
        drawn = next(container for container in ax.containers if container.get_label() == name)
        assert [bar.get_height() for bar in drawn] == pytest.approx(signed.tolist())


def test_intervals_are_drawn_from_lower_to_upper():
    value = curve()
    _, ax = plot_reliability(value)
    (lines,) = (c for c in ax.containers if c.get_label() == "accuracy, 95 % interval")
    segments = lines.lines[2][0].get_segments()
    seen = value.counts > 0
    assert [segment[0][1] for segment in segments] == pytest.approx(value.lower[seen].tolist(), abs=1e-12)
    assert [segment[1][1] for segment in segments] == pytest.approx(value.upper[seen].tolist(), abs=1e-12)


def test_before_and_after_in_axes_of_ones_own():
    _, own = plt.subplots()
    figure, ax = plot_reliability(curve(), before=curve(3.0), ax=own, title="mine")
    assert ax is own
    assert figure is own.figure
    assert own.get_title() == "mine"
    assert texts(own) == [f"before {curve(3.0).calibration_error():.1%}", f"ECE {curve().calibration_error():.1%}"]
    (line,) = (line for line in own.lines if line.get_label() == "before")
    assert len(line.get_xdata()) == filled(curve(3.0))


@pytest.mark.parametrize("n_bins", [1, 15])
def test_nothing_seen_is_said(n_bins):
    with pytest.warns(UserWarning, match="no position was scored"):
        empty = curve(n=0, n_bins=n_bins)
    _, ax = plot_reliability(empty)
    assert texts(ax) == ["no data"]


def test_colours_follow_the_background():
    drawn = {}
    for style in ("default", "dark_background"):
        with plt.style.context(style):
            figure, ax = plot_reliability(curve(), before=curve(3.0))
            figure.canvas.draw()
            background = to_rgb(ax.get_facecolor())
            drawn[style] = ax.containers[0][0].get_facecolor()
            (diagonal, *_) = ax.lines
            for colour in (drawn[style], diagonal.get_color()):
                assert sum(abs(a - b) for a, b in zip(to_rgb(colour), background, strict=True)) > 0.6
    assert drawn["default"] != drawn["dark_background"]


def test_dark_axes_of_ones_own_have_light_lines():
    _, ax = plt.subplots()
    ax.set_facecolor("black")
    ax.set_title("kept")
    plot_reliability(curve(), ax=ax)
    assert min(to_rgb(ax.lines[0].get_color())) > 0.8
    assert min(to_rgb(ax.texts[-1].get_color())) > 0.8
    assert max(to_rgb(ax.child_axes[0].get_facecolor())) < 0.1
    assert ax.get_title() == "kept"


def test_the_figure_of_a_subfigure_is_the_figure():
    figure = plt.figure()
    left, _ = figure.subfigures(1, 2)
    assert plot_reliability(curve(), ax=left.subplots())[0] is figure


def test_the_diagram_draws_a_given_value_and_a_comparison():
    diagram = ReliabilityDiagram()
    _, ax = diagram.plot(curve(), before=curve(3.0))
    assert len(texts(ax)) == 2

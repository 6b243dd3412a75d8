import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from lightning_clamp.metrics import ReliabilityDiagram, plot_reliability, reliability_curve
from tests.scenarios import calibrated_logits


def curve(scale=1.0, n=500, n_bins=15):
    diagram = ReliabilityDiagram(n_bins)
    logits, target = calibrated_logits(n)
    diagram.update(scale * logits, target)
    return diagram.compute()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def bars(ax, label):
    return next(container for container in ax.containers if container.get_label() == label)


@pytest.mark.parametrize("n_bins", [1, 15])
def test_a_bar_up_to_the_accuracy_per_filled_bin_and_the_shares_below(n_bins):
    diagram = ReliabilityDiagram(n_bins)
    logits, target = calibrated_logits(500)
    diagram.update(3 * logits, target)
    _, ax = diagram.plot()
    value = diagram.compute()
    accuracy, counts = torch.atleast_1d(value.accuracy), torch.atleast_1d(value.counts)
    heights = [bar.get_height() for bar in bars(ax, "accuracy")]
    assert heights == pytest.approx(accuracy[counts > 0].tolist())
    shares = ax.containers[-1]
    assert all(bar.get_y() == pytest.approx(-0.2) and bar.get_height() <= 0.14 + 1e-9 for bar in shares)
    assert [bar.get_height() for bar in shares] == pytest.approx((0.14 * counts / counts.max()).tolist())
    largest = f"{float(counts.max() / counts.sum()):.0%}"
    assert [label.get_text() for label in ax.get_yticklabels()[:2]] == ["share", largest]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_gaps_from_accuracy_to_confidence_are_coloured_by_their_sign():
    for scale, name in ((4.0, "over-confident"), (0.3, "under-confident")):
        value = curve(scale, n=20_000)
        _, ax = plot_reliability(value)
        gap = (value.confidence - value.accuracy)[value.counts > 0]
        signed = gap[gap > 0] if scale > 1 else gap[gap < 0]
        assert [bar.get_height() for bar in bars(ax, name)] == pytest.approx(signed.tolist())


def test_intervals_are_drawn_from_lower_to_upper():
    value = curve()
    seen = value.counts > 0
    for drawn, name in ((value, "95 % interval"), ({"a": value}, f"a: ECE {value.calibration_error():.1%}")):
        _, ax = plot_reliability(drawn)
        segments = bars(ax, name).lines[2][0].get_segments()
        assert [segment[0][1] for segment in segments] == pytest.approx(value.lower[seen].tolist(), abs=1e-12)
        assert [segment[1][1] for segment in segments] == pytest.approx(value.upper[seen].tolist(), abs=1e-12)


def test_curves_are_named_in_axes_of_ones_own():
    _, own = plt.subplots()
    models = {"ResNet": curve(3.0), "ViT": curve(), "CLIP": curve(0.5)}
    figure, ax = plot_reliability(models, ax=own, title="mine")
    assert ax is own
    assert figure is own.figure
    assert own.get_title() == "mine"
    named = [f"{name}: ECE {value.calibration_error():.1%}" for name, value in models.items()]
    assert [text.get_text() for text in own.get_legend().get_texts()] == named
    for name, value in zip(named, models.values(), strict=True):
        points = bars(ax, name).lines[0]
        assert points.get_xdata().tolist() == pytest.approx(value.confidence[value.counts > 0].tolist())
        assert points.get_ydata().tolist() == pytest.approx(value.accuracy[value.counts > 0].tolist())
    assert len({to_rgb(bars(ax, name).lines[0].get_color()) for name in named}) == 3


def test_of_many_steps_the_first_and_the_last_are_named():
    """As torchmetrics gives a metric's values over the epochs; a curve without data is said to have none."""
    _, ax = ReliabilityDiagram().plot([curve(1 + step / 5) for step in range(12)])
    assert [text.get_text()[:7] for text in ax.get_legend().get_texts()] == ["step 0:", "step 11"]
    with pytest.warns(UserWarning, match="no position was scored"):
        empty = curve(n=0)
    _, ax = plot_reliability({"one": curve(), "none": empty})
    assert ax.get_legend().get_texts()[1].get_text() == "none: no data"


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_probability_of_class_1_has_names_of_its_own(scale):
    """A probability of .1 that should be .2 is no lack of confidence."""
    logits, target = calibrated_logits(2000, n_classes=2)
    options = {"task": "binary", "confidence": "positive"}
    diagram = ReliabilityDiagram(**options)
    diagram.update(scale * (logits[:, 1] - logits[:, 0]), target)
    function = reliability_curve(scale * (logits[:, 1] - logits[:, 0]), target, **options)
    for drawn in (diagram.plot(), plot_reliability(function), plot_reliability({"a": function})):
        ax = drawn[1]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("probability of class 1", "frequency of class 1")
        words = " ".join([*texts(ax), *ax.get_legend_handles_labels()[1]])
        assert "probability too high" in words
        assert "probability too low" in words
        assert "confident" not in words
    with pytest.raises(
        ValueError, match=r"cannot hold curves of confidence=\"top\" and of \"positive\" \(here \['b'\]\)"
    ):
        plot_reliability({"a": curve(), "b": function})


BAD = {
    "a metric": (ReliabilityDiagram(), "got ReliabilityDiagram; the compute"),
    "a metric by name": ({"vit": ReliabilityDiagram()}, "got ReliabilityDiagram as 'vit'; the compute"),
    "a number in a list": ([0.3], "got float as 'step 0'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_curve_is_named(case):
    given, message = BAD[case]
    with pytest.raises(TypeError, match=message):
        plot_reliability(given)
    assert not plt.get_fignums()


@pytest.mark.parametrize("none", [{}, []])
def test_no_curve_is_said(none):
    with pytest.raises(ValueError, match="needs at least one curve, got none"):
        plot_reliability(none)


LAYOUTS = {
    "one": lambda: plt.subplots(squeeze=False)[1],
    "small": lambda: plt.subplots(2, 3, squeeze=False)[1],
    "narrow": lambda: plt.subplots(1, 4, figsize=(8, 2.5), squeeze=False)[1],
    "constrained": lambda: plt.subplots(2, 2, figsize=(7, 7), layout="constrained")[1],
    "tight": lambda: plt.subplots(2, 2, layout="tight")[1],
    "subfigure": lambda: plt.figure(layout="constrained").subfigures(1, 2)[0].subplots(2, 1, squeeze=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("several", [False, True])
def test_all_of_it_lies_in_the_axes_and_the_legend_covers_nothing(layout, several):
    """What a script draws that cares for no layout: the names of the axes are where every plot has them."""
    axes = LAYOUTS[layout]()
    for ax in axes.flat:
        plot_reliability({f"model {k}": curve(k) for k in (0.3, 1, 3)} if several else curve(3.0), ax=ax)
    figure = axes.flat[0].figure.figure
    figure.canvas.draw()
    for ax in axes.flat:
        assert not ax.child_axes
        legend = ax.get_legend().get_window_extent()
        assert legend.y0 >= ax.transData.transform((0, 1))[1] - 1
        assert legend.y1 <= ax.bbox.y1 + 1
        strip = ax.transData.transform((0, -0.2))[1]
        assert strip > ax.bbox.y0


@pytest.mark.parametrize("n_bins", [1, 15])
def test_nothing_seen_is_said(n_bins):
    with pytest.warns(UserWarning, match="no position was scored"):
        empty = curve(n=0, n_bins=n_bins)
    _, ax = plot_reliability(empty)
    assert texts(ax) == ["no data"]
    _, ax = plot_reliability({"a": empty, "b": empty})
    assert "no data" in texts(ax)


def test_colours_follow_the_background():
    drawn = {}
    for style in ("default", "dark_background"):
        with plt.style.context(style):
            _, ax = plot_reliability(curve(3.0))
            _, several = plot_reliability({f"{k}": curve(k) for k in (1, 2, 3, 4, 5, 6)})
            background = to_rgb(ax.get_facecolor())
            diagonal = ax.lines[0].get_color()
            lines = [container.lines[0].get_color() for container in several.containers]
            drawn[style] = bars(ax, "accuracy")[0].get_facecolor()
            for colour in (drawn[style], diagonal, bars(ax, "over-confident")[0].get_facecolor(), *lines):
                assert sum(abs(a - b) for a, b in zip(to_rgb(colour), background, strict=True)) > 0.6
    assert drawn["default"] != drawn["dark_background"]


def test_dark_axes_of_ones_own_have_light_lines():
    _, ax = plt.subplots()
    ax.set_facecolor("black")
    ax.set_title("kept")
    plot_reliability(curve(), ax=ax)
    assert min(to_rgb(ax.lines[0].get_color())) > 0.8
    legend = ax.get_legend()
    for text in (*legend.get_texts(), legend.get_title()):
        assert min(to_rgb(text.get_color())) > 0.8
    assert ax.get_title() == "kept"


def test_the_figure_of_a_subfigure_is_the_figure():
    figure = plt.figure()
    left, _ = figure.subfigures(1, 2)
    assert plot_reliability(curve(), ax=left.subplots())[0] is figure


def test_the_diagram_draws_what_it_is_given():
    _, ax = ReliabilityDiagram().plot({"before": curve(3.0), "after": curve()})
    assert len(ax.get_legend().get_texts()) == 2

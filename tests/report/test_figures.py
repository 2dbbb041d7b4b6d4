"""What the plots say: points, labels, bands, marks; never pixels."""

import re
from functools import cache
from importlib import resources
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qprobe.errors import RunError
from qprobe.manifest.records import NEAREST, Compared
from qprobe.report.against import Side, against_plot
from qprobe.report.figures import COLUMN, PAGE, Kept, Layout, spike_plot
from qprobe.report.frontier import frontier_plot
from qprobe.report.panels import LABELLED_SPIKES, panel_columns, tower_runs, tower_spans
from qprobe.runs.key import DAMAGE
from tests.report.tables import MEASURES, layer_table

pytestmark = pytest.mark.slow

SPIKES = {3: 200.0, 4: 180.0, 14: 50.0, 15: 60.0, 16: 70.0, 25: 90.0}


def points(figure: Figure, gid: str) -> list[tuple[int, float]]:
    (line,) = [x for ax in figure.axes for x in ax.lines if x.get_gid() == gid]
    return [(int(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


@cache
def spikes_drawn(
    count: int = 30, high: tuple[int, ...] = (), kept: tuple[int, ...] = (), layout: Layout = PAGE
) -> Figure:
    """The plot of `layer_table(count)`, drawn once for all tests that look at it; none may change it.

    high: which of SPIKES it has. kept: places of layers in 16-bit, lm_head beside them.
    """
    table = layer_table(count, {at: SPIKES[at] for at in high})
    always = frozenset(["lm_head"] if kept else ())
    return spike_plot(table, Kept(frozenset(table["layer"].iloc[list(kept)]), always), "a model", layout)


def texts(figure: Figure, gid: str) -> list[str]:
    return [t.get_text() for ax in figure.axes for t in ax.texts if t.get_gid() == gid]


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [legend.get_title().get_text(), *(t.get_text() for t in legend.get_texts())]


@pytest.mark.parametrize("count", [30, 600])
def test_every_layer_is_drawn_once_at_its_place_and_value(count: int):
    table = layer_table(count, SPIKES)
    figure = spikes_drawn(count, tuple(SPIKES), (3, 14))
    for panel in panel_columns():
        drawn = [x for how in ("kept", "always", "quantized") for x in points(figure, f"{panel.name}:{how}")]
        assert sorted(drawn) == list(enumerate(table[panel.name]))


def test_layers_in_16_bit_are_the_marked_ones():
    figure = spikes_drawn(30, tuple(SPIKES), (3, 14))
    assert [x for x, _ in points(figure, "activation_nmse:kept")] == [3, 14]
    assert "kept in 16-bit (2 layers)" in legend_texts(figure)
    assert [x for x, _ in points(figure, "activation_nmse:always")] == [29]
    # As in the verdict: what standard 4-bit keeps as well is named and not counted.
    assert "in 16-bit in standard 4-bit too (lm_head)" in legend_texts(figure)
    assert "4-bit (27 layers)" in legend_texts(figure)


def test_measures_not_taken_have_no_panel_and_are_named():
    table = layer_table(30).assign(propagated_nmse=np.nan, sensitivity_kl=np.nan)
    figure = spike_plot(table, Kept(), "a model")
    assert len(figure.axes) == 3
    said = legend_texts(figure)[0].splitlines()
    assert said[0] == "24 samples; not measured: propagated error, sensitivity"


def test_layers_that_never_ran_are_counted_and_not_drawn():
    table = layer_table(30)
    table.loc[[5, 6], ["activation_nmse", "activation_peak"]] = np.nan
    figure = spike_plot(table, Kept(), "a model")
    assert {5, 6}.isdisjoint(x for x, _ in points(figure, "activation_nmse:quantized"))
    assert "2 of 30 layers have no activation error" in legend_texts(figure)[0]


def test_the_tallest_spikes_are_named():
    figure = spikes_drawn(30, tuple(SPIKES), (3, 14))
    activation = [t.get_text() for t in figure.axes[1].texts if t.get_gid() == "spike"]
    assert {"vision.0.self_attn.o_proj", "vision.0.mlp.fc1"} <= set(activation)
    assert len(activation) <= LABELLED_SPIKES


def test_nothing_is_named_where_nothing_stands_out():
    table = layer_table(30)
    for panel in panel_columns():
        table[panel.name] = np.linspace(1.0, 1.1, 30)  # no value beyond the fences of a uniform spread
    assert texts(spike_plot(table, Kept(), "a model"), "spike") == []


@pytest.mark.parametrize("layout", [PAGE, COLUMN])
@pytest.mark.parametrize("measured", [["weight_nmse"], list(MEASURES)])
def test_the_legend_lies_below_the_panels_however_few_they_are(layout: Layout, measured: list[str]):
    table = layer_table(30)
    table[[column for column in MEASURES if column not in measured]] = np.nan
    figure = spike_plot(table, Kept(frozenset(table["layer"].iloc[[3]])), "a model", layout)
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    lowest = figure.axes[len(measured) - 1]
    assert legend.get_window_extent(renderer).y1 <= lowest.get_tightbbox(renderer).y0 + 1
    assert lowest.get_window_extent(renderer).height >= 0.6 * layout.panel_height * figure.dpi


@pytest.mark.parametrize("layout", [PAGE, COLUMN])
@pytest.mark.parametrize("count", [30, 90, 600])
def test_names_of_spikes_overlap_neither_each_other_nor_a_leader(count: int, layout: Layout):
    figure = spikes_drawn(count, tuple(SPIKES), (3, 14), layout)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for ax in figure.axes:
        boxes = [t.get_window_extent(renderer) for t in ax.texts if t.get_gid() == "spike"]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        for box in boxes:
            assert box.y1 <= ax.get_window_extent().y1 and box.x0 >= ax.get_window_extent().x0
            assert box.x1 <= ax.get_window_extent().x1 + 1
        leaders = [ax.transData.transform(x.get_xydata()) for x in ax.lines if x.get_gid() == "leader"]
        for (x, _), (_, top) in leaders:
            assert not any(box.x0 < x < box.x1 and box.y0 < top - 2 and box.y1 < top for box in boxes)


def test_neighbouring_spikes_of_a_large_model_are_all_named():
    figure = spike_plot(layer_table(600, {3: 60.0, 17: 90.0, 25: 40.0}), Kept(), "a model")
    named = {t.get_text() for t in figure.axes[1].texts if t.get_gid() == "spike"}
    assert named == {"vision.0.self_attn.o_proj", "vision.3.self_attn.v_proj", "vision.5.self_attn.q_proj"}


@pytest.mark.parametrize("count", [30, 600])
def test_the_column_form_is_as_wide_as_a_column_and_loses_nothing_on_its_edges(count: int):
    figure = spikes_drawn(count, tuple(SPIKES), (3, 14), COLUMN)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert figure.get_figwidth() == 3.35
    written = [*figure.texts, *(ax.yaxis.label for ax in figure.axes), *(ax.title for ax in figure.axes)]
    written += [t for ax in figure.axes for t in (*ax.texts, *ax.get_yticklabels())]
    (legend,) = figure.legends
    for box in [t.get_window_extent(renderer) for t in written] + [legend.get_window_extent(renderer)]:
        assert box.width == 0 or (box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1)
    assert min(t.get_fontsize() for t in written) >= 4.5  # points at the size of print
    assert figure.axes[0].get_title(loc="left") == "weight error (nmse)"


def test_each_stem_reaches_from_the_floor_of_its_panel_to_its_own_value():
    table, ax = layer_table(30), spikes_drawn().axes[0]
    (drawn,) = [x for x in ax.lines if x.get_gid() == "stems"]
    stems = drawn.get_xydata().reshape(30, 3, 2)
    floor = ax.get_ylim()[0]
    assert stems[:, :2, 0].tolist() == [[i, i] for i in range(30)]
    assert stems[:, :2, 1].tolist() == [[floor, value] for value in table["weight_nmse"]]
    assert np.isnan(stems[:, 2]).all()  # nothing joins one stem to the next


def test_standard_errors_of_the_sensitivity_are_drawn():
    table = layer_table(30)
    figure = spikes_drawn()
    (bars,) = figure.axes[4].containers
    (drawn,) = bars.lines[2]
    low, high = drawn.get_segments()[7][:, 1]
    value, error = table["sensitivity_kl"][7], table["sensitivity_kl_se"][7]
    assert (low, high) == pytest.approx((value - error, value + error))
    assert "bars: standard error" in legend_texts(figure)[0]


def test_towers_are_bands_from_their_first_to_their_last_layer():
    figure = spikes_drawn()
    vision = [p for p in figure.axes[0].patches if p.get_gid() == "tower:vision"]
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in vision] == [(-0.5, 9.5)]
    assert {"vision", "projector", "cross-attention", "language"} <= set(legend_texts(figure))
    assert texts(figure, "tower-name") == ["vision", "language, cross-attention"]


def test_tower_runs_and_spans():
    towers = ["vision", "vision", "language", "cross_attention", "language", "language"]
    assert tower_runs(towers) == [
        ("vision", 0, 1),
        ("language", 2, 2),
        ("cross_attention", 3, 3),
        ("language", 4, 5),
    ]
    assert tower_spans(towers) == [("vision", 0, 1), ("language, cross_attention", 2, 5)]


def test_small_models_name_every_layer_below_the_axis():
    figure = spikes_drawn()
    ticks = [t.get_text() for t in figure.axes[-1].get_xticklabels()]
    assert len(ticks) == 30 and ticks[0] == "vision.0.self_attn.q_proj" and ticks[-1] == "lm_head"
    assert figure.axes[-1].get_xlabel() == "layer, in execution order"


def test_a_large_model_counts_its_layers_from_one_in_round_steps():
    (*_, last) = spike_plot(layer_table(522), Kept(), "a model").axes
    labels = [t.get_text() for t in last.get_xticklabels()]
    assert labels == ["1", "100", "200", "300", "400", "500"]
    assert list(last.get_xticks()) == [0, 99, 199, 299, 399, 499]


@pytest.mark.parametrize("lowest", [1.8e-4, 2e-3])
@pytest.mark.parametrize("layout", [PAGE, COLUMN])
def test_the_labels_of_every_axis_are_legible(layout: Layout, lowest: float):
    table = layer_table(120, {40: 9.0, 100: 30.0})
    table["activation_nmse"] = np.geomspace(lowest, 3.2e-2, len(table))
    figure = spike_plot(table, Kept(), "a model", layout)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            low, high = sorted(axis.get_view_interval())
            shown = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_visible()]
            boxes = [label.get_window_extent(renderer) for label in shown if label.get_text()]
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_errors_that_span_decades_are_logarithmic_and_signed_ones_linear():
    table = layer_table(30, SPIKES)
    table.loc[7, "sensitivity_kl"] = -2e-4
    figure = spike_plot(table, Kept(), "a model")
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "log", "log", "log", "linear"]
    assert (7, -2e-4) in points(figure, "sensitivity_kl:quantized")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_tables_draw(count: int):
    table = layer_table(30).iloc[:count]
    FigureCanvasAgg(spike_plot(table, Kept(), "a model")).draw()


def test_an_error_of_exactly_zero_does_not_break_the_logarithm():
    table = layer_table(30).assign(weight_nmse=0.0)
    FigureCanvasAgg(spike_plot(table, Kept(), "a model")).draw()


def test_a_table_without_any_measure_says_so():
    table = layer_table(5).assign(**{p.name: np.nan for p in panel_columns()})
    figure = spike_plot(table, Kept(), "a model")
    assert "nothing was measured" in [t.get_text() for t in figure.axes[0].texts]


def test_points_too_low_to_see_are_no_spikes_of_a_linear_panel():
    table = layer_table(30, {3: 1000.0, 20: 20.0})  # 20 / 1000 of the tallest
    figure = spike_plot(table, Kept(), "a model")
    named = [[t.get_text() for t in ax.texts if t.get_gid() == "spike"] for ax in figure.axes]
    assert len(named[0]) >= 2 and named[4] == ["vision.0.self_attn.o_proj"]


FRONTIER = {
    "budget_bytes": [3 * 2**20, 2**20, 2**20],
    "predicted_kl": [0.1, 0.3, np.nan],
    "measured_kl": [0.12, 0.33, 0.4],
    "measured_kl_se": [0.01, np.nan, 0.02],
}
MEASURED = "measured (bars: standard error)"


def test_frontier_has_a_line_for_each_way_of_choosing():
    candidates = ["sensitivity", "sensitivity", "weight error"]
    (ax,) = frontier_plot(pd.DataFrame({**FRONTIER, "candidate": candidates}), "KL by budget").axes
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert sorted(labels) == [
        f"sensitivity, {MEASURED}",
        "sensitivity, predicted",
        f"weight error, {MEASURED}",
    ]
    (predicted,) = [x for x in ax.lines if x.get_label() == "sensitivity, predicted"]
    assert predicted.get_xydata().tolist() == [[1, 0.3], [3, 0.1]]
    assert ax.get_xlabel() == "size of the model (MiB)"


def test_frontier_of_single_candidates_is_one_line():
    (ax,) = frontier_plot(pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]}), "KL by budget").axes
    assert sorted(t.get_text() for t in ax.get_legend().get_texts()) == [MEASURED, "predicted"]


COMPARED = (
    Compared("nothing kept", 2**20, 0.3, 0.02, False),
    Compared("by sensitivity_kl", 2 * 2**20, 0.1, None, True),
    Compared("unsloth", 3 * 2**20, 0.2, 0.01, False),
    Compared("not measured", 3 * 2**20, None, None, False),
)


def test_the_frontier_of_an_encoder_is_in_the_unit_of_its_damage():
    frontier = pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]})
    (ax,) = frontier_plot(frontier, "by size", (), DAMAGE["embeddings"]).axes
    assert ax.get_ylabel() == "normalized error to the 16-bit model (per embedding)"


def test_the_scripts_of_the_page_name_the_damage_by_their_data_alone():
    scripts = list((resources.files("qprobe.report") / "page").iterdir())
    scripts = [x for x in scripts if x.name.endswith(".js")]
    assert scripts
    for script in scripts:
        code = [line.partition("//")[0] for line in script.read_text("utf-8").splitlines()]
        assert not [line for line in code if re.search(r"\bKL\b|nats", line)], script.name


def frontier_ax(frontier: pd.DataFrame):
    (ax,) = frontier_plot(frontier, "KL by budget", COMPARED).axes
    return ax


def test_frontier_names_standard_4bit_published_lists_and_the_chosen_one():
    ax = frontier_ax(pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]}))
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert points["standard 4-bit"] == [[1, 0.3]] and points["unsloth"] == [[3, 0.2]]
    assert points["by sensitivity (chosen)"] == [[2, 0.1]] and "not measured" not in points


def test_beside_calibrated_weights_standard_4bit_is_rounded_to_nearest():
    lists = (COMPARED[0], Compared(NEAREST, 2**20, 0.5, 0.02, False))
    frontier = pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]})
    (ax,) = frontier_plot(frontier, "KL by budget", lists).axes
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert points["calibrated 4-bit"] == [[1, 0.3]] and points["standard 4-bit"] == [[1, 0.5]]


def test_no_two_compared_lists_look_alike():
    lists = [Compared(f"list {i}", (i + 1) * 2**20, 0.1, 0.01, False) for i in range(12)]
    (ax,) = frontier_plot(
        pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]}), "KL by budget", lists
    ).axes
    drawn = [x.lines[0] for x in ax.containers if x.get_label().startswith("list ")]
    assert len({(x.get_marker(), x.get_color()) for x in drawn}) == len(lists)


def test_a_frontier_over_decades_is_logarithmic_and_counts_the_predictions_it_cannot_draw():
    frontier = pd.DataFrame({**FRONTIER, "candidate": ["a", "b", "c"]})
    assert frontier_ax(frontier).get_yscale() == "linear"  # 0.1 to 0.4
    steep = frontier.assign(measured_kl=[0.001, 0.3, 0.4], predicted_kl=[-0.01, 0.0, 0.2])
    ax = frontier_ax(steep)
    assert ax.get_yscale() == "log"
    (predicted,) = [x for x in ax.lines if str(x.get_label()).startswith("predicted")]
    assert predicted.get_label() == "predicted (2 at or below 0 not drawn)"
    assert predicted.get_xydata().tolist() == [[1, 0.2]]


def test_two_runs_are_drawn_layer_by_layer_and_what_differs_is_named():
    one, other = layer_table(30, SPIKES), layer_table(30, {**SPIKES, 7: 300.0})
    figure = against_plot(Side("first, nf4", one), Side("second, fp4", other), "two formats")
    for panel in panel_columns():
        for i, table in enumerate((one, other), start=1):
            assert points(figure, f"{panel.name}:run{i}") == list(enumerate(table[panel.name]))
    named = [t.get_text() for t in figure.axes[1].texts if t.get_gid() == "spike"]
    assert named == ["vision.1.self_attn.v_proj"]  # layer 7; the spikes that both share are not named
    assert {"first, nf4; 24 samples", "second, fp4; 24 samples"} <= set(legend_texts(figure))


def test_two_runs_are_joined_by_name_not_by_place():
    one = layer_table(30)
    shuffled = one.sample(frac=1, random_state=1).iloc[:20].reset_index(drop=True)
    figure = against_plot(Side("a", one), Side("b", shuffled), "a against b")
    first, second = (points(figure, f"weight_nmse:run{i}") for i in (1, 2))
    assert len(first) == 20 and first == second
    assert "10 layers that only one run has are left out" in legend_texts(figure)[0]


def test_runs_without_a_common_layer_are_refused():
    other = layer_table(30).assign(layer=[f"other.{i}" for i in range(30)])
    with pytest.raises(RunError, match="no layer of the same name"):
        against_plot(Side("a", layer_table(30)), Side("b", other), "a against b")

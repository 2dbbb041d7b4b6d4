"""What the plots say: points, labels, bands, marks; never pixels."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qprobe.report.figures import PANELS, frontier_plot, spike_plot, tower_runs, tower_spans
from tests.report.tables import layer_table

SPIKES = {3: 200.0, 4: 180.0, 14: 50.0, 15: 60.0, 16: 70.0, 25: 90.0}


def points(figure: Figure, gid: str) -> list[tuple[int, float]]:
    (line,) = [x for ax in figure.axes for x in ax.lines if x.get_gid() == gid]
    return [(int(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def texts(figure: Figure, gid: str) -> list[str]:
    return [t.get_text() for ax in figure.axes for t in ax.texts if t.get_gid() == gid]


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [legend.get_title().get_text(), *(t.get_text() for t in legend.get_texts())]


@pytest.mark.parametrize("count", [30, 600])
def test_every_layer_is_drawn_once_at_its_place_and_value(count: int):
    table = layer_table(count, SPIKES)
    kept = frozenset(table["layer"].iloc[[3, 14]])
    figure = spike_plot(table, kept, "a model")
    for panel in PANELS:
        drawn = points(figure, f"{panel.column}:kept") + points(figure, f"{panel.column}:quantized")
        assert sorted(drawn) == list(enumerate(table[panel.column]))


def test_layers_in_16_bit_are_the_marked_ones():
    table = layer_table(30, SPIKES)
    figure = spike_plot(table, frozenset(table["layer"].iloc[[3, 14]]), "a model")
    assert [x for x, _ in points(figure, "activation_nmse:kept")] == [3, 14]
    assert "kept in 16-bit (2 layers)" in legend_texts(figure)
    assert "4-bit (28 layers)" in legend_texts(figure)


def test_measures_not_taken_have_no_panel_and_are_named():
    table = layer_table(30).assign(propagated_nmse=np.nan, sensitivity_kl=np.nan)
    figure = spike_plot(table, frozenset(), "a model")
    assert len(figure.axes) == 3
    assert legend_texts(figure)[0] == "24 samples; not measured: propagated error, sensitivity"


def test_layers_that_never_ran_are_counted_and_not_drawn():
    table = layer_table(30)
    table.loc[[5, 6], ["activation_nmse", "activation_peak"]] = np.nan
    figure = spike_plot(table, frozenset(), "a model")
    assert {5, 6}.isdisjoint(x for x, _ in points(figure, "activation_nmse:quantized"))
    assert "2 of 30 layers have no activation error" in legend_texts(figure)[0]


def test_the_tallest_spikes_are_named():
    figure = spike_plot(layer_table(30, SPIKES), frozenset(), "a model")
    activation = [t.get_text() for t in figure.axes[1].texts if t.get_gid() == "spike"]
    assert {"vision.0.self_attn.o_proj", "vision.0.mlp.fc1"} <= set(activation)
    assert len(activation) <= 6


def test_nothing_is_named_where_nothing_stands_out():
    table = layer_table(30)
    for panel in PANELS:
        table[panel.column] = np.linspace(1.0, 1.1, 30)  # no value beyond the fences of a uniform spread
    assert texts(spike_plot(table, frozenset(), "a model"), "spike") == []


@pytest.mark.parametrize("count", [30, 90, 600])
def test_names_of_spikes_overlap_neither_each_other_nor_a_leader(count: int):
    figure = spike_plot(layer_table(count, SPIKES), frozenset(), "a model")
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


def test_towers_are_bands_from_their_first_to_their_last_layer():
    table = layer_table(30)
    figure = spike_plot(table, frozenset(), "a model")
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
    figure = spike_plot(layer_table(30), frozenset(), "a model")
    ticks = [t.get_text() for t in figure.axes[-1].get_xticklabels()]
    assert len(ticks) == 30 and ticks[0] == "vision.0.self_attn.q_proj" and ticks[-1] == "lm_head"
    assert figure.axes[-1].get_xlabel() == "layer, in execution order"


def test_errors_that_span_decades_are_logarithmic_and_signed_ones_linear():
    table = layer_table(30, SPIKES)
    table.loc[7, "sensitivity_kl"] = -2e-4
    figure = spike_plot(table, frozenset(), "a model")
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "log", "log", "log", "linear"]
    assert (7, -2e-4) in points(figure, "sensitivity_kl:quantized")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_tables_draw(count: int):
    table = layer_table(30).iloc[:count]
    FigureCanvasAgg(spike_plot(table, frozenset(), "a model")).draw()


def test_an_error_of_exactly_zero_does_not_break_the_logarithm():
    table = layer_table(30).assign(weight_nmse=0.0)
    FigureCanvasAgg(spike_plot(table, frozenset(), "a model")).draw()


def test_a_table_without_any_measure_says_so():
    table = layer_table(5).assign(**{p.column: np.nan for p in PANELS})
    figure = spike_plot(table, frozenset(), "a model")
    assert "nothing was measured" in [t.get_text() for t in figure.axes[0].texts]


def test_points_too_low_to_see_are_no_spikes_of_a_linear_panel():
    table = layer_table(30, {3: 1000.0, 20: 20.0})  # 20 / 1000 of the tallest
    figure = spike_plot(table, frozenset(), "a model")
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

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from relexkit.analysis import figures, style, variance_map
from relexkit.errors import RelexkitError
from relexkit.geometry.shape import walk_gram
from relexkit.geometry.spectrum import agreement, spectrum
from relexkit.gram_matrix import Gram

IRREGULAR = np.array([1, 2, 5, 9, 30, 31, 40, 80, 120, 200, 210, 500])
NAMES = ["spectrum", "coefficients", "variance_by_layer_and_module", "geometry"]
MODULES = [
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
]


def make_gram(names, steps, *, still=(), drift_size=0.1, scale=1.0, size=300, seed=0):
    """Gram matrices of a drifting walk recorded at ``steps``; also the deltas ``[N, T, size]``."""
    rng = np.random.default_rng(seed)
    steps = np.asarray(steps)
    gaps = np.diff(steps, prepend=0)[:, None]
    deltas = np.stack(
        [
            (name not in still)
            * scale
            * (
                rng.normal(size=(len(steps), size)) * np.sqrt(gaps)
                + drift_size * gaps * rng.normal(size=size)
            ).cumsum(axis=0)
            for name in names
        ]
    )
    counts = np.zeros(deltas.shape[:2], np.int64)
    sizes = np.full(len(names), size)
    return (
        Gram(
            steps,
            tuple(names),
            sizes,
            deltas @ deltas.transpose(0, 2, 1),
            counts,
            counts,
            counts - 1,
        ),
        deltas,
    )


def model_names(num_layers, modules=MODULES):
    layers = [f"model.layers.{i}.{m}.weight" for i in range(num_layers) for m in modules]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


STILL = (
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def run():
    return make_gram(model_names(4), IRREGULAR, still=STILL)[0]


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """All files of the run; matplotlib's settings are as they were before."""
    before = dict(matplotlib.rcParams)
    paths = figures.plot_spectra(run, tmp_path_factory.mktemp("figures") / "new" / "folder")
    assert dict(matplotlib.rcParams) == before
    return paths


@pytest.fixture
def svg_alone(monkeypatch):
    """Fonts in a PDF take most of the time of a figure, and these tests read words in SVG."""
    monkeypatch.setattr(style, "FORMATS", ("svg",))


def draw(gram, name, *, centered=False, whole=None):
    whole = whole or spectrum(gram, scope="global", centered=centered)
    with style.styled():
        if name == "spectrum":
            return figures.spectrum_figure(whole, spectrum(gram, scope="module", centered=centered))
        if name == "coefficients":
            return figures.coefficients_figure(whole)
        if name == "geometry":
            return figures.geometry_figure(gram, whole)
        return variance_map.variance_figure(gram, whole)


def line(axes, label):
    (found,) = [artist for artist in axes.get_lines() if str(artist.get_label()).startswith(label)]
    return found


def mesh(figure, gid):
    (found,) = [
        artist for axes in figure.axes for artist in axes.collections if artist.get_gid() == gid
    ]
    return found


def visible_texts(figure):
    """The texts that are drawn: matplotlib also keeps labels of ticks outside the limits and of
    hidden axes.
    """
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            margin = 1e-9 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not (
                    axes.axison
                    and axis.get_visible()
                    and low - margin <= tick.get_loc() <= high + margin
                ):
                    hidden |= {tick.label1, tick.label2}
    return [
        t
        for t in figure.findobj(Text)
        if t.get_text().strip() and t.get_visible() and t not in hidden
    ]


def assert_readable(figure):
    """Every text lies inside the figure and none covers another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    with style.styled():
        figure.draw_without_rendering()  # places everything and colours no pixel
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in visible_texts(figure)]
    assert boxes
    for text, box in boxes:
        inside = (
            box.x0 >= -1
            and box.y0 >= -1
            and box.x1 <= figure.bbox.x1 + 1
            and box.y1 <= figure.bbox.y1 + 1
        )
        assert inside, f"{text!r} is cut off at {box}"
    for (one, a), (other, b) in combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        # boxes hold the room for letters that hang below the line: one pixel of it may be shared
        assert width <= 1 or height <= 1, (
            f"{one!r} and {other!r} overlap by {width:.1f} x {height:.1f} pixels"
        )


# -- files -----------------------------------------------------------------------------------------


def test_all_files_are_written_and_read_back(written):
    names = [f"{name}.{kind}" for name in NAMES for kind in style.FORMATS]
    assert [p.name for p in written] == names
    for path in written:
        if path.suffix == ".png":
            pixels = matplotlib.image.imread(path)
            assert pixels.shape[1] == round(style.WIDTH_INCHES * style.DOTS_PER_INCH)
            assert pixels[..., :3].std() > 0.01
        elif path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        else:
            root = ElementTree.parse(path).getroot()
            assert "".join(root.itertext()).count("direction") > 1, (
                "text must be text, not outlines"
            )


def test_files_are_reproducible_and_leave_no_settings_behind(run, written, tmp_path):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        again = figures.plot_spectra(run, tmp_path)
    assert dict(matplotlib.rcParams) == before
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_relexkit_loads_no_matplotlib_and_analysis_no_global_state():
    program = """
import sys, relexkit, relexkit.cli
outer = ("matplotlib", "relexkit.analysis", "relexkit.trainer")
assert not [m for m in sys.modules if m.startswith(outer)]
import relexkit.analysis.figures
assert "matplotlib.pyplot" not in sys.modules and "relexkit.trainer" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_analysis_imports_neither_trainer_nor_private_names():
    for path in Path(figures.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("relexkit.trainer")
                if node.module.startswith("relexkit") and "analysis" not in node.module:
                    assert not [
                        a.name
                        for a in node.names
                        if a.name.startswith("_") and a.name != "__version__"
                    ]
            elif isinstance(node, ast.Import):
                assert not [
                    a.name
                    for a in node.names
                    if a.name.startswith(("relexkit.trainer", "matplotlib.pyplot"))
                ]


def test_no_tensor_at_all_is_refused(run, tmp_path):
    empty = Gram(
        run.steps, (), np.zeros(0, int), np.zeros((0, 12, 12)), *[np.zeros((0, 12), int)] * 3
    )
    with pytest.raises(RelexkitError, match="no tensor to plot"):
        figures.plot_spectra(empty, tmp_path)


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
def test_spectrum_shows_ratios_of_model_modules_and_null(run, centered):
    figure = draw(run, "spectrum", centered=centered)
    whole = spectrum(run, scope="global", centered=centered)
    modules = {s.name: s for s in spectrum(run, scope="module", centered=centered).scopes}
    scree, running = figure.axes
    assert scree.get_yscale() == "log"
    for label, scope in (
        ("whole model", whole.scopes[0]),
        (style.NULL_LABEL, whole.null),
        ("_lm_head", modules["lm_head"]),
    ):
        ratios = scope.explained_variance_ratio
        np.testing.assert_array_equal(line(scree, label).get_xdata(), np.arange(1, len(ratios) + 1))
        np.testing.assert_array_equal(line(scree, label).get_ydata(), ratios)
        np.testing.assert_allclose(line(running, label).get_ydata(), np.cumsum(ratios), rtol=1e-12)
    drawn = [a for a in scree.get_lines() if a.get_color() == style.PARTS]
    assert len(drawn) == len(modules) - 1, "the final norm never moved"


def test_marks_tell_directions_needed_by_run_and_walk(run):
    running = draw(run, "spectrum").axes[1]
    whole = spectrum(run, scope="global")
    heights = [a.get_ydata()[0] for a in running.get_lines() if a.get_color() == style.MUTED]
    assert heights == [0.90, 0.95, 0.99]
    texts = {t.get_position()[1]: t.get_text() for t in running.texts[:3]}
    for share in heights:
        counts = [
            int(np.argmax(np.cumsum(s.explained_variance_ratio) >= share)) + 1
            for s in (whole.scopes[0], whole.null)
        ]
        assert texts[share] == f"{counts[0]}  ({counts[1]})"


@pytest.mark.parametrize("centered", [False, True])
def test_coefficients_and_their_line_use_real_steps(run, centered):
    (axes,) = draw(run, "coefficients", centered=centered).axes
    whole = spectrum(run, scope="global", centered=centered)
    first = whole.scopes[0].coefficients[:, 0]
    for k in range(3):
        np.testing.assert_array_equal(line(axes, f"direction {k + 1}").get_xdata(), IRREGULAR)
        np.testing.assert_array_equal(
            line(axes, f"direction {k + 1}").get_ydata(), whole.scopes[0].coefficients[:, k]
        )
    slope, offset = np.polyfit(IRREGULAR, first, 1)
    fitted = line(axes, "line through direction 1")
    np.testing.assert_allclose(
        fitted.get_ydata(), slope * IRREGULAR + offset, rtol=1e-9, atol=1e-9 * abs(first).max()
    )
    residual = first - (slope * IRREGULAR + offset)
    r2 = 1 - (residual @ residual) / ((first - first.mean()) @ (first - first.mean()))
    assert float(fitted.get_label().rpartition("R² ")[2]) == pytest.approx(
        r2, abs=5.1e-4
    )  # three decimals, or more
    null = line(axes, style.NULL_LABEL)
    shape = whole.null.coefficients[:, 0]
    assert null.get_label().endswith(f"R² {np.corrcoef(shape, IRREGULAR)[0, 1] ** 2:.3f}")
    np.testing.assert_allclose(
        null.get_ydata() / null.get_ydata()[-1], shape / shape[-1], rtol=1e-12, atol=1e-12
    )
    assert np.linalg.norm(null.get_ydata()) == pytest.approx(np.linalg.norm(first))


@pytest.mark.parametrize("centered", [False, True])
def test_heat_map_holds_each_tensors_first_ratio(run, centered):
    figure = draw(run, "variance_by_layer_and_module", centered=centered)
    tensors = {s.name: s.explained_variance_ratio for s in spectrum(run, centered=centered).scopes}
    shown = np.ma.filled(mesh(figure, "layers").get_array(), np.nan).reshape(len(MODULES), 4)
    for row, module in enumerate(MODULES):
        for layer in range(4):
            name = f"model.layers.{layer}.{module}.weight"
            if name in STILL:
                assert np.isnan(shown[row, layer])
            else:
                assert shown[row, layer] == tensors[name][0]
    others = np.ma.filled(mesh(figure, "others").get_array(), np.nan).ravel()
    assert others[0] == tensors["model.embed_tokens.weight"][0]
    assert np.isnan(others[1])
    assert others[2] == tensors["lm_head.weight"][0]
    grey = [p for axes in figure.axes for p in axes.patches if p.get_gid() == "still"]
    assert sorted(p.get_xy() for p in grey) == [(-0.5, 0.5), (0.5, 1.5), (1.5, 1.5)]
    assert all(p.get_hatch() for p in grey)
    words = [t.get_text() for t in figure.findobj(Text)]
    assert words.count("did not move") == 2, "once as the value of the final norm, once as legend"
    null = spectrum(run, scope="global", centered=centered).null.explained_variance_ratio[0]
    (mark,) = [a for axes in figure.axes for a in axes.get_lines() if a.get_gid() == "null"]
    assert mark.get_xdata()[0] == null
    assert f"{style.NULL_LABEL}: {100 * null:.1f} %" in words


def test_colours_cover_all_values_and_the_null(run):
    norm = mesh(draw(run, "variance_by_layer_and_module"), "layers").norm
    ratios = [s.explained_variance_ratio[0] for s in spectrum(run).scopes if len(s.singular_values)]
    null = spectrum(run).null.explained_variance_ratio[0]
    assert 0 <= norm.vmin <= min(*ratios, null) < max(*ratios, null) <= norm.vmax <= 1


def test_cells_the_model_lacks_are_empty_and_experts_share_a_cell():
    names = [
        "layers.0.attn.weight",
        "layers.7.mlp.experts.0.up.weight",
        "layers.7.mlp.experts.11.up.weight",
        "layers.7.x.bias",
    ]
    gram, deltas = make_gram(names, [3, 4, 8, 20])
    table = variance_map.variance_table(gram)
    assert table.layers == (0, 7)
    assert table.modules == ("attn", "mlp.experts.*.up", "x.bias")
    assert table.present.tolist() == [[True, False], [False, True], [False, True]]
    np.testing.assert_array_equal(np.isnan(table.ratios), ~table.present)
    singular = np.linalg.svd(np.concatenate([deltas[1], deltas[2]], axis=1), compute_uv=False)
    assert table.ratios[1, 1] == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-9)
    figure = draw(gram, "variance_by_layer_and_module")
    assert not [p for axes in figure.axes for p in axes.patches if p.get_gid() == "still"]


def test_rows_without_room_are_counted():
    gram, _ = make_gram([f"stage_{i}.kernel" for i in range(variance_map.MAX_ROWS + 7)], [1, 2, 4])
    gram.num_parameters[:] = np.arange(len(gram.names))
    table = variance_map.variance_table(gram)
    assert table.others == tuple(f"stage_{i}.kernel" for i in range(7, variance_map.MAX_ROWS + 7))
    assert table.num_left_out == 7
    figure = draw(gram, "variance_by_layer_and_module")
    assert "(7 smaller rows are not shown)" in [t.get_text() for t in figure.findobj(Text)]


@pytest.mark.parametrize("centered", [False, True])
def test_geometry_shows_cosines_agreement_and_norms(centered):
    gram, deltas = make_gram(["a.weight", "b.weight"], IRREGULAR)
    turning, agreeing, striding = draw(gram, "geometry", centered=centered).axes
    updates = np.diff(np.concatenate(list(deltas), axis=1), axis=0, prepend=0)
    norms = np.linalg.norm(updates, axis=1)
    (cosines,) = [a for a in turning.get_lines() if a.get_color() == style.RUN]
    expected = (updates[1:] * updates[:-1]).sum(axis=1) / (norms[1:] * norms[:-1])
    np.testing.assert_allclose(cosines.get_ydata(), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(cosines.get_xdata(), IRREGULAR[:-1])
    distances = np.linalg.norm(updates.cumsum(axis=0), axis=1)
    np.testing.assert_allclose(
        line(striding, "whole model").get_ydata(), norms / distances.max(), rtol=1e-6
    )
    gaps = np.diff(IRREGULAR, prepend=0)
    np.testing.assert_allclose(
        line(striding, style.NULL_LABEL).get_ydata(), np.sqrt(gaps / 500), rtol=1e-12
    )
    of_run = line(agreeing, "whole model")
    np.testing.assert_array_equal(of_run.get_xdata(), IRREGULAR)
    assert of_run.get_ydata()[-1] == pytest.approx(1)
    if not centered:
        final = np.linalg.svd(updates.cumsum(axis=0), full_matrices=False)[2][0]
        for count in (1, 4, 9):
            first = np.linalg.svd(updates[:count].cumsum(axis=0), full_matrices=False)[2][0]
            assert of_run.get_ydata()[count - 1] == pytest.approx(abs(first @ final), rel=1e-6)
        null = agreement(walk_gram(IRREGULAR), np.arange(1, 13))
        np.testing.assert_array_equal(line(agreeing, style.NULL_LABEL).get_ydata(), null)


def test_geometry_of_a_run_that_returns_to_its_base_and_pauses():
    steps = np.arange(1, 7)
    path = np.array([[1.0, 0], [1, 0], [2, 1], [2, 1], [0, 0], [0, 0]])
    counts = np.zeros((1, 6), int)
    gram = Gram(steps, ("w",), np.array([2]), (path @ path.T)[None], counts, counts, counts)
    turning, _, striding = draw(gram, "geometry").axes
    norms = line(striding, "whole model").get_ydata()
    np.testing.assert_allclose(
        norms, np.array([1, 0, np.sqrt(2), 0, np.sqrt(5), 0]) / np.sqrt(5), atol=1e-12
    )
    assert "no two neighbouring updates move anything" in turning.get_title("left")


# -- words -----------------------------------------------------------------------------------------


def words_of(path):
    return " ".join("".join(ElementTree.parse(path).getroot().itertext()).split())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("steps", "still", "sentence"),
    [
        (
            [10, 20, 50],
            ("a.weight", "b.weight"),
            "Nothing moved: all 2 tensors equal the base in 3 recorded steps (10 to 50)",
        ),
        (
            [70],
            ("a.weight", "b.weight"),
            "Nothing moved: all 2 tensors equal the base in the one recorded step (70)",
        ),
        ([70], ("b.weight",), "One recorded step (70): 1 of 2 tensors moved, by "),
    ],
)
def test_runs_without_geometry_are_put_into_words(
    tmp_path, steps, still, sentence, centered, svg_alone
):
    gram, deltas = make_gram(["a.weight", "b.weight"], steps, still=still)
    paths = figures.plot_spectra(gram, tmp_path, centered=centered)
    assert len(paths) == len(NAMES)
    for path in paths:
        assert sentence in words_of(path).replace("  ", " ")
        if len(still) == 1:
            assert f"by {np.linalg.norm(deltas):.3g} in all" in words_of(path)
    with style.styled():
        figure = figures.words_figure(
            "Geometry", figures.nothing_to_draw(gram, spectrum(gram, scope="global"))
        )
    assert_readable(figure)


def test_centered_run_that_stands_still_away_from_its_base(tmp_path, svg_alone):
    position = np.random.default_rng(1).normal(
        size=40
    )  # squared norm without an exact mean in floating point
    path = np.tile(position, (7, 1))
    counts = np.zeros((1, 7), int)
    gram = Gram(
        np.arange(1, 8), ("w",), np.array([40]), (path @ path.T)[None], counts, counts, counts
    )
    paths = figures.plot_spectra(gram, tmp_path, centered=True)
    assert len(paths) == len(NAMES)
    assert all("are the same checkpoint" in words_of(p) for p in paths)


def test_two_steps_have_no_r_squared():
    (axes,) = draw(make_gram(["a"], [4, 9])[0], "coefficients").axes
    labels = axes.get_legend_handles_labels()[1]
    assert not [label for label in labels if "R² 1" in label or "nan" in label]
    assert "two steps: every line fits, there is no R²" in labels


# -- looks -----------------------------------------------------------------------------------------

LONG = [
    *MODULES,
    *(
        f"block_sparse_moe.shared_${i}_with_a_very_long_name$.gate_and_up_projection.part_{i}"
        for i in range(7)
    ),
]
CASES = {
    "irregular": lambda: make_gram(model_names(4), IRREGULAR, still=STILL)[0],
    "one layer": lambda: make_gram(
        ["wte", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"], range(50, 1001, 50), drift_size=5
    )[0],
    "large": lambda: make_gram(
        model_names(60, LONG), [1, 2, 5, 9, 100], still=model_names(60, LONG)[3:300:12], size=20
    )[0],
    "no layers": lambda: make_gram(
        [f"stage_{i}.kernel" for i in range(70)], [5, 6, 9, 10_000], size=20
    )[0],
    "two steps": lambda: make_gram(model_names(2), [123_450, 123_460])[0],
    "many steps": lambda: make_gram(["a.weight"], range(10, 710, 10), size=500)[0],
    "tiny": lambda: make_gram(model_names(2), [3, 4, 5, 6], scale=1e-9)[0],
    "huge": lambda: make_gram(model_names(2), [3, 4, 5, 6], scale=1e9)[0],
    "exact line": lambda: make_gram(model_names(2), [3, 4, 5, 60], drift_size=1e6)[0],
    "wandering": lambda: make_gram(model_names(2), np.arange(1, 31), drift_size=0, seed=3)[0],
}


@pytest.fixture(scope="module")
def analysed():
    """A case's Gram matrices and spectrum, which its four figures share."""

    @cache
    def found(case, centered):
        gram = CASES[case]()
        return gram, spectrum(gram, scope="global", centered=centered)

    return found


def readable(case, name, centered, analysed):
    gram, whole = analysed(case, centered)
    assert_readable(draw(gram, name, centered=centered, whole=whole))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_no_text_is_cut_off_or_covered(case, name, analysed):
    readable(case, name, False, analysed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        case if case in ("irregular", "two steps") else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
)
def test_no_text_is_cut_off_or_covered_about_the_mean(case, name, analysed):
    readable(case, name, True, analysed)


def test_cut_off_and_covered_texts_are_noticed():
    figure = Figure(figsize=(3, 2))
    figure.text(0.9, 0.5, "far too long for its place")
    with pytest.raises(AssertionError, match="cut off"):
        assert_readable(figure)
    figure = Figure(figsize=(3, 2))
    figure.text(0.1, 0.5, "one sentence")
    figure.text(0.2, 0.5, "another")
    with pytest.raises(AssertionError, match="overlap"):
        assert_readable(figure)


def test_number_formats():
    assert doctest.testmod(style).failed == 0
    assert style.percent(0.0) == "0 %"
    assert style.percent(float("nan")) == "none"


@pytest.mark.parametrize("length", [1, 29, 30, 31, 80])
def test_elided_names_keep_both_ends(length):
    name = ("abcdefghij" * 8)[:length]
    short = style.elide(name)
    assert len(short) == min(length, 30)
    if length > 30:
        head, tail = short.split("…")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert min(len(head), len(tail)) >= 10

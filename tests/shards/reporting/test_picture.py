"""The picture of a session: the right way round, with the grid on patch edges, rim above, windows where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from helpers.records import session_record
from shards.format import layout
from shards.format.grid import Grid
from shards.format.patches import gather, patch_places
from shards.reporting import html, quality_figures

pytestmark = pytest.mark.fast

GRID = Grid(mm=12.0, shape=(16, 16, 16))
FRAMES, WINDOWS, KEEP = 5, 12, 8


def brain() -> np.ndarray:
    place = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij")) - 7.5
    return (place[0] / 5.6) ** 2 + (place[1] / 7) ** 2 + (place[2] / 6) ** 2 < 1


def render(figure: Figure) -> np.ndarray:
    """Pixels of a figure, int (rows from bottom to top, as matplotlib counts; columns; red, green, blue)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)


def test_the_left_of_the_picture_is_the_left_of_the_brain():
    """A brain that is bright on its right, in front and above: each slice is bright where its letters say."""
    mask = brain()
    place = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    bright = {0: "R", 1: "A", 2: "S"}
    for axis in range(3):
        volume = np.where(mask, (place[axis] > 7).astype(float), np.nan)
        for seen, (title, drawn, extent, ends) in enumerate(quality_figures.slices(volume, GRID, (8, 8, 8))):
            if seen == axis:
                continue
            assert title.startswith(("Sagittal", "Coronal", "Axial")[seen])
            across, up = (other for other in range(3) if other != seen)
            low = GRID.affine[:3, 3] - GRID.mm / 2
            assert extent == (low[across], low[across] + 192, low[up], low[up] + 192)
            if axis == across:
                assert np.nanmean(drawn[:, 8:]) == 1 and np.nanmean(drawn[:, :8]) == 0
                assert ends[1] == bright[axis]
            else:
                assert np.nanmean(drawn[8:]) == 1 and np.nanmean(drawn[:8]) == 0
                assert ends[3] == bright[axis]


def test_the_drawn_figure_is_the_right_way_round():
    """The same on the pixels of a finished axial slice; the brain is bright in its front right quarter."""
    mask = brain()
    high = np.arange(16) > 7
    volume = np.where(mask, (high[:, None, None] & high[None, :, None]).astype(float), np.nan)
    with html.drawing():
        figure = Figure(figsize=(4, 4))
        axes = figure.subplots()
        view = quality_figures.slices(volume, GRID, (8, 8, 8))[2]
        edges = quality_figures.patch_edges(patch_places(mask, GRID.patch), GRID, 2, 8)
        quality_figures.draw_slice(axes, view, mask[:, :, 8].T, edges, np.array([0.0, 1.0]))
        pixels = render(figure)[..., 0]
        place = {text.get_text(): text.get_window_extent() for text in axes.texts}
    middle_mm = GRID.affine[:2, 3] + GRID.mm * 7.5
    for right in (-1, 1):
        for front in (-1, 1):
            place_mm = middle_mm + 2 * GRID.mm * np.array([right, front])
            x, y = axes.transData.transform(place_mm).round().astype(int)
            assert pixels[y, x] == (255 if right > 0 and front > 0 else 0)
    x, y = axes.transData.transform(middle_mm)
    assert place["L"].x1 < x < place["R"].x0 and place["P"].y1 < y < place["A"].y0


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 2), st.floats(0.02, 0.98))
@settings(max_examples=60, deadline=None)
def test_grid_lines_are_the_edges_of_the_kept_patches(seed, edge, axis, share):
    """A line lies between two neighbouring patch places if and only if at least one of them is kept."""
    rng = np.random.default_rng(seed)
    places = (3, 4, 5)
    grid = Grid(mm=3.0, shape=tuple(edge * size for size in places), patch=edge, centre_mm=(-1.0, 7.0, 2.0))
    kept = rng.random(places) < share
    patch = np.argwhere(kept).astype(np.int16)
    index = int(rng.integers(grid.shape[axis]))
    plane = [other for other in range(3) if other != axis]
    around = np.pad(np.take(kept, index // edge, axis=axis), 1)
    corner_mm = (grid.affine @ np.array([-0.5, -0.5, -0.5, 1]))[:3][plane]
    side = edge * grid.mm
    expected = set()
    for a, b in np.ndindex(around.shape):
        if a and (around[a, b] or around[a - 1, b]):  # upright, between (a - 1, b) and (a, b)
            expected.add((a - 1, b - 1, a - 1, b))
        if b and (around[a, b] or around[a, b - 1]):
            expected.add((a - 1, b - 1, a, b - 1))
    found = (quality_figures.patch_edges(patch, grid, axis, index) - corner_mm) / side
    np.testing.assert_allclose(found, found.round(), atol=1e-9)
    found_set = {tuple(int(value) for value in line) for line in found.round().reshape(-1, 4)}
    assert found_set == expected and len(found) == len(expected)


def test_the_drawn_grid_encloses_the_kept_patches_only():
    """On the pixels: blue on the border of a kept patch, the background inside it and around patches not kept."""
    patch = np.array([[1, 2, 1]])
    mask = np.zeros(GRID.shape, bool)
    mask[5:7, 9:11, 5:7] = True
    with html.drawing():
        figure = Figure(figsize=(4, 4))
        axes = figure.subplots()
        view = quality_figures.slices(np.where(mask, 1.0, np.nan), GRID, (5, 9, 5))[2]
        quality_figures.draw_slice(
            axes, view, mask[:, :, 5].T, quality_figures.patch_edges(patch, GRID, 2, 5), np.array([0.0, 1.0])
        )
        pixels = render(figure)

    def blue(x: float, y: float) -> bool:
        """Whether there is a line at this voxel's place, or a pixel beside it."""
        column, row = axes.transData.transform(GRID.affine[:2, 3] + GRID.mm * np.array([x, y])).round().astype(int)
        near = pixels[row - 1 : row + 2, column - 1 : column + 2].reshape(-1, 3)
        return bool((near[:, 2] - near[:, 0] > 40).any())

    for along in (4.5, 5.5, 6.5):
        assert blue(3.5, along + 4) and blue(7.5, along + 4) and blue(along, 7.5) and blue(along, 11.5)
    for free in (1.5, 5.5, 9.5, 13.5):  # middles of patches, and of edges of patches that are not kept
        for border in (3.5, 7.5, 11.5):
            assert blue(border, free) == (free == 9.5 and border < 11)
            assert blue(free, border) == (free == 5.5 and border > 7)
        assert not blue(free, 5.5) and not blue(free, 9.5)


def shown(scores: np.ndarray, keep: int = KEEP, **changes) -> quality_figures.Shown:
    """A session of few voxels; `changes` are those of its line, or arrays of its sample."""
    mask = brain()
    patch = patch_places(mask, GRID.patch)
    frames = FRAMES * len(scores) + 2
    arrays = {
        "baseline": gather(mask.astype(float), patch, GRID.patch),
        "brain": gather(mask, patch, GRID.patch),
        "carpet": np.zeros((40, frames), np.int8),
        "patch": patch,
        "roi": 1000 + np.random.default_rng(2).standard_normal((30, frames)),
        "scores": scores,
        "start": np.argsort(-scores)[:keep] * FRAMES,
    }
    given = (*arrays, "scores_space", "scores_time")
    arrays |= {name: changes.pop(name) for name in [*changes] if name in given}
    return quality_figures.Shown(GRID, FRAMES, session_record(**{"space": "MNI", **changes}), arrays)


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


OUTLINE = np.zeros((4, 4, 4)), np.eye(4)  # a template that is nowhere to be seen


def test_the_rim_is_at_the_top_of_the_carpet_and_time_goes_right():
    carpet = np.zeros((40, 62), np.int8)
    carpet[:10] = 2 * layout.CARPET_STEPS  # the rim is bright, the depth dark
    carpet[30:] = -2 * layout.CARPET_STEPS
    carpet[10:30, 40:45] = 2 * layout.CARPET_STEPS  # window 8
    scores = np.linspace(0, 1, WINDOWS, dtype=np.float32)[[*range(1, WINDOWS), 0]]
    with html.drawing():
        figure = shown(scores, carpet=carpet).draw(OUTLINE)
        pixels = render(figure)
    axes = panel(figure, "Carpet")
    box = axes.get_window_extent()
    # the middle of rows 5, 20 and 35, and of windows 8 (bright in the middle) and 3
    row_3 = (box.y1 - box.height * np.array([5, 20, 35]) / 40).astype(int)
    column_2 = (box.x0 + box.width * np.array([42.5, 17.5]) / 62).astype(int)
    assert abs(pixels[row_3][:, column_2, 0] - [[255, 255], [255, 127], [0, 0]]).max() <= 1
    low, high = (axes.transData.transform((0, value))[1] for value in axes.get_yticks()[::-1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rim", "depth"] and low < high
    # the strip above it, window by window: rank of window n is 10 - n, window 11 is the worst
    strip = round(box.y1 + box.height * 0.055)
    at_W = (box.x0 + box.width * (np.arange(WINDOWS) + 0.5) * FRAMES / 62).astype(int)
    colours = [tuple(pixels[strip, x]) for x in at_W]
    assert colours == [rgb(html.PALE)] * 3 + [rgb(html.BLUE)] * 8 + [rgb(html.PALE)]
    # on one time axis with the panels above and below
    assert {tuple(axes.get_window_extent().intervalx) for axes in panels(figure)} == {(box.x0, box.x1)}
    assert {axes.get_xlim() for axes in panels(figure)} == {(0, 62 * 0.72)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def panels(figure: Figure) -> list[Axes]:
    return [panel(figure, title) for title in ("Parcels", "Saliency", "Carpet", "DVARS", "Global")]


@pytest.mark.parametrize("windows", [12, 240])
def test_the_saliency_curve_marks_kept_windows_and_scores_below_the_axis(windows):
    scores = np.random.default_rng(3).random(windows).astype(np.float32)
    scores[4] = -50
    with html.drawing():
        figure = shown(scores, keep=10).draw(OUTLINE)
        pixels = render(figure)
    axes = panel(figure, "Saliency")
    bottom, top = axes.get_ylim()
    others = np.delete(scores, 4)
    assert others.min() - 1 < bottom < others.min() and top > others.max()
    rank_W = np.argsort(np.argsort(-scores))
    for number in np.delete(np.arange(windows), 4):
        x, y = axes.transData.transform(((number + 0.5) * FRAMES * 0.72, (bottom + scores[number]) / 2)).astype(int)
        expected = html.BLUE if rank_W[number] < 8 else html.SKY if rank_W[number] < 10 else html.PALE
        # a bar of 240 is four pixels wide: the line of the axis is near the first
        np.testing.assert_allclose(pixels[y, x], rgb(expected), atol=8, err_msg=str(number))
    curve = next(patch for patch in axes.patches if isinstance(patch, StepPatch)).get_data()
    np.testing.assert_allclose(curve.values, np.maximum(scores, bottom), atol=1e-6)
    np.testing.assert_allclose(curve.edges, np.arange(windows + 1) * FRAMES * 0.72)
    (mark,) = axes.lines
    assert mark.get_xdata().tolist() == pytest.approx([4.5 * FRAMES * 0.72])
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["below the axis", "dropped", "kept", "the 8 most salient"]


@pytest.mark.parametrize("windows", [12, 240])
def test_the_part_of_a_score_that_did_not_decide_stands_above_it(windows):
    rng = np.random.default_rng(5)
    scores = rng.uniform(1, 2, windows).astype(np.float32)
    space, time = scores.copy(), scores.copy()
    space[::3] += 0.8
    time[1::3] += 0.8
    with html.drawing():
        figure = shown(scores, keep=10, scores_space=space, scores_time=time).draw(OUTLINE)
        pixels = render(figure)
    axes = panel(figure, "Saliency")
    assert axes.get_ylim()[1] > 2.5
    curves = {patch.get_label(): patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)}
    np.testing.assert_array_equal(curves["space part"].values, space)
    np.testing.assert_array_equal(curves["time part"].values, time)
    np.testing.assert_allclose(curves["space part"].edges, np.arange(windows + 1) * FRAMES * 0.72)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["dropped", "kept", "space part", "the 8 most salient", "time part"]
    (title,) = axes.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().startswith("Saliency"))
    box = axes.get_legend().get_window_extent()
    assert title.get_window_extent().x1 < box.x0 and box.x1 <= axes.get_window_extent().x1 + 1

    def line_at(number: int, value: float) -> np.ndarray:
        """Of the pixels around a place, the one farthest from white, which is behind the lines."""
        x, y = axes.transData.transform(((number + 0.5) * FRAMES * 0.72, value)).round().astype(int)
        near = pixels[y - 2 : y + 3, x]
        return near[near.sum(axis=1).argmin()]

    for number in range(0, windows, 3):
        red, green, blue = line_at(number, space[number])  # orange
        assert red > green > blue + 30
        red, green, blue = line_at(number + 1, time[number + 1])  # purple
        assert min(red, blue) > green + 15
        assert line_at(number + 2, scores[number + 2]).max() < 120  # the score, ink, hides both


def test_equal_scores_and_kept_all_are_drawn():
    with html.drawing():
        figure = shown(np.ones(6, np.float32)).draw(OUTLINE)
        render(figure)
    axes = panel(figure, "Saliency")
    bottom, top = axes.get_ylim()
    assert bottom < 1 < top
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["the 6 most salient"]


def test_unknown_sides_carry_a_question_mark_and_native_space_no_template():
    scores = np.random.default_rng(4).random(WINDOWS).astype(np.float32)
    template = brain().astype(float), GRID.affine

    def drawn(**changes) -> tuple[list[str], int]:
        with html.drawing():
            figure = shown(scores, **changes).draw(template)
        axes = panel(figure, "Coronal")
        return [text.get_text() for text in axes.texts], sum(isinstance(c, ContourSet) for c in axes.collections)

    assert drawn() == (["L", "R", "I", "S"], 2)
    assert drawn(space="native") == (["L", "R", "I", "S"], 1)
    assert drawn(orientation_assumed="LAS") == (["L?", "R?", "I", "S"], 2)

"""The page of a dataset: self-contained, true to the manifest, safe against file names, right way round."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.stats import median_abs_deviation

from helpers.page_dataset import WINDOWS, changed, make_dataset, mixed_dataset, session
from helpers.pages import NASTY, Reader, check_self_contained, command, page_of
from helpers.records import data_record
from shards.conversion.splits import SPLITS
from shards.format import layout
from shards.format.reader import Dataset
from shards.format.refusal import Refusal, read_refusals
from shards.reporting import dataset_page, distribution, html, pictures, quality_figures
from shards.reporting.anonymous import without_names


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return mixed_dataset(tmp_path_factory.mktemp("pages") / "mixed")


@pytest.fixture(scope="module")
def content(dataset) -> str:
    path = dataset_page.write(dataset)
    assert path == dataset / "report" / "index.html"
    return path.read_text()


def test_is_self_contained_and_has_a_picture_of_each_example(content):
    reader = check_self_contained(content, scripts=1)
    assert len(reader.pictures()) == 2 + pictures._EXAMPLES  # quality, chosen windows
    assert len(content) < 1e6


def test_says_what_the_manifest_says(content, dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    text = Reader(content).text
    counts = {split: f"{manifest['sessions'][split]} ({manifest['subjects'][split]})" for split in SPLITS}
    for split, count in counts.items():
        assert f"{split}: sessions (subjects) {count}" in text
    assert "11 sessions of 11 subjects from 2 cohorts" in text
    assert "16 × 16 × 16 voxels of 12 mm, RAS+" in text
    assert "variance" in text and manifest["configuration_hash"][:12] in text
    assert "Parcels cubes of the brain mask" in text
    # cohort, train, val, test, all, refused, TR
    assert "one 6 (6) 2 (2) 2 (2) 10 (10) 0 0.72 (9), 0.8 (1)" in text
    assert "two 1 (1) 0 (0) 0 (0) 1 (1) 1 2" in text
    assert f"all {' '.join(counts.values())} 11 (11) 1 0.72 (9), 0.8 (1), 2 (1)" in text


def test_names_refused_runs_and_escapes_them(content):
    assert NASTY not in content and "<script>alert" not in content
    text = Reader(content).text
    assert f"two_{NASTY} {NASTY}.nii.gz: TR: got 0 s, expected 0.05-20 s. Set `tr` in the cohort" in text
    assert "1 of 12 scans refused" in text


def test_names_the_outlying_session_first_among_the_pictures(content):
    text = Reader(content).text
    assert "one_sub-04 train Temporal signal-to-noise ratio 11" in text
    assert "one_sub-04" in Reader(content).pictures()[2][0]


def test_says_how_far_native_sessions_were_moved(content):
    text = Reader(content).text
    assert "two_sub-x +3 -4 +12 13.0" in text
    assert "moved by (+3, -4, +12) mm to the centre of the grid; not registered" in text


def test_says_what_was_done_to_a_run_and_what_was_taken_for_granted(content):
    """In the notes, in the cohort's table and beside the picture, and only for the session that it is true of."""
    text = Reader(content).text
    assert "Look: 1 session without orientation in the header; LAS was assumed" in text
    for words in (
        "two 4 leading frames dropped 1",
        "two brain mask computed from the scan 1",
        f"two cleaned: 6 motion parameters {NASTY} 1",
        "two orientation LAS assumed 1",
        "Orientation LAS assumed; left and right cannot be verified",
        "Leading frames dropped 4",
        "Brain mask computed from the scan",
        f"Cleaned 6 motion parameters {NASTY}",
    ):
        assert text.count(words) == 1, words


def test_names_what_was_assumed_and_of_which_sessions(tmp_path):
    rule = "soft values from 0 to 255: brain above half of it"
    sessions = [session(f"one_{n}", "one", str(n), "train", mask_rule=rule) for n in range(11)]
    sessions[3] = changed(sessions[3], dead_share=0.084, repeated_frames=15)
    sessions[4] = changed(
        sessions[4], forms_disagree="sform LAS, qform RAS", space_assumed="taken as MNI: header code 1 (scanner)"
    )
    text = Reader(dataset_page.write(make_dataset(tmp_path, sessions, [])).read_text()).text
    for words in (
        'Look: 1 session with volumes that are copies of an earlier one; windows with them were not kept: see "To',
        f"mask of {rule} 11 one_0, one_1, one_10, one_2, one_3, one_4, one_5, one_6 and 3 more",
        "8.4% of the mask has no signal and was left out 1 one_3",
        "15 volumes are copies of an earlier one; windows with them were not kept 1 one_3",
        "sform LAS, qform RAS: they disagree on left and right; the sform was used 1 one_4",
        "space taken as MNI: header code 1 (scanner) 1 one_4",
    ):
        assert text.count(words) == 1, words


def test_parts_of_scores_are_drawn_where_a_sample_has_them(tmp_path, monkeypatch):
    drawn = []
    draw = quality_figures.Shown.draw

    def watched(shown: quality_figures.Shown, outline) -> Figure:
        drawn.append([title for _, _, title in shown.parts])
        return draw(shown, outline)

    monkeypatch.setattr(quality_figures.Shown, "draw", watched)
    parts = {"scores_space": np.full(WINDOWS, 2.0), "scores_time": np.full(WINDOWS, 1.0)}
    for number, more in enumerate(({}, parts)):
        dataset_page.write(make_dataset(tmp_path / str(number), [session("one_a", "one", "a", "train")], [], **more))
    assert drawn == [[], ["space part", "time part"]]


def test_says_which_parcels_the_ranker_saw():
    sessions = [session(f"one_{n}", "one", "a", "train", n_parcels=n) for n in (98, 100)]
    image = {"name": "atlas.nii.gz", "sha256": "c0ffee" * 10}
    for stated, expected in (
        ({"image": None}, "98–100 parcels: cubes of the brain mask"),
        ({"image": image}, "98–100 parcels: atlas.nii.gz, c0ffeec0ffee"),
    ):
        data = data_record(configuration={"settings": {"parcels": stated}})
        assert dataset_page._parcels(SimpleNamespace(manifest=data, sessions=sessions)) == expected


def test_outlying_is_beyond_three_robust_standard_deviations_on_the_bad_side():
    rng = np.random.default_rng(0)
    fd = np.round(rng.lognormal(-1, 0.6, 300), 4)
    sessions = [session(f"one_{n:03}", "one", str(n), "train", mean_fd_mm=value) for n, value in enumerate(fd)]
    sessions += [session(f"one_x{n}", "one", f"x{n}", "train", mean_fd_mm=None) for n in range(50)]
    limit = np.median(fd) + 3 * median_abs_deviation(fd, scale="normal")
    expected = [f"one_{n:03}" for n in np.argsort(-fd, kind="stable") if fd[n] > limit]
    assert 3 < len(expected) < 40 and [*distribution.find_outlying(sessions)] == expected


def test_rounding_is_not_outlying_and_few_values_are_judged_by_all_sessions():
    sessions = [session(f"one_{n:02}", "one", str(n), "train", brain_ml=1500.0 + n % 3) for n in range(20)]
    sessions[3] = changed(sessions[3], brain_ml=1574.0)  # the MAD is 1, but 75 ml is the least difference that counts
    assert distribution.find_outlying(sessions) == {}
    sessions[3] = changed(sessions[3], brain_ml=1577.0)
    assert distribution.find_outlying(sessions)["one_03"]["brain_ml"].side == "high"
    # 12 sessions of another cohort, of which 7 have a value
    other = [session(f"two_{n:02}", "two", str(n), "train", tsnr=20.0 if n < 7 else None) for n in range(12)]
    assert {key for key in distribution.find_outlying([*sessions, *other]) if key != "one_03"} == {
        f"two_{n:02}" for n in range(7)
    }
    other[7] = changed(other[7], tsnr=20.0)  # eight values: judged by themselves
    assert [*distribution.find_outlying([*sessions, *other])] == ["one_03"]


def test_another_tr_inside_a_cohort_is_pointed_out():
    """Not that of a whole cohort, however small; and it ranks behind sessions of bad quality."""
    sessions = [session(f"one_{n}", "one", str(n), "train", source_tr=2.0) for n in range(20)]
    sessions += [session(f"two_{n}", "two", str(n), "train", source_tr=0.8) for n in range(3)]
    assert distribution.find_outlying(sessions) == {}
    sessions[3] = changed(sessions[3], source_tr=2.5)
    sessions[9] = changed(sessions[9], tsnr=20.0)
    outlying = distribution.find_outlying(sessions)
    assert [*outlying] == ["one_9", "one_3"]
    assert outlying["one_3"] == {"source_tr": distribution.Far("high", "TR of the scan 2.5 s (median 2 s)")}
    with html.drawing():
        figure = distribution._draw(sessions, distribution.MEASURES, outlying)
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "TR of the scan")
    drawn = np.concatenate([line.get_xdata() for line in axes.lines if line.get_linestyle() == "None"])
    assert sorted(drawn) == [0.8] * 3 + [2.0] * 19 + [2.5]
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "D"] == [[2.5], []]
    low, high = axes.get_xlim()
    assert low < 0.8 and high > 2.5
    assert dataset_page._trs(sessions) == "2 (19), 0.8 (3), 2.5 (1)"
    sessions[:8] = [changed(line, source_tr=1 + number / 10) for number, line in enumerate(sessions[:8])]
    assert dataset_page._trs(sessions) == "0.8–2"


def test_equal_datasets_give_equal_bytes(content, dataset):
    assert dataset_page.write(dataset).read_text() == content
    assert not list((dataset / "report").glob("*tmp*"))


def test_thousands_of_sessions_stay_one_page():
    rng = np.random.default_rng(1)
    tsnr = [*rng.normal(20, 4, 40).tolist(), *rng.normal(60, 8, 3960).tolist()]
    sessions = [session(f"c{n % 20}_sub-{n:04}", f"c{n % 20}", f"{n:04}", "train", tsnr=tsnr[n]) for n in range(4000)]
    outlying = distribution.find_outlying(sessions)
    assert 10 < len(outlying) < 200
    embedded = pictures.number_embedded(sessions, None)
    assert embedded == pictures._MOST_EXAMPLES
    chosen = pictures.choose(sessions, outlying, None, None)
    assert len(chosen) == len(set(chosen)) == len(sessions)
    assert chosen[:2] == list(outlying)[:2]
    assert len({key.split("_")[0] for key in chosen[2:embedded]}) == embedded - 2
    assert (
        chosen[embedded : len(outlying)]
        == [key for key in outlying if key not in chosen[:embedded]][: len(outlying) - embedded]
    )
    with html.drawing():
        shown = page_of(distribution.describe(sessions, outlying))
    assert len(shown) < 500_000


def test_many_refused_runs_are_grouped():
    failed = [
        Refusal(key=f"k{n}", cohort="c", source="", reason=f"file {n}: bad. Mend it", hint="Mend it", fingerprint="")
        for n in range(500)
    ]
    text = Reader(page_of(dataset_page._refused(failed))).text
    assert "c Mend it 500" in text and "k99" in text and "k100" not in text
    assert "The first 100 of 500" in text


def test_fewer_colours_look_the_same():
    """The picture on the page beside the figure: every colour of the palette, and a grey ramp of noise."""
    palette = [html.BLUE, html.ORANGE, html.GREEN, html.RED, html.PURPLE, html.SKY, html.INK, html.PALE]
    with html.drawing():
        figure = Figure(figsize=(6, 4), dpi=html._DPI)
        above, below = figure.subplots(2, 1)
        above.imshow(np.random.default_rng(0).random((150, 600)), cmap="gray", aspect="auto")
        for place, colour in enumerate(palette):
            below.plot([0, 1], [place, place + 1], color=colour, lw=1)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        exact = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
        ((_, image),) = Reader(page_of([html.Picture.of(figure, "words")])).pictures()
    seen = np.asarray(image.convert("RGB")).astype(int)
    assert image.mode == "P" and seen.shape == exact.shape
    assert abs(seen - exact).max() < 32 and abs(seen - exact).mean() < 2
    assert (seen[0] == 255).all()


def test_damaged_sample_is_told(tmp_path):
    from shards.core.errors import SampleCorrupt

    folder = make_dataset(tmp_path / "d", [session("one_a", "one", "a", "train")], [])
    shard = folder / "shards" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    at = data.find(b"PK\x05\x06")
    data[at : at + 4] = b"XXXX"
    shard.write_bytes(data)
    with pytest.raises(SampleCorrupt, match="one_a"):
        dataset_page.write(folder)


def test_command(tmp_path, monkeypatch, capsys):
    folder = make_dataset(tmp_path / "d", [session("one_a", "one", "a", "train")], [])
    status, out, _ = command(monkeypatch, capsys, str(folder), "--json")
    last = json.loads(out.splitlines()[-1])
    assert status == 0 and last["kind"] == "dataset" and Path(last["report"]).is_file()
    status, _, err = command(monkeypatch, capsys, str(folder / "shards"))
    assert status == 2 and re.fullmatch(r"error: .*neither manifest\.json nor config\.yaml.*\n", err)
    status, _, err = command(monkeypatch, capsys, str(folder / "absent"))
    assert status == 2 and "no such folder" in err and err.count("\n") == 1
    assert command(monkeypatch, capsys)[0] == 2


def test_pictures_are_embedded_and_beside_the_page_as_asked_for(tmp_path, monkeypatch, capsys):
    sessions = [session(f"one_{n}", "one", str(n), "train") for n in range(3)]
    folder = make_dataset(tmp_path / "d", sessions, [])
    beside = folder / "report" / "sessions"
    for words, embedded, files_beside in (
        (["--embed", "1", "--pictures", "2"], 1, 1),
        (["--embed", "0", "--pictures", "all"], 0, 3),
        (["--pictures", "0"], 0, 0),
        ([], 3, 0),
    ):
        assert command(monkeypatch, capsys, str(folder), *words)[0] == 0
        reader = check_self_contained((folder / "report" / "index.html").read_text(), scripts=1)
        assert len([alt for alt, _ in reader.pictures() if alt.startswith("Three planes")]) == embedded, words
        assert len([*beside.glob("*.png")]) == files_beside and beside.exists() == bool(files_beside), words
    for words, expected in (
        (["--pictures", "many"], "expected a number of sessions or all"),
        (["--embed", "-1"], "--embed: got -1, expected 0 or more sessions"),
    ):
        status, _, err = command(monkeypatch, capsys, str(folder), *words)
        assert status == 2 and expected in err and err.count("\n") == 1
    (tmp_path / "run").mkdir()
    status, _, err = command(monkeypatch, capsys, str(tmp_path / "run"), "--pictures", "3")
    assert status == 2 and "--pictures: got no manifest.json in it, expected the folder of a dataset" in err
    status, out, _ = command(monkeypatch, capsys, "--help")
    assert status == 0 and f"(default {pictures.DRAWN})" in " ".join(out.split())


def test_the_colours_differ_for_colour_blind_readers():
    """CIELAB distance of every pair, seen without one kind of cone (Machado et al. 2009, severity 1)."""
    missing = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    palette = [html.BLUE, html.ORANGE, html.GREEN, html.RED, html.PURPLE, html.SKY, html.INK]
    srgb_C3 = np.array([to_rgb(colour) for colour in palette])
    linear_C3 = np.where(srgb_C3 <= 0.04045, srgb_C3 / 12.92, ((srgb_C3 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for kind, seen in {"all cones": np.eye(3), **missing}.items():
        xyz_C3 = np.clip(linear_C3 @ np.array(seen).T, 0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
        f_C3 = np.where(xyz_C3 > 0.008856, np.cbrt(xyz_C3), 7.787 * xyz_C3 + 16 / 116)
        x, y, z = f_C3.T
        lab_C3 = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
        distance_CC = np.linalg.norm(lab_C3[:, None] - lab_C3, axis=-1)
        assert distance_CC[np.triu_indices(len(palette), 1)].min() > 10, kind


def test_a_private_page_has_numbers_in_place_of_names(dataset: Path, tmp_path: Path) -> None:
    """Nothing that comes from a key, a subject or a file is left, and a subject has one number."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    opened = Dataset(copy)
    names = {name for line in opened.sessions for name in (line.key, line.source)}
    names |= {part for line in read_refusals(copy / layout.FAILED) for part in (line.key, line.source)}
    assert all(name in dataset_page.write(copy).read_text() for name in ("one_sub-04", "one_sub-05"))
    content = dataset_page.write(copy, private=True).read_text()
    reader = check_self_contained(content, scripts=1)
    assert not [name for name in names if name and (name in content or name in reader.text)]
    assert "session 05" in reader.text and "subject 05" in reader.text and "hidden on this page" in reader.text
    made = without_names(opened.sessions)
    pairs = {((one.cohort, one.subject), other.subject) for one, other in zip(opened.sessions, made, strict=True)}
    assert len(pairs) == len({one for one, _ in pairs}) == len({(one[0], other) for one, other in pairs})
    assert not any(one.labels or one.source for one in made)

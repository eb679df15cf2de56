"""The synthetic cohort: its bytes, its names, its headers, and whether what is planted can be found.

    pytest tests/shards/synthetic/test_synthetic.py

Shape suffixes: R runs, T frames, V voxels, N networks, P parcels, E pairs of parcels.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from nilearn.connectome import ConnectivityMeasure
from nilearn.interfaces.bids import get_bids_files
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.commands import ROOT
from shards.core.errors import ConfigError
from shards.synthetic import signals, truth, write
from shards.synthetic.anatomy import anatomy
from shards.synthetic.signals import run_frames
from shards.synthetic.truth import NETWORKS, SyntheticCohort, traits
from shards.synthetic.write import write_cohort

SMALL = SyntheticCohort(subjects=2, sessions=2, frames=40, voxel_mm=10, tr=0.8)
STEM = "sub-01_ses-1_task-rest"
BOLD = f"{STEM}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"


def digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load_run(root: Path, subject: str = "sub-01", session: str = "ses-1"):
    """A run from disk: (T, V) in scanner units, its image, its confounds and what was planted in it."""
    func = root / subject / session / "func"
    (bold,) = func.glob("*_bold.nii.gz")
    (mask,) = func.glob("*_mask.nii.gz")
    (confounds,) = func.glob("*_timeseries.tsv")
    image = nib.load(bold)
    y_TV = np.asarray(image.dataobj)[np.asarray(nib.load(mask).dataobj) > 0].T
    facts = json.loads((root / "truth.json").read_text())["subjects"][subject]["sessions"][session]
    return y_TV, image, pd.read_csv(confounds, sep="\t", na_values="n/a"), facts


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small") / "cohort"
    write_cohort(root, SMALL)
    return root


@pytest.fixture(scope="module")
def simulated():
    """What one would compute from 24 subjects x 2 sessions x 120 frames at 8 mm, and their traits."""
    cohort = SyntheticCohort()
    brain = anatomy(cohort.voxel_mm)
    cube_V3 = np.floor(brain.mm_V3 / 24).astype(int)
    _, cube_V, size_P = np.unique(cube_V3, axis=0, return_inverse=True, return_counts=True)
    average_PV = np.equal.outer(np.flatnonzero(size_P >= 3), cube_V.ravel()).astype(np.float32)
    average_PV /= average_PV.sum(1, keepdims=True)
    mean_RV, sd_RV, parcels, networks = [], [], [], []
    for subject, session in cohort.runs():
        y_TV = np.stack(list(run_frames(cohort, subject, session)))
        mean_RV.append(y_TV.mean(0))
        percent_TV = 100 * (y_TV / mean_RV[-1] - 1)
        sd_RV.append(percent_TV.std(0))
        parcels.append(percent_TV @ average_PV.T)
        networks.append(percent_TV @ np.linalg.pinv(brain.map_NV))
    measure = ConnectivityMeasure(
        kind="correlation", vectorize=True, discard_diagonal=True, standardize="zscore_sample"
    )
    subject_R = np.array([subject for subject, _ in cohort.runs()])
    label_R = [traits(cohort.seed, subject) for subject in subject_R]
    return {
        "mean_image": np.array(mean_RV),
        "sd_image": np.array(sd_RV),
        "connectome": measure.fit_transform(parcels),
        "networks": networks,
        "subject": subject_R,
        "group": np.array([group == "A" for group, _ in label_R]).astype(int),
        "score": np.array([score for _, score in label_R]),
    }


def decode(simulated, features: str) -> tuple[float, float]:
    """AUROC of `group` and correlation with `score`, cross-validated by subject."""
    x_RE, split = simulated[features], {"groups": simulated["subject"], "cv": GroupKFold(8)}
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9)))
    decision_R = cross_val_predict(logistic, x_RE, simulated["group"], method="decision_function", **split)
    guess_R = cross_val_predict(ridge, x_RE, simulated["score"], **split)
    return roc_auc_score(simulated["group"], decision_R), np.corrcoef(simulated["score"], guess_R)[0, 1]


def identify(x_RE: np.ndarray) -> float:
    """Share of subjects whose session 1 is most like their own session 2, each less its mean."""
    first, second = (x_RE[k::2] - x_RE[k::2].mean(0) for k in (0, 1))
    likeness = np.corrcoef(first, second)[: len(first), len(first) :]
    return float((likeness.argmax(1) == np.arange(len(first))).mean())


# ---------------------------------------------------------------- bytes


def test_same_call_same_bytes(small, tmp_path):
    write_cohort(tmp_path, SMALL)
    assert digests(tmp_path) == digests(small)


def test_run_does_not_depend_on_the_number_of_subjects_or_sessions(small, tmp_path):
    write_cohort(tmp_path, replace(SMALL, subjects=3, sessions=1))
    few, many = digests(small), digests(tmp_path)
    shared = [name for name in few if name in many and "/" in name]
    assert len(shared) == 2 * 5  # two subjects, one session: image, sidecar, mask, confounds, events
    assert all(few[name] == many[name] for name in shared)


def test_seed_and_session_change_the_run(small, tmp_path):
    write_cohort(tmp_path, replace(SMALL, subjects=1, sessions=1, seed=1))
    bolds = [path.read_bytes() for root in (small, tmp_path) for path in root.rglob("*_bold.nii.gz")]
    assert len(set(bolds)) == len(bolds) == 5


def test_killed_run_is_completed_and_shows_as_incomplete_before(small, tmp_path, monkeypatch):
    original, written = write.write_run, []

    def killed_at_third(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(original(*arguments))

    monkeypatch.setattr(write, "write_run", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, SMALL)
    assert not (tmp_path / "cohort.yaml").exists()
    monkeypatch.undo()
    write_cohort(tmp_path, SMALL)
    assert digests(tmp_path) == digests(small)


def test_interrupted_file_never_has_its_final_name(tmp_path, monkeypatch):
    def two_frames_then_stop(*_):
        yield from list(run_frames(SMALL, 1, 1))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "run_frames", two_frames_then_stop)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, SMALL)
    assert not list(tmp_path.rglob("*_bold.nii.gz"))


def test_gzip_carries_no_time_and_no_name(small):
    with open(next(small.rglob(BOLD)), "rb") as file:
        head = file.read(10)
    assert head[3] == 0 and head[4:8] == b"\0\0\0\0"


# ---------------------------------------------------------------- names and headers


def test_bids_files_are_found_in_pairs(small):
    space = ("space", "MNI152NLin2009cAsym")
    bolds, masks, tables = (
        get_bids_files(small, tag, kind, modality_folder="func", filters=filters)
        for tag, kind, filters in (
            ("bold", "nii.gz", [space, ("desc", "preproc")]),
            ("mask", "nii.gz", [space, ("desc", "brain")]),
            ("timeseries", "tsv", [("desc", "confounds")]),
        )
    )
    assert len(bolds) == len(masks) == len(tables) == 4
    for bold, mask, table in zip(sorted(bolds), sorted(masks), sorted(tables), strict=True):
        stem = bold.split("_space-")[0]
        assert mask == f"{stem}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz"
        assert table == f"{stem}_desc-confounds_timeseries.tsv"
        sidecar = json.loads(Path(bold.replace(".nii.gz", ".json")).read_text())
        assert sidecar["RepetitionTime"] == SMALL.tr and sidecar["TaskName"] == "rest"


def test_cohort_folder_describes_itself(small):
    description = json.loads((small / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    people = pd.read_csv(small / "participants.tsv", sep="\t")
    assert list(people.columns) == ["participant_id", "group", "score"]
    assert sorted(people["group"]) == ["A", "B"] and list(people.participant_id) == ["sub-01", "sub-02"]
    assert yaml.safe_load((small / "cohort.yaml").read_text()) == {
        "name": "synthetic",
        "root": ".",
        "layout": "bids",
        "space": "MNI",
        "participants": "participants.tsv",
    }
    subjects = json.loads((small / "truth.json").read_text())["subjects"]
    for row in people.itertuples():
        assert subjects[row.participant_id]["group"] == row.group
        assert subjects[row.participant_id]["score"] == row.score


def test_header_facts(small):
    y_TV, image, _, _ = load_run(small)
    header = image.header
    assert image.shape[3] == SMALL.frames and header.get_data_dtype() == np.int16
    assert int(header["sform_code"]) == int(header["qform_code"]) == 4  # MNI152
    assert np.allclose(header.get_sform(), header.get_qform())
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert header.get_xyzt_units() == ("mm", "sec")
    assert np.allclose(header.get_zooms(), (10, 10, 10, 0.8))
    assert float(header["scl_slope"]) != 1 and float(header["scl_inter"]) != 0
    # the rounding to integers, of SD slope / sqrt(12), must not matter beside the fluctuation
    assert float(image.dataobj.slope) / np.sqrt(12) < 0.005 * np.median(y_TV.std(0))


def test_background_is_zero_and_mask_is_the_mni_brain(small):
    _, image, _, _ = load_run(small)
    mask = np.asarray(nib.load(next(small.rglob("sub-01_ses-1*_mask.nii.gz"))).dataobj) > 0
    data = np.asarray(image.dataobj)
    assert np.all(data[~mask] == 0) and data[mask].min() > 1000
    assert mask.sum() * 10**3 == pytest.approx(235_375 * 8, rel=0.05)  # mm3, of the brain mask at 2 mm
    outer = np.ones_like(mask)
    outer[1:-1, 1:-1, 1:-1] = False
    assert not mask[outer].any()


def test_int16_never_saturates(small):
    for path in small.rglob("*_bold.nii.gz"):
        raw = np.frombuffer(gzip.decompress(path.read_bytes())[352:], np.int16)
        assert raw.max() < 32_767 and raw.min() > -32_768


# ---------------------------------------------------------------- what is planted


def test_fluctuation_is_one_to_three_percent_and_slow(simulated):
    y_TV = np.stack(list(run_frames(SyntheticCohort(), 1, 1)))
    percent_TV = 100 * (y_TV / y_TV.mean(0) - 1)
    assert 1 < np.median(percent_TV.std(0)) < 3
    z_TN = simulated["networks"][0] / simulated["networks"][0].std(0)
    assert (z_TN[1:] * z_TN[:-1]).mean() > 0.8  # lag 1 at 0.72 s, as the haemodynamic response has it


@pytest.mark.parametrize("snr", [0.6, 1.2])
def test_snr_is_what_was_asked_for(snr):
    """Two runs that differ in their noise level only: its size follows, and nothing else changes."""
    loud, soft = (SyntheticCohort(frames=100, snr=value) for value in (snr, 1e6))
    noise_TV, signal_TV = (np.stack(list(run_frames(cohort, 1, 1))) for cohort in (loud, soft))
    baseline_V = signals.baseline(loud, 1, 1)
    noise_percent = 100 * ((noise_TV - signal_TV) / baseline_V).std()
    assert signals.NETWORK_PERCENT / noise_percent == pytest.approx(snr, rel=0.05)


def test_events_raise_their_network_at_their_time(simulated):
    """Averaged over events: the planted networks peak 4-9 s after the onset, the others do not."""
    cohort = SyntheticCohort()
    planted_, others = [], []
    for (subject, session), course_TN in zip(cohort.runs(), simulated["networks"], strict=True):
        for event in truth.planted(cohort, subject, session)["events"]:
            first = round(event["onset_s"] / cohort.tr)
            course = course_TN[first : first + 20] - course_TN[first]
            if len(course) == 20:
                chosen = np.isin(list(NETWORKS), event["networks"])
                planted_.append(course[:, chosen].mean(1))
                others.append(course[:, ~chosen].mean(1))
    planted_T, others_T = np.mean(planted_, axis=0), np.mean(others, axis=0)
    assert len(planted_) > 100
    assert 4 < planted_T.argmax() * cohort.tr < 9
    assert planted_T.max() > 1.5 and np.abs(others_T).max() < 0.4


def test_events_stand_in_a_bids_table(small):
    _, _, _, facts = load_run(small)
    table = pd.read_csv(next(small.rglob(f"{STEM}_events.tsv")), sep="\t")
    assert list(table.columns) == ["onset", "duration", "trial_type"]
    for row, event in zip(table.itertuples(), facts["events"], strict=True):
        assert (row.onset, row.duration, row.trial_type) == (event["onset_s"], event["length_s"], event["state"])
        assert tuple(event["networks"]) == truth.STATES[event["state"]]
    pairs = {frozenset((a, b)) for pairs in truth.TRAIT_PAIRS.values() for a, b, _ in pairs}
    assert pairs.isdisjoint(map(frozenset, truth.STATES.values()))


def test_artefacts_show_in_the_data_and_in_framewise_displacement(small):
    for subject in ("sub-01", "sub-02"):
        y_TV, _, confounds, facts = load_run(small, subject)
        dvars_T = np.sqrt((np.diff(100 * y_TV / y_TV.mean(0), axis=0) ** 2).mean(1))
        fd_T = confounds["framewise_displacement"].to_numpy()[1:]
        at = [artefact["frame"] - 1 for artefact in facts["artefacts"]]  # row f - 1: the change into frame f
        assert at and np.all(fd_T[at] > 5 * np.median(fd_T))
        assert np.all(dvars_T[at] > np.median(dvars_T) + 5 * np.median(np.abs(dvars_T - np.median(dvars_T))))


def test_confounds_follow_fmriprep(small):
    y_TV, _, confounds, _ = load_run(small)
    text = next(small.rglob(f"{STEM}_desc-confounds_timeseries.tsv")).read_text().splitlines()
    assert text[1].split("\t")[text[0].split("\t").index("framewise_displacement")] == "n/a"
    assert len(confounds) == SMALL.frames and confounds.iloc[1:].notna().all().all()
    motion_T6 = confounds[[f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]].to_numpy()
    power_T = np.abs(np.diff(motion_T6, axis=0)) @ [1, 1, 1, 50, 50, 50]
    assert np.allclose(confounds["framewise_displacement"][1:], power_T, atol=1e-5)
    assert np.allclose(confounds["global_signal"], y_TV.mean(1), rtol=1e-4)


def test_traits_are_balanced_and_of_the_subject_alone():
    groups = [traits(0, subject)[0] for subject in range(1, 41)]
    assert groups.count("A") == 20 and groups[::2] != ["A"] * 20
    assert traits(0, 7) == traits(0, 7) != traits(1, 7)


@pytest.mark.parametrize("subject", range(1, 9))
def test_connectivity_is_a_correlation_matrix(subject):
    corr_NN = truth.connectivity(0, subject)
    assert np.allclose(np.diag(corr_NN), 1) and np.allclose(corr_NN, corr_NN.T)
    assert np.linalg.eigvalsh(corr_NN).min() > 0.01


def test_traits_live_in_the_connectome(simulated):
    """With 24 people the group is at .74; with 200 of twice the frames it is at .99."""
    auroc, r = decode(simulated, "connectome")
    assert auroc > 0.7 and r > 0.5


@pytest.mark.parametrize("features", ["mean_image", "sd_image"])
def test_traits_do_not_live_elsewhere(simulated, features):
    auroc, r = decode(simulated, features)
    assert auroc < 0.65 and r < 0.3


def test_pairs_that_carry_traits_do_not_overlap():
    """Where two maps overlap, their correlation shows in the variance of a voxel."""
    map_NV = anatomy(8.0).map_NV
    unit_NV = map_NV / np.linalg.norm(map_NV, axis=1, keepdims=True)
    index = {name: i for i, name in enumerate(NETWORKS)}
    for pairs in truth.TRAIT_PAIRS.values():
        assert all(unit_NV[index[a]] @ unit_NV[index[b]] < 0.05 for a, b, _ in pairs)


def test_fingerprint(simulated):
    """Chance is 1 in 24; the mean image is anatomy and identifies everyone."""
    assert identify(simulated["connectome"]) > 0.25
    assert identify(simulated["mean_image"]) > 0.95


# ---------------------------------------------------------------- invalid calls


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subjects", 0),
        ("sessions", 0),
        ("frames", 19),
        ("frames", 40_000),
        ("voxel_mm", 0),
        ("voxel_mm", 21),
        ("voxel_mm", float("nan")),
        ("tr", 0),
        ("tr", 11),
        ("snr", 0),
        ("snr", float("inf")),
        ("seed", -1),
    ],
)
def test_value_out_of_range(field, value):
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **{field: value})
    assert caught.value.where == "command line" and caught.value.field == f"--{field.replace('_', '-')}"
    assert str(value) in caught.value.line()


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        write_cohort(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"frames": 50}, {"snr": 0.5}, {"subjects": 1}])
def test_cohort_of_other_parameters_is_refused(small, change):
    before = digests(small)
    with pytest.raises(ConfigError, match="--out"):
        write_cohort(small, replace(SMALL, **change))
    assert digests(small) == before


def test_more_subjects_extend_a_cohort(tmp_path):
    one = replace(SMALL, subjects=1, sessions=1)
    write_cohort(tmp_path, one)
    write_cohort(tmp_path, replace(one, subjects=2))
    assert len(pd.read_csv(tmp_path / "participants.tsv", sep="\t")) == 2 == len(list(tmp_path.glob("sub-*")))


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(ROOT / "tools" / "make_cohort.py"), *arguments]
    return subprocess.run(call, capture_output=True, text=True, env=environment, check=False)


def test_command_writes_and_says_what_next(tmp_path):
    out = tmp_path / "cohort"
    size = ["--subjects", "1", "--sessions", "1", "--frames", "20", "--voxel-mm", "12"]
    done = command("--out", str(out), *size, "--json")
    assert done.returncode == 0, done.stderr
    assert f"next: python tools/make_shards.py {out}/cohort.yaml --out" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["runs"] == 1
    assert (out / "cohort.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--frames", "5"], "--frames"),
        (["--subjects", "many"], "--subjects"),
        (["--voxel-mm", "-2"], "--voxel-mm"),
        (["--sujets", "3"], "--sujets"),
    ],
)
def test_invalid_call_is_one_line_and_status_2(tmp_path, arguments, named):
    done = command("--out", str(tmp_path / "cohort"), *arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and named in done.stderr
    assert not (tmp_path / "cohort").exists()


def test_out_that_is_a_file_is_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--out", str(tmp_path / "file"))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "--out" in done.stderr

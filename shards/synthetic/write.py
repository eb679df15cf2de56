"""Write a synthetic BIDS-derivative cohort in MNI space with known events, artefacts, traits and fingerprints.

    slim-brain make-cohort --out cohort --subjects 24 --sessions 2

The ground truth, against which methods can be tested:

- the *mean image* identifies the subject (smooth anatomical variation), but contains no information about the traits;
- the *connectivity* of twelve overlapping networks identifies the subject (it is shared by the subject's sessions) and
  depends on both traits, `group` and `score`; the variance of each network is equal in all subjects;
- with recipe 3, each network has a *fine pattern* too, which has mean 0 in every 24 mm cube and in every parcel of the
  label image at the root. The coupling of fine patterns identifies the subject and depends on two more traits,
  `fine_group` and `fine_score`. The fingerprint of the networks themselves is then drawn for each session, so what
  identifies a subject beyond the traits `group` and `score` is fine;
- *events* (two networks are active for a few seconds, convolved with a haemodynamic response) and *artefacts* (motion
  in one or two frames) are listed with their times in `truth.json`, and events also in BIDS `events.tsv` files.

All random numbers depend only on (seed, purpose, subject, session), so the files of a scan do not depend on the number
of subjects. `cohort.yaml` is written last: if it exists, the cohort is complete.

    DIR/README  dataset_description.json  participants.tsv (and .json)  truth.json  cohort.yaml  .bidsignore
    DIR/space-MNI152NLin2009cAsym_desc-parcels_dseg.nii.gz  (recipe 3)
    DIR/sub-01/ses-1/func/
        sub-01_ses-1_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz (and .json)
        sub-01_ses-1_task-rest_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz
        sub-01_ses-1_task-rest_desc-confounds_timeseries.tsv
        sub-01_ses-1_task-rest_events.tsv

Shape suffixes: T frames, D steps of `STEP_S` seconds, V voxels inside the mask, XYZ the grid, N networks, K
spatial patterns (networks and nuisances), 3 coordinates in mm, 6 motion parameters (translations in mm,
rotations in rad).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import yaml

from shards.core import files
from shards.core.errors import ConfigError
from shards.synthetic.anatomy import Anatomy, anatomy
from shards.synthetic.signals import framewise_displacement, motion, run_frames
from shards.synthetic.surrogates import surrogates
from shards.synthetic.truth import (
    GENERATOR,
    PARCEL_IMAGE,
    SPACE,
    SyntheticCohort,
    planted,
    truth,
)

_README = "A synthetic cohort of SLIM-Brain (slim-brain make-cohort): nobody was scanned. See truth.json.\n"
_README_NOISE = (
    "A synthetic cohort of SLIM-Brain (slim-brain make-cohort). Its people and signals are made up; its noise are\n"
    "surrogates of the scan that truth.json names, with its spatial correlations: what you may do with that scan, you\n"
    "may do with this cohort.\n"
)
_COLUMNS = {
    "group": {"Description": "trait of the subject, in its connectivity", "Levels": {"A": "group A", "B": "group B"}},
    "score": {"Description": "trait of the subject, in its connectivity", "Units": "arbitrary"},
    "fine_group": {
        "Description": "trait of the subject, in the coupling of fine patterns",
        "Levels": {"A": "group A", "B": "group B"},
    },
    "fine_score": {"Description": "trait of the subject, in the coupling of fine patterns", "Units": "arbitrary"},
}
# Files that are not part of BIDS; fMRIPrep's .bidsignore also lists its confounds.
_NOT_BIDS = ("cohort.yaml", "truth.json", "*_timeseries.tsv")


SLOPE, INTERCEPT = 0.5, 12_000.0  # exact in binary, so that the background is read as exactly 0


@contextmanager
def _gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without a name and time in its header, so that equal content gives equal bytes."""
    with files.atomically(path) as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        yield packed


def _write_table(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(None, sep="\t", na_rep="n/a", index=False, float_format="%.8g", lineterminator="\n")
    files.write_atomically(path, text)


def _header(brain: Anatomy, dtype: type, tr: float | None = None, count: int = 1) -> bytes:
    """A NIfTI-1 header in MNI152 space; with `tr`, for `count` frames of scaled integers."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    mm = float(brain.affine[0, 0])
    header.set_data_shape(brain.mask_XYZ.shape + ((count,) if tr else ()))
    header.set_zooms((mm, mm, mm) + ((tr,) if tr else ()))
    header.set_xyzt_units("mm", "sec" if tr else "unknown")
    header.set_sform(brain.affine, code="mni")
    header.set_qform(brain.affine, code="mni")
    if tr:
        header.set_slope_inter(SLOPE, INTERCEPT)
    header.set_data_offset(header.single_vox_offset)
    buffer = io.BytesIO()
    header.write_to(buffer)
    return buffer.getvalue()


def write_run(root: Path, cohort: SyntheticCohort, subject: int, session: int) -> None:
    """Write one scan with its sidecar, mask and confounds below `root`, with the file names of fMRIPrep."""
    brain = anatomy(cohort.voxel_mm, cohort.recipe)
    folder = root / f"sub-{subject:02d}" / f"ses-{session}" / "func"
    stem = f"sub-{subject:02d}_ses-{session}_task-rest"

    with _gzip(folder / f"{stem}_space-{SPACE}_desc-brain_mask.nii.gz") as file:
        file.write(_header(brain, np.uint8) + brain.mask_XYZ.astype(np.uint8).tobytes(order="F"))

    global_signal = []
    outside = round(-INTERCEPT / SLOPE)  # is read as 0
    stored_XYZ = np.full(brain.mask_XYZ.shape, outside, np.int16)
    limits = np.iinfo(np.int16)
    with _gzip(folder / f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz") as file:
        file.write(_header(brain, np.int16, cohort.tr, cohort.frames))
        for y_V in run_frames(cohort, subject, session):
            stored_XYZ[brain.mask_XYZ] = np.clip(np.round((y_V - INTERCEPT) / SLOPE), limits.min, limits.max)
            file.write(stored_XYZ.tobytes(order="F"))
            global_signal.append(float(y_V.mean()))

    sidecar = {"RepetitionTime": cohort.tr, "SkullStripped": True, "TaskName": "rest"}
    files.write_atomically(folder / f"{stem}_space-{SPACE}_desc-preproc_bold.json", _pretty(sidecar))
    motion_T6 = motion(cohort, subject, session)
    confounds = {"global_signal": global_signal, "framewise_displacement": framewise_displacement(motion_T6)}
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    confounds |= dict(zip(names, motion_T6.T, strict=True))
    _write_table(folder / f"{stem}_desc-confounds_timeseries.tsv", pd.DataFrame(confounds))
    events = [
        {"onset": event["onset_s"], "duration": event["length_s"], "trial_type": event["state"]}
        for event in planted(cohort, subject, session)["events"]
    ]
    _write_table(folder / f"{stem}_events.tsv", pd.DataFrame(events))


def _write_parcels(root: Path, brain: Anatomy) -> None:
    """Write the label image of the parcels, for `parcels.image`."""
    assert brain.parcel_V is not None
    label_XYZ = np.zeros(brain.mask_XYZ.shape, np.int16)
    label_XYZ[brain.mask_XYZ] = brain.parcel_V
    with _gzip(root / PARCEL_IMAGE) as file:
        file.write(_header(brain, np.int16) + label_XYZ.tobytes(order="F"))


def _pretty(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def _check_folder(root: Path, cohort: SyntheticCohort) -> None:
    """Check that a folder is empty or holds (a part of) this cohort."""
    if all(path.name.endswith(".tmp") for path in root.iterdir()):
        return
    try:
        old = json.loads((root / "truth.json").read_text(encoding="utf-8"))
        was = old["parameters"] | {"recipe": old["recipe"]} if old["generator"] == GENERATOR else None
    except (OSError, ValueError, KeyError, TypeError):
        was = None
    hint = "Give another folder"
    if was is None:
        got = f"{root}, which contains other files"
        raise ConfigError("command line", "--out", got, "a new or empty folder", hint)
    asked = cohort.parameters() | {"recipe": cohort.recipe}
    # More subjects or sessions extend a cohort; with fewer, scans would remain that are not in its tables.
    for key in sorted({*was, *asked}):
        value = asked.get(key)
        grows = key in ("subjects", "sessions") and key in was and asked[key] >= was[key]
        if not grows and value != was.get(key):
            got = f"{root}, a cohort of {key} {was.get(key)}"
            raise ConfigError("command line", "--out", got, f"{key} {value}", hint)


def write_cohort(
    root: str | Path, cohort: SyntheticCohort, advance: Callable[[int, str], None] = lambda count, note: None
) -> None:
    """Write a cohort below `root`. Writing the same cohort again gives the same bytes.

    Parameters
    ----------
    root : str or Path
        A new or empty folder, or a folder with this cohort, possibly with fewer subjects or sessions.
    cohort : SyntheticCohort
    advance : callable, optional
        Called with (1, name of the scan) after each scan.

    Raises
    ------
    ConfigError
        If `root` has other content or cannot be made, or the scan of the noise cannot be used.
    """
    root = Path(root)
    facts = truth(cohort)
    if cohort.noise is not None:  # whether it can be used, before anything is written
        surrogates(cohort.noise, cohort.voxel_mm, cohort.recipe)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_folder(root, cohort)
        (root / "cohort.yaml").unlink(missing_ok=True)
        files.write_atomically(root / "truth.json", _pretty(facts))
    except OSError as error:
        got = f"{root} ({error.strerror})"
        raise ConfigError("command line", "--out", got, "a folder that can be written") from None
    description = {
        "Name": "synthetic",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": str(cohort.recipe)}],
    }
    files.write_atomically(root / "dataset_description.json", _pretty(description))
    files.write_atomically(root / "README", _README if cohort.noise is None else _README_NOISE)
    files.write_atomically(root / ".bidsignore", "".join(f"{name}\n" for name in _NOT_BIDS))
    people = pd.DataFrame.from_dict(facts["subjects"], orient="index").drop(columns="sessions")
    files.write_atomically(root / "participants.json", _pretty({name: _COLUMNS[name] for name in people}))
    _write_table(root / "participants.tsv", people.rename_axis("participant_id").reset_index())
    if cohort.recipe == 3:
        _write_parcels(root, anatomy(cohort.voxel_mm, cohort.recipe))
    for subject, session in cohort.runs():
        write_run(root, cohort, subject, session)
        advance(1, f"sub-{subject:02d} ses-{session}")
    config = {"name": "synthetic", "root": ".", "layout": "bids", "space": "MNI", "participants": "participants.tsv"}
    files.write_atomically(root / "cohort.yaml", yaml.safe_dump(config, sort_keys=False))

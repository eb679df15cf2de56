"""The shipped cohort files against folder trees as the real cohorts have them, made up of small images.

A tree is described once (`TREES`), as the patterns of its files and the scans that fill them; `build` writes it. Names
of files and columns are the real ones; subjects, scores and images are made up.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from helpers.commands import GRID, ROOT
from shards.cohorts.cohort_file import CohortSettings, find_runs, pattern_regex
from shards.cohorts.scan import RunSource
from shards.core.settings import load, read_yaml
from shards.format.reader import Dataset

COHORTS = ROOT / "configs" / "cohorts"
FRAMES = 60
SHAPE = 20, 24, 20
AFFINE = nib.affines.from_matvec(np.diag([9.0] * 3), [-85.5, -121.5, -67.5])  # 9 mm, around the MNI brain
MNI = "space-MNI152NLin2009cAsym"


@dataclass(frozen=True)
class Tree:
    """A cohort as it lies on disk.

    The patterns are filled by each scan in turn; `{_}` stands for `stem`. Those of `bold`, `mask`, `confounds` and
    `neighbours` begin at the folder that the cohort file's root names, those of `above` at the top of the tree.
    """

    scans: str  # a line each: TR in seconds, then what fills the patterns
    key: str  # of the sample
    bold: str
    mask: str | None = None
    confounds: str | None = None
    neighbours: str = ""  # files that are no runs, parted by blanks
    above: str = ""  # more of them
    stem: str = ""
    root: str = "."
    table: str = ""  # labels: the file at the top of the tree,
    rows: str = ""  # and what it holds; * is a tab
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)  # some of them, by subject or subject/session
    tr: float | None = None  # what the cohort file states
    dummy: int | str = "auto"
    residuals: bool = False  # regression took each voxel's mean away
    mask_value: float = 1  # where a mean or anatomical image serves as mask
    blanks: bool = False  # confounds parted by blanks

    @property
    def each(self) -> list[dict[str, Any]]:
        lines = [line.split() for line in self.scans.strip().splitlines()]
        return [{"tr": float(tr), **dict(word.split("=") for word in words)} for tr, *words in lines]

    def fill(self, pattern: str, scan: dict[str, Any]) -> str:
        return pattern.format(**scan, _=self.stem.format(**scan))


def fmriprep(stem: str, words: str = "timeseries", res: str = "", more: str = "") -> dict[str, Any]:
    """What fMRIPrep leaves beside a run."""
    run = f"{{_}}_{MNI}{res}"
    return {
        "root": "derivatives/fmriprep",
        "stem": stem,
        "bold": f"{run}_desc-preproc_bold.nii.gz",
        "mask": f"{run}_desc-brain_mask.nii.gz",
        "confounds": f"{{_}}_desc-confounds_{words}.tsv",
        "neighbours": f"""
            {run}_desc-preproc_bold.json {run}_boldref.nii.gz {run}_desc-aseg_dseg.nii.gz
            {{_}}_space-T1w_desc-preproc_bold.nii.gz {{_}}_space-T1w_desc-brain_mask.nii.gz
            {{_}}_space-fsaverage5_hemi-L.func.gii {{_}}_desc-confounds_{words}.json
            {stem.replace("task-", "task-faces")}_{MNI}{res}_desc-preproc_bold.nii.gz
            sub-{{sub}}/anat/sub-{{sub}}_{MNI}_desc-preproc_T1w.nii.gz sub-{{sub}}/figures/sub-{{sub}}_{MNI}_T1w.svg
            {more}""",
        "above": f"{stem}_bold.nii.gz sub-{{sub}}/anat/sub-{{sub}}_T1w.nii.gz dataset_description.json",
    }


def hcp(run: str, others: str) -> dict[str, Any]:
    """What the HCP pipelines leave of a resting run, cleaned by ICA-FIX."""
    results = "{sub}/MNINonLinear/Results"
    return {
        "stem": f"{results}/{run}/{run}",
        "bold": "{_}_hp2000_clean.nii.gz",
        "mask": f"{results}/{run}/brainmask_fs.2.nii.gz",
        "neighbours": f"""
            {{_}}.nii.gz {{_}}_SBRef.nii.gz {{_}}_Jacobian.nii.gz {{_}}_hp2000_clean_rclean_tclean.nii.gz
            {{_}}_Atlas_MSMAll_hp2000_clean.dtseries.nii {results}/{run}/Movement_Regressors.txt
            {results}/{run}/RibbonVolumeToSurfaceMapping/goodvoxels.nii.gz
            {{sub}}/MNINonLinear/T1w_restore.2.nii.gz {{sub}}/MNINonLinear/brainmask_fs.nii.gz
            {{sub}}/unprocessed/3T/{run}/{{sub}}_3T_{run}.nii.gz {others.replace("...", results)}""",
    }


VISIT = "sub-{sub}/ses-{ses}/func/sub-{sub}_ses-{ses}_task-rest"
ABCD = f"{VISIT}_run-{{run}}"
ABCD_ANAT = "sub-{sub}/ses-{ses}/anat/sub-{sub}_ses-{ses}"
ABCD_TASK = ABCD.replace("task-rest", "task-MID")
AOMIC = "participant_id*age*sex*BMI*handedness*education_category*raven_score*NEO_N*NEO_E*NEO_O*NEO_A*NEO_C"
ATHENA = "{site}/{sub}/{sub}_session_{ses}"

TREES = {
    "hcp": Tree(
        scans="".join(
            f"0.72 sub={sub} ses={ses} run={run}\n"
            for sub in (100307, 211720)
            for ses in ("REST1", "REST2")
            for run in ("LR", "RL")
        ),
        key="hcp_sub-{sub}_ses-{ses}_run-{run}",
        **hcp(
            "rfMRI_{ses}_{run}",
            """.../tfMRI_WM_{run}/tfMRI_WM_{run}.nii.gz .../tfMRI_WM_{run}/brainmask_fs.2.nii.gz
            .../rfMRI_REST1_7T_PA/rfMRI_REST1_7T_PA_hp2000_clean.nii.gz""",
        ),
        table="unrestricted.csv",
        rows="Subject,Release,Gender,Age,PMAT24_A_CR\n100307,Q1,F,26-30,17\n211720,Q2,M,31-35,\n",
        labels={
            "100307": {"Gender": "F", "Age": "26-30", "PMAT24_A_CR": 17},
            "211720": {"Age": "31-35", "PMAT24_A_CR": None},
        },
    ),
    "hcp_task": Tree(
        scans="".join(
            f"0.72 sub={sub} task={task} run={run}\n"
            for sub in (100307, 211720)
            for task in ("MOTOR", "WM")
            for run in ("LR", "RL")
        ),
        key="hcp-task_sub-{sub}_task-{task}_run-{run}",
        stem="{sub}/MNINonLinear/Results/tfMRI_{task}_{run}",
        bold="{_}/tfMRI_{task}_{run}.nii.gz",
        mask="{_}/brainmask_fs.2.nii.gz",
        neighbours="""
            {_}/tfMRI_{task}_{run}_SBRef.nii.gz {_}/tfMRI_{task}_{run}_Atlas_MSMAll.dtseries.nii
            {_}/EVs/lh.txt {_}/EVs/Sync.txt {_}/Movement_Regressors.txt
            {sub}/MNINonLinear/Results/rfMRI_REST1_{run}/rfMRI_REST1_{run}.nii.gz
            {sub}/MNINonLinear/Results/tfMRI_MOVIE1_7T_AP/tfMRI_MOVIE1_7T_AP.nii.gz
            {sub}/MNINonLinear/Results/tfMRI_{task}/tfMRI_{task}_hp200_s4_level2.fsf""",
        table="unrestricted.csv",
        rows="Subject,Release,Gender,Age,Family_ID\n100307,Q1,F,26-30,F1\n211720,Q2,M,31-35,F2\n",
        labels={"100307": {"Gender": "F", "Family_ID": "F1"}, "211720": {"Age": "31-35"}},
    ),
    "aabc": Tree(
        scans="""
            0.72 sub=HCA6000030 ses=V1
            0.72 sub=HCA6000030 ses=V2
            0.72 sub=HCA8887776 ses=V1""",
        key="aabc_sub-{sub}_ses-{ses}",
        stem="{sub}_{ses}_MR/MNINonLinear/Results",
        bold="{_}/rfMRI_REST/rfMRI_REST_hp0_clean_rclean_tclean.nii.gz",
        neighbours="""
            {_}/rfMRI_REST/rfMRI_REST_Atlas_MSMAll_hp0_clean_rclean_tclean.dtseries.nii
            {_}/rfMRI_REST1_AP/rfMRI_REST1_AP_hp0_clean_rclean_tclean.nii.gz
            {_}/tfMRI_CARIT_PA/tfMRI_CARIT_PA_hp0_clean_rclean_tclean.nii.gz""",
        table="participants.csv",
        rows="id_event,sex,age_open,pedid,subject,session\nHCA6000030_V1,F,51.5,P1,HCA6000030,V1\n"
        "HCA6000030_V2,F,54.0,P1,HCA6000030,V2\nHCA8887776_V1,M,,P2,HCA8887776,V1\n",
        labels={
            "HCA6000030/V1": {"sex": "F", "age_open": 51.5},
            "HCA6000030/V2": {"age_open": 54.0, "pedid": "P1"},
            "HCA8887776/V1": {"sex": "M", "age_open": None},
        },
    ),
    "chcp": Tree(
        scans="".join(
            f"0.71 sub={sub} ses={ses} run={run}\n" for sub in (3001, 3002) for ses in (1, 2) for run in ("AP", "PA")
        ),
        key="chcp_sub-{sub}_ses-{ses}_run-{run}",
        **hcp("rfMRI_REST{ses}_{run}", ".../rfMRI_Emotion_{run}/rfMRI_Emotion_{run}_hp2000_clean.nii.gz"),
        labels={"3001": {}, "3002": {}},
    ),
    "abcd": Tree(
        scans="""
            0.8 sub=NDARINV0A1B2C3D ses=baselineYear1Arm1 run=1
            0.8 sub=NDARINV0A1B2C3D ses=baselineYear1Arm1 run=2
            0.8 sub=NDARINV0A1B2C3D ses=2YearFollowUpYArm1 run=1
            0.8 sub=NDARINV9Z8Y7X6W ses=baselineYear1Arm1 run=1""",
        key="abcd_sub-{sub}_ses-{ses}_run-{run}",
        root="derivatives/abcd-hcp-pipeline",
        bold=f"{ABCD}_space-MNI_bold.nii.gz",
        mask=f"{ABCD_ANAT}_T1w_space-MNI_brain.nii.gz",
        mask_value=600,
        confounds=f"{ABCD}_desc-includingFD_motion.tsv",
        blanks=True,
        neighbours=f"""
            {ABCD}_motion.tsv {ABCD}_desc-filtered_motion.tsv {ABCD}_desc-filteredincludingFD_motion.tsv
            {ABCD}_bold_timeseries.dtseries.nii {VISIT}_bold_desc-filtered_timeseries.dtseries.nii
            {VISIT}_desc-filtered_motion_mask.mat
            {ABCD_TASK}_space-MNI_bold.nii.gz {ABCD_TASK}_desc-includingFD_motion.tsv
            {ABCD_ANAT}_T1w_space-MNI_head.nii.gz {ABCD_ANAT}_T2w_space-MNI_brain.nii.gz
            {ABCD_ANAT}_space-ACPC_dseg.nii.gz sub-{{sub}}/ses-{{ses}}/sub-{{sub}}_ses-{{ses}}.html""",
        above=f"{ABCD}_bold.nii.gz derivatives/freesurfer-5.3.0-HCP/sub-{{sub}}/ses-{{ses}}/stats/aseg.stats",
        table="participants.tsv",
        rows="participant_id*session_id*site*scanner_manufacturer*sex*age\n"
        "sub-NDARINV0A1B2C3D*ses-baselineYear1Arm1*site06*SIEMENS*2*118\n"
        "sub-NDARINV0A1B2C3D*ses-2YearFollowUpYArm1*site06*SIEMENS*2*143\n"
        "sub-NDARINV9Z8Y7X6W*ses-baselineYear1Arm1*site16*GE MEDICAL SYSTEMS*1*\n",
        labels={
            "NDARINV0A1B2C3D/baselineYear1Arm1": {"site": "site06", "age": 118},
            "NDARINV0A1B2C3D/2YearFollowUpYArm1": {"site": "site06", "age": 143},
            "NDARINV9Z8Y7X6W/baselineYear1Arm1": {"scanner_manufacturer": "GE MEDICAL SYSTEMS", "age": None},
        },
    ),
    "aomic_piop1": Tree(
        scans="0.75 sub=0001\n0.75 sub=0002\n0.75 sub=0010",
        key="aomic-piop1_sub-{sub}_task-restingstate_acq-mb3",
        **fmriprep("sub-{sub}/func/sub-{sub}_task-restingstate_acq-mb3", "regressors"),
        table="participants.tsv",
        rows=f"{AOMIC}\nsub-0001*25.5*M*21*right*academic*33*23*40*52*47*32\n"
        "sub-0002*23.25*F*22*right*n/a*19*22*47*34*53*46\n",
        labels={"0001": {"age": 25.5, "NEO_C": 32}, "0002": {"sex": "F", "education_category": None}, "0010": {}},
    ),
    "aomic_piop2": Tree(
        scans="2 sub=0001\n2 sub=0002",
        key="aomic-piop2_sub-{sub}_task-restingstate_acq-seq",
        **fmriprep("sub-{sub}/func/sub-{sub}_task-restingstate_acq-seq", "regressors"),
        table="participants.tsv",
        rows=f"{AOMIC}\nsub-0001*21*F*23*left*applied*28*31*38*44*41*39\n"
        "sub-0002*22*M*20*right*academic*30*27*45*40*49*43\n",
        labels={"0001": {"handedness": "left"}, "0002": {"raven_score": 30}},
    ),
    "abide": Tree(  # two people as nilearn leaves them, one as the bucket has them, a folder for each derivative
        scans="""
            1.5 sub=0050003 site=Pitt at= with=
            2.0 sub=0050272 site=UM_1 at= with=
            2.0 sub=0050954 site=NYU at=func_preproc/ with=func_mask/""",
        key="abide_sub-{sub}",
        bold="cpac/nofilt_noglobal/{at}{site}_{sub}_func_preproc.nii.gz",
        mask="cpac/nofilt_noglobal/{with}{site}_{sub}_func_mask.nii.gz",
        residuals=True,
        dummy=4,
        neighbours="""
            cpac/nofilt_noglobal/{at}{site}_{sub}_func_mean.nii.gz cpac/nofilt_noglobal/{at}{site}_{sub}_rois_cc200.1D
            cpac/filt_noglobal/{site}_{sub}_func_preproc.nii.gz cpac/filt_global/{site}_{sub}_func_mask.nii.gz
            ccs/nofilt_noglobal/{site}_{sub}_func_preproc.nii.gz""",
        table="Phenotypic_V1_0b_preprocessed1.csv",
        rows=",Unnamed: 0,SUB_ID,X,subject,SITE_ID,FILE_ID,DX_GROUP,AGE_AT_SCAN,SEX,FIQ,qc_notes_rater_1\n"
        "0,1,50002,1,50002,PITT,no_filename,1,16.8,1,116,\n"
        '1,2,50003,2,50003,PITT,Pitt_0050003,1,24.5,1,124,"slow, but fine"\n'
        "2,3,50272,3,50272,UM_1,UM_1_0050272,2,13.2,2,-9999,\n3,4,50954,4,50954,NYU,NYU_0050954,1,11.0,1,,\n",
        labels={
            "0050003": {"SITE_ID": "PITT", "DX_GROUP": 1, "qc_notes_rater_1": "slow, but fine"},
            "0050272": {"DX_GROUP": 2, "FIQ": -9999},
            "0050954": {"FILE_ID": "NYU_0050954", "FIQ": None},
        },
    ),
    "adhd200": Tree(
        scans="""
            2.0 sub=0010001 site=NYU ses=1 run=1
            2.0 sub=0010001 site=NYU ses=1 run=2
            2.5 sub=1018959 site=KKI ses=1 run=1""",
        key="adhd200_sub-{sub}_ses-{ses}_run-{run}",
        stem="mrda{sub}_session_{ses}_rest_{run}",
        bold="{site}/{sub}/sfnw{_}.nii.gz",
        mask="{site}/{sub}/wmean_{_}.nii.gz",
        mask_value=900,
        residuals=True,
        dummy=0,
        neighbours=f"""
            {{site}}/{{sub}}/snw{{_}}.nii.gz {{site}}/{{sub}}/fc_snw{{_}}.nii.gz {{site}}/{{sub}}/snw{{_}}_TCs.1D
            {{site}}/{{sub}}/falff_{{sub}}_session_{{ses}}_rest_{{run}}.nii.gz
            {{site}}/{{sub}}/wssd{{sub}}_session_{{ses}}_anat.nii.gz {ATHENA}_template.nii.gz
            {ATHENA}_rest_{{run}}_epi_2_template_4mm.nii.gz {{site}}/{{site}}_phenotypic.csv""",
        table="adhd200_preprocessed_phenotypics.tsv",
        rows="ScanDir ID*Site*Gender*Age*Handedness*DX*Secondary Dx *ADHD Measure*ADHD Index*QC_Athena*QC_NIAK\n"
        "10001*5*1*12.2*0.6*0**1*45*1*1\n1018959*3*0*10.6*1*3*Phobia*2*-999*1*N/A\n",
        labels={"0010001": {"DX": 0, "Site": 5, "ADHD Index": 45}, "1018959": {"DX": 3, "QC_NIAK": None}},
    ),
    "adni": Tree(
        scans="""
            3.0 sub=ADNI002S0295 ses=M072
            3.0 sub=ADNI002S0295 ses=M084
            0.607 sub=ADNI130S6105 ses=M000""",
        key="adni_sub-{sub}_ses-{ses}_task-rest",
        **fmriprep(VISIT, more="{_}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz"),
        table="participants.tsv",
        rows="participant_id*alternative_id_1*original_study*diagnosis_sc*sex*education_level\n"
        "sub-ADNI002S0295*002_S_0295*ADNI1*CN*M*18\nsub-ADNI130S6105*130_S_6105*ADNI3*MCI*F*\n",
        labels={"ADNI002S0295": {"diagnosis_sc": "CN"}, "ADNI130S6105": {"sex": "F", "education_level": None}},
    ),
    "ppmi": Tree(
        scans="""
            2.5 sub=101742 ses=BL dir=LR
            2.5 sub=101742 ses=BL dir=RL
            2.5 sub=101742 ses=V06 dir=RL
            2.4 sub=3102 ses=V04 dir=AP""",
        key="ppmi_sub-{sub}_ses-{ses}_task-rest_dir-{dir}",
        **fmriprep(f"{VISIT}_dir-{{dir}}", res="_res-2", more="{_}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"),
        table="Participant_Status.csv",
        rows="PATNO,COHORT,COHORT_DEFINITION,ENROLL_DATE,ENROLL_AGE,ENROLL_STATUS\n"
        "3102,1,Parkinson's Disease,02/2011,64.7,Withdrew\n101742,4,Prodromal,05/2021,66.1,Enrolled\n",
        labels={"101742": {"COHORT": 4}, "3102": {"COHORT_DEFINITION": "Parkinson's Disease", "ENROLL_AGE": 64.7}},
    ),
    "development_fmri": Tree(
        scans="2 sub=pixar001\n2 sub=pixar002\n2 sub=pixar123",
        key="development-fmri_sub-{sub}_task-pixar",
        bold=f"sub-{{sub}}_task-pixar_{MNI}_desc-preproc_bold.nii.gz",
        confounds="sub-{sub}_task-pixar_desc-confounds_regressors.tsv",
        neighbours="sub-{sub}_task-pixar_desc-reducedConfounds_regressors.tsv",
        tr=2,
        table="participants.tsv",
        rows="participant_id*Age*AgeGroup*Child_Adult*Gender*Handedness*ToM Booklet-Matched\n"
        "sub-pixar001*4.77*4yo*child*M*R*0.8\nsub-pixar002*4.86*4yo*child*F*R*0.7\n"
        "sub-pixar123*27.06*Adult*adult*F*R*n/a\n",
        labels={
            "pixar001": {"Age": 4.77, "ToM Booklet-Matched": 0.8},
            "pixar002": {"Gender": "F"},
            "pixar123": {"Child_Adult": "adult", "ToM Booklet-Matched": None},
        },
    ),
}


@cache
def brain() -> np.ndarray:
    """An ellipsoid of 1.2 l in the place of the MNI brain, bool (x, y, z)."""
    place = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))
    return (((place - [0, -18, 15]) / [66, 80, 55]) ** 2).sum(axis=-1) < 1


def image(path: Path, values: np.ndarray, tr: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti = nib.Nifti1Image(values.astype(np.float32), AFFINE)
    nifti.set_sform(AFFINE, 4)
    nifti.set_qform(AFFINE, 4)
    nifti.header.set_xyzt_units("mm", "sec")
    nifti.header.set_zooms((9, 9, 9, tr)[: values.ndim])
    nib.save(nifti, path)


def bold(path: Path, tr: float, residuals: bool) -> None:
    """A brain with anatomy and noise that is smooth in time."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    noise = np.cumsum(rng.standard_normal((*SHAPE, FRAMES)), axis=-1)
    noise -= noise.mean(axis=-1, keepdims=True)
    anatomy = 0 if residuals else rng.uniform(800, 1200, SHAPE)[..., None]
    image(path, (anatomy + 5 * noise) * brain()[..., None], tr)


def confounds_text(blanks: bool) -> str:
    """A row per frame; displacement 0.1 mm, but none in the first frame."""
    names = ("trans_x_mm", "rot_x_degrees") if blanks else ("csf", "trans_x")
    rows = [(*names, "framewise_displacement"), (1, 0, 0 if blanks else "n/a"), *[(1, 0.5, 0.1)] * (FRAMES - 1)]
    return "".join((" " if blanks else "\t").join(map(str, row)) + "\n" for row in rows)


def build(name: str, folder: Path) -> Path:
    """Write a cohort's tree below `folder`, and the shipped cohort file with its root there. Returns the file."""
    tree, top = TREES[name], folder / name
    root = top / tree.root
    wanted, others = set(), {}
    for scan in tree.each:
        wanted |= {root / tree.fill(each, scan) for each in (tree.bold, tree.mask, tree.confounds) if each}
        others |= {root / tree.fill(each, scan): scan["tr"] for each in tree.neighbours.split()}
        others |= {top / tree.fill(each, scan): scan["tr"] for each in tree.above.split()}
        bold(root / tree.fill(tree.bold, scan), scan["tr"], tree.residuals)
        if tree.mask:
            image(root / tree.fill(tree.mask, scan), tree.mask_value * brain())
        if tree.confounds:
            (root / tree.fill(tree.confounds, scan)).write_text(confounds_text(tree.blanks))
    assert not wanted & set(others)
    for path, tr in others.items():
        if path.name.endswith(".nii.gz"):
            image(path, brain())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"RepetitionTime": tr}) if path.suffix == ".json" else "")
    if tree.table:
        (top / tree.table).write_text(tree.rows.replace("*", "\t"))
    text, found = re.subn(r"(?m)^root: .*$", f"root: {root}", (COHORTS / f"{name}.yaml").read_text())
    assert found == 1
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def seen(run: RunSource, root: Path) -> dict[str, Any]:
    """What was found of a run, its files relative to the root."""
    return {
        "key": run.key,
        "subject": run.subject,
        "session": run.session,
        "bold": run.source,
        "mask": run.mask and run.mask.relative_to(root).as_posix(),
        "confounds": run.confounds and run.confounds.relative_to(root).as_posix(),
        "tr": run.tr,
        "dummy": run.dummy,
    }


@pytest.mark.parametrize("name", TREES)
def test_the_runs_of_a_cohort_and_nothing_else_are_found(name: str, tmp_path: Path) -> None:
    tree, path = TREES[name], build(name, tmp_path)
    root = (tmp_path / name / tree.root).resolve()
    expected = [
        {
            "key": tree.fill(tree.key, scan),
            "subject": scan["sub"],
            "session": scan.get("ses", ""),
            "bold": tree.fill(tree.bold, scan),
            "mask": tree.mask and tree.fill(tree.mask, scan),
            "confounds": tree.confounds and tree.fill(tree.confounds, scan),
            "tr": tree.tr,
            "dummy": tree.dummy,
        }
        for scan in tree.each
    ]
    runs = find_runs(path)
    assert [seen(run, root) for run in runs] == sorted(expected, key=lambda each: each["key"])
    settings = load(CohortSettings, path)
    assert all(run.problem is None and run.people == (settings.people or settings.name) for run in runs)
    if tree.table:
        assert settings.subject_column in re.split(r"[*,]", tree.rows.splitlines()[0])
        assert all(settings.subject_column not in run.labels for run in runs)
    for run in runs:
        assert all(each is None or each.is_file() for each in (run.bold, run.mask, run.confounds))
        wanted = tree.labels.get(f"{run.subject}/{run.session}", tree.labels.get(run.subject))
        assert wanted is not None
        assert {label: run.labels.get(label, "missing") for label in wanted} == wanted
        assert bool(run.labels) == bool(wanted)


def test_cohorts_with_the_same_subject_names_are_different_people(tmp_path: Path) -> None:
    first, second = (find_runs(build(name, tmp_path)) for name in ("aomic_piop1", "aomic_piop2"))
    assert {run.subject for run in second} < {run.subject for run in first}
    assert not {run.person for run in first} & {run.person for run in second}


def test_the_table_of_aabc_is_made_as_its_cohort_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (COHORTS / "aabc.yaml").read_text()
    lines = re.findall(r"^#               (\S.*)$", text, re.M)
    assert len(lines) == 4 and lines[0].startswith("import pandas")
    rows = [line.split(",") for line in TREES["aabc"].rows.splitlines()]
    (tmp_path / "AABC_subjects.csv").write_text("".join(f"{','.join(row[:4])}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    assert [line.split(",") for line in (tmp_path / "participants.csv").read_text().splitlines()] == rows


def test_the_task_runs_of_hcp_are_of_the_people_of_its_resting_runs(tmp_path: Path) -> None:
    rest, tasks = (find_runs(build(name, tmp_path)) for name in ("hcp", "hcp_task"))
    assert {run.person for run in rest} == {run.person for run in tasks}


GROUPS = (
    ("hcp", "hcp_task", "chcp", "abcd"),
    ("aomic_piop1", "aomic_piop2", "adni", "ppmi"),
    ("abide", "adhd200", "aabc", "development_fmri"),
)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_the_trees_are_converted(names: tuple[str, ...], tmp_path: Path, command) -> None:
    out = tmp_path / "dataset"
    cohorts = [build(name, tmp_path) for name in names]
    words = ("--out", out, "--ranker", "variance", "--workers", 1, "--json", *GRID)
    done = command("tools/make_shards.py", *cohorts, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    tr = {TREES[name].fill(TREES[name].key, scan): scan["tr"] for name in names for scan in TREES[name].each}
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["sessions"], facts["refused"]) == (len(tr), 0)
    sessions = {session.key: session for session in Dataset(out).sessions}
    assert {key: session.source_tr for key, session in sessions.items()} == pytest.approx(tr)
    for name in names:
        tree = TREES[name]
        for scan in tree.each:
            session = sessions[tree.fill(tree.key, scan)]
            assert session.mask_source == (Path(tree.fill(tree.mask, scan)).name if tree.mask else "computed")
            if tree.confounds and not tree.blanks:
                assert session.mean_fd_mm == pytest.approx(0.1, rel=0.02)
            if tree.dummy != "auto":
                assert session.dropped_frames == tree.dummy


def test_every_tree_has_its_cohort_file_and_every_cohort_file_its_tree() -> None:
    shipped = {path.stem for path in COHORTS.glob("*.yaml")}
    assert shipped == {*TREES, "example_bids", "example_native", "example_pattern"}
    assert {name for group in GROUPS for name in group} == set(TREES)


@pytest.mark.parametrize("path", sorted(COHORTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cohort_file_is_read_and_explains_itself(path: Path) -> None:
    settings = load(CohortSettings, path)
    written = read_yaml(path)
    assert set(written) <= set(CohortSettings.model_fields)
    assert settings.model_dump(exclude_unset=True) == written
    assert settings.root.startswith("/data/")
    text = path.read_text()
    head = text[: text.index("\nname:")].splitlines()
    assert len(head) >= 2 and all(line.startswith("#") for line in head)
    if path.stem in TREES:
        assert all(f"# {word} " in text for word in ("Source", "Tree", "Labels", "Traps"))
        assert settings.root in "\n".join(head)
    assert max(map(len, text.splitlines())) <= 120


def test_the_example_pattern_is_met_by_what_it_is_written_for() -> None:
    settings = load(CohortSettings, COHORTS / "example_pattern.yaml")
    results = "100307/MNINonLinear/Results/rfMRI_REST1_LR"
    met = pattern_regex(settings.pattern or "").match(f"{results}/rfMRI_REST1_LR.nii.gz")
    assert met and met.groupdict() == {"subject": "100307", "session": "REST1", "run": "LR"}
    assert (settings.mask or "").format(**met.groupdict()) == f"{results}/brainmask_fs.2.nii.gz"

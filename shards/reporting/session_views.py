"""The views of a session beside the page of its dataset: its maps, and its windows.

    DATASET/report/views/
        KEY_mean.html       mean image in the brain mask
        KEY_tsnr.html       temporal signal-to-noise ratio
        KEY_kept.html       mean of the kept windows, weighted by saliency
        KEY_windows.html    its windows, one at a time

Legend: X, Y, Z voxels of the grid; K kept windows in rank order; W all windows; F frames of a window; P patches; V
voxels of a patch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from shards.core.files import write_atomically
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.reporting import html, windows_view
from shards.reporting.viewer import Map
from shards.reporting.windows_view import Given

FOLDER = "views"


def start(report: Path) -> Path:
    """The empty folder of the views beside a page: those of an earlier page may name people, or be of other data."""
    folder = report / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def write(folder: Path, dataset: Dataset, session: SessionRecord, given: Given) -> html.Views:
    """Write the views of a session.

    Parameters
    ----------
    folder : Path
        Result of `start`.
    dataset : Dataset
    session : SessionRecord
        Its key is used in the names of files.
    given : Given

    Returns
    -------
    html.Views
        The links, for the page.
    """
    stem, links = session.key.replace(" ", "-"), {}
    for name, (ending, make) in _MAPS.items():
        made = make(dataset, session)
        if made is not None:
            path = folder / f"{stem}_{ending}.html"
            write_atomically(path, made.volume())
            links[name] = f"{FOLDER}/{path.name}"
    path = folder / f"{stem}_windows.html"
    write_atomically(path, windows_view.render(dataset, session, given))
    links["windows, one at a time"] = f"{FOLDER}/{path.name}"
    behind = "MNI152 template" if session.space != "native" else "mean image"
    note = (
        f"A click loads a view into the frame; move through it with the mouse. The {behind} is behind the maps: lower "
        "their opacity to compare."
    )
    if "tSNR" not in links:
        note += " No map of the tSNR: this dataset was made by a version that did not record mean and SD of the scan."
    return html.Views("Look inside", links, note)


def mean_image(dataset: Dataset, session: SessionRecord) -> Map:
    """The mean of each brain voxel over the scan: in the units of the scan if they are recorded and not negative."""
    arrays = dataset.read(session, ("baseline", "brain", "patch"))
    mean_PV, title = arrays["baseline"], "Mean image in the brain mask"
    if session.global_mean is not None and session.global_sd is not None:
        mean_PV = mean_PV * session.global_sd + session.global_mean
    lowest = float(mean_PV[arrays["brain"] > 0].min())
    if lowest <= 0:  # 0 is not drawn
        mean_PV, title = mean_PV - 1.001 * lowest, f"{title}, above its lowest value"
    return _map(dataset, session, arrays, mean_PV, title, colours="gray")


def tsnr(dataset: Dataset, session: SessionRecord) -> Map | None:
    """Mean / SD over time of each brain voxel; None for a session whose scale is not recorded."""
    if session.global_mean is None or not session.global_sd:
        return None
    arrays = dataset.read(session, ("baseline", "spread", "brain", "patch"))
    mean_PV = np.abs(arrays["baseline"] + session.global_mean / session.global_sd)
    varies_PV = arrays["spread"] > 0
    ratio_PV = np.divide(mean_PV, arrays["spread"], out=np.zeros_like(mean_PV), where=varies_PV)
    return _map(dataset, session, arrays, ratio_PV, "Temporal signal-to-noise ratio")


def kept_mean(dataset: Dataset, session: SessionRecord) -> Map:
    """The mean over the frames of the kept windows, weighted by saliency, in SDs of each voxel over the scan.

    The weight of a window is its score minus the lowest score of all windows, because scores may be negative.
    """
    arrays = dataset.read(session, ("brain", "patch", "saliency", "scores", "spread"))
    weight_K = arrays["saliency"] - arrays["scores"].min()
    weight_K = weight_K / weight_K.sum() if weight_K.sum() > 0 else np.full(len(weight_K), 1 / len(weight_K))
    mean_PV = np.zeros(arrays["spread"].shape, np.float32)
    for number, weight in enumerate(weight_K):  # one window at a time, to save memory
        mean_PV += weight * window_mean(dataset, session, number)
    varies_PV = arrays["spread"] > 0
    z_PV = np.divide(mean_PV, arrays["spread"], out=np.zeros_like(mean_PV), where=varies_PV)
    return _map(
        dataset,
        session,
        arrays,
        z_PV,
        "Mean of the kept windows, weighted by saliency, in SDs of each voxel",
        signed=True,
    )


def window_mean(dataset: Dataset, session: SessionRecord, number: int) -> np.ndarray:
    """The mean over the frames of a kept window, float32 (P, V), in units of the global SD."""
    arrays = dataset.read(session, ("windows",), [number])
    return arrays["windows"][0].astype(np.float32).mean(axis=0)


def _map(
    dataset: Dataset,
    session: SessionRecord,
    arrays: dict[str, np.ndarray],
    value_PV: np.ndarray,
    title: str,
    signed: bool = False,
    colours: str | None = None,
) -> Map:
    grid = dataset.grid
    inside_PV = np.where(arrays["brain"] > 0, value_PV, 0).astype(np.float32)
    image = nib.Nifti1Image(scatter(inside_PV, arrays["patch"], grid.shape, grid.patch), grid.affine)
    under = None
    if session.space == "native":
        under = image if colours == "gray" else mean_image(dataset, session).image
    return Map(image, title, under, signed, colours)


_MAPS: dict[str, tuple[str, Callable[[Dataset, SessionRecord], Map | None]]] = {
    "mean image": ("mean", mean_image),
    "tSNR": ("tsnr", tsnr),
    "mean of the kept windows": ("kept", kept_mean),
}

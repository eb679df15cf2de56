"""Interactive views of maps: HTML files beside a page, each loaded when it is opened.

A volume is shown in three planes that follow the mouse (nilearn's `view_img`), a map in MNI space also on the cortical
surface (`view_img_on_surf`). A view holds its scripts and pictures, and loads nothing. The templates behind them are
those that nilearn ships, so nothing is downloaded.

Equal maps give equal bytes.

Legend: X, Y, Z voxels.
"""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shards.core.files import write_atomically

_TINY = 1e-12
LEAST_MM = 2.0  # smallest voxel of a view; finer images are resampled
_UNIQUE = re.compile(r"div_viewer-([0-9a-f]{32})")
_CHARSET = re.compile(r"<head>\s*")
_ICON = re.compile(r'<link rel="icon".*?/>', re.DOTALL)
_TITLE = re.compile(r"<title>.*?</title>", re.DOTALL)
# What the scripts of nilearn use; nothing is loaded.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'{more}; style-src 'unsafe-inline'; "
    "img-src data: blob:; worker-src blob:; form-action 'none'; base-uri 'none'"
)
_STYLE = """
html { color-scheme: dark; } body { margin: 0; background: #000; color: #fff; font: 14px/1.4 system-ui, sans-serif; }
h1 { font-size: 15px; margin: 6px 10px; } p { margin: 6px 10px; } canvas { display: block; cursor: crosshair; }
img.hidden { display: none; } input.slider { min-width: 100px; accent-color: #56b4e9; }
/* the choices of a surface above it */
body:has(#surface-plot) { display: grid; grid-template-columns: repeat(3, max-content) 1fr; }
h1, #surface-plot { grid-column: 1 / -1; } #surface-plot { order: 1; min-height: 240px; }
select { margin: 4px; font: inherit; }
@media (max-width: 520px) { body:has(#surface-plot) { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True)
class Map:
    """A map to explore.

    Attributes
    ----------
    image : Nifti1Image
        Three dimensions; 0 and NaN are not coloured.
    title : str
        What the colours are, with their unit.
    under : Nifti1Image, optional
        Image behind the map; by default the MNI152 template, which is right only for maps in MNI space.
    signed : bool
        Whether values below 0 have colours of their own.
    colours : str, optional
        Colour map of matplotlib.
    threshold : float
        Values up to this size are not coloured.
    limit : float, optional
        Size at which the colours end; by default the 99th percentile of the coloured voxels.
    """

    image: nib.Nifti1Image
    title: str
    under: nib.Nifti1Image | None = None
    signed: bool = False
    colours: str | None = None
    threshold: float = 0.0
    limit: float | None = None

    def volume(self) -> str:
        """The view of three planes."""
        from nilearn.plotting import view_img

        under = _behind(self.image) if self.under is None else _bounded(self.under)
        return _document(*self._view(view_img, bg_img=under, resampling_interpolation="nearest"))

    def surface(self) -> str:
        """The view on the surface fsaverage5; `can_draw_surfaces` says whether this is possible."""
        from nilearn.plotting import view_img_on_surf

        content, words = self._view(view_img_on_surf, surf_mesh="fsaverage5")
        # plotly makes functions from text
        return _document(content, f"{words}, on the cortical surface", " 'unsafe-eval'")

    def _view(self, draw: Callable[..., Any], **more: object) -> tuple[str, str]:
        """A view that `draw` makes, an HTML document, and what its colours are."""
        shown, unit = self._scaled()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a map without voxels below its threshold
            view = draw(
                shown,
                black_bg=True,
                threshold=max(self.threshold / unit, _TINY),
                cmap=self._colour_map,
                symmetric_cmap=self.signed,
                vmin=self._lowest,
                vmax=float(f"{self._highest() / unit:.3g}"),
                **more,
            )
        return view.get_standalone(), self._words(unit)

    def _scaled(self) -> tuple[nib.Nifti1Image, float]:
        """The map without NaN in a unit in which its largest values are near 1: a view shows three decimals."""
        highest = self._highest()
        unit = 1.0 if highest >= 0.1 else 10.0 ** math.floor(math.log10(highest))
        volume_XYZ = np.nan_to_num(np.asarray(self.image.dataobj, np.float64)) / unit
        return nib.Nifti1Image(volume_XYZ.astype(np.float32), self.image.affine), unit

    def _words(self, unit: float) -> str:
        return self.title if unit == 1 else f"{self.title}, in units of {unit:.0e}"

    @property
    def _colour_map(self) -> str:
        return self.colours or ("RdBu_r" if self.signed else "inferno")

    @property
    def _lowest(self) -> float | None:
        """Where the colours begin; None where they are symmetric."""
        return None if self.signed else 0.0

    def _highest(self) -> float:
        """Where the colours end."""
        if self.limit is not None:
            return max(self.limit, _TINY)
        size_XYZ = np.abs(np.nan_to_num(np.asarray(self.image.dataobj, np.float64)))
        coloured = size_XYZ[size_XYZ > self.threshold]
        return max(float(np.percentile(coloured, 99)), _TINY) if len(coloured) else 1.0


def can_draw_surfaces() -> bool:
    """Whether the package that nilearn draws surfaces with, plotly, is installed (extra `report`)."""
    return find_spec("plotly") is not None


def write(path: Path, one: Map, in_mni: bool) -> None:
    """Write the view of a map and, in MNI space, that on the surface.

    Parameters
    ----------
    path : Path
        Ends in `.html`; the view on the surface gets the ending `_surface.html`.
    one : Map
    in_mni : bool
        Whether the map is in MNI space, so that it can be brought to the surface.
    """
    remove(path)
    if in_mni and can_draw_surfaces():
        write_atomically(_surface(path), one.surface())
    write_atomically(path, one.volume())


def find(path: Path) -> dict[str, Path]:
    """The files that `write` made, by what they show; empty without any."""
    return {name: file for name, file in (("volume", path), ("surface", _surface(path))) if file.is_file()}


def remove(path: Path) -> None:
    """Remove what an earlier `write` made."""
    for file in find(path).values():
        file.unlink()


def _surface(path: Path) -> Path:
    return path.with_name(f"{path.stem}_surface.html")


@lru_cache(maxsize=2)
def _template(mm: int) -> nib.Nifti1Image:
    from nilearn.datasets import load_mni152_template

    return load_mni152_template(resolution=mm)


def _behind(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The MNI152 template at half the voxel size of a map, or at 2 mm: finer would cost more than it shows."""
    mm = float(np.abs(nib.affines.voxel_sizes(image.affine)).min())
    return _template(max(round(LEAST_MM), round(mm / 2)))


def _bounded(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """An image, at 2 mm if its voxels are smaller."""
    if nib.affines.voxel_sizes(image.affine).min() >= LEAST_MM - 0.01:
        return image
    from nilearn.image import resample_img

    return resample_img(image, target_affine=np.diag([LEAST_MM] * 3), interpolation="linear")


def _document(page: str, title: str, more: str = "") -> str:
    """A view of nilearn as a document of its own: with a title and a policy, without an icon and random names.

    Parameters
    ----------
    page, title : str
    more : str
        What the scripts of the view may do, beyond what the policy allows to all views.
    """
    for unique in set(_UNIQUE.findall(page)):
        page = page.replace(unique, "view")
    shown = html.escape(title)
    policy = _POLICY.format(more=more)
    head = (
        f'<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{_STYLE}</style>\n"
    )
    page = _TITLE.sub(lambda _: f"<title>{shown}</title>", _ICON.sub("", page), count=1)
    page = _CHARSET.sub(lambda _: head, page, count=1)
    return page.replace("<body>", f"<body>\n<h1>{shown}</h1>", 1)

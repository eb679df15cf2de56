"""
A map in a viewer
=================

Put the tokens of an encoder back into the brain, and look at them with nilearn. ``slim-brain explain`` makes
maps of what a prediction rests on; they are NIfTI files that you view in the same way.
"""

# %%
# Encode a scan. The places of the tokens are cells of the grid.
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn import plotting

from shards.reader import Dataset
from slim import SlimBrain

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
dataset = Dataset(quickstart / "shards")
model = SlimBrain.from_pretrained(quickstart / "pretrain")
features = model.encode_session(dataset, dataset.sessions[0])
print(features.tokens.shape, "time slots, places, channels")

# %%
# How much does each place change over time? Take the SD of its tokens over the slots.
change = features.tokens.std(axis=0).mean(axis=1)
cells = model.geometry.cells[1:]
volume = np.zeros(cells, dtype=np.float32)
volume.flat[features.places] = change

# %%
# A cell covers several voxels. Its size and the affine of the grid give the image its place in MNI space.
grid = dataset.grid
size = np.array(grid.shape) // np.array(cells)
affine = grid.affine.copy()
affine[:3, 3] += affine[:3, :3] @ ((size - 1) / 2)
affine[:3, :3] *= size
image = nib.Nifti1Image(volume, affine)
low, high = np.percentile(change, (2, 98))
plotting.plot_stat_map(
    image,
    title="change of the tokens over time",
    cut_coords=(0, -20, 20),
    cmap="viridis",
    vmin=low,
    vmax=high,
    draw_cross=False,
)
plotting.show()

# %%
# In a notebook, ``view_img`` gives a viewer that you can click through.
plotting.view_img(image, threshold=0, cmap="viridis", symmetric_cmap=False, vmin=low, vmax=high)

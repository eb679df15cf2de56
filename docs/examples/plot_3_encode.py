"""
Encode a scan
=============

Load a pretrained encoder and turn a NIfTI file into vectors.
"""

# %%
# ``from_pretrained`` takes a run, one of its checkpoints, an export, or a name on the Hugging Face hub.
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from slim import SlimBrain

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
model = SlimBrain.from_pretrained(quickstart / "pretrain")
model

# %%
# A vector for each kept window, in time order. The mask, the confounds table and the TR beside the file are
# found by themselves, as fMRIPrep names them.
scan = next((quickstart / "cohort/sub-01/ses-1/func").glob("*desc-preproc_bold.nii.gz"))
z = model.encode_windows(scan)
print(z.shape, z.dtype)

# %%
# All tokens: one vector for each time slot and each place that holds brain.
features = model.encode_tokens(scan)
print("tokens  ", features.tokens.shape)
print("onsets  ", np.round(features.window_onsets[:4], 2), "... s")
print("TR      ", features.tr, "s")

# %%
# Windows of a scan resemble each other, because they share the anatomy. Take the mean away to see what
# changes over time.
changing = z - z.mean(axis=0)
similarity = np.corrcoef(changing)
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
shown = ax.imshow(similarity, vmin=-1, vmax=1, cmap="RdBu_r")
ax.set(xlabel="window", ylabel="window", title="similarity of windows")
fig.colorbar(shown, label="r")
plt.show()

"""
Look at a dataset
=================

A dataset holds the windows that were kept of each scan, the labels of each subject, and the quality of each
session.
"""

# %%
# Open the dataset of the quickstart. Give the path of your own dataset instead, or a URL.
import os
from pathlib import Path

import matplotlib.pyplot as plt

from shards.reader import Dataset

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
dataset = Dataset(quickstart / "shards")
dataset

# %%
# A dataset is a collection of sessions. Each is a record: whose it is, its labels, its split, and facts about the scan.
session = dataset[0]
print(len(dataset), "sessions; the first is", session.key, "of", session.subject, "with", session.labels)

# %%
# All of them are a table.
table = dataset.to_frame()
table[["subject", "split", "tr", "n_kept", "tsnr", "labels.group", "labels.score"]].head()

# %%
# The split is by subject: all sessions of a person are in the same part.
table.groupby("split")["subject"].nunique()

# %%
# Read the arrays of one session. You read only what you name: here four of 15 arrays.
sample = dataset.read(session, names=("baseline", "brain", "patch", "carpet"))
for name, array in sample.items():
    print(f"{name:10} {array.dtype!s:8} {array.shape}")

# %%
# The carpet shows brain voxels over the whole scan, from the rim of the brain (top) to its depth. A movement
# is a vertical line. One unit of the colour bar is a standard deviation of the voxel.
carpet = sample["carpet"] / 20
seconds = carpet.shape[1] * session.tr
fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
shown = ax.imshow(carpet, aspect="auto", cmap="gray", vmin=-2, vmax=2, extent=(0, seconds, len(carpet), 0))
ax.set(xlabel="time (s)", ylabel="voxel", title=f"{session.subject}, session {session.session}")
fig.colorbar(shown, label="z")
plt.show()

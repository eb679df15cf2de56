"""
Which windows were kept?
========================

The ranker scores every window of a scan and keeps the best. This example draws the scores of one scan beside
the signal of its parcels.
"""

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shards.reader import Dataset

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
dataset = Dataset(quickstart / "shards")
session = dataset.sessions[0]
sample = dataset.read(session, names=("scores", "scores_space", "scores_time", "start", "roi"))

# %%
# A window is five frames long. ``start`` has the first frame of each kept window, the best first. The 32 best of a
# scan are kept. This scan is so short that all of its windows are, so we look at the eight best.
frames = dataset.frames
print(f"{session.n_kept} of {session.n_windows} windows of {frames * session.tr:.1f} s are kept")
best = np.zeros(session.n_windows, dtype=bool)
best[sample["start"][:8] // frames] = True

# %%
# The score has two parts: how well the other parcels predict a window (space), and how well its neighbours do
# (time). The smaller one limits the score. High windows stand out from the scan by signal that both can predict.
# The eight best windows are blue. The burst at the end of this scan is an artefact: it is large, but its score is low.
onset = np.arange(session.n_windows) * frames * session.tr
fig, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
roi = sample["roi"]
z = (roi - roi.mean(axis=1, keepdims=True)) / roi.std(axis=1, keepdims=True)
length = roi.shape[1] * session.tr
above.imshow(z, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, extent=(0, length, len(roi), 0))
above.set(ylabel="parcel", title="parcels (z)")
below.bar(onset, sample["scores"], width=frames * session.tr, align="edge", color=np.where(best, "C0", "0.8"))
below.step(onset, sample["scores_space"], where="post", color="C1", label="space")
below.step(onset, sample["scores_time"], where="post", color="C2", label="time")
below.set(xlabel="time (s)", ylabel="score")
below.legend()
plt.show()

# %%
# Scores are relative to the scan: each part is 0 for its median window. So each scan keeps its own best windows, and
# you cannot compare the scores of two scans.
for other in dataset.sessions[:4]:
    scores = dataset.read(other, names=("scores",))["scores"]
    print(f"{other.key}: median {np.median(scores):+.2f}, best {scores.max():+.2f}")

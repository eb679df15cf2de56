"""
Compare with functional connectivity
====================================

Functional connectivity is the baseline to beat. This example asks of an encoder and of connectivity which two
sessions belong to the same person.
"""

# %%
# Vectors of every session: connectivity of the parcels over the whole scan, and the ``cov`` pooling of the
# encoder over the kept windows.
import os
from functools import reduce
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from nilearn.connectome import ConnectivityMeasure

from shards.reader import Dataset
from slim import SlimBrainTransformer

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
dataset = Dataset(quickstart / "shards")
sessions = list(dataset)
samples = [dataset.read(session, names=("roi", "roi_number")) for session in sessions]
common = reduce(np.intersect1d, [sample["roi_number"] for sample in samples])  # parcels that every session has
series = [sample["roi"][np.isin(sample["roi_number"], common)].T for sample in samples]
measure = ConnectivityMeasure(kind="correlation", vectorize=True, discard_diagonal=True)
connectivity = measure.fit_transform(series)

images = sorted((quickstart / "cohort").glob("sub-*/ses-*/func/*desc-preproc_bold.nii.gz"))  # in the same order
encoded = SlimBrainTransformer(quickstart / "pretrain", pooling="cov").fit_transform(images)
print("connectivity", connectivity.shape, " encoder", encoded.shape)

# %%
# Similarity of sessions. Sessions of a person lie next to each other.
people = np.array([session.subject for session in sessions])
vectors = {"functional connectivity": connectivity, "encoder, cov": encoded}
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
similar = {}
for ax, (name, rows) in zip(axes, vectors.items(), strict=True):
    similar[name] = np.corrcoef(rows - rows.mean(axis=0))
    ax.imshow(similar[name], vmin=-0.5, vmax=0.5, cmap="RdBu_r")
    ax.set(title=name, xlabel="session", ylabel="session")
plt.show()

# %%
# For how many sessions is the most similar other session of the same person?
for name, matrix in similar.items():
    matrix = matrix.copy()
    np.fill_diagonal(matrix, -np.inf)
    print(f"{name:24} {np.mean(people[matrix.argmax(axis=1)] == people):.0%}")
print(f"{'chance':24} {1 / (len(people) - 1):.0%}")

# %%
# Connectivity sees the whole scan, the encoder only the kept windows. ``slim-brain probe --task
# synthetic_fingerprint`` makes the comparison with connectivity of the same windows, with intervals.

"""
A probe in scikit-learn
=======================

``SlimBrainTransformer`` is a transformer of scikit-learn: it turns images into vectors, inside a pipeline and a
cross-validation.
"""

# %%
# Both sessions of each person, and the score that the synthetic cohort planted in the coupling of its networks.
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slim import SlimBrainTransformer

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
people = pd.read_csv(quickstart / "cohort/participants.tsv", sep="\t", index_col="participant_id")
images = sorted((quickstart / "cohort").glob("sub-*/ses-*/func/*desc-preproc_bold.nii.gz"))
names = np.array([image.name.split("_")[0] for image in images])
truth = people.loc[names, "score"].to_numpy()
print(len(images), "images of", len(people), "people")

# %%
# The pooling ``cov`` is a learned connectome: correlations between places, on the principal axes of the tokens. It is
# fitted on the training images of each fold. ``mean`` is the mean token. With ``memory`` each image is encoded once.
# The folds divide people, so both sessions of a person are on the same side.
cache = tempfile.TemporaryDirectory()
predicted = {}
for pooling in ("mean", "cov"):
    vectors = SlimBrainTransformer(quickstart / "pretrain", pooling=pooling, memory=cache.name)
    probe = make_pipeline(vectors, StandardScaler(), RidgeCV(np.logspace(0, 6, 13)))
    predicted[pooling] = cross_val_predict(probe, images, truth, groups=names, cv=GroupKFold(5))
cache.cleanup()

# %%
# Each dot is a session. A mean over tokens does not show couplings between places.
fig, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
for ax, (pooling, values) in zip(axes, predicted.items(), strict=True):
    ax.scatter(truth, values)
    ax.axline((0, 0), slope=1, color="0.7")
    ax.set(title=f"{pooling}: r = {np.corrcoef(truth, values)[0, 1]:.2f}", xlabel="score", ylabel="predicted")
plt.show()

# %%
# ``slim-brain probe`` does the same with repeated folds, baselines, intervals and p values. Do not conclude from 24
# people more than these allow.

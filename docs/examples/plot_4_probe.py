"""
A probe in scikit-learn
=======================

``SlimBrainTransformer`` is a transformer of scikit-learn: it turns images into vectors, inside a pipeline and
a cross-validation.
"""

# %%
# The first session of each person, and the group that the synthetic cohort planted in the coupling of its
# networks.
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from slim import SlimBrainTransformer

quickstart = Path(os.environ.get("SLIM_QUICKSTART", "runs/quickstart"))
people = pd.read_csv(quickstart / "cohort/participants.tsv", sep="\t")
images = [
    next((quickstart / "cohort" / person / "ses-1/func").glob("*desc-preproc_bold.nii.gz"))
    for person in people["participant_id"]
]
people["group"].value_counts()

# %%
# The pooling ``cov`` is a learned connectome: correlations between places, on the principal axes of the
# tokens. It is fitted on the training images of each fold. With ``memory`` each image is encoded once.
cache = tempfile.TemporaryDirectory()
folds = StratifiedKFold(n_splits=4, shuffle=True, random_state=0)


def score(pooling):
    vectors = SlimBrainTransformer(quickstart / "pretrain", pooling=pooling, memory=cache.name)
    probe = make_pipeline(vectors, StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return cross_val_score(probe, images, people["group"], cv=folds, scoring="roc_auc")


for pooling in ("mean", "cov"):
    auroc = score(pooling)
    print(f"{pooling:5} AUROC {auroc.mean():.2f} (folds: {np.round(auroc, 2)})")

# %%
# The group lies in the coupling of networks, so a mean over tokens does not show it. With 24 people a fold
# tests six, and the scores vary much. ``slim-brain probe`` does the same with repeated folds, baselines,
# intervals and p values.
cache.cleanup()

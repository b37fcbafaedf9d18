"""Records fidelity.npz: torch-fidelity's figures of features that are drawn here.

Run with `pip install torch-fidelity` (recorded with 0.4.0, torch 2.14):
python tests/references/make_fidelity.py
"""

import pathlib

import numpy as np
import torch
from torch_fidelity.metric_fid import (
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

random = np.random.RandomState(0)


def drawn(count, shift, mix):
    """Features with correlations, above zero as those of pools are."""
    values = random.randn(count, 8) @ (np.eye(8) + mix * random.randn(8, 8))
    return np.abs(values + shift).astype(np.float32)


samples, reference = drawn(150, 0.6, 0.15), drawn(120, 0.0, 0.2)
both = torch.from_numpy(samples), torch.from_numpy(reference)
figures = fid_statistics_to_metric(*map(fid_features_to_statistics, both), False)
figures |= kid_features_to_metric(*both, kid_subset_size=120, verbose=False)
figures |= prc_features_to_metric(*both, verbose=False)
print(figures)
assert 0.1 < figures["precision"] < 0.9 and 0.1 < figures["recall"] < 0.9
np.savez_compressed(
    pathlib.Path(__file__).with_name("fidelity.npz"),
    samples=samples,
    reference=reference,
    fid=figures["frechet_inception_distance"],
    kid=figures["kernel_inception_distance_mean"],
    precision=figures["precision"],
    recall=figures["recall"],
)

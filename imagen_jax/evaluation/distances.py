"""Distances between two sets of features: Frechet's, KID, precision and recall."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagen_jax.errors import UserError
from imagen_jax.files import appearing, parse_json, read_arrays

# Of precision and recall; pictures in a subset of KID's; rows of distances in memory,
# of which torch takes several copies.
NEIGHBOURS, _SUBSET, _ROWS = 3, 1000, 100


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, in float64."""

    n: int  # how many; 0 if nobody knows
    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D], unbiased
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: np.ndarray | None = None  # [n, D] float32; None if they were not kept


def statistics(features: np.ndarray) -> Statistics:
    """Those of features `[n, D]`; `merge` takes them batch by batch."""
    mean = features.mean(axis=0, dtype=np.float64)
    away = features - mean
    return Statistics(len(away), mean, away.T @ away / max(len(away) - 1, 1))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Those of the features of both (Chan, Golub and LeVeque, 1979)."""
    n, step = a.n + b.n, b.mean - a.mean
    covariance = a.covariance * ((a.n - 1) / (n - 1))
    covariance += b.covariance * ((b.n - 1) / (n - 1))
    covariance += np.outer(step, step * (a.n * b.n / n / (n - 1)))
    return Statistics(n, a.mean + step * (b.n / n), covariance)


def frechet(a: Statistics, b: Statistics) -> float:
    """|ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2)) (arXiv 1706.08500, Eq. 6).

    The last trace is that of (Ca^(1/2) Cb Ca^(1/2))^(1/2): the sum of the singular
    values of Ca^(1/2) Cb^(1/2).
    """
    factors = []
    for one in (a, b):
        values, vectors = np.linalg.eigh(one.covariance)
        # Of few features, most are rounding errors, whose roots would add up.
        values[values < values[-1] * len(values) * np.finfo(float).eps] = 0
        factors.append(vectors * np.sqrt(values))
    root = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


def by_torch_fidelity(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """KID, precision and recall of features `[n, D]` float32."""
    import torch
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    both = torch.from_numpy(samples), torch.from_numpy(reference)
    size = min(_SUBSET, *map(len, both))
    kid = kid_features_to_metric(*both, kid_subset_size=size, verbose=False)
    how = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _ROWS, "verbose": False}
    near = prc_features_to_metric(*both, save_cpu_ram=True, **how)
    return {
        "KID": kid["kernel_inception_distance_mean"],
        "KID deviation": kid["kernel_inception_distance_std"],
        "precision": near["precision"],
        "recall": near["recall"],
    }


def save_statistics(path: str, found: Statistics) -> None:
    """Writes mu, sigma and what they are of as .npz, without the features."""
    about = np.array(json.dumps({"n": found.n, **found.about}))
    with appearing(pathlib.Path(path)) as partial, open(partial, "wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance, about=about)


def read_statistics(path: str, width: int, about: Mapping[str, Any]) -> Statistics:
    """Stored statistics of features of a width; fid_stats_*.npz of others, too.

    `UserError` for other files, and for those that were not measured as `about` says:
    those of others do not tell.
    """
    what = f"statistics of {width:,} features"
    shapes = {"mu": ("<f8", (width,)), "sigma": ("<f8", (width, width))}
    mean, covariance = read_arrays(path, what, shapes).values()
    if not np.isfinite(mean.sum() + covariance.sum()):
        raise UserError(f"{path!r} is not {what}: not all are finite numbers")
    try:
        text = read_arrays(path, what, {"about": ("<U", ())})["about"]
    except UserError:
        return Statistics(0, mean, covariance)
    stored = parse_json(str(text).encode(), f"{path!r} is not {what}")
    for name, here in about.items():
        if stored.get(name) != here:
            raise UserError(
                f"{path!r} was measured with {name} {stored.get(name)}, not {here}: "
                "measure the reference again"
            )
    return Statistics(stored.pop("n", 0), mean, covariance, stored)

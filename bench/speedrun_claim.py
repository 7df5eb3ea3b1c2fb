"""What the seeds of a speedrun show: is the mean accuracy above the target, and is one entry quicker than another?

Student's and Welch's t-tests, one-sided, as scipy has them; scikit-learn, which fastanchor needs, brings scipy.
"""

from __future__ import annotations

import statistics
from typing import Any

from scipy import stats

from fastanchor.errors import UserError


def summarise(rows: list[dict[str, Any]], target: float, alpha: float, needed: int) -> dict[str, Any]:
    """n, mean and standard deviation (n - 1; None for one seed) of seconds and accuracies, all of them, and the verdict.

    rows: one a seed, with `seconds`, `cold_s`, `clean`, `robust` (percent), and `failed` where it did. `p`: of the one-sided
    t-test that the mean robust accuracy is above `target`; None for fewer than two seeds. `holds`: p < alpha, with at least
    `needed` seeds.
    """
    found: dict[str, Any] = {"n": len(rows), "target": target, "alpha": alpha, "failed": sum("failed" in row for row in rows)}
    for key in ("seconds", "cold_s", "clean", "robust"):
        values = [row[key] for row in rows]
        found[f"{key}_all"], found[f"{key}_mean"] = values, statistics.fmean(values)
        found[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    p = above(found["robust_all"], target) if len(rows) > 1 else None
    enough = len(rows) >= max(needed, 2)
    holds = enough and p is not None and p < alpha
    said = f"too few seeds ({len(rows)} of {needed})" if not enough else "holds" if holds else "does not hold"
    return found | {"p": p, "holds": holds, "verdict": said + (f" (p = {p:.2g})" if enough else "")}


def above(values: list[float], target: float) -> float:
    """p of the one-sided t-test that the mean of two or more values is above the target; 0 or 1 where all values are the same."""
    if len(set(values)) == 1:
        return 0.0 if values[0] > target else 1.0
    return float(stats.ttest_1samp(values, target, alternative="greater").pvalue)


def quicker(a: list[float], b: list[float]) -> dict[str, float]:
    """`difference_s` of the means, B - A, their `ratio` A / B, and p of Welch's one-sided test that B's mean is less.

    Raises UserError where one of them has fewer than two values: they have no spread to judge by.
    """
    if min(len(a), len(b)) < 2:
        raise UserError("a comparison needs at least two seeds in each of the two files")
    means = statistics.fmean(a), statistics.fmean(b)
    if len(set(a)) == len(set(b)) == 1:
        p = 0.0 if means[1] < means[0] else 1.0
    else:
        p = float(stats.ttest_ind(b, a, equal_var=False, alternative="less").pvalue)
    return {"difference_s": means[1] - means[0], "ratio": means[0] / means[1], "p": p}

"""What the seeds of a speedrun show: is the mean accuracy above the target? And its runs: is one entry quicker than another?

Student's t-tests, one-sided, as scipy has them; scikit-learn, which fastanchor needs, brings scipy.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from scipy import stats

ROUNDING = 1e-12  # of differences of logarithms


def summarise(rows: list[dict[str, Any]], target: float, alpha: float, needed: int) -> dict[str, Any]:
    """n, mean and standard deviation (n - 1; None for one seed) of seconds and accuracies, all of them, and the verdict.

    rows: one a seed, with `seconds`, `cold_s`, `clean`, `robust` (percent), and `failed` where it did. `p`: of the one-sided
    t-test that the mean robust accuracy is above `target`; None for fewer than two seeds and for seeds without any spread.
    `holds`: p < alpha, with at least `needed` seeds.
    """
    found: dict[str, Any] = {"n": len(rows), "target": target, "alpha": alpha, "failed": sum("failed" in row for row in rows)}
    for key in ("seconds", "cold_s", "clean", "robust"):
        values = [row[key] for row in rows]
        found[f"{key}_all"], found[f"{key}_mean"] = values, statistics.fmean(values)
        found[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    p = above(found["robust_all"], target)
    enough = len(rows) >= max(needed, 2)
    holds = enough and p is not None and p < alpha
    if not enough:
        verdict = f"too few seeds ({len(rows)} of {needed})"
    elif p is None:
        verdict = "does not hold: all seeds have the same accuracy, of which no test can say anything"
    else:
        verdict = f"{'holds' if holds else 'does not hold'} (p = {p:.2g})"
    return found | {"p": p, "holds": holds, "verdict": verdict}


def above(values: list[float], target: float) -> float | None:
    """p of the one-sided t-test that the mean of the values is above the target; None where they have no spread to test by.

    Equal values are no certainty: a network that gives every image the same class has the same accuracy with every seed.
    """
    if len(set(values)) < 2:
        return None
    return float(stats.ttest_1samp(values, target, alternative="greater").pvalue)


def quicker(a: list[float], b: list[float]) -> dict[str, Any]:
    """Is B quicker? a, b: seconds of runs made in turns, one value a run; a[i] and b[i] are a pair.

    A machine's load and temperature hold for a whole process, so the seeds of one are no independent samples of its speed: the
    run is the unit, and a pair shares what changes slowly. `ratios` A / B of the pairs, `ratio`: their geometric mean; `p` of the
    paired one-sided t-test on the logarithms that B takes less; None where all ratios are the same.
    """
    logs = [[math.log(seconds) for seconds in runs] for runs in (a, b)]
    gains = [one - other for one, other in zip(*logs, strict=True)]
    spread = max(gains) - min(gains)
    p = float(stats.ttest_rel(logs[1], logs[0], alternative="less").pvalue) if spread > ROUNDING else None
    return {"ratios": [math.exp(gain) for gain in gains], "ratio": math.exp(statistics.fmean(gains)), "p": p}

"""What the SupCon kernels hold: the ends of their options, as numbers. Without Triton, for those who only ask."""

from __future__ import annotations

FIXED_MAXIMUM = 0.03  # from this temperature on exp(-2 / tau) is a normal fp32 number, products with it included
MIN_TEMPERATURE = 0.001  # below it the rounding of a distance is the size of tau
MAX_BETA = 40.0
MAX_GAMMA = 5.0
MAX_K = 63
MAX_FEATURES = 512


def refused(
    temperature: float, weight: str, beta: float, gamma: float, hard_negative_beta: float, *, steep: bool
) -> str:  # fmt: skip
    """Why the kernels do not take these numbers, in words, or nothing. steep: attached weights whose slopes are kept in fp16."""
    if temperature < MIN_TEMPERATURE:
        return f"fp32 needs temperature >= {MIN_TEMPERATURE}, this is {temperature}"
    if weight == "exp" and not -MAX_BETA <= beta <= MAX_BETA:
        return f"exp weights need |beta| <= {MAX_BETA:g} in fp32, this is {beta}"
    if weight == "pow" and not 0 <= gamma <= MAX_GAMMA:
        return f"pow weights need 0 <= gamma <= {MAX_GAMMA:g} in fp32, this is {gamma}"
    if weight == "pow" and steep and gamma < 1:
        return "attached pow weights with gamma < 1 have a slope too steep for fp16"
    if not -MAX_BETA <= hard_negative_beta <= MAX_BETA:
        return f"negatives need |hard_negative_beta| <= {MAX_BETA:g} in fp32, this is {hard_negative_beta}"
    return ""

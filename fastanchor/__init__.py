"""fastanchor: training and judging adversarially robust image classifiers, built for speed."""

__version__ = "0.1.0"

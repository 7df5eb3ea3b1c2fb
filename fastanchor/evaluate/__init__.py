"""Judging a model: clean and robust accuracy, AutoAttack, and the report."""

"""Experiments; each `python -m experiments.NAME` regenerates a page of docs/results."""

"""Experiments at laptop scale, one file each: `python -m experiments.NAME --help`."""

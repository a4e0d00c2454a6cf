"""Experiments at laptop scale, one file each: `python -m experiments` prints what they found."""

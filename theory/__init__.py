"""Appendix A and B of the paper, checked numerically: `python -m theory`."""

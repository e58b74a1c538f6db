"""Faults that a training run throws at an optimizer: what happens, and what counts as surviving it.

A case builds its own problem with the subject's optimizer, does the damage, and raises ``Lost`` with the reason if the
run did not survive. Cases know nothing of SCAO: the same bar holds for every optimizer (survival.py lists them).
"""

from faults import checkpoint, gradients, lifecycle, numerics, shapes  # noqa: F401  (each enters its cases)
from faults.core import FAULTS, Fault, Inapplicable, Lost, Subject

__all__ = ["FAULTS", "Fault", "Inapplicable", "Lost", "Subject"]

"""What the fuzz tests put in the place of sound values."""

from __future__ import annotations

import math
from typing import Any

import torch

STRANGE: list[Any] = [None, -1, 0, 2**70, 1e400, math.nan, "", "published", [], {}, (), True, b"x", torch.zeros(0)]
STRANGE += [torch.full((4, 30), math.nan), torch.zeros(2, 3, dtype=torch.int8), [torch.zeros(1)], {"step": 3}]

"""Settings of every test: one thread where timing is noisy, and Triton in its interpreter without a GPU."""

from __future__ import annotations

import os

import torch

# The decorator of a Triton kernel reads this when its module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

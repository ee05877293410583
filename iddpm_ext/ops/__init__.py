"""The project's ops: each has several backends, all of which compute what its `reference.py` does."""

from __future__ import annotations

from iddpm_ext.ops.adamw_ema import adamw_ema
from iddpm_ext.ops.conv3x3 import conv3x3
from iddpm_ext.ops.group_norm_silu import GroupNormSilu, group_norm_silu
from iddpm_ext.ops.hybrid_loss import HybridLoss, hybrid_loss
from iddpm_ext.ops.q_sample import q_sample
from iddpm_ext.ops.qkv_attention import qkv_attention
from iddpm_ext.ops.reverse_step import ReverseStep, reverse_step
from iddpm_ext.ops.spec import REGISTRY, BadCase, Case, OpSpec, resolve_backend, unavailable
from iddpm_ext.ops.vlb_terms import vlb_terms
from iddpm_ext.ops.vlb_to_all import vlb_to_all

__all__ = [
    "REGISTRY",
    "BadCase",
    "Case",
    "GroupNormSilu",
    "HybridLoss",
    "OpSpec",
    "ReverseStep",
    "adamw_ema",
    "conv3x3",
    "group_norm_silu",
    "hybrid_loss",
    "q_sample",
    "qkv_attention",
    "resolve_backend",
    "reverse_step",
    "unavailable",
    "vlb_terms",
    "vlb_to_all",
]

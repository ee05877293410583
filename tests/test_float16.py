"""float16, whose range a network can leave: no public function gives a number that was lost there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import Case

import iddpm_ext

OPTIONS = {"dtype": torch.float16, "progress": False}
CALLS: dict[str, Callable[[Case, dict[str, Any]], Any]] = {
    "sample": lambda case, o: iddpm_ext.sample(case.network, 2, **o),
    "sample_progressive": lambda case, o: list(iddpm_ext.sample_progressive(case.network, 2, **o)),
    "invert": lambda case, o: iddpm_ext.invert(case.network, case.given["images"], 2, **o),
    "nll": lambda case, o: iddpm_ext.nll(case.network, case.given["images"], steps=2, **o),
    "nll with a budget": lambda case, o: iddpm_ext.nll(
        case.network, case.given["images"], budget=4, **o
    ),
    "nll by information": lambda case, o: iddpm_ext.nll(
        case.network, case.given["images"], method="information", budget=2, **o
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_overflow_is_told_and_nothing_returned(call):
    case = Case()
    options = {**OPTIONS, "labels": case.given["labels"]}
    CALLS[call](case, options)
    with torch.no_grad():  # features of some 1e7, which normalisation brings back to one
        case.network.input_blocks[0][0].weight.mul_(1e8)
    who = call.split()[0]
    with pytest.raises(
        RuntimeError, match=rf"^{who}: dtype must be bfloat16 or float32 .* float16$"
    ):
        CALLS[call](case, options)
    CALLS[call](case, {**options, "dtype": torch.bfloat16})

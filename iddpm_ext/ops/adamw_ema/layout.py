"""How lists of tensors reach the kernels of `adamw_ema`: as a table of addresses.

The op is elementwise, so a kernel walks through each parameter's memory from end to end. For that, all
tensors of a parameter must have its strides and be dense; others are replaced by packed copies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leaves_no_gaps(x: Tensor) -> bool:
    """Whether x is dense: its elements fill one range of memory, each place once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected = stride * size
    return True


class Packed:
    """The tensors of an update, and `table`, the kernels' rows of all parameters, one after the other.

    A row: numel, then the addresses of param, grad, exp_avg, exp_avg_sq, copy (0 for none) and each
    average. The object keeps packed copies alive; `write_back` copies their new values to the originals.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        emas: list[Tensor],
        copies: list[Tensor],
    ) -> None:
        self.stand_ins: list[tuple[Tensor, Tensor, bool]] = []
        count = len(params)
        averages = [emas[k : k + count] for k in range(0, len(emas), count)]
        lists = [params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else []), *averages]
        if all(x.is_contiguous() for values in lists for x in values):
            columns = [[x.data_ptr() for x in values] for values in lists]
        else:
            columns = [
                [
                    self._address(x, p, written=values is not grads)
                    for x, p in zip(values, params, strict=True)
                ]
                for values in lists
            ]
        if not copies:
            columns.insert(4, [0] * count)
        sizes = [p.numel() for p in params]
        self.table = [v for row in zip(sizes, *columns, strict=True) for v in row]

    def _address(self, x: Tensor, param: Tensor, *, written: bool) -> int:
        strides = param.stride()
        if not leaves_no_gaps(param):
            strides = torch.empty(param.shape, dtype=param.dtype, device="meta").stride()
        if x.stride() != strides:
            packed = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
            self.stand_ins.append((x, packed, written))
            x = packed
        return x.data_ptr()

    def write_back(self) -> None:
        for x, packed, written in self.stand_ins:
            if written:
                x.copy_(packed)

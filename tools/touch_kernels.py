"""Calls every op once per test case on one backend, for a memory checker.

compute-sanitizer --error-exitcode 1 python tools/touch_kernels.py --backend cuda
"""

from __future__ import annotations

import argparse

import torch

from iddpm_ext.ops.pixel_rows import channel_sums, rows_of, settle
from iddpm_ext.ops.spec import BACKENDS, REGISTRY, unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    """Runs the cases and prints how many calls each op took; a backend that supports none raises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="cuda")
    backend = parser.parse_args().backend
    device = "cpu" if backend in ("cpu", "reference") else "cuda"
    total = 0
    for name, spec in REGISTRY.items():
        calls = 0
        for dtype in DTYPES:
            if unavailable(name, backend, device, dtype) is None:
                for case in spec.sample_inputs(device, dtype):
                    spec.public(**case.kwargs, backend=backend)
                    calls += 1
        print(f"{name}: {calls} calls", flush=True)
        total += calls
    if backend in ("cuda", "reference"):
        for dtype in DTYPES:
            for channels, pitch in ((3, 0), (40, 8), (1536, 0)):
                wide = torch.randn(2, 5, 9, channels + pitch, dtype=dtype, device=device)
                x = wide[..., :channels].permute(0, 3, 1, 2)
                channel_sums(rows_of(x), backend)
                bias = torch.randn(channels, dtype=torch.float32, device=device)
                settle(x, x.clone(memory_format=torch.preserve_format), bias, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    if total == 0:
        reasons = {unavailable(name, backend, device, torch.float32) for name in REGISTRY}
        raise SystemExit(f"touch_kernels: no op can run on {backend}: {reasons}")


if __name__ == "__main__":
    main()

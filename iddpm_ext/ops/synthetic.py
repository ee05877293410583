"""Synthetic arguments for tests and benchmarks of the ops: tensors, a table, unusual memory layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from iddpm_ext.ops.columns import NUM_COLUMNS, Column

NUM_TIMESTEPS = 50


class Tensors:
    """Random tensors of one dtype and device, the same for the same seed on every device."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._dtype = device, dtype

    def normal(self, shape: Sequence[int], mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Normal numbers, drawn in float32 and rounded to the dtype."""
        values = (
            torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32, device="cpu")
            * std
            + mean
        )
        return values.to(self._device, self._dtype)

    def timesteps(self, n: int) -> Tensor:
        """Steps of `table`'s chain, including the first and the last if n allows."""
        t = torch.randint(
            0, NUM_TIMESTEPS, (n,), generator=self._generator, dtype=torch.int64, device="cpu"
        )
        t[:1], t[1:2] = NUM_TIMESTEPS - 1, 0
        return t.to(self._device)


def table(device: str, *, learned: bool = True, sampler: str = "ddpm", eta: float = 0.0) -> Tensor:
    """A cosine chain's table, float32 [50, 16].

    `Diffusion.table`, a layer above, is the real one. This is written independently from the equations, so
    that tests find errors in either.
    """
    steps = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64, device="cpu") / NUM_TIMESTEPS
    curve = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    alpha_bar = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), alpha_bar[:-1]])
    posterior = betas * (1 - previous) / (1 - alpha_bar)
    low = torch.cat([posterior[1:2], posterior[1:]]).log()

    rows = torch.zeros(NUM_TIMESTEPS, NUM_COLUMNS, dtype=torch.float64, device="cpu")
    rows[:, Column.X0_FROM_XT] = (1 / alpha_bar).sqrt()
    rows[:, Column.X0_FROM_OUT] = -(1 / alpha_bar - 1).sqrt()
    rows[1:, Column.NOISE_SCALE] = 1
    if sampler == "ddim":
        sigma = eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
        direction = (1 - previous - sigma**2).clamp(min=0).sqrt() / (1 - alpha_bar).sqrt()
        rows[:, Column.MEAN_X0] = previous.sqrt() - direction * alpha_bar.sqrt()
        rows[:, Column.MEAN_XT] = direction
        noisy = sigma > 0
        rows[noisy, Column.LOG_VARIANCE_BIAS] = 2 * sigma[noisy].log()
        rows[~noisy, Column.NOISE_SCALE] = 0
    else:
        rows[:, Column.MEAN_X0] = betas * previous.sqrt() / (1 - alpha_bar)
        rows[:, Column.MEAN_XT] = (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)
        high = betas.log()
        rows[:, Column.LOG_VARIANCE_BIAS] = (high + low) / 2 if learned else low
        rows[:, Column.LOG_VARIANCE_SCALE] = (high - low) / 2 if learned else 0
    rows[:, Column.POSTERIOR_LOG_VARIANCE] = low
    rows[:, Column.SQRT_ALPHA_BAR] = alpha_bar.sqrt()
    rows[:, Column.SQRT_ONE_MINUS_ALPHA_BAR] = (1 - alpha_bar).sqrt()
    rows[:, Column.TARGET_NOISE] = 1
    log_alpha_bar = alpha_bar.log()
    rows[:, Column.LOG_ALPHA_BAR_HIGH] = log_alpha_bar.float().double()
    rows[:, Column.LOG_ALPHA_BAR_LOW] = log_alpha_bar - log_alpha_bar.float().double()
    rows[:, Column.STEP] = torch.arange(NUM_TIMESTEPS, dtype=torch.float64, device="cpu")
    return rows.float().to(device)


def _sliced(x: Tensor) -> Tensor:
    """Every second sample of a larger batch, from an odd offset of storage on."""
    room = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), float("nan"), dtype=x.dtype, device="cpu")
    room = room.to(x.device)
    view = room[1::2]
    return view.copy_(x)


def _pitched(x: Tensor) -> Tensor:
    """channels_last with gaps between the pixels, like the gradient of a part of a concatenation."""
    n, c, h, w = x.shape
    room = torch.full((n, h, w, c + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = room[..., 1 : c + 1].permute(0, 3, 1, 2)
    return view.copy_(x)


def _cropped(x: Tensor) -> Tensor:
    """A window of larger images: its pixels have no constant stride."""
    n, c, h, w = x.shape
    room = torch.full((n, c, h + 2, w + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = room[:, :, 1 : h + 1, 2 : w + 2]
    return view.copy_(x)


def _offset(x: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "pitched": _pitched,
    "cropped": _cropped,
    "storage offset": _offset,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def bound_call(
    shape: tuple[int, int, int, int],
    device: str,
    dtype: torch.dtype,
    *,
    learned: bool = True,
    spread: float = 1.0,
    last: bool = False,
) -> dict[str, Any]:
    """Arguments of `vlb_terms`: 8-bit images, x_t drawn from them, and outputs close to the true noise.

    spread: scale of the outputs' error. x_0 contains both extreme levels. last: every example is at t = 0.
    """
    draw = Tensors(1, device, torch.float32)
    levels = (draw.normal(shape) * 60 + 128).clamp(0, 255).round()
    levels.flatten()[:1], levels.flatten()[1:2] = 0, 255
    x_0 = levels / 127.5 - 1
    rows = table(device, learned=learned)
    t, noise = draw.timesteps(shape[0]), draw.normal(shape)
    if last:
        t = torch.zeros_like(t)
    signal = rows[t, Column.SQRT_ALPHA_BAR][:, None, None, None]
    deviation = rows[t, Column.SQRT_ONE_MINUS_ALPHA_BAR][:, None, None, None]
    out = noise + 0.1 * spread * draw.normal(shape)
    if learned:
        out = torch.cat([out, spread * draw.normal(shape)], dim=1)
    return {
        "model_output": out.to(dtype),
        "x_0": x_0,
        "x_t": signal * x_0 + deviation * noise,
        "t": t,
        "table": rows,
    }


def bad_bound_calls(bad: Callable[..., Any], good: dict[str, Any]) -> Iterator[Any]:
    """Bad arguments for `vlb_terms`, `hybrid_loss` and `vlb_to_all`; `bad(label, error, match, **change)`."""
    t, out = good["t"], good["model_output"]
    yield bad("x_t not a tensor", TypeError, "x_t must be a tensor", x_t=[1.0])
    yield bad("x_t rank", ValueError, r"x_t must be \[N, C, H, W\]", x_t=good["x_t"][0])
    yield bad("x_0 integer", TypeError, "x_0 must be float", x_0=good["x_0"].long())
    yield bad("x_0 shape", ValueError, "x_0 must be of the shape of x_t", x_0=good["x_0"][:1])
    yield bad("output channels", ValueError, r"2C, H, W\] for x_t", model_output=out[:, :5])
    headless = bad("no variance head", ValueError, "must have 2C = 6", model_output=out[:, :3])
    yield headless._replace(of_values=True)
    yield bad("output integer", TypeError, "model_output must be", model_output=out.long())
    yield bad("t float", TypeError, "t must be int64", t=t.float())
    yield bad("t shape", ValueError, r"t must be \[N\] with N = 2", t=t[:1])
    for value in (-1, NUM_TIMESTEPS, 2**40):
        outside = bad(f"t {value}", ValueError, f"t must lie in .* got {value} at", t=t * 0 + value)
        yield outside._replace(of_values=True)
    yield bad("table shape", ValueError, r"table must be \[T, 16\]", table=good["table"][:, :4])
    yield bad("backend", ValueError, "backend must be one of", backend="opencl")

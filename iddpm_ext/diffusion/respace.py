"""Respacing: which steps of a chain a shorter chain keeps."""

from __future__ import annotations

from collections.abc import Sequence

from iddpm_ext.scalars import plain


def space_timesteps(num_timesteps: int, spec: int | str | Sequence[int]) -> list[int]:
    """The steps of a chain of ``num_timesteps`` that ``spec`` asks for, ascending.

    Args:
        num_timesteps: T, the length of the chain to choose from.
        spec: one of
            an int K: K evenly spread steps, both ends included for K > 1;
            ``"a,b,c"``: the chain is divided into equal sections (the first ones longer by the
            remainder) with a, b, c evenly spread steps; the first step of a section if it is one;
            ``"ddimN"``: every i-th step from 0, i the smallest stride that gives exactly N steps;
            ``"dense-K"``: K evenly spread steps and all steps from 0 to T / K, for likelihoods;
            a list of indices: those steps.

    Returns:
        distinct indices in [0, T), ascending.

    Raises:
        ValueError: the steps asked for do not exist in this chain.
        TypeError: spec is of none of these kinds.

    Source: the original code, including its rounding: positions are accumulated in float64 and ties
    rounded to even. "dense-K": appendix E of Improved DDPM.
    """
    num_timesteps, spec = plain(num_timesteps), plain(spec)
    if isinstance(spec, bool):
        raise TypeError(f"respace: spec must be an int, a string or indices, got {spec!r}")
    if isinstance(spec, int):
        return _spread(num_timesteps, [spec])
    if isinstance(spec, str):
        if spec.startswith("ddim"):
            return _ddim(num_timesteps, _number(spec[len("ddim") :], spec))
        if spec.startswith("dense-"):
            return _dense(num_timesteps, _number(spec[len("dense-") :], spec))
        return _spread(num_timesteps, [_number(part, spec) for part in spec.split(",")])
    return _indices(num_timesteps, spec)


def _spread(num_timesteps: int, counts: list[int]) -> list[int]:
    size, remainder = divmod(num_timesteps, len(counts))
    steps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < remainder)
        if not 0 <= count <= length:
            raise ValueError(
                f"respace: section {section + 1} of {len(counts)} has {length} steps, the number "
                f"taken from it must be from 0 to {length}, got {count}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Accumulated rather than multiplied, for the original's rounding errors.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return sorted(set(steps))


def _dense(num_timesteps: int, count: int) -> list[int]:
    even = _spread(num_timesteps, [count])
    early = range(min(num_timesteps - 1, num_timesteps // max(count, 1)) + 1)
    return sorted({*early, *even})


def _ddim(num_timesteps: int, count: int) -> list[int]:
    reachable = {len(range(0, num_timesteps, i)): i for i in range(num_timesteps, 0, -1)}
    if count not in reachable:
        below = [n for n in reachable if n < count]
        above = [n for n in reachable if n > count]
        near = [str(n) for n in ([max(below)] if below else []) + ([min(above)] if above else [])]
        raise ValueError(
            f"respace: ddimN must divide {num_timesteps} steps by a whole stride, got "
            f"N={count}; the nearest N possible: {', '.join(near)}"
        )
    return list(range(0, num_timesteps, reachable[count]))


def _indices(num_timesteps: int, spec: Sequence[int]) -> list[int]:
    try:
        steps = [int(i) for i in spec]
        exact = all(step == i for step, i in zip(steps, spec, strict=True))
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise TypeError(f"respace: spec must be an int, a string or indices, got {spec!r}")
    outside = [i for i in steps if not 0 <= i < num_timesteps]
    if outside:
        raise ValueError(
            f"respace: every index must be from 0 to {num_timesteps - 1}, got {outside[0]}"
        )
    if len(set(steps)) != len(steps):
        raise ValueError(f"respace: indices must be distinct, got {spec!r}")
    return sorted(steps)


def _number(text: str, spec: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f'respace: spec must look like "50", "10,15,20", "ddim50" or "dense-50", got {spec!r}'
        ) from None

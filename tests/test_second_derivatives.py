"""Second derivatives, tangents and batches of gradients are right on every backend, never silently zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import assert_close, cloned, differentiable, tensors, to_double
from torch import Tensor, nn
from torch.autograd import forward_ad

import iddpm_ext
from iddpm_ext import UNet, UNetConfig, ops
from iddpm_ext.diffusion import Diffusion
from iddpm_ext.ops import synthetic
from iddpm_ext.ops.spec import REGISTRY, Case, OpSpec, unavailable

DIFFERENTIABLE = [spec for spec in REGISTRY.values() if spec.differentiable]
COMPILED = [s for s in DIFFERENTIABLE if not unavailable(s.name, "cpu", "cpu", torch.float32)]
SMALL = 800
needs_kernels = pytest.mark.skipif(
    unavailable("q_sample", "cpu", "cpu", torch.float32) is not None, reason="no C++ kernels here"
)


def cases(specs: list[OpSpec], dtype: torch.dtype) -> list[Any]:
    """(spec, case) with something to differentiate, small."""
    return [
        pytest.param(spec, case, id=f"{spec.name}-{case.label}")
        for spec in specs
        for case in spec.sample_inputs("cpu", dtype)
        if 0 < sum(case.kwargs[k].numel() for k in leaves_of(spec, case.kwargs)) < SMALL
        and case.label not in synthetic.LAYOUTS
    ]


def leaves_of(spec: OpSpec, kwargs: dict[str, Any]) -> list[str]:
    return [k for k in spec.differentiable if isinstance(kwargs.get(k), Tensor)]


def weighted(results: list[Tensor], seed: int) -> Tensor:
    """A fixed weighted sum, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for x in results:
        ramp = torch.arange(x.numel(), dtype=torch.float64).view(x.shape)
        total = total + (x.double() * (seed + ramp).cos()).sum()
    return total


def second(spec: OpSpec, backend: str, kwargs: dict[str, Any]) -> list[Tensor]:
    """Gradients of a weighted sum of the gradients of a weighted sum of squared results."""
    leaves = [kwargs[k] for k in leaves_of(spec, kwargs)]
    results = [r for r in tensors(spec.public(**kwargs, backend=backend)) if r.requires_grad]
    scale = [r.double().square() for r in results]
    first = torch.autograd.grad(weighted(scale, 1), leaves, create_graph=True, allow_unused=True)
    total = weighted([g for g in first if g is not None and g.requires_grad], 2)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


@pytest.mark.parametrize(
    ("spec", "case"), cases([s for s in DIFFERENTIABLE if not s.stops_gradient], torch.float64)
)
def test_reference_passes_gradgradcheck(spec: OpSpec, case: Case):
    kwargs = differentiable(spec, to_double(case.kwargs))
    names = leaves_of(spec, kwargs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = {**kwargs, **dict(zip(names, values, strict=True))}
        return tuple(tensors(spec.public(**arguments, backend="reference")))

    assert torch.autograd.gradgradcheck(function, [kwargs[k] for k in names], fast_mode=True)


@pytest.mark.parametrize("watched", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize(("spec", "case"), cases(COMPILED, torch.float32))
def test_second_derivatives_of_kernels_are_the_references(spec: OpSpec, case: Case, watched: bool):
    profiler = torch.autograd.profiler.profile() if watched else contextlib.nullcontext()
    with profiler:
        results = second(spec, "cpu", differentiable(spec, case.kwargs))
    exact = second(spec, "reference", differentiable(spec, to_double(cloned(case.kwargs))))
    yardstick = second(spec, "reference", differentiable(spec, case.kwargs))
    # Terms of a second derivative cancel: float32's own error is a few roundings of the largest term.
    largest = max((float(x.abs().max()) for x in exact if x.numel()), default=0.0)
    for result, target, measure in zip(results, exact, yardstick, strict=True):
        assert_close(
            result, target, measure, torch.float32, roundings=spec.roundings, largest=largest
        )


def call_of(spec: OpSpec, dtype: torch.dtype) -> dict[str, Any]:
    """A call with images, every optional argument that has a gradient among them if there is one."""
    found = [
        case.kwargs
        for case in spec.sample_inputs("cpu", dtype)
        if case.label not in synthetic.LAYOUTS
    ]
    return max(
        (k for k in found if 0 < sum(k[x].numel() for x in leaves_of(spec, k)) < SMALL),
        key=lambda k: len(leaves_of(spec, k)),
    )


def loss_of(spec: OpSpec, kwargs: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    """A scalar of the tensors that the op is differentiable in."""
    names = leaves_of(spec, kwargs)

    def loss(*values: Tensor) -> Tensor:
        arguments = {**kwargs, **dict(zip(names, values, strict=True))}
        results = tensors(spec.public(**arguments, backend=backend))
        return weighted([r.double().square() for r in results], 1)

    return loss


def points(spec: OpSpec, kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where a loss is differentiated, and a direction."""
    values = tuple(kwargs[name] for name in leaves_of(spec, kwargs))
    generator = torch.Generator().manual_seed(3)
    return values, tuple(
        torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in values
    )


def reverse_over_reverse(loss: Callable[..., Tensor], values: Any, direction: Any) -> Any:
    return torch.autograd.functional.hvp(loss, values, direction)[1]


def functional(loss: Callable[..., Tensor], values: Any, direction: Any) -> Any:
    gradient = torch.func.grad(loss, argnums=tuple(range(len(values))))
    return torch.func.jvp(gradient, values, direction)[1]


def mapped(loss: Callable[..., Tensor], values: Any, direction: Any) -> Any:
    """The second of a batch of two directions."""
    batch = tuple(torch.stack([-d, d]) for d in direction)
    found = torch.func.vmap(lambda *d: functional(loss, values, d))(*batch)
    return tuple(x[1] for x in found)


def compiled(loss: Callable[..., Tensor], values: Any, direction: Any) -> Any:
    torch.compiler.reset()
    whole = torch.compile(lambda v, d: functional(loss, v, d), backend="aot_eager")
    return whole(values, direction)


def forward_mode(loss: Callable[..., Tensor], values: Any, direction: Any) -> Any:
    """The tangent of the loss alone."""
    with forward_ad.dual_level():
        dual = (forward_ad.make_dual(v, d) for v, d in zip(values, direction, strict=True))
        return (forward_ad.unpack_dual(loss(*dual)).tangent,)


ROUTES = [reverse_over_reverse, functional, mapped, compiled]


@pytest.mark.parametrize("route", [*ROUTES, forward_mode], ids=lambda route: route.__name__)
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_every_route_to_a_derivative_gives_the_references(spec: OpSpec, route: Callable[..., Any]):
    exact_call = to_double(cloned(call_of(spec, torch.float32)))
    values, direction = points(spec, exact_call)
    loss = loss_of(spec, exact_call, "reference")
    if route is forward_mode:
        leaves = [v.clone().requires_grad_(True) for v in values]
        gradients = torch.autograd.grad(loss(*leaves), leaves)
        exact = [sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))]
    else:
        exact = reverse_over_reverse(loss, values, direction)
    call = call_of(spec, torch.float32)
    values, direction = points(spec, call)
    found = route(loss_of(spec, call, "auto"), values, direction)
    # Compiling does not change the reference's rounding, and takes seconds.
    own = functional if route is compiled else route
    measure = own(loss_of(spec, call, "reference"), values, direction)
    for result, target, yardstick in zip(found, exact, measure, strict=True):
        assert bool(target.any())
        assert_close(result, target, yardstick, torch.float32, spec.roundings)


@pytest.mark.parametrize("route", [functional, mapped, forward_mode], ids=lambda r: r.__name__)
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_an_explicit_kernel_refuses_what_it_cannot_look_through(
    spec: OpSpec, route: Callable[..., Any]
):
    call = call_of(spec, torch.float32)
    with pytest.raises(RuntimeError, match=f"^{spec.name}: backend 'cpu' .*torch.func and forward"):
        route(loss_of(spec, call, "cpu"), *points(spec, call))


@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_a_batch_of_gradients_is_taken_apart(spec: OpSpec):
    kwargs = differentiable(spec, call_of(spec, torch.float32))
    leaves = [kwargs[k] for k in leaves_of(spec, kwargs)]
    result = tensors(spec.public(**kwargs, backend="cpu"))[0]
    batch = torch.stack(
        [torch.ones_like(result), torch.linspace(-1, 1, result.numel()).view(result.shape)]
    )
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(result, leaves, batch, is_grads_batched=True, **options)
    for i in range(2):
        alone = torch.autograd.grad(result, leaves, batch[i], **options)
        for a, b in zip(found, alone, strict=True):
            assert torch.allclose(a[i], b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@needs_kernels
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("vlb_terms", "x_t"), ("vlb_terms", "x_0"), ("hybrid_loss", "x_t"), ("hybrid_loss", "x_0"),
        ("hybrid_loss", "noise"), ("q_sample", "noise"),
    ],
)  # fmt: skip
def test_a_gradient_that_kernels_lack_is_the_references_or_refused(op: str, argument: str):
    spec = REGISTRY[op]
    calls = (case.kwargs for case in spec.sample_inputs("cpu", torch.float32))
    kwargs = cloned(next(k for k in calls if isinstance(k.get("noise", k["x_0"]), Tensor)))
    leaf = kwargs[argument].requires_grad_(True)

    def gradient(backend: str) -> Tensor:
        results = tensors(spec.public(**kwargs, backend=backend))
        return torch.autograd.grad(weighted(results, 1), leaf)[0]

    assert bool(gradient("auto").any()) and torch.equal(gradient("auto"), gradient("reference"))
    with pytest.raises(RuntimeError, match=f"no gradient in {argument}"):
        gradient("cpu")


def test_a_tensor_that_is_two_arguments_has_both_gradients():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    row = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

    def f(row: Tensor, other: Tensor, backend: str) -> Tensor:
        y = ops.group_norm_silu(
            x.to(other.dtype), 2, weight, bias, scale=row, shift=other, backend=backend
        )
        return y.double().square().sum()

    exact = torch.autograd.functional.hvp(lambda r: f(r, r, "reference"), row, row)[1]
    single = torch.autograd.functional.hvp(lambda r: f(r, r, "auto"), row.float(), row.float())[1]
    assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_a_written_sum_has_its_second_derivative():
    """Through the sum itself as well as through what is made of it."""

    def f(x: Tensor, residual: Tensor, bias: Tensor, backend: str) -> Tensor:
        one = torch.linspace(0.5, 1.5, 4)
        y, total = ops.group_norm_silu(
            x,
            2,
            one,
            one - 1,
            residual=residual,
            channel_bias=bias,
            return_sum=True,
            backend=backend,
        )
        return (y.double().square() * total.double().sin()).sum()

    generator = torch.Generator().manual_seed(0)
    values = tuple(
        torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 3), (2, 4, 3, 3), (4,))
    )
    wide = tuple(v.double() for v in values)
    exact = torch.autograd.functional.hvp(lambda *v: f(*v, "reference"), wide, wide)[1]
    found = torch.autograd.functional.hvp(lambda *v: f(*v, "auto"), values, values)[1]
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


CONFIG = UNetConfig(
    image_size=8,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2),
    attention_resolutions=(4,),
)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def assert_network_has_its_hessian(
    model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """The product with a direction, against finite differences of the gradient in float64."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.functional.hvp(lambda z: call(model, z).square().sum(), x, x)[1]
    model.double()

    def gradient(z: Tensor) -> Tensor:
        z = z.requires_grad_(True)
        return torch.autograd.grad(call(model, z).square().sum(), z)[0]

    step, wide = 1e-5, x.double()
    exact = (gradient(wide * (1 + step)) - gradient(wide * (1 - step))) / (2 * step)
    assert (found.double() - exact).norm() < 1e-3 * exact.norm()


def test_a_network_has_its_hessian():
    model = randomised(UNet(CONFIG))
    assert_network_has_its_hessian(model, lambda net, x: net(x, x.new_tensor([3.0])))


def test_an_accelerated_network_has_its_hessian():
    pytest.importorskip("diffusers")
    model = iddpm_ext.to_diffusers(randomised(UNet(CONFIG)))
    assert iddpm_ext.accelerate(model).replaced
    assert_network_has_its_hessian(model, lambda net, x: net(x, torch.tensor([3.0])).sample)


def test_a_training_loss_has_its_hessian():
    diffusion = Diffusion("cosine", 50)
    x_0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    t, weight = torch.tensor([0, 30]), torch.linspace(0.5, 1.0, 6)

    def loss(weight: Tensor) -> Tensor:
        images, noise = x_0.to(weight.dtype), x_0.flip(0).to(weight.dtype)

        def model(x: Tensor, _: Tensor) -> Tensor:
            return torch.cat([x, x.sin()], dim=1) * weight[:, None, None]

        return diffusion.training_losses(model, images, t, noise)["loss"].sum()

    exact = torch.autograd.functional.hessian(loss, weight.double())
    found = torch.autograd.functional.hessian(loss, weight)
    assert bool(exact.any()) and torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_table_made_under_a_transform_serves_later_calls():
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([1, 20])
    diffusion = Diffusion("cosine", 50)
    torch.func.grad(lambda z: diffusion.q_sample(z, t, x).sum())(x)
    assert torch.equal(diffusion.q_sample(x, t, x), Diffusion("cosine", 50).q_sample(x, t, x))


def test_a_compiled_function_refuses_a_second_derivative():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    one = torch.ones(8)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: ops.group_norm_silu(x, 2, one, one).square().sum(), backend="aot_eager"
    )
    (gradient,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_ops_without_a_gradient_can_be_mapped():
    """Over samples, steps included."""
    reverse = next(iter(REGISTRY["reverse_step"].sample_inputs("cpu", torch.float32))).kwargs
    x, out, t, table = (reverse[k] for k in ("x_t", "model_output", "t", "table"))

    def one(x: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return ops.reverse_step(x[None], out[None], t[None], table, None).x_prev[0]

    mapped = torch.func.vmap(one)(x, out, t)
    whole = ops.reverse_step(x, out, t, table, None, backend="reference").x_prev
    assert torch.allclose(mapped, whole, rtol=1e-6, atol=1e-6)

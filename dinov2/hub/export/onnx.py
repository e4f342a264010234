"""ONNX: the network itself in a file, which runs without PyTorch."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2.hub.export.layout import Layout, arguments_of, cast, preprocessor
from dinov2.hub.pixels import Colours
from dinov2.hub.teacher import describe

_INPUT, _OUTPUTS = "pixel_values", ("last_hidden_state", "pooler_output")  # as transformers' exports have them
_WEIGHTS = "model.onnx.data"


class Onnx(Layout):
    """ViTs of DINOv2 and DINOv3, for images of one size and batches of any.

    Inputs are float32 ``pixel_values`` (B, C, side, side), normalised; outputs are float32 ``last_hidden_state``
    (B, 1 + R + N, D), all tokens after the final norm, and ``pooler_output`` (B, D), the class token.
    """

    library = "onnxruntime"
    card_library = "onnx"
    writers = ("onnx", "onnxscript")
    extra = "onnx"
    reader = "ONNX Runtime"
    dtypes = ("fp32", "fp16")  # on CPUs ONNX Runtime multiplies no bf16 matrices
    any_size = opens_here = False
    # It computes in the dtype of the weights, not in float64 as the other libraries are made to.
    tolerances: ClassVar = {"fp32": (1e-5, 0.99999), "fp16": (1e-2, 0.9999)}

    def files(
        self, model: nn.Module, dtype: torch.dtype, colours: Colours, record: Mapping[str, Any], scratch: Path
    ) -> dict[str, Any]:
        """The network, its weights beside it where they are too large for one file, and what describes both."""
        arguments = arguments_of(model)
        network = copy.deepcopy(model)
        network.load_state_dict(cast(model.state_dict(), dtype), assign=True)
        side = arguments["img_size"]
        _write(network.eval(), torch.zeros(2, arguments["in_chans"], side, side), scratch / "model.onnx")
        written = {name: scratch / name for name in (_WEIGHTS, "model.onnx") if (scratch / name).exists()}
        return {
            **written,
            "model.json": {**record, "architecture": describe(model)},
            "preprocessor_config.json": preprocessor(side, colours),
        }

    def opener(self, model: nn.Module, colours: Colours) -> Callable[[Path], nn.Module]:
        """A session on the CPU."""
        return lambda folder: _Session(folder / "model.onnx")

    def loading(self, repo: str) -> str:
        """With ONNX Runtime, on images as ``preprocessor_config.json`` describes them."""
        return (
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("DIR/model.onnx")\n'
            f'tokens, class_token = session.run(None, {{"{_INPUT}": images}})  # float32 (B, C, H, W), normalised'
        )


class _Tokens(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.backbone.forward_features(pixel_values)
        parts = found["x_norm_clstoken"][:, None], found["x_norm_regtokens"], found["x_norm_patchtokens"]
        tokens = torch.cat(parts, dim=1).float()
        return tokens, tokens[:, 0]


class _Session(nn.Module):
    """A file as a module; float64 stays the caller's business."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> SimpleNamespace:
        tokens, _ = self._session.run(list(_OUTPUTS), {_INPUT: images.float().numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(tokens).double())


def _write(backbone: nn.Module, images: Tensor, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with torch.no_grad():
        program = torch.onnx.export(
            _Tokens(backbone).eval(), (images,), dynamo=True, verbose=False,
            input_names=[_INPUT], output_names=list(_OUTPUTS),
            dynamic_shapes={_INPUT: {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    ClearMetadataAndDocStringPass()(program.model)  # names of files on this machine, lines of this code
    program.save(path)  # large weights go into a file of their own: 2 GB are the most that ONNX's may have

"""What an export is: files of another library that hold a backbone, how that opens them, and how it resamples."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2.hub.layouts import resize_grid, vit_arguments
from dinov2.hub.layouts_dinov3 import is_dinov3
from dinov2.hub.pixels import Colours

Resampling = tuple[bool, float]
"""Manner in which a position grid is resampled for images of another size: antialias and offset, see
`resample_positions`."""


class Layout(ABC):
    """Files of one library. A subclass is a file of this folder and a line of `dinov2.extensions.EXPORTS`."""

    library: ClassVar[str]  # a package that opens the files
    card_library: ClassVar[str]  # ``library_name`` of the model card
    writers: ClassVar[tuple[str, ...]] = ()  # packages that writing needs
    extra: ClassVar[str] = "export"  # part of pyproject.toml that has them, and the library
    reader: ClassVar[str]  # who resamples positions as `resampling` says, in words
    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    any_size: ClassVar[bool] = True  # whether the reader takes images of any size
    opens_here: ClassVar[bool] = True  # by `dinov2.hub.load_teacher`
    tolerances: ClassVar[Mapping[str, tuple[float, float]]] = {
        "fp32": (1e-6, 0.999999), "fp16": (5e-3, 0.9999), "bf16": (4e-2, 0.999)
    }  # fmt: skip
    """By dtype of the export: the largest difference over the largest output, and the least cosine of a token."""

    @abstractmethod
    def files(
        self, model: nn.Module, dtype: torch.dtype, colours: Colours, record: Mapping[str, Any], scratch: Path
    ) -> dict[str, Any]:
        """Contents by name, as `dinov2.hub.save.write_new` takes them.

        Args:
            model: the teacher's backbone, float32 on the CPU; it stays as it is.
            dtype: of all weights.
            colours: that images are normalised with.
            record: the JSON beside the teacher, or nothing.
            scratch: an empty folder for files that are moved from there.

        Raises ValueError where the format cannot express the architecture, or ``dtype`` the weights.
        """

    @abstractmethod
    def opener(self, model: nn.Module, colours: Colours) -> Callable[[Path], nn.Module]:
        """A function that opens the files of this model in a folder with the library, as its users do.

        What it returns has ``forward_features``, or is called and returns a ``last_hidden_state`` (B, 1 + R + N, D).
        """

    @abstractmethod
    def loading(self, repo: str) -> str:
        """Python that opens the files in folder DIR, or of ``repo`` on the Hugging Face hub."""

    def resampling(self, num_registers: int) -> Resampling | None:
        """Manner of the reader; None where it resamples nothing."""
        return None

    def verified_resampling(self, num_registers: int) -> Resampling | None:
        """Manner of what `opener` opens, if that is another one."""
        return self.resampling(num_registers)


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """Constructor keywords of a ViT of DINOv2 or DINOv3; raises ValueError for another backbone."""
    return model.describe() if is_dinov3(model) else vit_arguments(model)


def fit_to_images(model: nn.Module, image_size: int) -> None:
    """Make square images of so many px a ViT's own: its position grid is resampled, if it has one; in place."""
    if not is_dinov3(model):
        resize_grid(model, image_size)
    elif image_size < model.patch_size or image_size % model.patch_size:
        raise ValueError(
            f"The image size is {image_size}; a positive multiple of the patch's {model.patch_size} px is expected."
        )
    else:
        model.img_size = image_size


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of tensors in a dtype; raises ValueError where one is not finite in it."""
    cast = {
        # Periods of rotary positions are no weights, and rounded to 16 bit would turn far patches elsewhere.
        key: tensor.detach().to(tensor.dtype if key.endswith(".periods") else dtype).contiguous().clone()
        for key, tensor in state.items()
    }
    for key, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"The teacher's {key} is not finite in {dtype}; finite weights are expected.")
    return cast


def preprocessor(side: int, colours: Colours) -> dict[str, Any]:
    """Transformers' ``preprocessor_config.json``: the shorter edge is resized and the centre cut out."""
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(colours.mean), "image_std": list(colours.std),
    }  # fmt: skip

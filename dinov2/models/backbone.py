"""Contract of a backbone with training, evaluation and export, and backbones from a run's configuration."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dinov2.extensions import BACKBONES

# Tensor dimensions below: B images, C channels, N patches, D width.

_VIT_SETTINGS = (
    "patch_size", "ffn_layer", "qkv_bias", "proj_bias", "ffn_bias", "num_register_tokens", "interpolate_antialias",
    "interpolate_offset",
)  # fmt: skip
_ALIASES = {"layerscale_init": "init_values"}  # DINOv3's keyword


class Backbone(nn.Module):
    """Images to one class token and N = (side / patch_size)^2 patch tokens each.

    A subclass gives `tokens` and sets the attributes; the rest has defaults. Blocks are what is trained alone
    (``train.unfreeze_last_n_blocks``), sharded, compiled and recomputed one by one, so each must be called once per
    pass and draw no random numbers. The parameters of the patch embedding have names that begin with ``patch_embed.``;
    of all others, those of blocks and of ``norm`` are told apart by `layer_of`. It must run on the meta device.
    """

    blocks: nn.ModuleList  # in the order in which they run; at least one
    embed_dim: int  # D
    patch_size: int  # side of a patch in pixels
    num_prefix_tokens: int = 1  # that are no patches (class token, registers), for those who count tokens
    supports_patch_index: ClassVar[bool] = False  # by `forward_features`; otherwise all tokens are computed
    compiled_methods: ClassVar[tuple[str, ...]] = ()  # beside the blocks', that compile into one graph each
    needs_all_crops: bool = False  # whether a batch is told from those of other sizes only where all come in one call

    @abstractmethod
    def tokens(self, images: Tensor, masks: Tensor | None) -> dict[str, Any]:
        """Tokens after the final norm, float32 or better.

        Args:
            images: (B, C, H, W), normalised; sides are multiples of the patch size.
            masks: bool (B, N), True for patches that are not to be seen, or None.

        Returns:
            ``x_norm_clstoken`` (B, D) and ``x_norm_patchtokens`` (B, N, D), patches row by row.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """``arch`` and the arguments, JSON values, with which ``BACKBONES[arch](**arguments)`` builds its like."""

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """`forward_features` in training; otherwise its class token (B, D)."""
        outputs = self.forward_features(*args, **kwargs)
        return outputs if is_training else outputs["x_norm_clstoken"]

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Any = None, patch_index: Tensor | None = None
    ) -> Any:
        """`tokens` of one batch, or a list of them for several batches of different crop sizes.

        Args:
            x: (B, C, H, W), or a list of such.
            masks: bool (B, N) or None; a list of these for a list.
            patch_index: int64 (M,) into the B * N patches of the (first) batch, only where `supports_patch_index`:
                dicts then hold ``x_norm_clstoken`` and the first ``x_norm_indexedtokens`` (M, D), nothing else.
        """
        if patch_index is not None:
            raise ValueError(f"{type(self).__name__} computes all tokens; patch_index is not supported.")
        if isinstance(x, Tensor):
            return self.tokens(x, masks)
        return [self.tokens(*pair) for pair in zip(x, masks or [None] * len(x), strict=True)]

    def layer_of(self, parameter_name: str) -> int:
        """Layer of a parameter for ``optim.layerwise_decay``: 0 embeddings, i + 1 block i, depth + 1 the final norm."""
        block = re.match(r"blocks\.(\d+)\.", parameter_name)
        if block:
            return int(block[1]) + 1
        return len(self.blocks) + 1 if parameter_name.startswith(("norm.", "head.")) else 0

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make sure that the configured kernels run here, before the first step; raises ValueError."""


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Backbone, Backbone, int] | tuple[Backbone, int]:
    """Build student and teacher backbones with fresh weights, on the default device.

    A backbone is given ``student.options`` and those of the other settings that its signature names, and that a
    `functools.partial` has not fixed; one that takes arbitrary keywords is given all. Sections ``student``, ``crops``
    and, where there is one, ``debug`` are read.

    Returns student, teacher (the same without stochastic depth) and their width; with ``only_teacher`` the last two.
    Raises ValueError if the architecture is unknown, or cannot be built with these settings.
    """
    student = cfg.student
    arch = re.sub(r"^(vit_\w+)_memeff$", r"\1", student.arch)  # Meta's name of another implementation of attention
    if arch not in BACKBONES:
        raise ValueError(f"student.arch = {student.arch!r}: {BACKBONES.problem(student.arch)}")
    settings = {
        **{name: getattr(student, name) for name in _VIT_SETTINGS},
        "img_size": cfg.crops.global_crops_size,
        "init_values": student.layerscale,
        "attention_backend": getattr(student, "attention_backend", "sdpa"),
        "inverse_gather": cfg.debug.inverse_gather if hasattr(cfg, "debug") else True,
    }
    drop_path = {"drop_path_rate": student.drop_path_rate, "drop_path_uniform": student.drop_path_uniform}
    make, options = BACKBONES[arch], dict(getattr(student, "options", {}))
    try:
        teacher = make(**_accepted(make, settings) | options)
        _check(teacher, cfg)
        if only_teacher:
            return teacher, teacher.embed_dim
        return make(**_accepted(make, settings | drop_path) | options), teacher, teacher.embed_dim
    except TypeError as error:
        raise ValueError(
            f"student.arch = {student.arch!r} cannot be built with student.options = {options} ({error})."
        ) from error


def ignored_settings(cfg: Any) -> list[str]:
    """Keys of section ``student`` that the configured backbone, if it is known, has no use for."""
    arch = cfg.student.arch
    taken = _accepted(BACKBONES[arch], dict.fromkeys(_VIT_SETTINGS)) if arch in BACKBONES else _VIT_SETTINGS
    return [name for name in _VIT_SETTINGS if name not in taken]


def _check(backbone: Backbone, cfg: Any) -> None:
    arch, patch, given = cfg.student.arch, backbone.patch_size, cfg.student.patch_size
    if patch != given:
        raise ValueError(
            f"student.arch = {arch!r} has patches of {patch} px, but student.patch_size = {given}; set that to "
            f"{patch}, and sides of crops to multiples of it."
        )
    if backbone.needs_all_crops and hasattr(cfg, "debug") and not cfg.debug.packed_crops:
        raise ValueError(
            f"debug.packed_crops = false cannot be with student.arch = {arch!r} and these student.options, which tell "
            "local crops from global ones where both come in one call; set it to true."
        )


def _accepted(make: Callable[..., Backbone], settings: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return settings
    names = {parameter.name for parameter in parameters} - getattr(make, "keywords", {}).keys()
    settings = settings | {alias: settings[name] for alias, name in _ALIASES.items() if name in settings}
    return {name: value for name, value in settings.items() if name in names}

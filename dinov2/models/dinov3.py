"""DINOv3's vision transformers: rotary positions, storage tokens, no bias of keys, norms of their own for class tokens.

State-dict keys and constructor keywords are those of Meta's class.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.layers import Block, LayerNorm, Mlp, PatchEmbed, RMSNorm, RopePositionEmbedding, SwiGLUFFNSplit
from dinov2.layers.linear import KeyMaskedLinear, draw_weights
from dinov2.models.vision_transformer import PackedTransformer, drop_path_rates

FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNSplit,
    **{f"swiglu{width}": partial(SwiGLUFFNSplit, align_to=width) for width in (32, 64, 128)},
}
NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": LayerNorm,
    "layernormbf16": partial(LayerNorm, eps=1e-5),
    "rmsnorm": RMSNorm,
}


class Dinov3VisionTransformer(PackedTransformer):
    """ViT as DINOv3 (arXiv:2508.10104, section 3.2) uses it.

    Args:
        img_size: side in pixels that images usually have; nothing depends on it.
        pos_embed_rope_base, pos_embed_rope_min_period, pos_embed_rope_max_period, pos_embed_rope_normalize_coords,
            pos_embed_rope_shift_coords, pos_embed_rope_jitter_coords, pos_embed_rope_rescale_coords: see
            `RopePositionEmbedding`. Coordinates are augmented in training alone, in each block by draws of its own.
        ffn_ratio, layerscale_init, mask_k_bias, attention_backend, inverse_gather: see `Block`.
        drop_path_rate, drop_path_uniform: as of `DinoVisionTransformer`.
        norm_layer, ffn_layer: one of `NORM_LAYERS` and of `FFN_LAYERS`.
        n_storage_tokens: registers.
        untie_cls_and_patch_norms: class token and registers have a final norm of their own, ``cls_norm``.
        untie_global_and_local_cls_norm: those of every crop size but the first have another one in training,
            ``local_cls_norm``.
    """

    def __init__(
        self,
        img_size: int = 224, patch_size: int = 16, in_chans: int = 3,
        pos_embed_rope_base: float | None = 100.0, pos_embed_rope_min_period: float | None = None,
        pos_embed_rope_max_period: float | None = None, pos_embed_rope_normalize_coords: str = "separate",
        pos_embed_rope_shift_coords: float | None = None, pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        embed_dim: int = 768, depth: int = 12, num_heads: int = 12, ffn_ratio: float = 4.0, qkv_bias: bool = True,
        drop_path_rate: float = 0.0, drop_path_uniform: bool = True, layerscale_init: float | None = 1e-5,
        norm_layer: str = "layernorm", ffn_layer: str = "mlp", ffn_bias: bool = True, proj_bias: bool = True,
        n_storage_tokens: int = 0, mask_k_bias: bool = False, untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        attention_backend: str = "sdpa", inverse_gather: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, known in (("ffn_layer", ffn_layer, FFN_LAYERS), ("norm_layer", norm_layer, NORM_LAYERS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; one of {', '.join(known)} is expected.")
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim = {embed_dim} is not a multiple of four times num_heads = {num_heads}, as rotary positions "
                "need it."
            )
        rope = {
            "base": pos_embed_rope_base, "min_period": pos_embed_rope_min_period,
            "max_period": pos_embed_rope_max_period, "normalize_coords": pos_embed_rope_normalize_coords,
            "shift_coords": pos_embed_rope_shift_coords, "jitter_coords": pos_embed_rope_jitter_coords,
            "rescale_coords": pos_embed_rope_rescale_coords,
        }  # fmt: skip
        self._arguments = {
            "patch_size": patch_size, "in_chans": in_chans,
            **{f"pos_embed_rope_{name}": value for name, value in rope.items()},
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "ffn_ratio": ffn_ratio,
            "qkv_bias": qkv_bias, "layerscale_init": layerscale_init, "norm_layer": norm_layer,
            "ffn_layer": ffn_layer, "ffn_bias": ffn_bias, "proj_bias": proj_bias, "n_storage_tokens": n_storage_tokens,
            "mask_k_bias": mask_k_bias, "untie_cls_and_patch_norms": untie_cls_and_patch_norms,
            "untie_global_and_local_cls_norm": untie_global_and_local_cls_norm,
        }  # fmt: skip
        self.embed_dim = self.num_features = embed_dim
        self.num_heads, self.img_size, self.patch_size, self.n_blocks = num_heads, img_size, patch_size, depth
        self.n_storage_tokens, self.num_prefix_tokens = n_storage_tokens, 1 + n_storage_tokens
        self.attention_backend = attention_backend
        self.untie_global_and_local_cls_norm = self.needs_all_crops = untie_global_and_local_cls_norm
        self.patch_embed = PatchEmbed(img_size // patch_size * patch_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, n_storage_tokens, embed_dim)) if n_storage_tokens else None
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.rope_embed = RopePositionEmbedding(embed_dim // num_heads, **rope)
        norm = NORM_LAYERS[norm_layer]
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim, num_heads=num_heads, mlp_ratio=ffn_ratio, qkv_bias=qkv_bias, proj_bias=proj_bias,
                ffn_bias=ffn_bias, drop_path=rate, init_values=layerscale_init or None,
                ffn_layer=FFN_LAYERS[ffn_layer], attention_backend=attention_backend, inverse_gather=inverse_gather,
                norm_layer=norm, mask_k_bias=mask_k_bias,
            )
            for rate in drop_path_rates(drop_path_rate, drop_path_uniform, depth)
        )  # fmt: skip
        self.norm = norm(embed_dim)
        self.cls_norm = norm(embed_dim) if untie_cls_and_patch_norms else None
        self.local_cls_norm = norm(embed_dim) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw starting weights: normals of deviation 0.02 for the tokens, zeros for the mask token, gains as
        configured, and `draw_weights` in the blocks; set the periods and the masks of the keys' biases."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.storage_tokens is not None:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        draw_weights(self)

    def describe(self) -> dict[str, Any]:
        """As of `Backbone`."""
        return {"arch": "dinov3_vit", "img_size": self.img_size, **self._arguments}

    def layer_of(self, parameter_name: str) -> int:
        """As of `Backbone`; all final norms are of the last layer."""
        return super().layer_of(parameter_name.removeprefix("local_").removeprefix("cls_"))

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        """As of `Backbone`; raises ValueError also where a bias mask of keys was never set."""
        super().check_kernels(dtype, device)
        for name, module in self.named_modules():
            if isinstance(module, KeyMaskedLinear) and not module.bias_mask.isfinite().all():
                raise ValueError(f"{name}.bias_mask is not set; load weights that hold it, or call init_weights().")

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Class token, storage tokens and patches, float32 or better: (B, 1 + R + N, D)."""
        patches = self.masked_patches(x, masks)
        tokens = [token for token in (self.cls_token, self.storage_tokens) if token is not None]
        return torch.cat([*(token.to(patches.dtype).expand(x.shape[0], -1, -1) for token in tokens), patches], dim=1)

    def rotations(self, sizes: Sequence[tuple[int, int]]) -> list[list[Tensor] | None]:
        """As of `PackedTransformer`, from `RopePositionEmbedding`."""
        depth = len(self.blocks)
        if not (self.training and self.rope_embed.is_augmented):
            return [[self.rope_embed(size)[0] for size in sizes]] * depth
        # Of all blocks at once, outside of them: they draw nothing themselves.
        of_sizes = [self.rope_embed(size, self.rope_embed.drawn(depth)) for size in sizes]
        return [[rotations[i] for rotations in of_sizes] for i in range(depth)]

    def final_norms(self, crop: int) -> tuple[nn.Module, nn.Module]:
        """As of `PackedTransformer`."""
        if crop and self.training and self.local_cls_norm is not None:
            return self.local_cls_norm, self.norm
        return self.cls_norm or self.norm, self.norm


_PUBLISHED = {
    "patch_size": 16, "qkv_bias": True, "ffn_bias": True, "proj_bias": True, "ffn_layer": "mlp", "ffn_ratio": 4.0,
    "norm_layer": "layernormbf16", "n_storage_tokens": 4, "mask_k_bias": True, "pos_embed_rope_rescale_coords": 2.0,
}  # fmt: skip


def _vit(embed_dim: int, depth: int, num_heads: int, **differing: Any) -> partial[Dinov3VisionTransformer]:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return partial(Dinov3VisionTransformer, **_PUBLISHED | sizes | differing)


_PLUS = {"ffn_layer": "swiglu", "ffn_ratio": 6.0}

# Meta's names of the published models.
dinov3_vits16 = _vit(384, 12, 6)
dinov3_vits16plus = _vit(384, 12, 6, **_PLUS)
dinov3_vitb16 = _vit(768, 12, 12)
dinov3_vitl16 = _vit(1024, 24, 16)
dinov3_vitl16plus = _vit(1024, 24, 16, **_PLUS)
dinov3_vith16plus = _vit(1280, 32, 20, **_PLUS)
dinov3_vit7b16 = _vit(
    4096, 40, 32, ffn_layer="swiglu64", ffn_ratio=3.0, qkv_bias=False, untie_global_and_local_cls_norm=True
)

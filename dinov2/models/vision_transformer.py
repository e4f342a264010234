"""Vision transformer with registers, several crop sizes in one call, and DINOv2's names."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers import Block, LayerNorm, Mlp, PatchEmbed, SwiGLUFFNFused
from dinov2.layers.attention_backends import require_kernel
from dinov2.layers.linear import draw_weights
from dinov2.layers.norm import at_least_float32
from dinov2.layers.packing import Segments, pack, unpack
from dinov2.layers.stochastic_depth import draw_orders
from dinov2.models.backbone import Backbone

# Tensor dimensions below: B images, C channels, N patches, R registers, T packed rows of all images, D width.

_TOLD = ("patch_size", "num_register_tokens", "interpolate_antialias", "interpolate_offset")
FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": lambda *args, **kwargs: nn.Identity(),
}


class PackedTransformer(Backbone):
    """Transformer of whose blocks the tokens of several crop sizes go through each as one packed matrix.

    A subclass gives `prepare_tokens_with_masks` and sets the attributes; the rest has defaults.
    """

    supports_patch_index: ClassVar[bool] = True
    compiled_methods: ClassVar[tuple[str, ...]] = ("prepare_tokens_with_masks",)
    patch_embed: nn.Module
    mask_token: Tensor  # (1, D)
    norm: nn.Module  # the final one
    num_heads: int
    attention_backend: str

    @abstractmethod
    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Tokens before the first block, float32 or better: class token, registers, patches, (B, 1 + R + N, D)."""

    def masked_patches(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """Embedded patches, the mask token in place of those that are masked, float32 or better: (B, N, D)."""
        patches = at_least_float32(self.patch_embed(x))
        if masks is not None:
            if masks.shape != patches.shape[:2]:
                raise ValueError(f"masks are {tuple(masks.shape)}; {tuple(patches.shape[:2])} is expected.")
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        return patches

    def rotations(self, sizes: Sequence[tuple[int, int]]) -> list[list[Tensor] | None]:
        """Per block, the rotations of queries and keys for grids of these rows and columns, see `Block`; here none."""
        return [None] * len(self.blocks)

    def final_norms(self, crop: int) -> tuple[nn.Module, nn.Module]:
        """Norm of the class token and registers, and that of the patches, of the crop size with this number."""
        return self.norm, self.norm

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Any = None, patch_index: Tensor | None = None
    ) -> Any:
        """As of `Backbone`; several batches go through the blocks in one pass.

        With ``patch_index`` the last block is computed for class tokens and these patches alone.

        Returns:
            Per batch a dict: ``x_norm_clstoken`` (B, D), ``x_norm_regtokens`` (B, R, D), ``x_norm_patchtokens``
            (B, N, D), ``x_prenorm`` (B, 1 + R + N, D), ``masks`` as given.
        """
        if isinstance(x, Tensor):
            return self._forward_crops([x], [masks], patch_index)[0]
        return self._forward_crops(x, masks if masks is not None else [None] * len(x), patch_index)

    def tokens(self, images: Tensor, masks: Tensor | None) -> dict[str, Any]:
        """`forward_features` of one batch."""
        return self._forward_crops([images], [masks])[0]

    def check_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        """As of `Backbone`: the attention backend."""
        width = self.embed_dim // self.num_heads
        require_kernel(self.attention_backend, head_width=width, dtype=dtype, device=device)

    def forward_features_list(self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]) -> list[dict]:
        """Meta's name for `forward_features` of a list."""
        return self._forward_crops(x_list, masks_list)

    def _forward_crops(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patch_index: Tensor | None = None
    ) -> list[dict[str, Any]]:
        x, segments = self._pack(crops, masks)
        rotations = self.rotations([self._grid(crop) for crop in crops])
        selected = None if patch_index is None else self._selected_rows(segments, patch_index)
        orders = None
        if self.training and any(block.drop_path_rate for block in self.blocks):
            # Per segment int64 (2 * depth, B): the images that each branch of each block keeps come first.
            orders = draw_orders(segments, 2 * len(self.blocks), x.device)
        for i, (block, of_patches) in enumerate(zip(self.blocks, rotations, strict=True)):
            of_block = [order[2 * i : 2 * i + 2] for order in orders] if orders else None
            x = block(x, segments, of_block, selected if i == len(self.blocks) - 1 else None, of_patches)
        if selected is not None:
            norms = [self.final_norms(i) for i in range(len(segments))]
            parts = [*(batch for batch, _ in segments), len(patch_index)]
            *class_tokens, patches = _normed(x, parts, [*(norm for norm, _ in norms), norms[0][1]])
            outputs = [{"x_norm_clstoken": tokens} for tokens in class_tokens]
            outputs[0]["x_norm_indexedtokens"] = patches
            return outputs
        prefix = self.num_prefix_tokens
        return [
            {
                "x_norm_clstoken": normed[:, 0],
                "x_norm_regtokens": normed[:, 1:prefix],
                "x_norm_patchtokens": normed[:, prefix:],
                "x_prenorm": prenorm,
                "masks": mask,
            }
            for prenorm, normed, mask in zip(unpack(x, segments), self._all_normed(x, segments), masks, strict=True)
        ]

    def _all_normed(self, x: Tensor, segments: Segments) -> list[Tensor]:
        """Packed rows after the final norms, one (B, N, D) per segment."""
        norms = [self.final_norms(i) for i in range(len(segments))]
        if all(norm is self.norm for pair in norms for norm in pair):
            return unpack(self.norm(x), segments)
        prefix = self.num_prefix_tokens
        return [
            torch.cat([of_prefix(part[:, :prefix]), of_patches(part[:, prefix:])], dim=1)
            for part, (of_prefix, of_patches) in zip(unpack(x, segments), norms, strict=True)
        ]

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def _selected_rows(self, segments: Segments, patch_index: Tensor) -> Tensor:
        """Packed rows of every image's class token, segment by segment, then of the first segment's patches."""
        rows, start = [], 0
        for batch, tokens in segments:
            rows.append(start + tokens * torch.arange(batch, device=patch_index.device))
            start += batch * tokens
        image = patch_index.div(segments[0][1] - self.num_prefix_tokens, rounding_mode="floor")
        return torch.cat([*rows, patch_index + self.num_prefix_tokens * (image + 1)])

    def _pack(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Segments]:
        tokens = [self.prepare_tokens_with_masks(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
        return pack(tokens), tuple((t.shape[0], t.shape[1]) for t in tokens)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        return_extra_tokens: bool = False,
    ) -> tuple:
        """Patch tokens after some of the blocks.

        Args:
            n: how many of the last blocks, or which blocks by number.
            reshape: return maps (B, D, H/p, W/p) in place of (B, N, D).
            return_class_token, return_extra_tokens: give each as a tuple with its class token (B, D), its registers
                (B, R, D) or both.
            norm: apply the final norm.
        """
        depth = len(self.blocks)
        numbers = range(depth - n, depth) if isinstance(n, int) else n
        rows, segments = self._pack([x], [None])
        outputs = []
        for i, (block, rotations) in enumerate(zip(self.blocks, self.rotations([self._grid(x)]), strict=True)):
            rows = block(rows, segments, rotations=rotations)
            if i in numbers:
                outputs.append((self._all_normed if norm else unpack)(rows, segments)[0])
        if len(outputs) != len(numbers):
            raise ValueError(f"n is {n}, but the blocks are numbered 0 to {depth - 1}.")
        prefix = self.num_prefix_tokens
        patches = [out[:, prefix:] for out in outputs]
        if reshape:
            patches = [p.unflatten(1, self._grid(x)).permute(0, 3, 1, 2).contiguous() for p in patches]
        parts = [patches]
        if return_class_token:
            parts.append([out[:, 0] for out in outputs])
        if return_extra_tokens:
            parts.append([out[:, 1:prefix] for out in outputs])
        return tuple(zip(*parts, strict=True)) if len(parts) > 1 else tuple(patches)


class DinoVisionTransformer(PackedTransformer):
    """ViT (Dosovitskiy et al., arXiv:2010.11929) as DINOv2 (arXiv:2304.07193) uses it, with optional registers
    (Darcet et al., arXiv:2309.16588). State-dict keys and constructor keywords are those of Meta's class.

    Args:
        img_size: side in pixels of the images that the position grid is made for.
        drop_path_rate: rate of stochastic depth in the last block, in [0, 1).
        drop_path_uniform: the same rate in every block; else it rises linearly from 0.
        ffn_layer: one of `FFN_LAYERS`.
        block_chunks: accepted for compatibility; blocks are never chunked, and chunked state dicts load.
        interpolate_antialias, interpolate_offset: see `resample_positions`.
        mlp_ratio, init_values, attention_backend, inverse_gather: see `Block`.
    """

    def __init__(
        self,
        img_size: int = 224, patch_size: int = 16, in_chans: int = 3,
        embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
        qkv_bias: bool = True, ffn_bias: bool = True, proj_bias: bool = True,
        drop_path_rate: float = 0.0, drop_path_uniform: bool = False, init_values: float | None = None,
        embed_layer: Callable[..., nn.Module] = PatchEmbed, act_layer: Callable[..., nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = Block, ffn_layer: str = "mlp", block_chunks: int = 0,
        num_register_tokens: int = 0, interpolate_antialias: bool = False, interpolate_offset: float = 0.1,
        attention_backend: str = "sdpa", inverse_gather: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ValueError(f"ffn_layer is {ffn_layer!r}; one of {', '.join(FFN_LAYERS)} is expected.")
        if not 0 <= interpolate_offset < 1:
            raise ValueError(f"interpolate_offset is {interpolate_offset}; a number from 0 to below 1 is expected.")
        self.embed_dim = self.num_features = embed_dim
        self.num_prefix_tokens = 1 + num_register_tokens
        self.attention_backend, self.n_blocks = attention_backend, depth
        self.arch = ""  # name in `dinov2.extensions.BACKBONES`, where the sizes are those of that name
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias, "ffn_bias": ffn_bias}
        self._sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        self._sizes |= {"in_chans": in_chans, "depth": depth}
        self._options = {"ffn_layer": ffn_layer, "init_values": init_values, **biases}
        self.num_heads, self.patch_size, self.num_register_tokens = num_heads, patch_size, num_register_tokens
        self.interpolate_antialias, self.interpolate_offset = interpolate_antialias, interpolate_offset
        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.blocks = nn.ModuleList(
            block_fn(
                dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, **biases, drop_path=rate,
                init_values=init_values or None, act_layer=act_layer, ffn_layer=FFN_LAYERS[ffn_layer],
                attention_backend=attention_backend, inverse_gather=inverse_gather,
            )
            for rate in drop_path_rates(drop_path_rate, drop_path_uniform, depth)
        )  # fmt: skip
        self.norm = LayerNorm(embed_dim)
        self.head = nn.Identity()
        self.init_weights()
        self.register_load_state_dict_pre_hook(_unchunk_blocks)

    def init_weights(self) -> None:
        """Draw starting weights: truncated normals of deviation 0.02 for the position grid, 1e-6 normals for the
        tokens, zeros for the mask token, gains as configured, and `draw_weights` in the blocks."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        draw_weights(self)

    def describe(self) -> dict[str, Any]:
        """As of `Backbone`; the sizes only where no name stands for them."""
        return {
            "arch": self.arch or f"{type(self).__module__}:{type(self).__qualname__}",
            **({} if self.arch else self._sizes),
            **self._options,
            "img_size": math.isqrt(self.pos_embed.shape[1] - 1) * self.patch_size,
            **{name: getattr(self, name) for name in _TOLD},
        }

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Class token, registers and patches with positions, float32 or better: (B, 1 + R + N, D)."""
        height, width = x.shape[-2:]
        patches = self.masked_patches(x, masks)
        dtype = patches.dtype
        tokens = torch.cat([self.cls_token.to(dtype).expand(x.shape[0], -1, -1), patches], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, height, width)
        if self.register_tokens is None:
            return tokens
        registers = self.register_tokens.to(dtype).expand(x.shape[0], -1, -1)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + N, D) for an image of ``height`` x ``width`` px, in the dtype of ``x``."""
        size = (height // self.patch_size, width // self.patch_size)
        pos_embed = self.pos_embed.to(x.dtype)
        return resample_positions(pos_embed, size, self.interpolate_antialias, self.interpolate_offset)


def resample_positions(pos_embed: Tensor, size: tuple[int, int], antialias: bool = True, offset: float = 0.0) -> Tensor:
    """Resample a square position grid bicubically in float32; a grid that has the size already is returned as is.

    Args:
        pos_embed: (1, 1 + N, D), the class token's first; N is a square number.
        size: rows and columns of patches: (1, 1 + rows * columns, D) is returned, in the dtype of ``pos_embed``.
        antialias: low-pass filter when shrinking.
        offset: in [0, 1). The grid is resampled by the factor (side + offset) / sqrt(N), which shifts the sampling
            positions a little, as Meta's models without registers do; 0 resamples to the exact sides.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if size == (side, side):
        return pos_embed
    grid = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = tuple((sides + offset) / side for sides in size)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=antialias)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def drop_path_rates(rate: float, uniform: bool, depth: int) -> list[float]:
    """Rate of stochastic depth of each block: the same, or rising linearly from 0 to it."""
    return [rate * (1 if uniform else i / max(depth - 1, 1)) for i in range(depth)]


def _normed(rows: Tensor, sizes: Sequence[int], norms: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Parts of packed rows, of these sizes, each after its norm."""
    if all(norm is norms[0] for norm in norms):
        return norms[0](rows).split(sizes)
    return [norm(part) for part, norm in zip(rows.split(sizes), norms, strict=True)]


def _unchunk_blocks(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Rename ``blocks.<chunk>.<i>.`` to ``blocks.<i>.`` in place."""
    for key in [key for key in state if key.startswith(f"{prefix}blocks.")]:
        parts = key.removeprefix(f"{prefix}blocks.").split(".")
        if parts[1].isdigit():
            state[f"{prefix}blocks.{'.'.join(parts[1:])}"] = state.pop(key)


def _vit(arch: str, embed_dim: int, depth: int, num_heads: int) -> Callable[..., DinoVisionTransformer]:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}

    def make(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
        kwargs |= {"patch_size": patch_size, "num_register_tokens": num_register_tokens}
        model = DinoVisionTransformer(**sizes | kwargs)
        # One of other sizes (``student.options``) tells them itself.
        model.arch = "" if model._sizes.keys() & kwargs.keys() else arch
        return model

    make.__name__ = make.__qualname__ = arch
    make.__doc__ = f"Build a ViT of width {embed_dim} with {depth} blocks of {num_heads} heads."
    return make


vit_demo = _vit("vit_demo", 128, 4, 4)  # for the demo and tests only
vit_shallow = _vit("vit_shallow", 256, 3, 4)  # texture within minutes of a CPU: width serves it better than depth
vit_tiny = _vit("vit_tiny", 192, 12, 3)  # DeiT's ViT-Ti (arXiv:2012.12877)
vit_small = _vit("vit_small", 384, 12, 6)
vit_base = _vit("vit_base", 768, 12, 12)
vit_large = _vit("vit_large", 1024, 24, 16)
vit_huge = _vit("vit_huge", 1280, 32, 16)  # of Virchow2; UNI-2's is vit_giant2 with 24 blocks
vit_giant2 = _vit("vit_giant2", 1536, 40, 24)  # DINOv2's own ViT-g

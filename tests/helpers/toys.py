"""Small parts of one's own, as a user adds them: a term of the loss with a network in it, a backbone, and a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.configs.fields import key
from dinov2.logging.sinks import Exported, Sink
from dinov2.loss import LossContext, LossTerm, StepOutputs
from dinov2.models import Backbone


class Discriminator(LossTerm):
    """Tells slides of odd and of even hash apart by the student's tokens, with which it is trained."""

    needs = frozenset({"patch_tokens"})

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """As of `LossTerm`, and the size."""

        width: int = key(8, "hidden width", least=1)

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self.net = nn.Sequential(nn.Linear(context.embed_dim, options.width), nn.GELU(), nn.Linear(options.width, 1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, outputs: StepOutputs) -> Tensor:
        self.steps += 1
        tokens = outputs.class_tokens.mean(0) + outputs.patch_tokens.mean((0, 2))
        odd = (outputs.slide_ids % 2).to(tokens.dtype)
        return F.binary_cross_entropy_with_logits(self.net(tokens)[:, 0], odd)


class Patches(Backbone):
    """Patches through a convolution and two residual MLPs; the class token is their mean, weighted by a table."""

    def __init__(self, patch_size: int = 14, width: int = 32) -> None:
        super().__init__()
        self.patch_size, self.embed_dim = patch_size, width
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("weights", torch.linspace(0.5, 1.5, width), persistent=False)

    def describe(self) -> dict[str, Any]:
        arch = f"{Patches.__module__}:{Patches.__name__}"
        return {"arch": arch, "patch_size": self.patch_size, "width": self.embed_dim}

    def tokens(self, images: Tensor, masks: Tensor | None) -> dict[str, Any]:
        x = self.patch_embed(images).flatten(2).mT
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token, x)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        return {"x_norm_clstoken": self.weights * x.mean(1), "x_norm_patchtokens": x}


class Album(Sink):
    """Keeps what it is shown of exports, for all of the process to see."""

    takes_exports = True
    seen: ClassVar[list[Exported]] = []

    def __init__(self, *_: object) -> None:
        self.seen.clear()

    def write(self, record: object) -> None:
        """Pass it over."""

    def export(self, exported: Exported) -> None:
        """Keep it."""
        self.seen.append(exported)

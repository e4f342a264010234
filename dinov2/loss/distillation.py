"""Distillation: the student's tokens predict those of a frozen, published teacher, which needs no heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.configs.fields import key
from dinov2.extensions import BACKBONES
from dinov2.loss.gram import resized_tokens
from dinov2.loss.term import LossContext, StepOutputs, TermWithTeacher

_Colour = tuple[float, float, float]


def distillation_loss(student: Tensor, teacher: Tensor, distance: str = "cosine") -> Tensor:
    """Mean distance of corresponding tokens, 0-d float32.

    With x the student's projected tokens and t the teacher's, of width D and n in number:

        cosine   1/n sum_i ( 1 - x_i.t_i / (|x_i| |t_i|) )
        mse      1/(n D) sum_i |x_i - t_i|^2

    The cosine leaves out how long the teacher's tokens are, of which a few are outliers; AM-RADIO (arXiv:2312.06709)
    takes it for class tokens.

    Args:
        student, teacher: (..., D), any float dtype.
        distance: ``cosine`` or ``mse``.
    """
    student, teacher = student.float(), teacher.float()
    if distance == "mse":
        return F.mse_loss(student, teacher)
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


class Distillation(TermWithTeacher):
    """`distillation_loss` of the global views' class tokens, and of all their patches, each by a linear projection.

    The student sees views masked, the teacher whole. Its patch tokens are resized to the student's grid (bicubic,
    antialiased), so that it may have other patches, widths and depths.
    """

    weights_option: ClassVar[str] = "teacher"
    follows_teacher: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options(TermWithTeacher.Options):
        """The teacher, how it is shown images, and what is learned from it.

        `dinov2.build.networks.with_teachers` fills in what its weights tell.
        """

        teacher: str = key("", "backbone weights: file, folder, hub id (org/name) or URL", is_path=True)
        architecture: Mapping[str, Any] = key({}, "of the teacher, {arch: NAME, ...}; empty: as its weights tell")
        crops_size: int | None = key(None, "side to which it gets global views resized; null: as they are", least=1)
        normalize_mean: _Colour | None = key(None, "of its images; null: as beside its weights, else ImageNet's")
        normalize_std: _Colour | None = key(None, "likewise", above=0)
        distance: Literal["cosine", "mse"] = key("cosine", "of tokens; mse: their lengths count, too")
        class_weight: float = key(1.0, "of the class tokens' loss, in units of weight", least=0)
        patch_weight: float = key(1.0, "of the patches' loss, likewise", least=0)

        def __post_init__(self) -> None:
            if self.is_used and not self.teacher:
                raise ValueError(
                    "there is no teacher; give its weights: a file, a folder, org/name on the hub or a URL"
                )
            if self.is_used and not self.class_weight + self.patch_weight:
                raise ValueError("class_weight = 0 and patch_weight = 0 leave nothing to learn; set one above 0")

        def build(self) -> nn.Module:
            """Build the teacher's backbone on the default device, of a registered name and its arguments.

            ``layer_norm_eps`` among them is set on its layer norms.
            """
            arguments = dict(self.architecture)
            eps = arguments.pop("layer_norm_eps", None)
            backbone = BACKBONES[arguments.pop("arch")](**arguments)
            for module in backbone.modules():
                if eps is not None and isinstance(module, nn.LayerNorm):
                    module.eps = eps
            return backbone

    options: Options

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        with torch.device("meta"):
            teacher = options.build()
        weights = {"class": options.class_weight, "patch": options.patch_weight}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(context.embed_dim, teacher.embed_dim) for name, weight in weights.items() if weight}
        )
        self.needs = frozenset({"patch_tokens"} if options.patch_weight else ())
        # Images of one normalisation are those of the other by this affine map.
        mean, std = options.normalize_mean or context.mean, options.normalize_std or context.std
        self._scale = [ours / theirs for ours, theirs in zip(context.std, std, strict=True)]
        self._shift = [(ours - theirs) / s for ours, theirs, s in zip(context.mean, mean, std, strict=True)]

    def build_teacher(self, teacher: nn.Module) -> nn.Module:
        """As of `TermWithTeacher`."""
        return self.options.build()

    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the global views in the teacher's normalisation and of its size."""
        images, size = batch["global_crops"], self.options.crops_size
        if size not in (None, images.shape[-1]):
            images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)
        if any(self._shift) or set(self._scale) != {1.0}:
            # By channel, with plain numbers: for a tensor of them the step would wait.
            channels = zip(images.unbind(1), self._scale, self._shift, strict=True)
            images = torch.stack([channel * scale + shift for channel, scale, shift in channels], 1)
        return images

    def forward(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return ``distillation_class_loss`` and ``distillation_patch_loss``, those that have a weight."""
        student = {"class": outputs.class_tokens, "patch": outputs.patch_tokens}
        teacher = {"class": outputs.frozen_class_tokens, "patch": outputs.frozen_patch_tokens}
        losses = {}
        for name, projection in self.projections.items():
            # Without a teacher, since the loss has no weight yet, gradients are there all the same, and 0.
            x, t = projection(student[name].float()), teacher[name]
            if t is not None and name == "patch":
                t = resized_tokens(t, x.shape[-2], "bicubic", True)
            losses[f"distillation_{name}_loss"] = (
                0 * x.mean() if t is None else distillation_loss(x, t, self.options.distance)
            )
        return losses

    def weight_of(self, loss: str, epoch: float) -> float:
        """As of `LossTerm`; class tokens and patches have weights of their own beside."""
        o = self.options
        return self.weight_at(epoch) * (o.class_weight if loss == "distillation_class_loss" else o.patch_weight)

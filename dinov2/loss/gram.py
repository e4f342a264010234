"""Gram anchoring: similarities between a student's patches are held to those of a teacher."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.configs.fields import key
from dinov2.configs.schedule import NO_SCHEDULE, Schedule
from dinov2.loss.term import LossContext, LossTerm, StepOutputs, TermWithTeacher

Tokens = Literal["all", "masked", "unmasked"]


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None = None,
    *,
    normalized: bool = True,
    remove_neg: bool = False,
    remove_only_teacher_neg: bool = False,
) -> Tensor:
    """Mean squared difference of the Gram matrices of two sets of patches, 0-d float32 (DINOv3, arXiv:2508.10104).

    With rows x of the student and t of the teacher, scaled to length 1 if ``normalized``:

        L_Gram = mean_{g, i, j} (x_gi . x_gj - t_gi . t_gj)^2

    Args:
        student, teacher: (G, n, D), any float dtype; similarities are taken within each of the G groups.
        counted: bool (G, n), True for the rows whose pairs count; None when all count. 0 where none does.
        normalized: cosines in place of scalar products.
        remove_neg: similarities below 0 are taken as 0.
        remove_only_teacher_neg: those of the teacher are, and the student's where both are below 0.
    """
    student, teacher = student.float(), teacher.float()
    if normalized:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    ours, theirs = student @ student.mT, teacher @ teacher.mT
    if remove_neg:
        ours, theirs = ours.clamp_min(0), theirs.clamp_min(0)
    elif remove_only_teacher_neg:
        ours, theirs = ours.masked_fill((ours < 0) & (theirs < 0), 0), theirs.clamp_min(0)
    squares = (ours - theirs).square()
    if counted is None:
        return squares.mean()
    pairs = counted[:, :, None] & counted[:, None, :]
    return (squares * pairs).sum() / pairs.sum().clamp_min(1)


def resized_tokens(tokens: Tensor, patches: int, method: str, antialias: bool) -> Tensor:
    """Resize square maps of patch tokens (..., N, D) to ``patches`` tokens each, in float32; as they are if equal."""
    if tokens.shape[-2] == patches:
        return tokens
    old, new = math.isqrt(tokens.shape[-2]), math.isqrt(patches)
    maps = tokens.float().mT.flatten(0, -3).unflatten(-1, (old, old))
    maps = F.interpolate(maps, (new, new), mode=method, align_corners=False, antialias=antialias)
    return maps.flatten(-2).mT.unflatten(0, tokens.shape[:-2])


class Gram(TermWithTeacher):
    """`gram_loss` of the student's patches of the global views, which it sees masked, and those of a gram teacher.

    That is the EMA teacher, or a frozen copy of it that follows it in jumps, and sees whole views.
    """

    weights_option: ClassVar[str] = "ckpt"
    follows_teacher: ClassVar[bool] = True
    needs = frozenset({"patch_tokens"})

    @dataclass(frozen=True)
    class Options(LossTerm.Options):
        """DINOv3's keys of its section ``gram``, with its defaults; ``weight`` is its ``loss_weight``.

        Steps are counted from the run's first, 0: the teacher of a step is the one after all replacements up to it.
        """

        use_loss: bool = key(True, "false leaves the term out")
        ema_teacher: bool = key(False, "true: the EMA teacher is the gram teacher; false: a frozen copy")
        ckpt: str = key("", "backbone weights that the copy starts from; empty: none")
        it_load_ema_teacher: int = key(-1, "step before which the copy is first taken; -1: only from ckpt", least=-1)
        rep_update: bool = key(True, "whether the copy is taken anew later")
        update_frequency: int = key(50000, "steps between, at its multiples", least=1)
        it_first_update: int = key(0, "not before this step", least=0)
        max_updates: int | None = key(None, "at most so often; null: without end", least=0)
        normalized: bool = key(True, "cosines in place of scalar products")
        img_level: bool = key(False, "true: pairs of patches of one view; false: of all views of the process")
        remove_neg: bool = key(False, "negative similarities count as 0")
        remove_only_teacher_neg: bool = key(False, "those of the teacher, and the student's where both are negative")
        tokens_used: Tokens = key("all", "patches by the student's masks")
        compute_stats: bool = key(False, "true: records tell the loss of masked and of unmasked patches")
        global_teacher_resize_method: Literal["bicubic", "bilinear"] = key("bicubic", "of maps of larger crops")
        global_teacher_resize_antialias: bool = key(False, "antialias in that")
        loss_weight_schedule: Schedule = NO_SCHEDULE  # in the weight's place

        def __post_init__(self) -> None:
            for fault in self._faults() if self.is_used else ():
                raise ValueError(fault)

        @property
        def is_used(self) -> bool:
            """Whether the term is added."""
            return self.use_loss and (self.weight > 0 or self.loss_weight_schedule.is_given)

        def _faults(self) -> list[str]:
            schedule, ramp = self.loss_weight_schedule, self.ramp_epochs
            has_teacher = self.ema_teacher or self.ckpt or self.it_load_ema_teacher >= 0
            faults = {
                "there is no gram teacher; give ema_teacher: true, a file as ckpt, or it_load_ema_teacher of 0 or "
                "more": not has_teacher,
                f"ema_teacher = true and ckpt = {self.ckpt!r} are two gram teachers; give one": (
                    self.ema_teacher and self.ckpt
                ),
                "remove_neg = true and remove_only_teacher_neg = true exclude each other; set one to false": (
                    self.remove_neg and self.remove_only_teacher_neg
                ),
                f"img_level = true takes all patches of a view, but tokens_used = {self.tokens_used}; set all, or "
                "img_level to false": self.img_level and self.tokens_used != "all",
                f"ramp_epochs = {list(ramp)} and loss_weight_schedule both set the weight's course; leave one out": (
                    schedule.is_given and any(ramp)
                ),
            }
            return [fault for fault, is_so in faults.items() if is_so]

    options: Options

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        self._epochs = context.epochs

    @property
    def has_teacher(self) -> bool:
        """As of `TermWithTeacher`; the EMA teacher is no further network."""
        return not self.options.ema_teacher

    def build_teacher(self, teacher: nn.Module) -> nn.Module:
        """Return a copy of the EMA teacher's backbone."""
        return copy.deepcopy(teacher)

    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """Return its own views of the global crops' boxes, where there are such."""
        return batch.get("gram_crops", batch["global_crops"])

    def exists(self, step: int) -> bool:
        """As of `TermWithTeacher`."""
        start = self.options.it_load_ema_teacher
        return bool(self.options.ckpt) or 0 <= start <= step

    def is_replaced(self, step: int) -> bool:
        """As of `TermWithTeacher`, by DINOv3's keys."""
        o = self.options
        if step == o.it_load_ema_teacher:
            return True
        # What was taken before the start would be overwritten there, and step 0 has nothing new.
        first = max(o.it_first_update, o.it_load_ema_teacher + 1, 1)
        if not o.rep_update or step < first or step % o.update_frequency:
            return False
        earlier = step // o.update_frequency - -(-first // o.update_frequency)
        return o.max_updates is None or earlier < o.max_updates

    def forward(self, outputs: StepOutputs) -> Tensor:
        """Return the loss; 0 without gradients while there is no gram teacher."""
        return self._loss(outputs, self.options.tokens_used, self.options.img_level)

    def figures(self, outputs: StepOutputs) -> Mapping[str, Tensor]:
        """Return the losses over the process's masked and unmasked patches, where ``compute_stats`` asks for them."""
        if not self.options.compute_stats:
            return {}
        with torch.no_grad():
            return {f"health/gram_{name}": self._loss(outputs, name, False) for name in ("masked", "unmasked")}

    def weight_at(self, epoch: float) -> float:
        """Return the factor of the loss, by the schedule where one is given."""
        schedule = self.options.loss_weight_schedule
        return schedule.at(epoch, self._epochs) if schedule.is_given else super().weight_at(epoch)

    def _loss(self, outputs: StepOutputs, tokens: Tokens, by_view: bool) -> Tensor:
        o, student = self.options, outputs.patch_tokens
        teacher = outputs.teacher_patch_tokens if o.ema_teacher else outputs.frozen_patch_tokens
        if teacher is None:
            return student.new_zeros((), dtype=torch.float32)
        method = o.global_teacher_resize_method, o.global_teacher_resize_antialias
        teacher = resized_tokens(teacher, student.shape[2], *method)
        student, teacher, masks = student.flatten(0, 1), teacher.flatten(0, 1), outputs.masks
        if not by_view:
            student, teacher, masks = (rows.flatten(0, 1)[None] for rows in (student, teacher, masks))
        if tokens == "masked" and len(outputs.mask_indices) < masks.numel():
            # The index is padded to a length that is known, so that no number of patches is waited for.
            student, teacher = (rows.index_select(1, outputs.mask_indices) for rows in (student, teacher))
            masks = (outputs.mask_weight > 0)[None]
        counted = {"all": None, "masked": masks, "unmasked": ~masks}[tokens]
        negatives = {"remove_neg": o.remove_neg, "remove_only_teacher_neg": o.remove_only_teacher_neg}
        return gram_loss(student, teacher, counted, normalized=o.normalized, **negatives)

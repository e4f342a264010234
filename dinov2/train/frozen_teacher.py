"""Frozen teachers of terms of the loss: backbones that are never trained, fixed or replaced in jumps."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.fsdp import reshard
from dinov2.loss.term import TermWithTeacher
from dinov2.train.update.weight_update import local_shard, refresh

logger = logging.getLogger("dinov2")


class FrozenTeacher(nn.Module):
    """The ``backbone`` of a term's frozen teacher.

    When the EMA teacher takes its place is a function of the step alone, so that a resumed run goes on as one that was
    not interrupted.

    Args:
        name: of the term.
        term: whose teacher it is; it stays a part of the objective, not of this module.
        teacher: the EMA teacher's backbone, whole.
    """

    def __init__(self, name: str, term: TermWithTeacher, teacher: nn.Module) -> None:
        super().__init__()
        self.name, self._term = name, (term,)  # in a tuple, so that it is not registered here
        self.backbone = term.build_teacher(teacher).requires_grad_(False)
        # Whether it runs: it exists, and the weight of the loss is above 0.
        self.is_active = True
        self.low_precision: Sequence[tuple[Tensor, Tensor]] = ()  # its weights and their 16-bit ones

    @property
    def term(self) -> TermWithTeacher:
        """The term whose teacher it is."""
        return self._term[0]

    @property
    def weights(self) -> str:
        """Path, id on the hub or URL of the weights that it starts from, or an empty text."""
        return getattr(self.term.options, self.term.weights_option)

    @torch.no_grad()
    def begin(self, step: int, epoch: float, teacher: nn.Module) -> None:
        """Make ready for a step, with the ``teacher``'s backbone as it is before it; communicates nothing."""
        reshard(self.backbone)
        if self.term.is_replaced(step):
            logger.info("The frozen teacher of losses.%s is the EMA teacher after %d steps.", self.name, step)
            reshard(teacher)
            ours, theirs = self.backbone.state_dict(), teacher.state_dict()
            for name, tensor in ours.items():
                local_shard(tensor).copy_(local_shard(theirs[name]))
            refresh(self.low_precision)
        self.is_active = self.term.exists(step) and self.term.weight_at(epoch) > 0

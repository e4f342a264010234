"""The frozen teacher of Gram anchoring: a snapshot of the EMA teacher's backbone, replaced by a schedule of steps."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.fsdp import reshard
from dinov2.loss.gram import Gram
from dinov2.train.update.weight_update import local_shard, refresh

logger = logging.getLogger("dinov2")


class GramTeacher(nn.Module):
    """A backbone that is never trained and follows the teacher's in jumps.

    When it jumps is a function of the step alone, so that a resumed run goes on as one that was not interrupted.

    Args:
        backbone: the teacher's, whole, of which a copy is made.
        options: of the term; ``ckpt``, ``it_load_ema_teacher``, ``rep_update``, ``update_frequency``,
            ``it_first_update`` and ``max_updates`` are read.
    """

    def __init__(self, backbone: nn.Module, options: Gram.Options) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.options = options
        # Whether it runs: it exists, and the weight of the loss is above 0.
        self.is_active = True
        self.low_precision: Sequence[tuple[Tensor, Tensor]] = ()  # its weights and their 16-bit ones

    def exists(self, step: int) -> bool:
        """Whether there is a teacher at a zero-based step."""
        start = self.options.it_load_ema_teacher
        return bool(self.options.ckpt) or 0 <= start <= step

    def is_replaced(self, step: int) -> bool:
        """Whether the present teacher takes its place before a step, after ``step`` completed ones."""
        o = self.options
        if step == o.it_load_ema_teacher:
            return True
        # What was taken before the start would be overwritten there, and step 0 has nothing new.
        first = max(o.it_first_update, o.it_load_ema_teacher + 1, 1)
        if not o.rep_update or step < first or step % o.update_frequency:
            return False
        earlier = step // o.update_frequency - -(-first // o.update_frequency)
        return o.max_updates is None or earlier < o.max_updates

    @torch.no_grad()
    def begin(self, step: int, weight: float, teacher: nn.Module) -> None:
        """Make ready for a step, with the ``teacher``'s backbone as it is before it; communicates nothing."""
        reshard(self.backbone)
        if self.is_replaced(step):
            logger.info("The gram teacher is the EMA teacher after %d steps.", step)
            reshard(teacher)
            ours, theirs = self.backbone.state_dict(), teacher.state_dict()
            for name, tensor in ours.items():
                local_shard(tensor).copy_(local_shard(theirs[name]))
            refresh(self.low_precision)
        self.is_active = self.exists(step) and weight > 0

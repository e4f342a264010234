"""A term of the objective: what it is told of a step, and how the configured ones are built."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, nn

from dinov2.configs.fields import key
from dinov2.extensions import BUILT_IN_LOSSES, LOSSES
from dinov2.loss.prototype_kernels import PrototypeKernels
from dinov2.loss.sinkhorn import Assignments

# Tensor dimensions below: V = 2 global views, L local views, B images of this rank, N patches of a global view, M
# rows of masked patches with padding, D width, K prototypes.


@dataclass(frozen=True)
class StepOutputs:
    """Outputs of student and teacher for one micro-batch of this rank; tensors on the device, views outermost.

    What comes from the student carries gradients, what comes from the teacher none.
    """

    class_tokens: Tensor  # (V, B, D) student's class tokens of the global views, whose patches are partly masked
    teacher_class_tokens: Tensor  # (V, B, D) teacher's, of the whole views
    class_logits: Tensor  # (V + L, B, K) student's, of the global views, then of the local ones
    class_targets: Tensor  # (V, B, K) probabilities by the teacher
    patch_logits: Tensor  # (M, K') student's, of the masked patches
    patch_targets: Tensor | Assignments  # (M, K') probabilities by the teacher, written out or as factors
    masks: Tensor  # bool (V B, N), True where a patch is masked; view-major
    mask_indices: Tensor  # int64 (M,) into the V B N patches, 0 on padding
    mask_weight: Tensor  # (M,) 1 over the masked patches of that crop, 0 on padding
    teacher_temp: float  # temperature of the targets
    kernels: PrototypeKernels  # passes over prototype logits
    patch_tokens: Tensor | None = None  # (V, B, N, D) student's, where a term needs them (`LossTerm.needs`)
    teacher_patch_tokens: Tensor | None = None  # (V, B, N, D) teacher's, likewise
    # Of the term's own frozen teacher (`TermWithTeacher`), of N' patches and width D'; None where it has none, or off.
    frozen_class_tokens: Tensor | None = None  # (V, B, D')
    frozen_patch_tokens: Tensor | None = None  # (V, B, N', D')
    slides: Sequence[str] = ()  # name of each image's slide, B of them; empty where the batch does not say
    slide_ids: Tensor | None = None  # int64 (B,), a hash of each; None where the batch does not say
    indices: Tensor | None = None  # int64 (B,), sample indices on the run's axis; None where the batch does not say


@dataclass(frozen=True)
class LossContext:
    """Sizes that a term may build its modules by."""

    embed_dim: int  # D
    class_prototypes: int  # K of the class tokens' head
    patch_prototypes: int  # K' of the patches' head
    epochs: float = math.inf  # that the schedules span
    mean: Sequence[float] = (0.0, 0.0, 0.0)  # of the images' normalisation, per channel
    std: Sequence[float] = (1.0, 1.0, 1.0)


class LossTerm(nn.Module):
    """One term: called with the `StepOutputs` of a batch, on every rank; it must not wait for the device.

    Of a step of several micro-batches (``optim.accumulation_steps``) it is called once for each, sees that one alone,
    and the mean of its values is the step's.

    Its trainable parameters, if any, are treated as a head's: float32, sharded, gradients averaged over ranks, clipped
    by their own norm (metric ``grad_norm_<name>``), decayed and scheduled with the rest, saved and restored. Buffers
    of the state dict are saved as rank 0 has them.
    """

    # Optional fields of `StepOutputs` that are to be filled: ``patch_tokens`` brings those of student and teacher, at
    # the cost of computing the last block for all tokens.
    needs: frozenset[str] = frozenset()
    meta_keys: ClassVar[Mapping[str, str]] = {}  # of a built-in term: options, and Meta's keys that set them

    @dataclass(frozen=True)
    class Options:
        """Keys of the term's section; those of a subclass extend these."""

        weight: float = key(1.0, "weight in the total loss; 0 leaves the term out", least=0)
        _: KW_ONLY  # so that the keys of a subclass come second
        ramp_epochs: tuple[float, float] = key((0.0, 0.0), "the weight rises from 0 between these epochs", least=0)

        @property
        def is_used(self) -> bool:
            """Whether the term is added."""
            return self.weight > 0

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__()
        self.options = options

    def forward(self, outputs: StepOutputs) -> Tensor | dict[str, Tensor]:
        """Return a 0-d float32, logged as ``<name>_loss``, or several by the names that they are logged under.

        Their mean over ranks is the loss of the joined batch.
        """
        raise NotImplementedError

    def chance(self, outputs: StepOutputs) -> Mapping[str, Tensor | float]:
        """Return what losses of `forward` would be if the student told nothing apart, by the names they are logged by.

        Losses that are left out, by default all, are logged as they are; the others also as fractions of chance.
        """
        return {}

    def figures(self, outputs: StepOutputs) -> Mapping[str, Tensor]:
        """Return what is logged beside the losses, 0-d, of steps with a record; its mean over ranks is taken."""
        return {}

    def weight_of(self, loss: str, epoch: float) -> float:
        """Return the factor in the total of one of the losses of `forward`, by the name that it is logged under."""
        return self.weight_at(epoch)

    def weight_at(self, epoch: float) -> float:
        """Return the factor of the losses in the total, ``options.weight`` after the ramp; epochs may be fractional."""
        start, end = self.options.ramp_epochs
        if epoch >= end:
            return self.options.weight
        return self.options.weight * (epoch - start) / (end - start) if epoch > start else 0.0


class TermWithTeacher(LossTerm):
    """A term with a frozen teacher of its own, a backbone that `dinov2.train.frozen_teacher` holds and runs.

    It costs a further network and its forward pass; its tokens are in ``outputs.frozen_*`` when the term is called.
    """

    weights_option: ClassVar[str]  # option that names its weights, or is empty
    # Whether it is a copy of the EMA teacher's backbone: it then begins as that, may be replaced by it, and is saved
    # with each checkpoint. Others are always loaded from their weights; their options are those of
    # `dinov2.loss.distillation.Distillation`, and perhaps more.
    follows_teacher: ClassVar[bool]

    @property
    def has_teacher(self) -> bool:
        """Whether these options ask for one."""
        return True

    def build_teacher(self, teacher: nn.Module) -> nn.Module:
        """Build it on the default device; ``teacher`` is the EMA teacher's backbone, whole."""
        raise NotImplementedError

    def images(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what it sees of a batch: (V B, 3, S, S), view-major."""
        return batch["global_crops"]

    def exists(self, step: int) -> bool:
        """Return whether there is a teacher at a zero-based step; a function of the step alone, as `is_replaced`."""
        return True

    def is_replaced(self, step: int) -> bool:
        """Return whether the EMA teacher of after ``step`` completed steps takes its place before the next one."""
        return False


def build_terms(config: Any, context: LossContext) -> nn.ModuleDict:
    """Build the terms of the configuration that are used, whose weight is above 0, by name, on the default device.

    Sections ``dino`` and ``ibot`` of a `dinov2.configs.Config` set the built-in terms, ``losses`` names others.
    Raises ValueError if that names a built-in term, or a name twice.
    """
    terms = {}
    for name in BUILT_IN_LOSSES:
        options = {option: attrgetter(key)(config) for option, key in LOSSES[name].meta_keys.items()}
        terms[name] = LOSSES[name], LOSSES[name].Options(**options)
    for name, options in config.losses.items():
        label = name.rpartition(":")[2]
        if label in terms:
            raise ValueError(
                f"losses.{name} names the term {label!r} again; {', '.join(BUILT_IN_LOSSES)} are configured by "
                "sections dino and ibot, and each further term stands once."
            )
        terms[label] = LOSSES[name], options
    built = {name: term(options, context) for name, (term, options) in terms.items() if options.is_used}
    return nn.ModuleDict(built)

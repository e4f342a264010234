"""Teacher targets as the factors that Sinkhorn-Knopp ends with."""

from dataclasses import dataclass

from torch import Tensor

from dinov2.loss.prototype_kernels import scaled_exp


@dataclass(frozen=True)
class Assignments:
    """The matrix P_nk = v_n exp((l_nk - max_n) / T) u_k, not written out.

    `soft_cross_entropy` takes it as it is: one more pass over 16-bit logits instead of a float32 matrix.

    Attributes:
        logits: (N, K) teacher outputs l, any float dtype.
        row_max: (N,) each row's largest logit, float32 (float64 for float64 logits), as all that follow.
        u: (K,) scaling of the prototypes.
        v: (N,) scaling of the rows.
        inverse_temp: 0-d, 1 / T.
    """

    logits: Tensor
    row_max: Tensor
    u: Tensor
    v: Tensor
    inverse_temp: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five, as a target of the prototype kernels."""
        return self.logits, self.row_max, self.u, self.v, self.inverse_temp

    def probs(self) -> Tensor:
        """Write P out: (N, K), float32 (float64 for float64 logits), without a gradient."""
        return (
            scaled_exp(self.logits.detach(), self.row_max, self.inverse_temp)
            .mul_(self.u)
            .mul_(self.v[:, None])
        )

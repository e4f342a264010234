"""Teacher targets as the factors that Sinkhorn-Knopp ends with."""

from dataclasses import dataclass

from torch import Tensor

from dinov2.loss.prototype_kernels import shifted_exp


@dataclass(frozen=True)
class Assignments:
    """The matrix P_nk = v_n exp((l_nk - c_k - r_n) / T) u_k, not written out.

    `soft_cross_entropy` takes it as it is: one more pass over 16-bit logits instead of a float32 matrix.

    Attributes:
        logits: (N, K) teacher outputs l, any float dtype.
        row_shift: (N,) r, float32 (float64 for float64 logits), as all that follow.
        column_shift: (K,) c.
        u: (K,) scaling of the prototypes.
        v: (N,) scaling of the rows.
        inverse_temp: 0-d, 1 / T.
    """

    logits: Tensor
    row_shift: Tensor
    column_shift: Tensor
    u: Tensor
    v: Tensor
    inverse_temp: Tensor

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """All six, as a target of the prototype kernels."""
        return self.logits, self.row_shift, self.column_shift, self.u, self.v, self.inverse_temp

    def probs(self) -> Tensor:
        """Write P out: (N, K), float32 (float64 for float64 logits), without a gradient."""
        shifts = self.row_shift, self.column_shift
        kernel = shifted_exp(self.logits.detach(), *shifts, self.inverse_temp)
        return kernel.mul_(self.u).mul_(self.v[:, None])

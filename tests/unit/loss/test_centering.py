"""Teacher centering: DINO's running mean, and what it leaves out."""

import pytest
import torch

from dinov2.loss import DINOLoss, iBOTPatchLoss


@pytest.mark.parametrize(("loss", "shape"), [(DINOLoss(5), (1, 5)), (iBOTPatchLoss(5), (1, 1, 5))])
def test_centre_is_a_zero_buffer_of_the_public_shape(loss, shape):
    assert {key: tuple(value.shape) for key, value in loss.state_dict().items()} == {"center": shape}
    assert not loss.center.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_loss", [DINOLoss, iBOTPatchLoss])
def test_centre_follows_the_batch_mean(make_loss, dtype):
    loss = make_loss(5, center_momentum=0.8)
    centre = torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        teacher = torch.randn(6, 5).to(dtype)
        targets = loss.softmax_center_teacher(teacher, 0.05)
        expected = ((teacher.double() - centre) / 0.05).softmax(-1)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-7)
        loss.update_center(teacher)
        centre = 0.8 * centre + 0.2 * teacher.double().mean(0)
    torch.testing.assert_close(loss.center.double().flatten(), centre, rtol=1e-6, atol=1e-7)


def test_padded_rows_do_not_move_the_centre():
    padded, plain = iBOTPatchLoss(5), iBOTPatchLoss(5)
    teacher = torch.randn(8, 5)
    padded.update_center(teacher, row_weight=torch.arange(8) < 6)
    plain.update_center(teacher[None, :6])
    torch.testing.assert_close(padded.center, plain.center)
    before = padded.center.clone()
    padded.update_center(teacher, row_weight=torch.zeros(8))
    assert torch.equal(padded.center, before)

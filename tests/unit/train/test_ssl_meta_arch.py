"""One step up to the loss against a slow float64 reference; the teacher; DINOv2's public interface."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dinov2.configs import Config, load_config
from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
from dinov2.train.run import build_arch
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.helpers.batches import random_batch
from tests.helpers.runs import TINY
from tests.helpers.step_reference import step_losses

# Unequal weights, so that no term can stand in for another.
WEIGHTS = (
    "dino.loss_weight=0.7",
    "ibot.loss_weight=1.3",
    "dino.kde_loss_weight=0.25",
    "dino.koleo_loss_weight=0.4",
)
TEMP = 0.05


def config_of(*overrides: str) -> Config:
    return load_config(None, [*TINY, "student.drop_path_rate=0", *WEIGHTS, *overrides])


def perturbed_arch(config: Config) -> SSLMetaArch:
    """Student and teacher apart from each other and from their special starting values, in training mode."""
    arch = SSLMetaArch(config)
    with torch.no_grad():
        for parameter in arch.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return arch.train()


def in_double(batch: dict) -> dict:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("ibot.separate_head=false",),
        ("train.centering=centering",),
        ("train.centering=centering", "ibot.separate_head=false"),
        ("crops.local_crops_number=0",),
        ("crops.local_crops_number=8",),
        ("dino.kde_reference_sign=true",),
        ("ibot.mask_ratio_min_max=[0.05,0.9]", "ibot.mask_sample_probability=1.0"),
    ],
    ids=["recipe", "shared-head", "centering", "centering-shared-head", "no-locals", "8-locals", "reference-sign",
         "all-masked"],
)  # fmt: skip
def test_losses_centres_and_gradients_equal_the_slow_reference(overrides: tuple[str, ...]):
    config = config_of(*overrides)
    arch = perturbed_arch(config).double()
    centers = tuple(
        torch.zeros(loss.center.shape[-1], dtype=torch.float64) for loss in (arch.dino_loss, arch.ibot_patch_loss)
    )
    parameters = dict(arch.student.named_parameters())
    for step in range(2):  # the second one with centres that have moved
        batch = in_double(random_batch(config, images=4, first_index=4 * step))
        expected, centers = step_losses(arch, batch, TEMP, centers)
        losses = arch.compute_losses(batch, TEMP)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            # Only the DINO terms are float64 throughout: the masks' weights come in float32, and KDE and
            # KoLeo are handed over in it.
            rtol = 1e-10 if name.startswith("dino") else 2e-7
            torch.testing.assert_close(losses[name].double(), value, rtol=rtol, atol=0, msg=name)
        if config.train.centering == "centering":
            for loss, center in zip((arch.dino_loss, arch.ibot_patch_loss), centers, strict=True):
                torch.testing.assert_close(loss.center.flatten(), center, rtol=1e-10, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(total, list(parameters.values()))
        for total in (losses["total_loss"], expected["total_loss"])
    )
    for name, gradient, reference in zip(parameters, found, wanted, strict=True):
        error = (gradient - reference).norm() / reference.norm()
        assert error < 1e-6, (name, error)


@pytest.mark.parametrize(
    ("section", "left_out"),
    [
        ("dino.loss_weight", {"dino_local_crops_loss", "dino_global_crops_loss"}),
        ("ibot.loss_weight", {"ibot_loss"}),
        ("dino.kde_loss_weight", {"kde_loss"}),
        ("dino.koleo_loss_weight", {"koleo_loss"}),
    ],
)
def test_a_term_of_weight_zero_is_left_out(section: str, left_out: set[str]):
    batch = random_batch(config_of(), images=4)
    everything, others = (
        SSLMetaArch(config).compute_losses(batch, TEMP).keys() for config in (config_of(), config_of(f"{section}=0"))
    )
    assert everything - others == left_out


def test_padding_counts_for_nothing():
    """A longer static index with weight 0 changes neither losses nor centres."""
    config = config_of("train.centering=centering")
    arch = perturbed_arch(config).double()
    batch = in_double(random_batch(arch.cfg, images=4))
    longer = batch | {
        "mask_indices": torch.cat([batch["mask_indices"], torch.zeros(9, dtype=torch.int64)]),
        "mask_weight": torch.cat([batch["mask_weight"], torch.zeros(9, dtype=torch.float64)]),
    }
    seen = []
    for padded in (batch, longer):
        arch.dino_loss.center.zero_()
        arch.ibot_patch_loss.center.zero_()
        losses = arch.compute_losses(padded, TEMP)
        seen.append({**losses, "center": arch.ibot_patch_loss.center.clone()})
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-14)


def meta_config() -> dict:
    """A run as DINOv2 writes it: nested sections, its key names and nothing of ours."""
    precision = {"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}}
    networks = {
        network: {module: precision for module in ("backbone", "dino_head", "ibot_head")}
        for network in ("student", "teacher")
    }
    head = {"head_n_prototypes": 24, "head_bottleneck_dim": 16, "head_nlayers": 3, "head_hidden_dim": 32}
    return {
        "MODEL": {"WEIGHTS": ""},
        "compute_precision": {"grad_scaler": True, **networks},
        "dino": {"loss_weight": 1.0, "koleo_loss_weight": 0.1, **head},
        "ibot": {"loss_weight": 1.0, "separate_head": True, "mask_ratio_min_max": [0.1, 0.5], **head},
        "train": {"batch_size_per_gpu": 4, "centering": "sinkhorn_knopp"},
        "student": {"arch": "vit_demo", "patch_size": 14, "drop_path_rate": 0.0, "layerscale": 1e-5,
                    "num_register_tokens": 4, "block_chunks": 0},
        "teacher": {"momentum_teacher": 0.992, "teacher_temp": 0.07},
        "crops": {"global_crops_size": 56, "local_crops_size": 28, "local_crops_number": 3},
    }  # fmt: skip


def meta_batch() -> dict:
    """What DINOv2's data pipeline hands to ``forward_backward``."""
    augment = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 56, 28)
    images = np.random.default_rng(0).integers(0, 256, (4, 80, 80, 3), dtype=np.uint8)
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        dtype=torch.float32,
        n_tokens=16,
        mask_generator=MaskingGenerator((4, 4), max_num_patches=8),
    )
    return collate([(augment(image), None) for image in images])


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_public_interface_trains_on_the_public_data_pipeline(wrap):
    torch.manual_seed(0)
    arch = SSLMetaArch(wrap(meta_config())).train()
    images = meta_batch()
    losses = arch.forward_backward(images, teacher_temp=0.07)
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = {name: p.grad.clone() for name, p in arch.student.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    # Weights from the masks themselves, not from the collated ones.
    counts = images["collated_masks"].sum(1)
    rows = images["collated_masks"].nonzero()
    batch = {
        "global_crops": images["collated_global_crops"],
        "local_crops": images["collated_local_crops"],
        "masks": images["collated_masks"],
        "mask_indices": rows[:, 0] * 16 + rows[:, 1],
        "mask_weight": 1 / counts[rows[:, 0]],
    }
    arch.zero_grad()
    again = arch.compute_losses(batch, 0.07)
    again["total_loss"].backward()
    assert again.keys() == losses.keys()
    assert all(torch.equal(again[name], losses[name]) for name in losses)
    for name, parameter in arch.student.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
    assert all(parameter.grad is None for parameter in arch.teacher.parameters())


def test_gradients_accumulate_over_calls():
    torch.manual_seed(0)
    arch, images = SSLMetaArch(meta_config()).train(), meta_batch()
    arch.forward_backward(images, teacher_temp=0.07)
    once = arch.student.backbone.cls_token.grad.clone()
    arch.forward_backward(images, teacher_temp=0.07)
    torch.testing.assert_close(arch.student.backbone.cls_token.grad, 2 * once)


@pytest.mark.parametrize("separate", [True, False])
def test_state_dict_keys_are_metas(separate: bool):
    config = meta_config()
    config["ibot"]["separate_head"] = separate
    arch = SSLMetaArch(config)
    head = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    head += ["last_layer.weight_g", "last_layer.weight_v"]
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
             "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
             "mlp.fc2.bias", "ls2.gamma"]  # fmt: skip
    backbone = ["cls_token", "register_tokens", "mask_token", "pos_embed", "patch_embed.proj.weight",
                "patch_embed.proj.bias", "norm.weight", "norm.bias"]  # fmt: skip
    backbone += [f"blocks.{i}.{name}" for i in range(4) for name in block]
    network = [f"backbone.{name}" for name in backbone] + [f"dino_head.{name}" for name in head]
    network += [f"ibot_head.{name}" for name in head] if separate else []
    expected = {f"{owner}.{name}" for owner in ("student", "teacher") for name in network}
    assert arch.state_dict().keys() == expected | {"dino_loss.center", "ibot_patch_loss.center"}
    shape = arch.state_dict()["teacher.dino_head.last_layer.weight_g"].shape
    assert shape == (24, 1)


def copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.994, 0.99999, 1.0])
@pytest.mark.parametrize("all_finite", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_teacher_follows_by_the_moving_average(momentum: float, all_finite: float | Tensor):
    arch = perturbed_arch(config_of())
    teacher, student = copies(arch.teacher), copies(arch.student)
    arch.update_teacher(momentum, all_finite)
    for name, parameter in arch.teacher.named_parameters():
        expected = momentum * teacher[name].double() + (1 - momentum) * student[name].double()
        torch.testing.assert_close(parameter.double(), expected, rtol=2e-7, atol=2e-8)
        if momentum == 1.0:
            assert torch.equal(parameter, teacher[name])
    assert all(torch.equal(p, student[name]) for name, p in arch.student.named_parameters())


def test_a_bad_step_leaves_the_teacher_bit_identical():
    arch = perturbed_arch(config_of())
    teacher = copies(arch.teacher)
    arch.update_teacher(0.5, torch.tensor(0.0))
    assert all(torch.equal(p, teacher[name]) for name, p in arch.teacher.named_parameters())


def test_teacher_starts_as_the_student_and_is_never_trained():
    arch = SSLMetaArch(config_of("student.drop_path_rate=0.3"))
    for (name, student), teacher in zip(arch.student.named_parameters(), arch.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher), name
        assert student.data_ptr() != teacher.data_ptr()
        assert student.requires_grad and not teacher.requires_grad
    for module in (arch.train(), arch.eval(), arch.train(True)):
        assert not any(part.training for part in module.teacher.modules())
    assert all(part.training for part in arch.student.modules())
    assert all(block.drop_path_rate == 0 for block in arch.teacher.backbone.blocks)
    teacher_parameters = {id(p) for p in arch.teacher.parameters()}
    grouped = [p for group in arch.get_params_groups() for p in group["params"]]
    assert not teacher_parameters & {id(p) for p in grouped}


def test_one_process_prepares_by_a_plain_move():
    arch = SSLMetaArch(config_of())
    before = {name: (id(p), p.detach().clone()) for name, p in arch.named_parameters()}
    arch.prepare_for_distributed_training(torch.device("cpu"))
    after = dict(arch.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert type(parameter) is nn.Parameter
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


def test_only_the_last_blocks_train_when_the_rest_is_frozen():
    arch = build_arch(config_of("train.unfreeze_last_n_blocks=1"), torch.device("cpu"), from_checkpoint=False)
    arch.compute_losses(random_batch(arch.cfg, images=4), TEMP)["total_loss"].backward()
    trained = {name for name, p in arch.student.backbone.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith(("blocks.3.", "norm.")) for name in trained)
    with pytest.raises(ValueError, match="unfreeze_last_n_blocks = 5 exceeds the 4 blocks"):
        arch.freeze_all_but_last_blocks(5)

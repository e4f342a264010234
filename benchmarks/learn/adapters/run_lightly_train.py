"""Train with lightly-train's DINOv2 as its package has it: losses, augmentation, optimiser and schedules are its own.

Ours are network, batch, crops and the size of the heads. Its schedules are told in steps of a run of 125,000, and
shrink here with the run. Overrides are arguments of `lightly_train.pretrain`: ``method_args.koleo_loss_weight=0``.
"""

from __future__ import annotations

import os

os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}

import lightly_train
from common import Exports, nested, read_spec, tiles
from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2Args
from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer
from omegaconf import OmegaConf


def main() -> None:
    """Train as the specification says."""
    spec = read_spec()
    network, crops, head = spec["network"], spec["crops"], spec["head"]
    folder = spec["output"] / "images"
    folder.mkdir()
    for number, (_, data) in enumerate(tiles(spec)):
        (folder / f"{number:06d}.jpg").write_bytes(data)
    student = DinoVisionTransformer(
        img_size=crops["global_crops_size"],
        patch_size=network["patch_size"],
        embed_dim=network["embed_dim"],
        depth=network["depth"],
        num_heads=network["num_heads"],
        num_register_tokens=network["registers"],
        init_values=network["layerscale"],
        drop_path_rate=network["drop_path_rate"],
        block_chunks=0,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    exports = Exports(spec, interpolate_antialias=True, interpolate_offset=0.0)

    def save(method: DINOv2) -> None:
        model = method.teacher_embedding_model.wrapped_model.get_model()
        exports.save(method.trainer.global_step * spec["batch_size"], model.state_dict())

    DINOv2.on_train_start = lambda method: save(method)
    update = DINOv2.on_train_batch_end

    def on_train_batch_end(method: DINOv2, *args: object, **kwargs: object) -> None:
        update(method, *args, **kwargs)
        save(method)

    DINOv2.on_train_batch_end = on_train_batch_end
    fields = DINOv2Args.model_fields
    scale = spec["steps"] / DINOv2Args.default_steps
    shrunk = ("student_freeze_last_layer_steps", "teacher_temp_warmup_steps", "warmup_steps")
    steps_per_epoch = max(1, len(list(folder.iterdir())) // spec["batch_size"])
    resize = {"min_scale": crops["global_crops_scale"][0], "max_scale": crops["global_crops_scale"][1]}
    local = {"min_scale": crops["local_crops_scale"][0], "max_scale": crops["local_crops_scale"][1]}
    arguments = {
        "method": "dinov2",
        "epochs": -(-spec["steps"] // steps_per_epoch),
        "batch_size": spec["batch_size"],
        "num_workers": spec["num_workers"],
        "seed": spec["seed"],
        "accelerator": "cpu",
        "devices": 1,
        "precision": "bf16-mixed" if spec["bf16"] else "32-true",
        "method_args": {
            "output_dim": head["head_n_prototypes"],
            "hidden_dim": head["head_hidden_dim"],
            "dino_bottleneck_dim": head["head_bottleneck_dim"],
            "ibot_bottleneck_dim": head["head_bottleneck_dim"],
        }
        | {name: round(scale * fields[name].default) for name in shrunk},
        "transform_args": {
            "image_size": (crops["global_crops_size"],) * 2,
            "random_resize": resize,
            "local_view": {
                "num_views": crops["local_crops_number"],
                "view_size": (crops["local_crops_size"],) * 2,
                "random_resize": local,
            },
        },
        "trainer_args": {"max_steps": spec["steps"]},
        "callbacks": {"model_checkpoint": None, "model_export": None},
        "loggers": {"tensorboard": None},
    }
    asked = OmegaConf.merge(OmegaConf.create(arguments), OmegaConf.create(nested(spec["overrides"])))
    lightly_train.pretrain(
        out=spec["output"] / "lightly", data=str(folder), model=student, **OmegaConf.to_container(asked)
    )


if __name__ == "__main__":
    main()

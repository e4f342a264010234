"""``--dry-run``: the plan of a run, then what it needs looked at one after the other; nothing is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dinov2.build.data import OpenData, augmented_batch, check_rows, describe_stream, open_data, order_parameters
from dinov2.build.networks import check_backbone, try_starting_weights, with_teachers
from dinov2.configs import Config, validate
from dinov2.fsdp import local_world_size
from dinov2.train.performance.capabilities import resolve_performance
from dinov2.train.plan.describe import describe_plan, parameter_table
from dinov2.train.plan.gpus import Gpu, assumed_gpu, seen_gpu
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel, check_fits, resolve_batch
from dinov2.train.plan.plan import AUTO_IMAGES, AUTO_PASSES, RunPlan, disk_needs, make_plan
from dinov2.train.probe_hook import open_tasks
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.update.optim import Schedules
from dinov2.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def dry_run(
    config: Config,
    world_size: int,
    write: Callable[[str], object],
    gpu: Gpu | None = None,
    price: float | None = None,
    pictures: Path | None = None,
    output_dir: Path | None = None,
) -> None:
    """Show the plan, then check weights and data, of which some rows are decoded; allocates no networks.

    The plan comes first, whatever the others are then found to be; under ``optim.epochs: auto`` alone the data are
    opened before it. Faults are raised last, all of them.

    Args:
        config: the configuration.
        world_size: processes of the run.
        write: takes each part of the text, as soon as it is known.
        gpu: for which memory and time are predicted; None takes that of this machine, else `assumed_gpu`.
        price: see `describe_plan`.
        pictures: folder for ``schedules.png`` and ``crops.png``, in which nothing is replaced.
        output_dir: of the run, to compare the room on its disk.

    Raises:
        ValueError: as the start of the run would, or if the GPU, named or here, cannot hold the batch.
        OSError: as the start of the run would, or FileExistsError for a picture that is there with other contents.
    """
    validate(config, world_size)
    config = with_teachers(config)
    check_backbone(config, with_weights=False)
    compiled, planned = config.performance.compile is not False, gpu
    if torch.cuda.is_available() and gpu is None:
        device = torch.device("cuda", torch.cuda.current_device())
        compiled = resolve_performance(config, device).compile
        total = torch.cuda.get_device_properties(device).total_memory
        planned = seen_gpu(torch.cuda.get_device_name(device), total)
    costs, used = StepCosts(config, compiled), planned or assumed_gpu()
    memory = MemoryModel(costs, world_size, local_world_size())
    batch = resolve_batch(config, memory, used.memory) * world_size * config.optim.accumulation_steps
    data, tiles, faults = None, None, []
    if config.optim.epochs == "auto":
        with _noting(faults):
            data = open_data(config)
        # Any number between this and that of the fewest passes gives a run of the same length.
        tiles = data.num_tiles if data else AUTO_IMAGES // AUTO_PASSES[1]
        if faults:
            write(f"optim.epochs = auto follows from data that cannot be opened: {AUTO_IMAGES:,} images are assumed.")
    plan = make_plan(config, world_size, batch, tiles, lambda images: costs.flops(images).model)
    write(describe_plan(config, plan, costs, used, local_world_size(), price))
    if output_dir and (warning := _room_warning(config, plan, costs, output_dir)):
        write(warning)
    write(parameter_table(costs))
    if pictures:
        from dinov2.train.plan.pictures import draw_schedules

        _save(draw_schedules(Schedules(config, plan), plan.total_steps), pictures, "schedules")
    with _noting(faults):
        arch = SSLMetaArch(config, weights_device="meta")
        backbones = {name: frozen.backbone for name, frozen in arch.frozen_teachers.items()}
        write("\n".join(try_starting_weights(arch.student, backbones, config)))
    if data or config.optim.epochs != "auto":
        with _noting(faults):
            _look_at(data or open_data(config), config, plan, write, pictures)
    if planned:
        with _noting(faults):
            check_fits(plan.local_batch, memory, planned.memory)
    if faults:
        raise faults[0] if len(faults) == 1 else ValueError(" ".join(map(str, faults)))


@contextmanager
def _noting(faults: list[Exception]) -> Iterator[None]:
    """Keep what a user can mend for later, so that what comes after it is looked at, too."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        faults.append(error)


def _look_at(
    data: OpenData, config: Config, plan: RunPlan, write: Callable[[str], object], pictures: Path | None
) -> None:
    """Describe the stream, decode some rows, open the probes' tasks, and draw crops."""
    stream = describe_stream(config, plan, data, order_parameters(config, plan, data))
    write("\n".join([stream, *check_rows(config, data)]))
    open_tasks(config, data)
    if pictures:
        from dinov2.report.figures import draw_crops

        _save(draw_crops(*augmented_batch(config, data), config.student.patch_size), pictures, "crops")


def _room_warning(config: Config, plan: RunPlan, costs: StepCosts, output_dir: Path) -> str:
    if (output_dir / "checkpoints").exists():
        return ""  # of a run whose files are there in part; its next start says whether the others fit
    needed = disk_needs(config, plan, costs.student, costs.saved_teachers).total
    there = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free >= needed:
        return ""
    return (
        f"  warning   {str(there)!r}, where the run's folder is to be, has {free / 2**30:,.1f} GiB free and the run "
        f"needs {needed / 2**30:,.1f}; make room, or keep fewer by train.keep_checkpoints and evaluation.keep_exports"
    )


def _save(figure: Figure, folder: Path, name: str) -> None:
    from dinov2.report.figures import as_png

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.png", new=True) as (partial,):
        partial.write_bytes(as_png(figure))

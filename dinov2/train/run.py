"""One training run in its output folder: start or resume, what it saves and exports."""

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from dinov2.build.augmentation import device_batches
from dinov2.build.data import OpenData, build_loader, describe_stream, open_data, order_parameters
from dinov2.build.networks import (
    check_backbone,
    load_frozen_teacher,
    load_starting_weights,
    starting_weights,
    with_teachers,
)
from dinov2.configs import Config, public_config, save_config, trained_config, validate
from dinov2.data.stream.loader import TrainLoader, validate_stream_state, worker_lost
from dinov2.distributed import get_global_rank, get_global_size, is_main_process, on_main_process
from dinov2.extensions import SINKS
from dinov2.fsdp import Checkpointer, full_state_dict, local_world_size
from dinov2.hub.save import save_teacher
from dinov2.logging.bar import ProgressBar
from dinov2.logging.chance import ChanceWatch
from dinov2.logging.health import HealthWatch
from dinov2.logging.sinks import ConsoleSink, JsonlSink, Sinks
from dinov2.train.dump import RecentBatches, with_dump
from dinov2.train.exports import export_path, list_export, write_card
from dinov2.train.hooks import CheckpointHook, GarbageHook, Hook, PeriodicHook
from dinov2.train.output_folder import note_attempt
from dinov2.train.performance.apply import build_training_step
from dinov2.train.performance.capabilities import resolve_performance
from dinov2.train.picture_hook import PictureHook
from dinov2.train.plan.describe import describe_plan
from dinov2.train.plan.gpus import seen_gpu
from dinov2.train.plan.measure import StepCosts
from dinov2.train.plan.memory import MemoryModel, check_fits, free_memory, resolve_batch
from dinov2.train.plan.plan import RunPlan, check_divides, disk_needs, make_plan
from dinov2.train.probe_hook import ProbeHook, open_tasks
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.state import TrainState, check_loss_modules, check_resumable, decode_state, describe_state
from dinov2.train.stopping import StopRequest
from dinov2.train.trainer import Trainer
from dinov2.train.update.guard import NonFiniteError
from dinov2.train.update.optim import Schedules, adam_state, build_optimizer
from dinov2.train.watchdog import Watchdog
from dinov2.utils.cli import Stopped
from dinov2.utils.secrets import public

logger = logging.getLogger("dinov2")


class CollapseError(RuntimeError):
    """Training collapsed, and ``train.on_collapse`` is to stop there."""


class Run:
    """A run set up to train: newest checkpoint restored, data and networks ready. All ranks must construct.

    The folder is one that `hold_output_dir` holds. With ``eval_only`` a run is there to export a teacher, and needs a
    checkpoint and no data; its configuration is then the checkpoint's, whatever ``config`` is.

    Raises:
        ValueError, FileNotFoundError: if configuration, data, weights or checkpoint do not fit.
        MainProcessError: if that is so, and rank 0 says it.
    """

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        device: torch.device,
        eval_only: bool = False,
        watchdog: Watchdog | None = None,
    ):
        self.output_dir, self.device = output_dir, device
        self.watchdog = watchdog or Watchdog(output_dir, TrainState(), 0, 0)
        kept = config.train.keep_checkpoints, config.train.keep_checkpoints_every
        self.checkpointer = Checkpointer(output_dir, *kept, background=config.train.async_checkpoints)
        self.stop = StopRequest(config.train.time_limit, self._newest_checkpoint, lambda: self.checkpointer.longest_s)
        saved = self.checkpointer.newest(decode_state)
        self.config = config = on_main_process(partial(_checked, config, saved, eval_only))
        if not eval_only:
            self.performance = resolve_performance(config, device)
            on_main_process(partial(check_backbone, config, with_weights=saved is None))
            self.costs = StepCosts(config, self.performance.compile and device.type == "cuda")
            if saved:
                accumulation = config.optim.accumulation_steps
                on_main_process(partial(check_divides, saved["global_batch"], get_global_size(), accumulation))
            data = self._open_data(saved)
            self.plan = self._make_plan(saved, data.num_tiles)
        self.state = self.watchdog.state
        if saved:
            self.state.step, self.state.samples = saved["step"], saved["samples"]
        self.loader = None if eval_only else self._open_stream(saved, data)
        built = config if eval_only else self.performance.applied(config)
        self.arch = build_arch(built, device, from_checkpoint=saved is not None, trains=not eval_only)
        betas = (config.optim.adamw_beta1, config.optim.adamw_beta2)
        self.optimizer = build_optimizer(self.arch.get_params_groups(), betas)
        precision = config.compute_precision
        in_fp16 = any(module.mixed_precision.param_dtype == "fp16" for module in vars(precision.student).values())
        self.scaler = torch.amp.GradScaler(device.type, enabled=in_fp16 and precision.grad_scaler)
        if saved:
            check_loss_modules(saved, self._loss_modules())
            self.checkpointer.load(self.state.step, self._tensors())
            if saved["scaler"]:  # empty where nothing computed in fp16 before
                self.scaler.load_state_dict(saved["scaler"])
            logger.info("Resumed from %s.", self.checkpointer.path(self.state.step))

    def train(self) -> None:
        """Train to the end of the plan; all ranks must call.

        Raises:
            NonFiniteError: see `FiniteGuard`.
            CollapseError: on rank 0, where a collapse is to stop the run; MainProcessError on the others.
            Stopped: if the run was asked to stop.
        """
        if self.state.step >= self.plan.total_steps:
            logger.info(
                "Nothing is left to train: the run in %s is at step %d of %d; more optim.epochs or a later "
                "optim.early_stop go on with it.", self.output_dir, self.state.step, self.plan.total_steps,
            )  # fmt: skip
            return
        on_main_process(partial(save_config, self.config, self.output_dir / "config.yaml"))
        on_main_process(self._warn_of_room)
        config = self.config
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        plan, arch, batches = self.plan, self.arch, self.loader
        gpu = name and seen_gpu(name, torch.cuda.get_device_properties(self.device).total_memory)
        described = partial(describe_plan, config, plan, self.costs, gpu, local_world_size())
        logger.info("%s", on_main_process(described))
        for note in self.performance.notes:
            logger.warning("%s", note)
        if config.logging.samples:
            path = self.output_dir / "logs" / f"samples.rank{get_global_rank()}.jsonl"
            batches = logged_samples(batches, path, self.state.step, plan.accumulation)
        batches = recent = RecentBatches(batches, self.state.step, plan.accumulation)
        schedules = Schedules(config, plan)
        learning, patience = chance_patience(schedules, self.state, plan.total_steps, config.logging.period_iterations)
        patches = config.ibot if config.ibot.separate_head else config.dino
        prototypes = {"dino": config.dino.head_n_prototypes, "ibot": patches.head_n_prototypes}
        sinks, health = Sinks(), HealthWatch(learning + patience, prototypes)
        if is_main_process():
            sinks = Sinks(note_attempt(self.output_dir, self.state.step, plan.world_size, name or "CPU"))
            sinks.add(ConsoleSink)
            sinks.add(ProgressBar, plan.total_steps, self.state.step)
            sinks.add(JsonlSink, self.output_dir / "metrics.jsonl")
            sinks.add(ChanceWatch, learning, patience)
            sinks.add(lambda: health)
            shown = public_config(config) | {"plan": dataclasses.asdict(plan)}
            for sink in dict.fromkeys(("wandb",) * config.logging.wandb + config.logging.sinks):
                sinks.add(SINKS[sink], self.output_dir, config.logging.wandb_project, shown, apart=True)
        trainer = Trainer(
            training_step=build_training_step(arch, self.optimizer, self.scaler, self.performance, plan.global_batch),
            schedules=schedules,
            plan=plan,
            state=self.state,
            batches=device_batches(batches, config, self.device),
            log_period=config.logging.period_iterations,
            flops=on_main_process(lambda: (self.costs.flops(plan.local_batch) * plan.accumulation).model),
            sinks=[sinks],
            hooks=self._hooks(sinks),
            stop_asked=lambda: self.stop.asked() or self.checkpointer.has_failed,
            phase=self.watchdog.phase,
            collapsed=lambda: config.train.on_collapse == "stop" and bool(health.collapse),
        )
        with self.stop, worker_lost(), contextlib.closing(self.loader):
            try:
                trainer.fit()
            except NonFiniteError as error:
                raise with_dump(error, recent, self.output_dir) from error
            if trainer.guard.collapse_agreed:
                on_main_process(partial(self._collapsed, health.collapse))
            if self.state.step < plan.total_steps:
                self._stopped()

    def save_checkpoint(self, state: TrainState) -> None:
        """Save tensors and state, in the background as configured; all ranks must call."""
        described = describe_state(state, self.loader.stream_state, self.plan.global_batch, self.config)
        described |= {"scaler": self.scaler.state_dict(), "places": public(self._locations)}
        described["loss_modules"] = list(self._loss_modules())
        self.checkpointer.save(state.step, self._tensors(), described)

    def export_teacher(self, state: TrainState) -> None:
        """Write ``eval/training_<step>/teacher_checkpoint.pth`` and list it; all ranks must call.

        One that is there with other contents stays: a run that trains says so and goes on, otherwise FileExistsError is
        raised on rank 0.
        """
        modules = {name: full_state_dict(module) for name, module in self.arch.teacher.items()}
        path = export_path(self.output_dir, state.step)
        architecture, config = self.arch.teacher.backbone.describe(), public_config(self.config)
        metadata = {"architecture": architecture, **vars(state), "config": config}

        def export() -> None:
            try:
                checksum = save_teacher(path, modules, metadata)
            except FileExistsError as error:
                if self.loader is None:
                    raise
                logger.warning("The teacher of step %d is not exported again: %s", state.step, error)
                return
            logger.info("Exported the teacher to %s.", path)
            try:
                list_export(self.output_dir, state.step, checksum, self.config.evaluation.keep_exports)
            except OSError as error:  # the teacher is there; unlisted, it stays
                logger.warning("The teacher of step %d is not listed (%s).", state.step, error)

        on_main_process(export)

    def write_card(self, state: TrainState) -> None:
        """Describe the export of this step, with what probes found; all ranks may call."""
        if is_main_process():
            write_card(self.output_dir, state.step, self.arch.teacher.backbone)

    def _make_plan(self, saved: dict[str, Any] | None, num_tiles: int | None) -> RunPlan:
        """The plan, with ``auto`` decided; a batch that the GPU cannot hold is refused, or warned of, before."""
        world, free = get_global_size(), free_memory(self.device)
        memory = MemoryModel(self.costs, world, local_world_size())

        def plan() -> RunPlan:
            images = world * self.config.optim.accumulation_steps
            batch = saved["global_batch"] if saved else resolve_batch(self.config, memory, free) * images
            plan = make_plan(self.config, world, batch, num_tiles, lambda images: self.costs.flops(images).model)
            if free and (warning := check_fits(plan.local_batch, memory, free)):
                logger.warning("%s", warning)
            return plan

        return on_main_process(plan)

    def _stopped(self) -> NoReturn:
        """End a run that all ranks have stopped before its last step; all ranks must call."""
        reason, status = self.stop.agreed_reason()
        if not is_main_process():
            time.sleep(1)  # torchrun ends all processes as soon as one has left, and rank 0 has something to say
        done = f"Stopped by {reason} after step {self.state.step} of {self.plan.total_steps}"
        raise Stopped(f"{done}; {self._newest_checkpoint()}", status)

    def _collapsed(self, what: str) -> NoReturn:
        done = f"Stopped after step {self.state.step} of {self.plan.total_steps}, which was not saved: {what}"
        raise CollapseError(f"{done} As it is, {self._newest_checkpoint()}")

    def _newest_checkpoint(self) -> str:
        if steps := self.checkpointer.steps():
            return f"the same command goes on from {self.checkpointer.path(steps[-1])}."
        return "no checkpoint was saved, so that the same command starts anew."

    def _warn_of_room(self) -> None:
        """Say at the start that a later checkpoint will not fit; each is checked before it is written, too."""
        networks = self.costs.student, self.costs.saved_teachers
        disk, there = disk_needs(self.config, self.plan, *networks), len(self.checkpointer.steps())
        needed, free = max(disk.checkpoints - there, 0) * disk.checkpoint, shutil.disk_usage(self.output_dir).free
        if free < needed:
            logger.warning(
                "Folder %s has %.1f GiB free and its further checkpoints need %.1f GiB; make room in time, or lower "
                "train.keep_checkpoints.", self.output_dir, free / 2**30, needed / 2**30,
            )  # fmt: skip

    def _open_data(self, saved: dict[str, Any] | None) -> OpenData:
        # Rank 0 lists files and reads footers, once for all.
        data = on_main_process(partial(open_data, self.config, self.output_dir / "stream_index", saved))
        self._locations = data.locations
        if not any(source.is_remote for source in data.sources):
            self.watchdog.outage_s = 0.0
        self._data = data
        self._tasks_to_probe = on_main_process(partial(open_tasks, self.config, data))
        return data

    def _open_stream(self, saved: dict[str, Any] | None, data: OpenData) -> TrainLoader:
        lanes = saved["stream"]["lanes"] if saved else 0
        order = on_main_process(partial(order_parameters, self.config, self.plan, data, lanes))
        loader = build_loader(self.config, self.plan, data, self.state.samples, order, self.device)
        if saved:
            on_main_process(partial(validate_stream_state, saved["stream"], loader.stream_state, ", ".join(data.names)))
        logger.info("%s", describe_stream(self.config, self.plan, data, order))
        return loader

    def _tensors(self) -> dict[str, Any]:
        """Every tensor of the run by name; loading a checkpoint fills them in place."""
        tensors = {
            "student": self.arch.student.state_dict(),
            "teacher": self.arch.teacher.state_dict(),
            "optimizer": adam_state(self.arch.trained, self.optimizer),
            "dino_loss": self.arch.dino_loss.state_dict(),
            "ibot_patch_loss": self.arch.ibot_patch_loss.state_dict(),
        }
        return tensors | ({"losses": modules} if (modules := self._loss_modules()) else {})

    def _loss_modules(self) -> dict[str, dict[str, Any]]:
        """State of the terms of the loss that have one; a frozen teacher's is that of its term."""
        states = {name: state for name, term in self.arch.losses.items() if (state := term.state_dict())}
        for name, frozen in self.arch.frozen_teachers.items():
            if frozen.term.follows_teacher:
                states[name] = states.get(name, {}) | frozen.backbone.state_dict()
        return states

    def _hooks(self, sinks: Sinks) -> list[Hook]:
        # The export precedes the checkpoint: a run killed between the two repeats the export on resume.
        period = self.config.evaluation.eval_period_iterations
        hooks: list[Hook] = [PeriodicHook(period, self.export_teacher)]
        backbone = self.arch.teacher.backbone
        if on_main_process(lambda: sinks.takes_exports):
            hooks.append(PictureHook(period, backbone, self.config, self._data, self.output_dir, sinks))
        if self._tasks_to_probe:
            csv = self.output_dir / "eval" / "probes.csv"
            to = sinks if is_main_process() else None
            hooks.append(ProbeHook(period, backbone, self._tasks_to_probe, self.config, csv, to))
        hooks.append(PeriodicHook(period, self.write_card))
        if not self.config.train.skip_checkpointer:
            every, finish = self.config.train.checkpoint_period_iterations, self.checkpointer.finish
            hooks.append(CheckpointHook(every, self.save_checkpoint, finish))
        return [*hooks, GarbageHook()]


def _checked(config: Config, saved: dict[str, Any] | None, eval_only: bool) -> Config:
    """The valid configuration of a run that goes on from a checkpoint's JSON part, if any, or is exported."""
    if saved and eval_only:
        config = trained_config(saved["config"])
    validate(config, get_global_size())
    if not eval_only:
        config = with_teachers(config)
    if saved:
        check_resumable(saved, config)
    return config


def chance_patience(schedules: Schedules, state: TrainState, total_steps: int, log_period: int) -> tuple[int, int]:
    """The end of all warm-up, and the steps after it in which losses must leave chance: a tenth of the run, but 5
    records to 1000.
    """
    learning = max(schedules.warmup_steps, schedules.frozen_steps, state.step)
    return learning, max(5 * log_period, min(1000, total_steps // 10))


def logged_samples(
    batches: Iterable[dict[str, Any]], path: Path, first_step: int, accumulation: int = 1
) -> Iterator[dict[str, Any]]:
    """Pass batches on and append a JSON line to ``path`` for each step, for audits: what it consumes on this rank.

    A step takes so many batches, its ``accumulation``, and its line comes with the last. A line holds ``step`` (the
    first one is 1), ``ranks`` (their number), ``indices`` (global sample indices) and ``rows`` (row group and row of
    each, as the stream numbers them; of the row that stands in, where one was corrupt). After a resume the last line
    of a step is the valid one, on as many ranks as rank 0's says. Batches are on the CPU, the first one after
    ``first_step`` completed steps.
    """
    lines, indices, rows = JsonlSink(path), [], []
    for number, batch in enumerate(batches, 1):
        indices, rows = [*indices, *batch["indices"].tolist()], [*rows, *batch["rows"]]
        if number % accumulation == 0:
            step = first_step + number // accumulation
            lines.write({"step": step, "ranks": get_global_size(), "indices": indices, "rows": rows})
            indices, rows = [], []
        yield batch


def build_arch(config: Config, device: torch.device, from_checkpoint: bool, trains: bool = True) -> SSLMetaArch:
    """Student and teacher with their starting weights, sharded over the ranks, on ``device``; all ranks must call.

    The starting weights depend on the seed alone, whatever the number of ranks. Those ``from_checkpoint`` will be
    loaded over, so that no published weights are needed but those of frozen teachers that checkpoints do not hold, and
    these only where the run ``trains``. Raises FileNotFoundError or ValueError if weights are missing or do not fit.
    """
    torch.manual_seed(config.train.seed)
    arch = SSLMetaArch(config, weights_device="cpu" if is_main_process() else "meta")
    arch.freeze_all_but_last_blocks(config.train.unfreeze_last_n_blocks)

    def start() -> None:
        if loaded := load_starting_weights(arch.student, config):
            logger.info("Initialised from %s: %s.", starting_weights(config), ", ".join(loaded))
        arch.copy_student_to_teacher()

    def start_frozen_teachers() -> None:
        for name, frozen in arch.frozen_teachers.items():
            if frozen.weights and not (from_checkpoint and frozen.term.follows_teacher):
                load_frozen_teacher(frozen.backbone, f"losses.{name}.{frozen.term.weights_option}", frozen.weights)
                logger.info("The frozen teacher of losses.%s is from %s.", name, frozen.weights)

    if not from_checkpoint:
        on_main_process(start)
    if trains:
        on_main_process(start_frozen_teachers)
    arch.prepare_for_distributed_training(device)
    return arch.train()

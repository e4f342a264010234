"""The data that a configuration names: its datasets, what is left out of them, and their order."""

import functools
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dinov2.build.augmentation import build_augmentation, build_collate
from dinov2.configs import Config, saved_config
from dinov2.configs.schema import DatasetConfig
from dinov2.data.augment.collate import Sample
from dinov2.data.kinds import log_beside, recognise
from dinov2.data.slides.errors import SlideError
from dinov2.data.source import DecodeError, EncodedSample, Origin, Source, SourceRequest
from dinov2.data.stream.derived import make_source, take_tiles
from dinov2.data.stream.loader import TrainLoader
from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.data.stream.mixture import describe_fractions, make_order
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.patient_split import Fate, Fates, describe_splits, read_exclusions, split_by_patient
from dinov2.distributed import get_global_rank, get_global_size
from dinov2.extensions import SOURCES
from dinov2.utils.secrets import public_text

_SHARED_MEMORY = "/dev/shm"
_ABSURD_PASSES = 300
_SHOWN_TILES = 4  # two pairs, since masks are shared out over the four global crops of a pair
_CHECKED_ROWS, _CHECKED_AFTER_A_FAULT = 12, 256  # of each dataset, by a dry run ...
_CHECKED_BYTES = 1 << 28  # ... and of their row groups, where those come over a network


class Workload(Protocol):
    """Part of a run's plan that concerns its data."""

    global_batch: int  # images of a step over all processes
    local_batch: int  # images that a process takes at a time
    world_size: int
    total_images: int


@dataclass(frozen=True)
class OpenData:
    """The datasets of a run, in the order in which they are configured."""

    names: tuple[str, ...]
    locations: tuple[str, ...]  # where their files are, with the commit where there is one
    weights: tuple[float, ...]  # fraction of the samples of each, up to a common factor
    sources: tuple[Source, ...]  # their rows to train on
    held_out: tuple[Source | None, ...]  # of each, the rows of validation patients; None where there are none
    report: tuple[str, ...] = ()  # lines on what was left out, and on what makes reading slow

    @functools.cached_property
    def source(self) -> Source:
        """All rows to train on."""
        return make_source(self.sources)

    @property
    def num_tiles(self) -> int | None:
        """Number of their rows; None where they are drawn without end."""
        return None if _is_endless(self.source) else self.source.num_rows

    def order(self, seed: int, lanes: int, block_rows: int) -> SampleOrder:
        """Their order."""
        parameters = {"seed": seed, "lanes": lanes, "block_rows": block_rows}
        if hasattr(self.source, "order"):
            return self.source.order(**parameters)
        return make_order(self.sources, self.weights, **parameters)


def open_data(config: Config, index_cache: Path | None = None, saved: dict[str, Any] | None = None) -> OpenData:
    """Open the datasets that a validated configuration names and leave out what it excludes.

    ``index_cache`` is where the index of shards is kept between launches; None keeps none. ``saved`` is the JSON state
    of the checkpoint being resumed; datasets on the hub keep its commit. FileNotFoundError, ValueError or OSError if a
    dataset is missing, empty, of another format or out of reach.
    """
    data, datasets = config.data, _datasets(config)
    excluded = read_exclusions(data.exclusion_file) if data.exclusion_file else []
    sites = data.excluded_sites
    fates = Fates(excluded, data.validation_fraction)  # of the slides that kinds leave out themselves
    names, weights = zip(*((dataset.path, dataset.weight) for dataset in datasets), strict=True)
    sources: list[Source] = []
    locations, held_out, report, splits = [], [], [], {}
    for number, (dataset, commit) in enumerate(zip(datasets, _commits(config, saved), strict=True)):
        cache = index_cache and index_cache.with_name(f"{index_cache.name}{f'.{number}' if number else ''}")
        name, counts = dataset.path, Counter[int]()
        source = _open(config, dataset, commit, cache, functools.partial(_keep, fates, counts))
        if _is_endless(source) and len(datasets) > 1:
            raise ValueError(
                f"data.datasets mixes '{name}', which is drawn without end, with others; give its tiles a number by "
                "data.max_tiles, or train on it alone."
            )
        locations.append(getattr(source, "location", name))
        if advice := getattr(source, "repack_advice", str)():
            report.append(f"dataset '{name}': {advice}")
        validation = None
        if counts.total() > counts[Fate.TRAINING]:
            report.append(
                f"dataset '{name}': training on {counts[Fate.TRAINING]} of {counts.total()} slides; "
                f"{counts[Fate.EXCLUDED]} excluded, {counts[Fate.VALIDATION]} kept for validation"
            )
        elif not counts and (excluded or data.validation_fraction or sites or data.slide_fraction < 1):
            if _is_endless(source):
                raise ValueError(
                    f"Dataset '{name}' is drawn without end, so that data.exclusion_file, "
                    "data.excluded_sites and data.validation_fraction cannot be applied to its rows."
                )
            used = {"slide_fraction": data.slide_fraction, "seed": config.train.seed}
            splits[name] = split = split_by_patient(source, name, excluded, data.validation_fraction, sites, **used)
            if split.unnamed and data.slide_fraction < 1:
                raise ValueError(
                    f"data.slide_fraction = {data.slide_fraction} needs the slides of all tiles, but some of dataset "
                    f"'{name}' name none; give data.groups_file, or 1.0 and data.max_tiles."
                )
            source, validation = split.training, split.validation
        report += _small_tiles(config, name, source)
        if data.max_tiles and not _is_endless(source):
            source = take_tiles(source, data.max_tiles, config.train.seed)
        sources.append(source)
        held_out.append(validation)
    if sites and not any(any(split.sites) for split in splits.values()):
        raise ValueError(
            f"data.excluded_sites = {list(sites)} needs a column 'site', of Parquet shards, a list of images or "
            "data.groups_file, but no dataset has one that holds anything."
        )
    if splits:
        unmatched = [replace(split, unmatched=split.unmatched - fates.matched) for split in splits.values()]
        report += describe_splits(unmatched, list(splits), excluded, sites)
    return OpenData(names, tuple(locations), weights, tuple(sources), tuple(held_out), tuple(report))


def order_parameters(config: Config, plan: Workload, data: OpenData, lanes: int = 0) -> dict[str, int]:
    """Seed, lanes V and block length R of a run's first launch, or with the lanes of an earlier one; as `fit_lanes`."""
    fixed = {"seed": config.train.seed, "block_rows": config.data.block_rows}
    if _is_endless(data.source):
        return fixed | {"lanes": 1}
    lanes = fit_lanes(
        lambda number: data.order(lanes=number, **fixed),
        data.source,
        lanes=lanes or config.data.lanes,
        global_batch=plan.global_batch,
        world_size=plan.world_size,
        limit_gib=config.data.memory_gib,
        most=4 if _is_anonymous(data.locations) else 8,
    )
    return {**fixed, "lanes": lanes}


def describe_stream(config: Config, plan: Workload, data: OpenData, order: dict[str, int]) -> str:
    """The stream as lines of text, for the start of a run and for ``--dry-run``."""
    sample_order, source = data.order(**order), data.source
    prefetch = Prefetch.suited_to(source, config.data.memory_gib * GIB)
    split = {"global_batch": plan.local_batch * plan.world_size, "world_size": plan.world_size}
    stored = memory_bound(source, sample_order, prefetch=prefetch, **split)
    crops = config.crops
    pixels = 2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    in_flight = max(1, config.train.num_workers * config.train.prefetch_factor) + 1
    batches = in_flight * plan.local_batch * 3 * pixels
    if summary := getattr(source, "summary", ""):
        lines = [f"Data: {summary}"]
    else:
        lines = [
            f"Data: {source.num_rows:,} tiles, {plan.total_images / source.num_rows:.3g} passes, "
            f"{sample_order.lanes} lanes over {len(source.group_rows):,} row groups of up to "
            f"{source.group_rows.max()} rows",
            *(f"  {line}" for line in describe_fractions(sample_order, data.names)),
        ]
    lines += [f"  warning   {line}" for line in _absurd_passes(plan, data)]
    lines += [f"  {line}" for line in data.report]
    held = f"{stored / GIB:.3g} GiB of stored tiles and {batches / GIB:.3g} GiB of batches"
    lines.append(f"  memory    up to {held} on each process")
    # Workers hand batches over in shared memory, of which containers often have very little; a worker then dies.
    needed = batches * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.train.num_workers and os.path.isdir(_SHARED_MEMORY):
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if free < needed:
            lines.append(
                f"  warning   {_SHARED_MEMORY} has {free / GIB:.3g} GiB free where {needed / GIB:.3g} are needed; "
                "raise it (docker run --shm-size) or lower train.num_workers or train.prefetch_factor"
            )
    return "\n".join(lines)


def _absurd_passes(plan: Workload, data: OpenData) -> Iterator[str]:
    """A sentence for each dataset that is seen so often that a student learns it by heart, or not even once."""
    for name, weight, source in zip(data.names, data.weights, data.sources, strict=True):
        if _is_endless(source):
            continue
        passes = plan.total_images * weight / sum(data.weights) / source.num_rows
        if passes > _ABSURD_PASSES:
            yield (
                f"dataset '{name}': {passes:,.0f} passes over its {source.num_rows:,} tiles teach little more than "
                "some hundred; optim.epochs = auto makes 100 at most"
            )
        elif passes < 1:
            yield (
                f"dataset '{name}': {passes:.3g} passes, so that {1 - passes:.0%} of its {source.num_rows:,} tiles are "
                "never seen; optim.epochs = auto makes 3 at least"
            )


def check_rows(config: Config, data: OpenData) -> list[str]:
    """Decode some rows of each dataset, spread over its shards; return a line for each that has a corrupt one.

    After a first fault many more are looked at, since a single one is what training replaces. ValueError, with a row as
    it is stored, if none can be decoded, or more than one and more than ``data.max_corrupt_fraction``.
    """
    lines = []
    for name, source in zip(data.names, data.sources, strict=True):
        seen, faults = _find_faults(source, _CHECKED_ROWS)
        if faults:
            seen, faults = _find_faults(source, _CHECKED_AFTER_A_FAULT)
        if not faults:
            continue
        found = f"dataset '{name}': {len(faults)} of {seen} rows looked at cannot be decoded, the first is {faults[0]}"
        if len(faults) == seen or len(faults) > max(1, config.data.max_corrupt_fraction * seen):
            raise ValueError(f"{found}.")
        lines.append(f"  warning   {found}")
    return lines


def build_loader(
    config: Config, plan: Workload, data: OpenData, start_sample: int, order: dict[str, int], device: torch.device
) -> TrainLoader:
    """Build this rank's training loader, which begins after the ``start_sample`` samples consumed so far.

    ``order`` is what `order_parameters` returned; batches go to ``device``.
    """
    # A micro-batch of all ranks is consecutive, so that its composition does not depend on their number.
    micro_batch = plan.local_batch * plan.world_size
    return TrainLoader(
        data.source,
        build_augmentation(config),
        build_collate(config),
        global_batch=micro_batch,
        batches_per_step=plan.global_batch // micro_batch,
        rank=get_global_rank(),
        world_size=get_global_size(),
        start_sample=start_sample,
        order=data.order(**order),
        num_workers=config.train.num_workers,
        prefetch=Prefetch.suited_to(data.source, config.data.memory_gib * GIB),
        prefetch_factor=config.train.prefetch_factor,
        pin_memory=device.type == "cuda",
        max_corrupt_fraction=config.data.max_corrupt_fraction,
    )


def augmented_batch(config: Config, data: OpenData) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """A few tiles of the training data, uint8 (H, W, 3), and the batch that training would make of them."""
    augment = build_augmentation(config)
    # Neighbours in the order come from different row groups, so that they look different.
    order = data.order(seed=config.train.seed, lanes=_SHOWN_TILES, block_rows=1)
    locations = order.locate(np.arange(_SHOWN_TILES))
    tiles, samples = [], []
    for index, (group, row) in enumerate(zip(locations.group.tolist(), locations.row.tolist(), strict=True)):
        ((slide, stored),) = data.source.read(group, [row])
        tiles.append(data.source.decode(EncodedSample(index, group, row, slide, stored)))
        samples.append(Sample(index, augment(tiles[-1], index), slide, replaced=False))
    return tiles, build_collate(config)(samples)


def _find_faults(source: Source, count: int) -> tuple[int, list[str]]:
    """Decode so many rows, evenly spread; give how many were read, and name those that cannot be decoded."""
    if _is_endless(source):
        located = source.order(seed=0, lanes=1, block_rows=1).locate(np.arange(count))
        groups, rows = located.group, located.row
    else:
        chosen = np.unique(np.linspace(0, source.num_rows - 1, count).astype(np.int64))
        ends = np.cumsum(source.group_rows)
        groups = np.searchsorted(ends, chosen, side="right")
        rows = chosen - ends[groups] + source.group_rows[groups]
    seen, fetched, faults = 0, 0, []
    for group, found in groupby(zip(groups.tolist(), rows.tolist(), strict=True), key=itemgetter(0)):
        wanted = [row for _, row in found]
        fetched += int(source.group_bytes[group])
        if source.is_remote and seen and fetched > _CHECKED_BYTES:
            break
        seen += len(wanted)
        for row, (slide, stored) in zip(wanted, source.read(group, wanted), strict=True):
            try:
                source.decode(EncodedSample(0, group, row, slide, stored))
            except DecodeError as error:
                faults.append(f"{source.describe(group, row)}: {error}")
    return seen, faults


def _small_tiles(config: Config, name: str, source: Source) -> list[str]:
    """A warning where tiles are smaller than global views; of those on this machine one is looked at."""
    sides, crop = (), config.crops.global_crops_size
    if _is_endless(source):
        sides = (config.data.tile_size, config.data.tile_size)
    elif not source.is_remote:
        group = int(np.where(source.group_rows > 0, source.group_bytes, np.iinfo(np.int64).max).argmin())
        if source.group_bytes[group] > _CHECKED_BYTES:
            return []
        with suppress(DecodeError, SlideError, OSError, ValueError):  # which reading them in earnest tells
            ((slide, stored),) = source.read(group, [0])
            sides = source.decode(EncodedSample(0, group, 0, slide, stored)).shape[:2]
    if not sides or min(sides) >= crop:
        return []
    return [
        f"warning   dataset '{name}': tiles of {sides[1]} x {sides[0]} px are smaller than crops.global_crops_size = "
        f"{crop}, so that even a view of a whole tile is enlarged {crop / min(sides):.2g} times; give crops of at most "
        "the tiles' side, or larger tiles"
    ]


def _datasets(config: Config) -> tuple[DatasetConfig, ...]:
    data = config.data
    return data.datasets or (DatasetConfig(data.path, data.kind, revision=data.revision),)


def _open(config: Config, dataset: DatasetConfig, commit: str, cache: Path | None, keep: Callable[..., bool]) -> Source:
    told = next((kind for kind in (dataset.kind, config.data.kind) if kind != "auto"), "")
    kind = told or recognise(dataset.path)
    if not told:
        log_beside(dataset.path, kind)
    part = SOURCES[kind]()
    options = config.data.options.get(kind) or (part.Options() if hasattr(part, "Options") else None)
    try:
        return part.open(SourceRequest(dataset.path, commit or dataset.revision, config, options, cache, keep))
    except SlideError as error:
        raise ValueError(str(error)) from error
    except FileNotFoundError as error:
        other = kind
        with suppress(ValueError, OSError):
            other = recognise(dataset.path)
        if other == kind:
            raise
        found = f"it is {SOURCES[other]().accepts}, data.kind {other} or auto"
        raise FileNotFoundError(f"{error}; {found}, but data.kind is {kind}") from error


def _keep(fates: Fates, counts: Counter[int], slide: str, patient: str = "") -> bool:
    fate = fates[Origin(slide, patient)]
    counts[fate] += 1
    return fate == Fate.TRAINING


def _is_endless(source: Source) -> bool:
    return getattr(source, "is_endless", False)


def _is_anonymous(locations: tuple[str, ...]) -> bool:
    """Whether requests go to the hub without a token: it admits 3,000 in 5 minutes, and each lane begins with one."""
    if not any(location.startswith("hf://") for location in locations):
        return False
    from huggingface_hub import get_token

    return get_token() is None


def _commits(config: Config, saved: dict[str, Any] | None) -> list[str]:
    """The commit at which each dataset was first opened, where that was on the hub and the entries are unchanged."""
    now = [(public_text(dataset.path), dataset.revision) for dataset in _datasets(config)]
    if saved is not None:
        before, locations = saved_config(saved["config"])["data"], saved.get("places", [])
        then = [(public_text(entry["path"]), entry.get("revision", "")) for entry in before["datasets"] or [before]]
        if then == now and len(locations) == len(now):
            found = [re.search(r"^hf://.*@([0-9a-f]{40})(/|$)", location) for location in locations]
            return [match[1] if match else "" for match in found]
    return [""] * len(now)

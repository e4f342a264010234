"""The data that a configuration names: its datasets, what is left out of them, and their order."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.configs import Config
from dinov2.configs.schema import DatasetConfig, TrainConfig
from dinov2.data.stream.mixture import describe_shares, make_order, make_source
from dinov2.data.online.random import OnlinePatchSource
from dinov2.data.online.prepare import PatchOptions, mpps_of
from dinov2.data.stream.order import SampleOrder
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.stream.patient_split import describe_splits, split_by_patient
from dinov2.data.patients import comparable, names_of, patient_of
from dinov2.data.stream.patients import in_validation, read_exclusions
from dinov2.data.source import Source
from dinov2.data.slides.errors import SlideError
from dinov2.data.slides.sample_list import SlideListSource
from dinov2.data.slides.resolution import read_mpp_table
from dinov2.data.slides.table import SlideRow, read_slide_table
from dinov2.data.stream.memory import GIB, Prefetch, fit_lanes, memory_bound
from dinov2.train.plan.plan import RunPlan

_SHARED_MEMORY = "/dev/shm"
_NAMING = ("streaming_dataset_path", "streaming_dataset_revision", "datasets")  # keys of `train`


@dataclass(frozen=True)
class OpenData:
    """The datasets of a run.

    Attributes:
        names: as configured.
        places: where their files are, with the commit where there is one.
        weights: share of the samples of each, up to a common factor.
        sources: their rows to train on.
        held_out: of each, the rows of validation patients; None where there are none.
        report: lines on what was left out.
    """

    names: tuple[str, ...]
    places: tuple[str, ...]
    weights: tuple[float, ...]
    sources: tuple[Source, ...]
    held_out: tuple[Source | None, ...]
    report: tuple[str, ...] = ()

    @functools.cached_property
    def source(self) -> Source:
        """All rows to train on."""
        return make_source(self.sources)

    def order(self, seed: int, lanes: int, block_rows: int) -> SampleOrder:
        """Their order."""
        if isinstance(self.source, OnlinePatchSource):
            return self.source.order(seed=seed, lanes=lanes, block_rows=block_rows)
        return make_order(self.sources, self.weights, seed=seed, lanes=lanes, block_rows=block_rows)


def open_data(
    config: Config, index_cache: Path | None = None, saved: dict[str, Any] | None = None
) -> OpenData:
    """Open the datasets that the configuration names and leave out what it excludes.

    Args:
        config: validated configuration.
        index_cache: where the index of Parquet shards is kept between launches; None keeps none.
        saved: JSON state of the checkpoint being resumed; datasets on the hub keep its commit.

    Raises:
        FileNotFoundError, ValueError, OSError: a dataset is missing, empty, of another format or out of reach.
    """
    try:
        return (
            _open_online(config, index_cache)
            if config.train.online_patching
            else _open(config, index_cache, saved)
        )
    except SlideError as error:
        raise ValueError(str(error)) from error


def _open(config: Config, index_cache: Path | None, saved: dict[str, Any] | None) -> OpenData:
    train = config.train
    datasets = _named(config)
    commits = _commits(config, saved)
    opened: list[Source] = []
    for number, (dataset, commit) in enumerate(zip(datasets, commits, strict=True)):
        if train.streaming_from_hf:
            cache = index_cache and index_cache.with_name(
                f"{index_cache.name}{f'.{number}' if number else ''}"
            )
            opened.append(
                ParquetSource(dataset.path, cache, commit or dataset.revision, train.stream_attempts)
            )
        else:
            opened.append(
                SlideListSource(
                    dataset.path,
                    train.slide_root or None,
                    train.tile_size,
                    columns=train.sample_list_columns or None,
                    mpp_file=train.slide_mpp_file or None,
                )
            )
    names = tuple(dataset.path for dataset in datasets)
    data = OpenData(
        names=names,
        places=tuple(getattr(source, "place", name) for source, name in zip(opened, names, strict=True)),
        weights=tuple(dataset.weight for dataset in datasets),
        sources=tuple(opened),
        held_out=(None,) * len(opened),
    )
    return _leave_out(data, train.exclusion_file, train.validation_share)


def order_parameters(config: Config, plan: RunPlan, data: OpenData, lanes: int = 0) -> dict[str, int]:
    """Seed, lanes V and block length R of a run's first launch, or with the lanes of an earlier one.

    Raises:
        ValueError: there are more lanes than rows, or what they hold exceeds ``train.stream_memory_gib``.
    """
    train = config.train
    if train.online_patching and not config.online.max_patches:
        return {"seed": train.seed, "block_rows": train.stream_block_rows, "lanes": 1}
    fixed = {"seed": train.seed, "block_rows": train.stream_block_rows}
    lanes = fit_lanes(
        lambda number: data.order(lanes=number, **fixed),
        data.source,
        lanes=lanes or train.stream_lanes,
        global_batch=plan.global_batch,
        world_size=plan.world_size,
        limit_gib=train.stream_memory_gib,
        most=4 if _is_anonymous(data.places) else 8,
    )
    return {**fixed, "lanes": lanes}


def describe_stream(config: Config, plan: RunPlan, data: OpenData, order: dict[str, int]) -> str:
    """The stream as lines of text, for the start of a run and for ``--dry-run``."""
    sample_order, source = data.order(**order), data.source
    stored = memory_bound(
        source,
        sample_order,
        global_batch=plan.global_batch,
        world_size=plan.world_size,
        prefetch=prefetch_for(config, source),
    )
    batches = _batches_in_flight(config) * plan.local_batch * _sample_bytes(config)
    return "\n".join(
        (
            *_describe_rows(plan, source, sample_order, data.names),
            *(f"  {line}" for line in data.report),
            f"  memory    up to {stored / GIB:.3g} GiB of stored tiles and {batches / GIB:.3g} GiB of batches on each "
            "process",
            *_shared_memory_shortage(config, batches * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        )
    )


def _describe_rows(
    plan: RunPlan, source: Source, order: SampleOrder, names: tuple[str, ...]
) -> Iterator[str]:
    if isinstance(source, OnlinePatchSource):
        drawn = f"{source.num_rows:,} patches" if source.is_capped else "patches without end"
        yield f"Data: {drawn} from {len(source.slide_list)} slides; {len(source.dropped)} slides are left out"
        return
    yield (
        f"Data: {source.num_rows:,} tiles, {plan.total_images / source.num_rows:.3g} passes, {order.lanes} lanes over "
        f"{len(source.unit_rows):,} row groups of up to {source.unit_rows.max()} rows"
    )
    yield from (f"  {line}" for line in describe_shares(order, names))


def prefetch_for(config: Config, source: Source) -> Prefetch:
    """How far the reader works ahead on this source."""
    return Prefetch.suited_to(source, config.train.stream_memory_gib * GIB)


def _named(config: Config) -> tuple[DatasetConfig, ...]:
    train = config.train
    path = train.streaming_dataset_path if train.streaming_from_hf else train.sample_list_path
    return train.datasets or (DatasetConfig(path, 1.0, train.streaming_dataset_revision),)


def _is_anonymous(places: tuple[str, ...]) -> bool:
    """Whether requests go to the hub without a token: it admits 3,000 in 5 minutes, and each lane begins with one."""
    if not any(place.startswith("hf://") for place in places):
        return False
    from huggingface_hub import get_token

    return get_token() is None


def _open_online(config: Config, index_cache: Path | None) -> OpenData:
    """Make the slides ready, which takes a while at the first start and nothing later."""
    online, train = config.online, config.train
    if online.cache_dir:
        cache = Path(online.cache_dir)
    else:
        cache = index_cache.with_name("slide_cache") if index_cache else Path(tempfile.mkdtemp("path-fm"))
    mpps = mpps_of(online.magnifications) if online.magnifications else online.mpp
    options = PatchOptions(
        mpps, online.mpp_weights or (1.0,) * len(mpps), train.tile_size, online.min_foreground
    )
    table = read_mpp_table(train.slide_mpp_file) if train.slide_mpp_file else None
    rows = read_slide_table(online.slides, online.weight_column, mpp_table=table)
    kept, report = _without_excluded(rows, train)
    source = OnlinePatchSource(
        kept,
        cache,
        options=options,
        seed=train.seed,
        slide_share=online.slide_share,
        max_patches=online.max_patches,
        workers=os.cpu_count() or 1,
    )
    return OpenData((online.slides,), (online.slides,), (1.0,), (source,), (None,), report)


def _without_excluded(rows: list[SlideRow], train: TrainConfig) -> tuple[list[SlideRow], tuple[str, ...]]:
    """Slides left to train on, and a line on the others."""
    excluded = (
        {comparable(name) for name in read_exclusions(train.exclusion_file)}
        if train.exclusion_file
        else set()
    )
    kept = [row for row in rows if excluded.isdisjoint(names_of(row.path))]
    training = [row for row in kept if not in_validation(patient_of(row.path), train.validation_share)]
    if not training:
        raise ValueError(
            f"Of {len(rows)} slides {len(rows) - len(kept)} are excluded and {len(kept)} kept for validation; at "
            "least 1 must be left to train on."
        )
    if len(training) == len(rows):
        return rows, ()
    return training, (
        f"training on {len(training)} of {len(rows)} slides; {len(rows) - len(kept)} excluded, "
        f"{len(kept) - len(training)} kept for validation",
    )


def _commits(config: Config, saved: dict[str, Any] | None) -> list[str]:
    """The commit at which each dataset was first opened, where that was on the hub and the entries are unchanged."""
    unknown = [""] * len(_named(config))
    if saved is None:
        return unknown
    before = saved["config"]["train"]
    now = json.loads(json.dumps(dataclasses.asdict(config.train)))
    places = saved.get("places", [])
    if any(before.get(key) != now[key] for key in _NAMING) or len(places) != len(unknown):
        return unknown
    found = [re.search(r"^hf://.*@([0-9a-f]{40})(/|$)", place) for place in places]
    return [match[1] if match else "" for match in found]


def _leave_out(data: OpenData, exclusion_file: str, validation_share: float) -> OpenData:
    if not exclusion_file and not validation_share:
        return data
    excluded = read_exclusions(exclusion_file) if exclusion_file else []
    splits = [
        split_by_patient(source, name, excluded, validation_share)
        for source, name in zip(data.sources, data.names, strict=True)
    ]
    return dataclasses.replace(
        data,
        sources=tuple(split.training for split in splits),
        held_out=tuple(split.validation for split in splits),
        report=tuple(describe_splits(splits, data.names, excluded)),
    )


def _shared_memory_shortage(config: Config, needed: int) -> list[str]:
    """Workers hand batches over in shared memory, of which containers often have very little; a worker then dies."""
    if not config.train.num_workers or not os.path.isdir(_SHARED_MEMORY):
        return []
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed <= free:
        return []
    return [
        f"  warning   {_SHARED_MEMORY} has {free / GIB:.3g} GiB free where {needed / GIB:.3g} are needed; raise it "
        "(docker run --shm-size) or lower train.num_workers or train.prefetch_factor"
    ]


def _batches_in_flight(config: Config) -> int:
    return max(1, config.train.num_workers * config.train.prefetch_factor) + 1


def _sample_bytes(config: Config) -> int:
    """Bytes of one sample's pixels on the way to the device."""
    if config.train.augmentation_device == "gpu":
        return 3 * config.train.tile_size**2
    crops = config.crops
    return 3 * (2 * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2)

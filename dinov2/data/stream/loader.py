"""The training loader: reader -> stateless decode workers -> batches, in the order of `SampleOrder`."""

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from dinov2.data.augment.collate import Sample
from dinov2.data.source import EncodedSample, Source
from dinov2.data.stream.memory import Prefetch
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from dinov2.data.stream.worker import DecodedRows, Transform

logger = logging.getLogger(__name__)

_DEFAULT_PREFETCH = Prefetch()
_MIN_SEEN = 10_000  # the fraction of corrupt rows is of at least so many, lest one early row stop a run
_EXAMPLES = 5

Batch = dict[str, Any]
Collate = Callable[[list[Sample]], Batch]


def make_train_loader(
    source: Source,
    transform: Transform,
    collate: Collate,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    start_sample: int,
    order: SampleOrder,
    num_workers: int,
    prefetch: Prefetch = _DEFAULT_PREFETCH,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    max_corrupt_fraction: float = 0.001,
    start_method: str | None = None,
) -> "TrainLoader":
    """Build the endless loader of one rank.

    Args:
        source: the dataset.
        transform: called as transform(image uint8 (H, W, 3), g); its result becomes `Sample.crops`.
        collate: makes the batch dict of one rank from its consecutive samples.
        global_batch: samples per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        start_sample: global sample index to begin at, which is the number of samples consumed so far.
        order: the order of samples; its number of read streams should be a multiple of `global_batch`.
        num_workers: worker processes; 0 decodes in this process.
        prefetch: how far the reader works ahead of the workers.
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: whether batches lie in page-locked memory.
        max_corrupt_fraction: fraction of this rank's samples, or of the first 10,000, that may be corrupt.
        start_method: how workers start. By default they are forked on Linux, which is safe since the reader's
            threads start later; loaders started while this one is being read should use "forkserver".

    Raises:
        ValueError: if the batch cannot be split over the ranks or `start_sample` is negative.
    """
    # In this process and before the fork: a forked child that stops the thread pool it inherited hangs.
    cv2.setNumThreads(1)
    split = {"global_batch": global_batch, "world_size": world_size}
    reader = RankReader(source, order, rank=rank, start_sample=start_sample, prefetch=prefetch, **split)
    default_method = "fork" if sys.platform == "linux" else None
    make_loader = partial(
        DataLoader,
        DecodedRows(source, transform),
        collate_fn=partial(_collate_and_report, collate),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=(start_method or default_method) if num_workers else None,
        generator=torch.Generator(),  # DataLoader draws a seed, which must not come from the global generator
    )
    stream_state = {**order.parameters, "global_batch": global_batch, "fingerprint": source.fingerprint}
    return TrainLoader(reader, make_loader, stream_state, max_corrupt_fraction)


class TrainLoader:
    """Endless iterable of one rank's batch dicts; leaving the iteration ends its threads and workers.

    Attributes:
        stream_state: for the checkpoint: what must be equal for a resumed run to go on with the same samples.
    """

    def __init__(
        self,
        reader: RankReader,
        make_loader: Callable[..., DataLoader],
        stream_state: dict[str, Any],
        max_corrupt_fraction: float,
    ) -> None:
        self.stream_state = stream_state
        self._reader, self._make_loader, self._max_corrupt_fraction = (
            reader,
            make_loader,
            max_corrupt_fraction,
        )

    def __iter__(self) -> Iterator[Batch]:
        seen, corrupt, examples = 0, 0, []
        failure: list[Exception] = []
        steps = _until_failure(self._reader, failure)
        batches = iter(self._make_loader(batch_sampler=steps))
        try:
            for loaded in batches:
                if isinstance(loaded, Exception):
                    raise loaded
                batch, samples, faults = loaded
                seen += samples
                corrupt += len(faults)
                examples = (examples + faults)[:_EXAMPLES]
                for fault in faults:
                    logger.warning("replaced a corrupt row: %s", fault)
                if faults and corrupt > self._max_corrupt_fraction * max(seen, _MIN_SEEN):
                    raise ValueError(
                        f"{corrupt} of {seen} samples ({corrupt / seen:.2%}) are corrupt, where "
                        f"{self._max_corrupt_fraction:.2%} is allowed: {'; '.join(examples)}"
                    )
                yield batch
            raise failure[0]
        finally:
            steps.close()
            # DataLoader has no public close, and a worker's exception holds it in a reference cycle.
            getattr(batches, "_shutdown_workers", lambda: None)()


def validate_stream_state(saved: dict[str, Any], current: dict[str, Any], dataset: str) -> None:
    """Check that a run resumes on the stream it was saved with.

    Args:
        saved: `TrainLoader.stream_state` from the checkpoint.
        current: the same of the loader just built.
        dataset: its name, for the message.

    Raises:
        ValueError: if the dataset or a parameter of the order differs.
    """
    differing = [key for key in current if saved.get(key) != current[key]]
    if "fingerprint" in differing:
        raise ValueError(
            f"dataset '{dataset}' changed since the checkpoint (fingerprint {saved.get('fingerprint')} then, "
            f"{current['fingerprint']} now); resume with the same shards, exclusion file and validation share, or "
            "start a new run"
        )
    if differing:
        changed = ", ".join(f"{key} {saved.get(key)} is now {current[key]}" for key in differing)
        raise ValueError(f"resuming would change the order of samples ({changed}); keep the old values")


def _until_failure(reader: RankReader, failure: list[Exception]) -> Iterator[list[EncodedSample]]:
    """End the steps where the reader fails, so that the error is raised once the steps before it are used.

    Raised inside the DataLoader it would come too early, and from its constructor leave workers behind.
    """
    try:
        yield from reader
    except Exception as error:
        failure.append(error)


def _collate_and_report(
    collate: Collate, samples: list[Sample | Exception]
) -> tuple[Batch, int, list[str]] | Exception:
    """Collate, and tell the main process how many samples and what of them was corrupt; errors pass as they are."""
    errors = (sample for sample in samples if isinstance(sample, Exception))
    if error := next(errors, None):
        return error
    return collate(samples), len(samples), [sample.fault for sample in samples if sample.replaced]


def _start_worker(_: int) -> None:
    """Keep a worker to one core: there are as many workers as cores to feed."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

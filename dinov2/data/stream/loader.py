"""The training loader: reader -> stateless decode workers -> batches, in the order of `SampleOrder`."""

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data.augment.collate import Sample
from dinov2.data.source import EncodedSample, Source
from dinov2.data.stream.memory import Prefetch
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from dinov2.data.stream.worker import DecodedRows, Transform

logger = logging.getLogger(__name__)

_DEFAULT_PREFETCH = Prefetch()
_MIN_SEEN = 10_000  # the damaged share is taken of at least so many, lest one early row stop a run
_EXAMPLES = 5

Batch = dict[str, Any]


def make_train_loader(
    source: Source,
    transform: Transform,
    collate: Callable[[list[Sample]], Batch],
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
    max_damaged_share: float = 0.001,
    start_method: str | None = None,
) -> "TrainLoader":
    """Build the endless loader of one rank.

    Args:
        source: The dataset.
        transform: Called as transform(image uint8 (H, W, 3), g); its result becomes `Sample.crops`.
        collate: Makes the batch dict of one rank from its consecutive samples.
        global_batch: Samples per step over all ranks.
        rank: This rank.
        world_size: Number of ranks.
        start_sample: Global sample index to begin at, which is the number of samples consumed so far.
        order: The order of samples; lanes should be a multiple of `global_batch`.
        num_workers: Worker processes; 0 decodes in this process.
        prefetch: How far the reader works ahead of the workers.
        prefetch_factor: Batches that each worker prepares ahead.
        pin_memory: Whether batches lie in page-locked memory.
        max_damaged_share: Share of this rank's samples, or of the first 10,000, that may be damaged.
        start_method: How workers start. By default they are forked on Linux, which is safe since the reader's
            threads start later; loaders started while this one is being read should use "forkserver".

    Raises:
        ValueError: If the batch cannot be split over the ranks or `start_sample` is negative.
    """
    # In this process and before the fork: a forked child that stops the thread pool it inherited hangs.
    cv2.setNumThreads(1)
    split = {"global_batch": global_batch, "world_size": world_size}
    reader = RankReader(source, order, rank=rank, start_sample=start_sample, prefetch=prefetch, **split)
    make_loader = partial(
        DataLoader,
        _ErrorsAsItems(DecodedRows(source, transform)),
        collate_fn=_DamageReport(collate),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=(start_method or _default_start_method()) if num_workers else None,
        generator=torch.Generator(),  # DataLoader draws a seed, which must not come from the global generator
    )
    stream_state = {**order.parameters, "global_batch": global_batch, "fingerprint": source.fingerprint}
    return TrainLoader(reader, make_loader, stream_state, max_damaged_share)


class TrainLoader:
    """Endless iterable of one rank's batch dicts; leaving the iteration ends its threads and workers.

    Attributes:
        stream_state: For the checkpoint: what must be equal for a resumed run to go on with the same samples.
    """

    def __init__(
        self,
        reader: RankReader,
        make_loader: Callable[..., DataLoader],
        stream_state: dict[str, Any],
        max_damaged_share: float,
    ) -> None:
        self.stream_state = stream_state
        self._reader, self._make_loader, self._max_damaged_share = reader, make_loader, max_damaged_share

    def __iter__(self) -> Iterator[Batch]:
        seen, damaged, examples = 0, 0, []
        failure: list[Exception] = []
        steps = _until_failure(self._reader, failure)
        batches = iter(self._make_loader(batch_sampler=steps))
        try:
            for loaded in batches:
                if isinstance(loaded, Exception):
                    raise loaded
                batch, samples, damages = loaded
                seen += samples
                damaged += len(damages)
                examples = (examples + damages)[:_EXAMPLES]
                for damage in damages:
                    logger.warning("replaced a damaged row: %s", damage)
                if damages and damaged > self._max_damaged_share * max(seen, _MIN_SEEN):
                    raise ValueError(
                        f"{damaged} of {seen} samples ({damaged / seen:.2%}) are damaged, where "
                        f"{self._max_damaged_share:.2%} is allowed: {'; '.join(examples)}"
                    )
                yield batch
            raise failure[0]
        finally:
            steps.close()
            # DataLoader has no public close, and a worker's exception holds it in a reference cycle.
            getattr(batches, "_shutdown_workers", lambda: None)()


def _until_failure(reader: RankReader, failure: list[Exception]) -> Iterator[list[EncodedSample]]:
    """End the steps where the reader fails, so that the error is raised once the steps before it are used.

    Raised inside the DataLoader it would come too early, and from its constructor leave workers behind.
    """
    try:
        yield from reader
    except Exception as error:
        failure.append(error)


def validate_stream_state(saved: dict[str, Any], current: dict[str, Any], dataset: str) -> None:
    """Check that a run resumes on the stream it was saved with.

    Args:
        saved: `TrainLoader.stream_state` from the checkpoint.
        current: The same of the loader just built.
        dataset: Its name, for the message.

    Raises:
        ValueError: If the dataset or a parameter of the order differs.
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


class _ErrorsAsItems(Dataset):
    """Hands what the user can mend to the main process as it is; raised in a worker it would come as a traceback."""

    def __init__(self, rows: DecodedRows) -> None:
        self._rows = rows

    def __getitem__(self, encoded: EncodedSample) -> Sample | Exception:
        try:
            return self._rows[encoded]
        except (ValueError, OSError) as error:
            return error


class _DamageReport:
    """Collate that also tells the main process, which counts and logs, how many samples and which damage.

    Of samples among which there is an error, it returns the first one.
    """

    def __init__(self, collate: Callable[[list[Sample]], Batch]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Sample | Exception]) -> tuple[Batch, int, list[str]] | Exception:
        errors = (sample for sample in samples if isinstance(sample, Exception))
        return next(errors, None) or self._report(samples)

    def _report(self, samples: list[Sample]) -> tuple[Batch, int, list[str]]:
        return self._collate(samples), len(samples), [sample.damage for sample in samples if sample.replaced]


def _start_worker(_: int) -> None:
    """Keep a worker to one core: there are as many workers as cores to feed."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _default_start_method() -> str | None:
    return "fork" if sys.platform == "linux" else None

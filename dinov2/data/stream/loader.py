"""The training loader: reader -> stateless decode workers -> batches, in the order of `SampleOrder`."""

import dataclasses
import logging
import re
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data.augment.collate import Sample
from dinov2.data.source import DecodeError, EncodedSample, Source
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.reader import RankReader
from dinov2.distributed import get_global_rank
from dinov2.utils.signals import heed_parent_only

logger = logging.getLogger(__name__)

_MIN_SEEN = 10_000  # the fraction of corrupt rows is of at least so many, lest one early row stop a run
_EXAMPLES = 5
_LOST = re.compile("DataLoader worker|items of ancdata")  # the latter from the descriptors of shared memory
_GROUPS_TRIED = 8  # row groups after one without any image; more in a row are no accident

Batch = dict[str, Any]
Loaded = tuple[Batch, int, list[str]]
Transform = Callable[[np.ndarray, int], Any]
Collate = Callable[[list[Sample]], Batch]


class TrainLoader:
    """Endless iterable of one rank's batch dicts; leaving the iteration ends its threads and workers.

    Args:
        transform: called as transform(image uint8 (H, W, 3), g); its result becomes `Sample.crops`.
        collate: makes the batch dict of one rank from its consecutive samples.
        order: the order of samples; its number of read streams should be a multiple of the global batch.
        num_workers: worker processes; 0 decodes in this process.
        prefetch_factor: batches that each worker prepares ahead; with `pin_memory` they lie in page-locked memory.
        max_corrupt_fraction: fraction of this rank's samples, or of the first 10,000, that may be corrupt.
        start_method: how workers start. By default they are forked on Linux, which is safe since the reader's
            threads start later; loaders started while this one is being read should use "forkserver".
        batches_per_step: batches that make an optimiser step; the checkpoint tells the images of all of them.
        **split: `global_batch`, `rank`, `world_size`, `start_sample` and `prefetch` of the `RankReader`.

    `stream_state` is for the checkpoint: what must be equal for a resumed run to go on with the same samples.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        collate: Collate,
        *,
        order: SampleOrder,
        num_workers: int,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        max_corrupt_fraction: float = 0.001,
        start_method: str | None = None,
        batches_per_step: int = 1,
        **split: Any,
    ) -> None:
        # In this process and before the fork: a forked child that stops the thread pool it inherited hangs.
        cv2.setNumThreads(1)
        self._reader = RankReader(source, order, **split)
        self._max_corrupt_fraction = max_corrupt_fraction
        global_batch = split["global_batch"] * batches_per_step
        self.stream_state = {**order.parameters, "global_batch": global_batch, "fingerprint": source.fingerprint}
        default_method = "fork" if sys.platform == "linux" else None
        self._make_loader = partial(
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
        self._running: Callable[[], Generator[Batch] | None] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        self._running = weakref.ref(batches)  # whoever drops it ends it, too
        return batches

    def close(self) -> None:
        """End the last iteration with its workers now, and not when a garbage collection comes by, amid anything."""
        if (batches := self._running()) is not None:
            batches.close()

    def _batches(self) -> Generator[Batch]:
        seen, corrupt, examples = 0, 0, []
        failure: list[Exception] = []
        steps = _until_failure(self._reader, failure)
        batches = iter(self._make_loader(batch_sampler=steps))
        try:
            with worker_lost():
                for loaded in _received(batches):
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


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """What workers send; where one ends while it sends, DataLoader may not see yet that it did."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker does not answer: {error or 'end of file'}") from error


@contextmanager
def worker_lost() -> Iterator[None]:
    """Turn what DataLoader raises where one of its workers has ended into a ChildProcessError of one sentence.

    It does so not only while a batch is waited for: a handler of SIGCHLD raises wherever the main thread is.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise ChildProcessError(
            f"A decode worker of rank {get_global_rank()} has ended ({str(error).split('. ')[0]}), as it does for "
            "want of memory; lower train.num_workers, train.prefetch_factor or data.memory_gib."
        ) from error


def validate_stream_state(saved: dict[str, Any], current: dict[str, Any], dataset: str) -> None:
    """Raise ValueError where a run would not go on with its stream: `TrainLoader.stream_state` then and now differ."""
    differing = [key for key in current if saved.get(key) != current[key]]
    if "fingerprint" in differing:
        raise ValueError(
            f"dataset '{dataset}' changed since the checkpoint (fingerprint {saved.get('fingerprint')} then, "
            f"{current['fingerprint']} now); resume with the same shards, exclusions and validation "
            "fraction, or start a new run"
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


def _collate_and_report(collate: Collate, samples: list[Sample | Exception]) -> Loaded | Exception:
    """Collate, and tell the main process how many samples and what of them was corrupt; errors pass as they are."""
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return collate(samples), len(samples), [sample.fault for sample in samples if sample.replaced]


def _start_worker(_: int) -> None:
    """Keep a worker to one core, as there are as many as cores to feed, and to its work while the parent stops."""
    heed_parent_only()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class DecodedRows(Dataset):
    """Encoded to augmented samples; a corrupt row gives way to the next good one of its row group, wrapping.

    Where none of the row group is good, it is the first good one of the row groups that follow. The substitute
    depends on the dataset only, not on ranks or workers, and is augmented as sample g.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self._source, self._transform = source, transform

    def __getitem__(self, encoded: EncodedSample) -> Sample | Exception:
        """Decode and augment one row; an error that the user can mend is returned, not a worker's traceback."""
        try:
            fault = ""
            try:
                image = self._source.decode(encoded)
            except DecodeError as error:
                fault = f"{self._source.describe(encoded.group, encoded.row)}: {error}"
                encoded, image = self._next_good(encoded, fault)
            crops = self._transform(image, encoded.index)
        except (ValueError, OSError) as error:
            return error
        return Sample(encoded.index, crops, encoded.slide, bool(fault), fault, group=encoded.group, row=encoded.row)

    def _next_good(self, bad: EncodedSample, fault: str) -> tuple[EncodedSample, np.ndarray]:
        source = self._source
        counts, groups = source.group_rows, len(source.group_rows)  # of an endless source not to be listed
        after = ((bad.group + step) % groups for step in range(1, groups))
        following = list(islice((group for group in after if counts[group]), _GROUPS_TRIED))
        for group in [bad.group, *following]:
            rows = list(range(counts[group]))
            if group == bad.group:
                rows = rows[bad.row + 1 :] + rows[: bad.row]
            for row, (slide, data) in zip(rows, source.read(group, rows), strict=True):
                candidate = dataclasses.replace(bad, group=group, row=row, slide=slide, data=data)
                try:
                    return candidate, source.decode(candidate)
                except DecodeError:
                    continue
        raise ValueError(
            f"none of the {counts[bad.group]} rows of {source.describe(bad.group)} is an image ({fault}), nor any of "
            f"the {len(following)} row groups after it; restore them or train without them"
        )

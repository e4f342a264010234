"""Where records of metrics go: the console, ``metrics.jsonl``, W&B and others. None of them can stop a run."""

import contextlib
import io
import json
import logging
import math
import os
import secrets
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import dinov2
from dinov2.logging.metrics import is_of_training
from dinov2.logging.names import grouped
from dinov2.utils.secrets import public

logger = logging.getLogger("dinov2")

_PROBED = ("/balanced_accuracy", "/value")  # the headlines of probes with labels, and without
_COLUMNS = 100 - len("01-31 12:00:00 I ")
_WRITE_S, _OPEN_OR_CLOSE_S = 60.0, 120.0  # that others' sinks may take; Slurm gives a run that saves five minutes
_EXPORT_S = 600.0  # a ViT-G of 4.5 GB goes to a server in that
_WANDB_TIMEOUT_S = 30  # W&B's own is 90; nodes without internet wait all of it
_WANDB_FINISH_S = 100  # W&B's own is none: without a network it would never end, here or in the interpreter's end


@dataclass(frozen=True)
class Exported:
    """What sinks are shown of an export."""

    step: int
    pictures: Mapping[str, bytes] = field(default_factory=dict)  # PNG files by name
    teacher: Path | None = None  # its file, where sinks are asked to keep it, with a JSON beside


class Sink:
    """Receives one record per logging period, on rank 0 only; and what is exported, if it takes that."""

    takes_exports: ClassVar[bool] = False  # where no sink does, nothing is drawn

    @property
    def name(self) -> str:
        """What warnings call it."""
        return type(self).__name__

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        raise NotImplementedError

    def export(self, exported: Exported) -> None:
        """Take pictures and teacher of an export."""

    def close(self) -> None:
        """Flush and release what is held."""


class _Apart(Sink):
    """A sink in a thread of its own, where it may hang, as with a server that is gone; then TimeoutError is raised."""

    def __init__(self, make: Callable[..., Sink], *arguments: Any):
        self._name, self._hangs = make.__name__, False
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # At the end of the process no one waits for it.
        threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        self._sink: Sink = self._do(lambda: make(*arguments), _OPEN_OR_CLOSE_S)

    @property
    def name(self) -> str:
        """That of the sink."""
        return self._name

    @property
    def takes_exports(self) -> bool:
        """Whether the sink does."""
        return self._sink.takes_exports

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand the record on."""
        self._do(lambda: self._sink.write(record), _WRITE_S)

    def export(self, exported: Exported) -> None:
        """Hand the export on."""
        self._do(lambda: self._sink.export(exported), _EXPORT_S)

    def close(self) -> None:
        """Close the sink."""
        self._do(self._sink.close, _OPEN_OR_CLOSE_S)
        self._work.put(None)

    def _do(self, action: Callable[[], Any], limit_s: float) -> Any:
        if self._hangs:
            raise TimeoutError("it hangs")
        done: Future[Any] = Future()
        self._work.put((done, action))
        try:
            return done.result(limit_s)
        except TimeoutError:
            if done.done():  # the sink's own
                raise
            self._hangs = True
            raise TimeoutError(f"no answer within {limit_s:g} s") from None

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            done, action = work
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)
            except BaseException as error:  # such as SystemExit: it is not for a logger to end a run
                done.set_exception(RuntimeError(repr(error)))


class Sinks(Sink):
    """Several sinks, of which one that cannot be made, fails or hangs is left out from then on, with a warning.

    Each record gets the wall time, ``time`` in seconds since 1970, and ``attempt``, the number of the run's launch.
    """

    def __init__(self, attempt: int = 1) -> None:
        self._sinks: list[Sink] = []
        self._attempt = attempt

    def add(self, make: Callable[..., Sink], *arguments: Any, apart: bool = False) -> None:
        """Make one more, ``apart`` if it may hang."""
        try:
            self._sinks.append(_Apart(make, *arguments) if apart else make(*arguments))
        except Exception as error:  # whatever the libraries behind them raise, here and below
            logger.warning("%s cannot be made (%s); training goes on.", make.__name__, _text(error))

    @property
    def takes_exports(self) -> bool:
        """Whether one of them does."""
        return any(sink.takes_exports for sink in self._sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand the record to each."""
        record = {**record, "attempt": self._attempt, "time": round(time.time(), 3)}
        self._each(lambda sink: sink.write(record))

    def export(self, exported: Exported) -> None:
        """Hand the export to each."""
        self._each(lambda sink: sink.export(exported))

    def _each(self, hand: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                hand(sink)
            except Exception as error:
                logger.warning("%s failed (%s) and gets no further records.", sink.name, _text(error))
                self._sinks.remove(sink)
                with contextlib.suppress(Exception):
                    sink.close()

    def close(self) -> None:
        """Close each."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("%s could not be closed (%s).", sink.name, _text(error))


class ConsoleSink(Sink):
    """One line per record, which with date and time fits into 100 columns; of probes their headlines."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Log step, total loss, learning rate, speed, wait for data and time left; or headlines of probes."""
        if not is_of_training(record):
            shown = [f"{name} {value:.4f}" for name, value in record.items() if name.endswith(_PROBED)]
            text = f"step {record['step']}  " + "  ".join(text.replace(" ", "\xa0") for text in shown)
            lines = textwrap.fill(text, _COLUMNS, subsequent_indent="  ", break_long_words=False)
            logger.info("%s", lines.replace("\xa0", " "))
            return
        logger.info(
            "step %d/%d  total %#.5g  lr %.2e  %.*f img/s  wait %.0f%%  ETA %s",
            record["step"], record["total_steps"], record["total_loss"], record["lr"],
            int(record["img_per_s"] < 100), record["img_per_s"], record["data_wait_pct"], _duration(record["eta_s"]),
        )  # fmt: skip


class JsonlSink(Sink):
    """Appends each record as one line of strict JSON, in which what is not finite is null.

    After a resume the last line of a step is the valid one. A line that was cut short, by a kill or a full disk, is
    taken off before the next. While the file cannot be written, records are lost, and one warning says so.
    """

    def __init__(self, path: Path):
        self._path, self._failing = path, False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record."""
        line = json.dumps({name: _or_null(value) for name, value in record.items()}, allow_nan=False)
        try:
            with self._path.open("ab+") as file:
                _cut_torn_line(file)
                file.write(line.encode() + b"\n")
        except OSError as error:
            if not self._failing:
                logger.warning("Lines of '%s' cannot be written (%s); training goes on.", self._path, error.strerror)
            self._failing = True
        else:
            self._failing = False


class WandbSink(Sink):
    """A Weights & Biases run whose id is kept in the output folder, so that a resume continues it.

    Names are grouped (`dinov2.logging.names.grouped`), each a panel section of its dashboard. The package's code goes
    with it, and of each export pictures and, if asked, the teacher as an artifact of type ``model``. Runs of a sweep
    are a group. Without a login or network the run is kept offline under the output folder; nothing is ever asked.
    Raises ImportError, with advice, if the package is missing.
    """

    takes_exports = True

    def __init__(self, output_dir: Path, project: str, config: Mapping[str, Any]):
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_WANDB_FINISH_S))  # older versions do not know it
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb is not installed: ./install.sh installs it; or logging.wandb=false") from error
        self._wandb = wandb
        id_file = output_dir / "wandb_run_id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {
            "dir": str(output_dir), "project": project, "id": id_file.read_text().strip(), "resume": "allow",
            "config": dict(config), "name": output_dir.resolve().name,
            # Where the command line holds a secret W&B's own record of it, and of the machine, is left out.
            "settings": wandb.Settings(init_timeout=_WANDB_TIMEOUT_S, x_disable_meta=public(sys.argv) != sys.argv),
        }  # fmt: skip
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        try:
            self._run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            logger.warning("Weights & Biases cannot be reached (%s); this run is logged offline.", _text(error))
            wandb.teardown()  # its service holds the id of the run that failed
            self._run = wandb.init(mode="offline", **options)
        if os.environ.get("DINOV2_RUN_SCRIPT"):
            self._run.save(os.environ["DINOV2_RUN_SCRIPT"], policy="now")
        self._run.log_code(str(Path(dinov2.__file__).parent))
        self._run.define_metric("*", step_metric="step")  # a resumed run goes back to an earlier step

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record."""
        self._run.log({grouped(name): value for name, value in record.items()})

    def export(self, exported: Exported) -> None:
        """Log the pictures, and the teacher as a version of the run's artifact."""
        from PIL import Image

        images = {
            f"pictures/{name}": self._wandb.Image(Image.open(io.BytesIO(png)))
            for name, png in exported.pictures.items()
        }
        if images:
            self._run.log({"step": exported.step, **images})
        if exported.teacher:
            artifact = self._wandb.Artifact(f"teacher-{self._run.id}", "model", metadata={"step": exported.step})
            for path in (exported.teacher, exported.teacher.with_suffix(".json")):
                artifact.add_file(str(path))
            self._run.log_artifact(artifact, aliases=[f"step_{exported.step}"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _cut_torn_line(file: Any) -> None:
    """Shorten a file, open to read and append, to its last whole line."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _duration(seconds: float) -> str:
    """Its two largest units."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f}s"
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"
    return f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]

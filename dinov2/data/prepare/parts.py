"""What each slide gave, kept until all are done, so that a sample list that was stopped goes on where it was."""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.prepare.draw import NO_TISSUE, SlideDraw, SlideJob, draw_from_slide
from dinov2.data.prepare.preview import draw_preview
from dinov2.data.slides.reader import SlideError
from dinov2.utils.files import commit


@dataclass(frozen=True)
class PartJob:
    """One slide to draw from, the folder that keeps its part, and the PNG to draw (None draws none)."""

    slide: SlideJob
    folder: Path
    preview: Path | None


@dataclass(frozen=True)
class Part:
    """What the slide gave, and why its preview is missing ("" where it is not)."""

    draw: SlideDraw
    preview_failure: str = ""


def make_part(job: PartJob) -> Part:
    """Draw from a slide unless its part is there, then the preview unless it shows just that.

    A slide that cannot be read leaves no part: it is tried again.

    Raises:
        OSError: the part or the preview cannot be written.
    """
    name = _part_name(job.slide)
    path = job.folder / f"{name}.npz"
    draw = _load(path)
    if draw is None:
        draw = draw_from_slide(job.slide)
        if draw.failure in ("", NO_TISSUE):
            _save(path, draw)
    if job.preview is None or draw.failure not in ("", NO_TISSUE):
        return Part(draw)
    try:
        draw_preview(job.slide, draw, job.preview, f"{job.folder.name} {name}")
    except SlideError as error:
        return Part(draw, str(error))
    return Part(draw)


def _part_name(slide: SlideJob) -> str:
    """Stands for the slide's file, as it is now, and for what its draws hang on besides the options."""
    try:
        status = os.stat(slide.path)
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = []
    identity = json.dumps([slide.path, slide.key, slide.mpp, *state])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def _save(path: Path, draw: SlideDraw) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    words = {"failure": draw.failure, "skipped": list(draw.skipped.items()), "given_mpp": draw.given_mpp}
    try:
        with partial.open("wb") as file:
            np.savez(file, rows=draw.rows, mpp=draw.mpp, words=np.array(json.dumps(words)))
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path) -> SlideDraw | None:
    try:
        with np.load(path) as part:
            words = json.loads(str(part["words"]))
            draw = SlideDraw(
                part["rows"], part["mpp"], words["failure"], dict(words["skipped"]), words["given_mpp"]
            )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):  # a disk that lost what it had taken
        return None
    return draw

"""Parts of a sample list, one for each slide, kept until all are done, so that a list that was stopped goes on."""

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.prepare.draw import NO_TISSUE, SlideDraw, SlideJob, draw_from_slide
from dinov2.data.prepare.preview import draw_preview
from dinov2.data.slides.errors import SlideError
from dinov2.utils.files import replacing


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
        OSError: if the part or the preview cannot be written.
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
    """Stand for the slide's file, as it is now, and for what its draws hang on besides the options."""
    try:
        status = os.stat(slide.path)
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = []
    identity = json.dumps([slide.path, slide.key, slide.mpp, *state])
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def _save(path: Path, draw: SlideDraw) -> None:
    words = {"failure": draw.failure, "skipped": list(draw.skipped.items()), "given_mpp": draw.given_mpp}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, rows=draw.rows, mpp=draw.mpp, words=np.array(json.dumps(words)))


def _load(path: Path) -> SlideDraw | None:
    try:
        with np.load(path) as part:
            words = json.loads(str(part["words"]))
            skipped = dict(words["skipped"])
            return SlideDraw(part["rows"], part["mpp"], words["failure"], skipped, words["given_mpp"])
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # the last four: a disk that lost what it had taken

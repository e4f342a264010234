"""Parts of a sample list, one for each slide, kept until all are done, so that a list that was stopped goes on."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.prepare.draw import NO_TISSUE, SlideDraw, SlideJob, draw_from_slide
from dinov2.data.prepare.preview import draw_preview
from dinov2.data.slides.errors import SlideError
from dinov2.utils.files import read_arrays, write_arrays


@dataclass(frozen=True)
class PartJob:
    """One slide to draw from, the folder that keeps its part, and the PNG to draw (None draws none)."""

    slide: SlideJob
    folder: Path
    preview: Path | None


def make_part(job: PartJob) -> SlideDraw:
    """Draw from a slide unless its part is there, then the preview unless it shows just that.

    A slide that cannot be read leaves no part: it is tried again. OSError if the part or preview cannot be written.
    """
    slide = job.slide
    try:
        status = os.stat(slide.path)
        state = [status.st_size, status.st_mtime_ns]
    except OSError:
        state = []
    # The name stands for the slide's file, as it is now, and for what its draws hang on besides the options.
    identity = json.dumps([slide.path, slide.key, slide.mpp, *state])
    name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    path = job.folder / f"{name}.npz"
    if stored := read_arrays(path, "rows", "mpp", "words"):
        words = json.loads(str(stored[2]))
        draw = SlideDraw(*stored[:2], words["failure"], dict(words["skipped"]), words["given_mpp"])
    else:
        draw = draw_from_slide(slide)
        words = {"failure": draw.failure, "skipped": list(draw.skipped.items()), "given_mpp": draw.given_mpp}
        if draw.failure in ("", NO_TISSUE):
            write_arrays(path, rows=draw.rows, mpp=draw.mpp, words=json.dumps(words))
    if job.preview is not None and draw.failure in ("", NO_TISSUE):
        try:
            draw_preview(slide, draw, job.preview, f"{job.folder.name} {name}")
        except SlideError as error:
            draw.preview_failure = str(error)
    return draw

"""Parts of a sample list, one for each slide, kept until all are done, so that a list that was stopped goes on."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from dinov2.data.prepare.draw import SlideDraw, SlideJob, draw_from_slide
from dinov2.data.prepare.preview import draw_preview
from dinov2.data.slides.errors import SlideError
from dinov2.utils.files import read_arrays, write_arrays


def make_part(job: tuple[SlideJob, Path, Path | None]) -> SlideDraw:
    """Draw from a slide unless its part is there, then the preview unless it shows just that.

    A job is the slide, the folder that keeps its part, and the PNG to draw (None draws none). A slide that cannot be
    read leaves no part: it is tried again. OSError if the part or preview cannot be written.
    """
    slide, folder, preview = job
    state = []
    with suppress(OSError):
        status = os.stat(slide.path)
        state = [status.st_size, status.st_mtime_ns]
    # The name stands for the slide's file, as it is now, and for what its draws hang on besides the options.
    identity = json.dumps([slide.path, slide.key, slide.mpp, *state, *slide.sampling.rule.pixels.state(slide.path)])
    name = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    path = folder / f"{name}.npz"
    if stored := read_arrays(path, "rows", "mpp", "words"):
        words = json.loads(str(stored[2]))
        known = words["given_mpp"], words["level0_mpp"], tuple(words["notes"])
        draw = SlideDraw(*stored[:2], words["failure"], True, dict(words["skipped"]), *known, doubt=words["doubt"])
    else:
        draw = draw_from_slide(slide)
        words = {"failure": draw.failure, "skipped": list(draw.skipped.items()), "given_mpp": draw.given_mpp}
        words |= {"level0_mpp": draw.level0_mpp, "notes": draw.notes, "doubt": draw.doubt}
        if draw.is_read:
            write_arrays(path, rows=draw.rows, mpp=draw.mpp, words=json.dumps(words))
    if preview is not None and draw.is_read:
        try:
            draw_preview(slide, draw, preview, f"{folder.name} {name}")
        except SlideError as error:
            draw.preview_failure = str(error)
    return draw

"""The list of teachers that a run has exported, how many of them are kept, and the cards beside them."""

import contextlib
import logging
import re
from pathlib import Path

from torch import nn

from dinov2.utils import files

LISTING = "exports.xxh128"
"""File in the run's folder, as of ``xxhsum``: checksum and path of each teacher that the run exported and has kept, and
of the cards that it wrote beside them."""

_CARD = "README.md"
_LINE = re.compile(rf"([0-9a-f]{{32}})  (eval/training_\d+/(?:teacher_checkpoint\.pth|{re.escape(_CARD)}))")

logger = logging.getLogger("dinov2")


def export_path(output_dir: Path, step: int) -> Path:
    """File of the teacher exported after ``step`` steps."""
    return output_dir / "eval" / f"training_{step}" / "teacher_checkpoint.pth"


def list_export(output_dir: Path, step: int, checksum: str, keep: int) -> None:
    """Put an export on the list, and delete those before the ``keep`` last ones of it (0: none), with their cards.

    What is not listed, or no longer what was listed, came from elsewhere and stays.
    """
    listed = _read(output_dir)
    name = export_path(output_dir, step).relative_to(output_dir).as_posix()
    listed.pop(name, None)  # made again after a resume, it is the newest
    listed[name] = checksum
    teachers = [other for other in listed if not other.endswith(_CARD)]
    for old in teachers[:-keep] if keep else ():
        path = output_dir / old
        card = path.with_name(_CARD)
        _delete(path, listed.pop(old), card, listed.pop(card.relative_to(output_dir).as_posix(), ""))
    _write(output_dir, listed)


def write_card(output_dir: Path, step: int, backbone: nn.Module) -> None:
    """Write the model card of an export, ``README.md`` beside it: data, recipe, results of probes, how to load it.

    One that is there stays. A card is not worth a run: whatever goes wrong with it is a warning.
    """
    path = export_path(output_dir, step)
    card = path.with_name(_CARD)
    if card.exists() or not path.exists():
        return
    try:
        files.write_text(card, _card(output_dir, step, backbone))
        listed = _read(output_dir)
        listed[card.relative_to(output_dir).as_posix()] = files.checksum(card)
        _write(output_dir, listed)
    except Exception as error:
        logger.warning("The export of step %d gets no card (%s).", step, error)


def _card(output_dir: Path, step: int, backbone: nn.Module) -> str:
    from dinov2.eval.probe.results import as_table, read_csv  # these import what training does without
    from dinov2.hub.export.card import model_card
    from dinov2.hub.record import normalisation, read_record

    checkpoint, probes = str(export_path(output_dir, step)), output_dir / "eval" / "probes.csv"
    results = read_csv(probes, step) if probes.is_file() else []
    record, colours = read_record(checkpoint) or {}, normalisation(checkpoint)[2]
    side = record.get("architecture", {}).get("img_size")
    return model_card(None, backbone, "fp32", side, colours, record, as_table(results) if results else "")


def _read(output_dir: Path) -> dict[str, str]:
    listing = output_dir / LISTING
    lines = listing.read_bytes().decode(errors="replace").splitlines() if listing.exists() else []
    return {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}


def _write(output_dir: Path, listed: dict[str, str]) -> None:
    files.write_text(output_dir / LISTING, (f"{value}  {name}\n" for name, value in listed.items()))


def _delete(path: Path, checksum: str, card: Path, checksum_of_card: str) -> None:
    try:
        if path.exists() and files.checksum(path) != checksum:
            return
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        if card.exists() and files.checksum(card) == checksum_of_card:
            card.unlink()
    except OSError as error:  # no reason to end a run
        logger.warning("Teacher %s is no longer needed and cannot be deleted (%s).", path, error)
        return
    with contextlib.suppress(OSError):  # something else lies there, such as what was evaluated
        path.parent.rmdir()

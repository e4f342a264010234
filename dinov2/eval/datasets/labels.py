"""Labelled tiles, and where they are from: a folder of classes, a CSV of tiles or of slides, or Parquet shards."""

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow.parquet as pq

from dinov2.data.parquet.source import ParquetSource
from dinov2.data.patients import patient_of, patients_of
from dinov2.data.source import Origin
from dinov2.data.storage.base import is_shard
from dinov2.eval.datasets.images import IMAGE_SUFFIXES, ChosenTiles, ImageFiles, ParquetTiles, TileImages, visible_files

logger = logging.getLogger("dinov2")

SPLITS = ("train", "val", "test")
GROUPINGS = ("patient", "slide", "tile")
Rows = dict[str, dict[str, str]]
_SPLIT_NAMES = {name: name for name in SPLITS} | {"valid": "val", "validation": "val"}


@dataclass(frozen=True)
class LabelledTiles:
    """N tiles; a ValueError tells where the parts do not fit together."""

    images: TileImages
    labels: np.ndarray  # class number of each tile, int64 (N,)
    classes: tuple[str, ...]  # name of each class
    slides: tuple[str, ...] | None = None  # of each tile
    patients: tuple[str, ...] | None = None  # of each tile
    splits: tuple[str, ...] | None = None  # train, val or test for each tile; None where folds are to be made
    per_slide: bool = False  # a label belongs to the slide, and slides are what is counted

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"Labels name {len(self.classes)} class ({', '.join(self.classes)}); at least 2 are needed."
            )
        if absent := [name for number, name in enumerate(self.classes) if not np.any(self.labels == number)]:
            raise ValueError(f"Class {absent[0]!r} has no tiles; every class needs some.")
        if self.splits is None:
            return
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise ValueError(f"Split {unknown[0]!r} is none of {', '.join(SPLITS)}.")
        if missing := [name for name in ("train", "test") if name not in self.splits]:
            raise ValueError(f"Splits hold no {missing[0]} tiles; train and test are needed, val is optional.")

    def groups(self, by: str | None = None) -> np.ndarray:
        """Number of the patient, slide or tile that each tile belongs to, int64 (N,); None takes the widest known."""
        members = self._members[by := self.grouping(by)]
        if members is None:
            raise ValueError(f"Nothing tells the {by} of a tile: labels need a column {by!r}.")
        return np.unique(np.asarray(members), return_inverse=True)[1]

    def grouping(self, by: str | None = None) -> str:
        """What `groups` numbers: patient, slide or tile."""
        return by or next(name for name in GROUPINGS if self._members[name] is not None)

    @property
    def _members(self) -> dict[str, Sequence[str] | range | None]:
        return {"patient": self.patients, "slide": self.slides, "tile": range(len(self.labels))}

    def thinned(self, limit: int, seed: int = 0) -> Self:
        """At most `limit` tiles of each split, drawn so that classes keep their fractions; order stays."""
        rng = np.random.default_rng(seed)
        splits = np.asarray(self.splits or ["all"] * len(self.labels))
        keep = []
        for split in np.unique(splits):
            members = np.flatnonzero(splits == split)
            if len(members) > limit:
                order = members[np.lexsort((rng.random(len(members)), self.labels[members]))]
                members = order[np.arange(limit) * len(members) // limit]
            keep.append(members)
        chosen = np.sort(np.concatenate(keep))

        def pick(values: Sequence[str] | None) -> tuple[str, ...] | None:
            return None if values is None else tuple(values[i] for i in chosen)

        return replace(
            self, images=ChosenTiles(self.images, chosen), labels=self.labels[chosen],
            slides=pick(self.slides), patients=pick(self.patients), splits=pick(self.splits),
        )  # fmt: skip


def open_labelled_tiles(
    root: str | Path, labels: str | Path | None = None, slide_regex: str | None = None
) -> LabelledTiles:
    """Find tiles and their labels; no image is read.

    Without `labels` the folder holds one subfolder per class, or ``train``, ``test`` and perhaps ``val`` with such
    subfolders in each, or Parquet shards with a column ``label`` and perhaps ``patient``, ``split``.

    Args:
        root: folder of images, or of Parquet shards, or one of these.
        labels: CSV ``file,label[,slide,patient,split]`` with paths below `root`, or
            ``slide_id,label[,patient,split]``.
        slide_regex: finds a tile's slide in its path below `root`, as group 1; without it the slide is the parent
            folder, or what the Parquet row names. For labels per slide.

    Raises FileNotFoundError if there is no such folder or CSV, or no tile in it; ValueError if labels and tiles do not
    match.
    """
    root = Path(root)
    if root.is_file() and not is_shard(root.name):
        raise NotADirectoryError(f"'{root}' is no folder of labelled tiles, and no Parquet shard of them.")
    if not root.exists():
        raise FileNotFoundError(f"Folder '{root}' of labelled tiles does not exist.")
    shards = [root] if root.is_file() else sorted(path for path in root.rglob("*") if is_shard(path.name))
    if labels is None:
        return _from_shards(shards) if shards else _from_folder(root)
    rows, key = read_labels(labels)
    return _of_files(root, rows, labels) if key == "file" else _of_slides(root, shards, rows, labels, slide_regex)


def image_names(root: Path) -> list[str]:
    """Paths below a folder of all images in it, sorted; hidden files and folders are left out."""
    names = [name for name in visible_files(root) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise FileNotFoundError(f"Folder '{root}' holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return names


def read_labels(path: str | Path) -> tuple[Rows, str]:
    """Rows of a CSV of labels by file or slide, and which of the two (``file``, ``slide_id``) it names."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Labels '{path}' do not exist.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        key = next((name for name in ("file", "slide_id") if name in columns), None)
        if key is None or "label" not in columns:
            found = ", ".join(columns) or "none"
            raise ValueError(f"Labels '{path}' have columns {found}; file,label or slide_id,label are expected.")
        rows: Rows = {}
        for row in reader:
            if not row[key] or not row["label"]:
                raise ValueError(f"Labels '{path}', line {reader.line_num}: {key} or label is empty.")
            if row[key] in rows:
                raise ValueError(f"Labels '{path}', line {reader.line_num}: {row[key]!r} is there twice.")
            rows[row[key]] = row
    return rows, key


def _from_folder(root: Path) -> LabelledTiles:
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    named = {path: _SPLIT_NAMES.get(path.name.lower()) for path in folders}
    if not folders:
        raise ValueError(f"Folder '{root}' has no subfolders; one per class is expected, or give labels as a CSV.")
    parts = named.items() if {"train", "test"} <= set(named.values()) else [(root, None)]
    names, labels, splits = [], [], []
    for part, split in parts:
        for folder in sorted(path for path in part.iterdir() if path.is_dir() and path.name[0] != "."):
            try:
                found = [f"{folder.relative_to(root).as_posix()}/{name}" for name in image_names(folder)]
            except FileNotFoundError as error:
                raise ValueError(f"Class folder '{folder}' holds no image; fill or remove it.") from error
            names += found
            labels += [folder.name] * len(found)
            splits += [split] * len(found)
    return _build(ImageFiles(root, names), labels, splits=splits if splits[0] else None)


def _from_shards(shards: Sequence[Path]) -> LabelledTiles:
    columns: dict[str, list[str]] = {"label": [], "split": []}
    shared = set.intersection(*(set(pq.read_schema(shard).names) for shard in shards))
    if "label" not in shared:
        raise ValueError(f"Shards in '{shards[0].parent}' have no column 'label'; add it or give labels as a CSV.")
    for shard in shards:
        table = pq.read_table(shard, columns=[name for name in columns if name in shared])
        for name in table.column_names:
            values = table[name].to_pylist()
            if None in values:
                raise ValueError(f"Shard '{shard}', row {values.index(None)}: column {name!r} is empty.")
            columns[name] += map(str, values)
    tiles = ParquetTiles([ParquetSource(str(shard)) for shard in shards])
    origins = tiles.origins()
    slides, patients = [origin.slide for origin in origins], _told_patients(origins)
    return _build(tiles, columns["label"], slides, patients, columns["split"])


def _of_files(root: Path, rows: Rows, source: str | Path) -> LabelledTiles:
    present = set(image_names(root))
    if absent := [name for name in rows if name not in present]:
        raise ValueError(f"Labels '{source}' name {_first_of(absent)}, which is not in '{root}'.")
    if unlabelled := sorted(present - set(rows)):
        raise ValueError(f"Tile {_first_of(unlabelled)} of '{root}' has no label in '{source}'.")
    columns = {name: [row.get(name) or "" for row in rows.values()] for name in ("slide", "patient", "split")}
    return _build(ImageFiles(root, list(rows)), [row["label"] for row in rows.values()], *columns.values())


def _of_slides(
    root: Path, shards: Sequence[Path], rows: Rows, source: str | Path, pattern: str | None
) -> LabelledTiles:
    """Labels by slide; patients are of the labels, else those that the tiles tell, else by the paths."""
    if shards:
        images: TileImages = ParquetTiles([ParquetSource(str(shard)) for shard in shards])
        origins = images.origins()
        paths, slides = [origin.slide for origin in origins], []
        for path in paths:  # the labels name a slide whole, or its file name with or without the suffix
            spellings = (path, Path(path).name, Path(path).stem)
            slides.append(next((name for name in spellings if name in rows), path))
        told = _told_patients(origins)
    else:
        told, names = [], image_names(root)
        images, slides = ImageFiles(root, names), _slides_of(names, pattern)
        paths = [f"{Path(name).parent}/{slide}" for name, slide in zip(names, slides, strict=True)]
    if unlabelled := sorted(set(slides) - set(rows)):
        raise ValueError(f"Slide {_first_of(unlabelled)}, which has tiles, is not in '{source}'.")
    if without := sorted(set(rows) - set(slides)):
        logger.warning("%d slides of '%s' have no tiles, %r for one.", len(without), source, without[0])
    patients, splits = ([rows[slide].get(name) or "" for slide in slides] for name in ("patient", "split"))
    if not any(patients):
        patients = told or _patients(paths) or ()
    return _build(images, [rows[slide]["label"] for slide in slides], slides, patients, splits, per_slide=True)


def _first_of(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _build(
    images: TileImages,
    labels: Sequence[str],
    slides: Sequence[str] = (),
    patients: Sequence[str] = (),
    splits: Sequence[str] | None = (),
    per_slide: bool = False,
) -> LabelledTiles:
    """Columns are all filled or all empty."""
    columns = {"slide": slides, "patient": patients, "split": splits or ()}
    for name, values in columns.items():
        if any(values) and not all(values):
            raise ValueError(f"Column {name!r} is empty for '{images.name(list(map(bool, values)).index(False))}'.")
    classes, numbers = np.unique(np.array(labels, object), return_inverse=True)
    known = {name: tuple(values) if any(values) else None for name, values in columns.items()}
    if known["patient"] is None and known["slide"] is not None:
        known["patient"] = _patients(known["slide"])
    if known["split"] is not None:
        known["split"] = tuple(_SPLIT_NAMES.get(name.lower(), name) for name in known["split"])
        if known["split"][0] in SPLITS and len(set(known["split"])) == 1:  # a part of a larger set, whole by itself
            logger.info("All tiles are of the split %s, so folds are made of them.", known["split"][0])
            known["split"] = None
    return LabelledTiles(images, numbers, tuple(classes), known["slide"], known["patient"], known["split"], per_slide)


def _told_patients(origins: Sequence[Origin]) -> list[str]:
    """Patient of each tile where shards have a column of them, which the slide's stands in for if it is null."""
    if not any(origin.patient for origin in origins):
        return []
    return [patient_of(origin.slide, origin.patient) for origin in origins]


def _patients(slides: Sequence[str]) -> tuple[str, ...] | None:
    """Patients of slides by the rule of the training split, where it knows more than the slides do: else None."""
    patients = tuple(map(patient_of, slides))
    return patients if patients_of(slides) or len(set(patients)) < len(set(slides)) else None


def _slides_of(names: Sequence[str], pattern: str | None) -> list[str]:
    """Slide of each tile: its parent folder, or what group 1 of a pattern finds."""
    if pattern is None:
        return [Path(name).parent.name for name in names]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"Slide pattern {pattern!r} is no regular expression ({error}).") from error
    if compiled.groups != 1:
        raise ValueError(f"Slide pattern {pattern!r} has {compiled.groups} groups; 1 is needed, around the slide.")
    found = [compiled.search(name) for name in names]
    if None in found:
        raise ValueError(f"Slide pattern {pattern!r} does not match tile {names[found.index(None)]!r}.")
    return [match[1] for match in found]

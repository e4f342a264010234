"""Exclusion and validation fraction, row by row: what is left, what is told, and that nothing else comes through."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.augment.collate import Sample
from dinov2.data.online.from_list import SlideListSource
from dinov2.data.parquet.source import ParquetSource
from dinov2.data.source import EncodedSample, Origin, Source
from dinov2.data.stream.derived import make_source, take_tiles
from dinov2.data.stream.loader import DecodedRows, TrainLoader
from dinov2.data.stream.mixture import make_order
from dinov2.data.stream.order import SampleOrder
from dinov2.data.stream.patient_split import (
    Count,
    Fate,
    PatientSplit,
    describe_splits,
    in_validation,
    is_used,
    split_by_patient,
)
from dinov2.data.stream.reader import RankReader
from tests.helpers.memory_source import MemorySource
from tests.helpers.shards import encode, tile, tile_number, write_groups, write_published

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

A1, A2, B, C = "TCGA-AA-0001-DX1.svs", "TCGA-AA-0001-DX2.svs", "TCGA-BB-0002-DX1.svs", "/s/case_17.tiff"
GROUPS = [[A1] * 3, [], [B] * 2, [A1, B, A2, B, C], [C] * 4, [A1, A2], [B, C, B]]
FRACTION = 0.6  # holds the patient of A1 and A2 alone


def stored_rows(source: Source) -> list[bytes]:
    """Read all rows of a source, each row group in one go, and check that slides() names them too."""
    stored: list[bytes] = []
    for group, count in enumerate(source.group_rows.tolist()):
        rows = source.read(group, range(count))
        assert source.slides(group) == [slide for slide, _ in rows]
        stored += [data for _, data in rows]
    return stored


def expected_rows(groups: Sequence[Sequence[str]], *slides: str) -> list[bytes]:
    return [
        b"tiles:%d:%d" % (group, row)
        for group, names in enumerate(groups)
        for row, slide in enumerate(names)
        if slide in slides
    ]


def split(excluded: Sequence[str] = (), fraction: float = 0.0, source: MemorySource | None = None) -> PatientSplit:
    return split_by_patient(source or MemorySource(GROUPS), "tiles", excluded, fraction)


def test_the_fraction_of_these_tests_holds_patient_a_alone() -> None:
    # printf NAME | b2sum -l 64 gives 8c910adc1f1c4a8f, ca34bdfbdd6906b9 and cb2c6b68c443df0a
    names = ("TCGA-AA-0001", "TCGA-BB-0002", "case_17")
    assert [in_validation(name, FRACTION) for name in names] == [True, False, False]


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["tcga-bb-0002"], (A1, A2, C)),
        (["TCGA-AA-0001"], (B, C)),
        (["TCGA-AA-0001-DX2"], (A1, B, C)),
        (["case_17", A1], (A2, B)),
        (["/s/case_17.tiff", "case_17", "TCGA-BB-0002-DX1.svs"], (A1, A2)),
    ],
)
def test_rows_of_excluded_patients_and_slides_are_left_out(excluded: list[str], left: tuple[str, ...]) -> None:
    result = split(excluded)
    assert stored_rows(result.training) == expected_rows(GROUPS, *left)
    assert result.training.num_rows == len(expected_rows(GROUPS, *left))
    assert result.validation is None
    assert not result.unmatched


def test_validation_patients_are_kept_apart_and_exclusion_comes_first() -> None:
    result = split(fraction=FRACTION)
    assert stored_rows(result.training) == expected_rows(GROUPS, B, C)
    assert stored_rows(result.validation) == expected_rows(GROUPS, A1, A2)
    result = split([A2, C], FRACTION)
    assert stored_rows(result.training) == expected_rows(GROUPS, B)
    assert stored_rows(result.validation) == expected_rows(GROUPS, A1)


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from("abcdef"), max_size=7), min_size=1, max_size=8),
    excluded=st.lists(st.sampled_from("abcdefg"), max_size=4),
    fraction=st.sampled_from([0.0, 0.3, 0.7]),
)
def test_every_row_goes_to_one_side_and_an_epoch_visits_its_side_once(
    groups: list[list[str]], excluded: list[str], fraction: float
) -> None:
    held = {slide for slide in "abcdef" if slide not in excluded and in_validation(slide, fraction)}
    training = expected_rows(groups, *(set("abcdef") - held - set(excluded)))
    if not training:
        with pytest.raises(ValueError, match="at least 1 must be left"):
            split(excluded, fraction, MemorySource(groups))
        return
    result = split(excluded, fraction, MemorySource(groups))
    for source, rows in ((result.training, training), (result.validation, expected_rows(groups, *held))):
        assert (source is None) == (not rows)
        if source is not None:
            order = SampleOrder(source.group_rows, seed=1, lanes=4, block_rows=2)
            locations = order.locate(np.arange(len(rows)) + 3 * len(rows))
            visited = [
                source.read(group, [row])[0][1]
                for group, row in zip(locations.group.tolist(), locations.row.tolist(), strict=True)
            ]
            assert sorted(visited) == rows


def test_counts_and_names_that_match_nothing_are_told() -> None:
    excluded = ["TCGA-AA-0001-DX2", "nobody", "case_17", "case_18"]
    first = split(excluded, FRACTION)
    assert first.counts == {
        Fate.TRAINING: Count(slides=1, patients=1, rows=6),
        Fate.EXCLUDED: Count(slides=2, patients=2, rows=8),
        Fate.VALIDATION: Count(slides=1, patients=1, rows=5),
        Fate.UNUSED: Count(slides=0, patients=0, rows=0),
    }
    assert first.unmatched == {"nobody", "case_18"}
    second = split(excluded, FRACTION, MemorySource([["case_18.svs"], ["", ""]]))
    assert describe_splits([first, second], ["one", "two"], excluded) == [
        "dataset 'one': training on 6 rows of 1 slides and 1 patients; "
        "excluded 8 rows of 2 slides and 2 patients; kept for validation 5 rows of 1 slides and 1 patients",
        "dataset 'two': training on 2 rows of 1 slides and 1 patients; "
        "excluded 1 rows of 1 slides and 1 patients; kept for validation 0 rows of 0 slides and 0 patients; "
        "rows that name no slide cannot be excluded",
        "1 of 4 names to exclude match no slide: nobody",
    ]
    many = [f"nobody {number}" for number in range(7)]
    told = describe_splits([split(many)], ["one"], many)[1]
    assert told == f"7 of 7 names to exclude match no slide: {', '.join(many[:5])}, ..."


def test_a_dataset_that_loses_nothing_stays_as_it_is() -> None:
    source = MemorySource(GROUPS)
    assert split(["nobody"], 0.1, source).training is source


def test_fingerprint_tells_which_rows_remain_and_not_why() -> None:
    prints = [
        split(excluded).training.fingerprint
        for excluded in ([], ["case_17"], [A1], [A2], ["TCGA-AA-0001"], ["TCGA-AA-0001", "case_17"])
    ]
    assert len(set(prints)) == len(prints)
    assert split([A2, A1]).training.fingerprint == split(["TCGA-AA-0001"]).training.fingerprint
    assert split(["x", C, A2, A1]).training.fingerprint == split(["TCGA-AA-0001", "case_17"]).training.fingerprint
    assert split(fraction=FRACTION).training.fingerprint == split(["TCGA-AA-0001"]).training.fingerprint
    for groups in ([["a", "b"]], [["a"], ["b"]]):  # as many rows remain, but others
        a, b = (split([name], source=MemorySource(groups)).training.fingerprint for name in "ab")
        assert a != b
    other = split(["case_17"], source=MemorySource(GROUPS, "other")).training.fingerprint
    assert other != split(["case_17"]).training.fingerprint


def test_groups_keep_their_numbers_and_fraction_of_bytes() -> None:
    source = pickle.loads(pickle.dumps(split(["TCGA-BB-0002"]).training))
    assert source.group_rows.tolist() == [3, 0, 0, 3, 4, 2, 1]
    assert source.group_bytes.tolist() == [3000, 0, 0, 3000, 4000, 2000, 1000]
    assert source.slides(2) == []
    assert source.read(3, [2, 0]) == [(C, b"tiles:3:4"), (A1, b"tiles:3:0")]
    assert source.decode(EncodedSample(0, 3, 2, C, b"tiles:3:4")).tolist() == [[[3, 4, 0]]]
    assert source.describe(3) == "row group 3 of tiles"
    assert source.describe(3, 2) == "row 4 of row group 3 of tiles"
    assert not source.is_remote


def test_bytes_are_rounded_up() -> None:
    source = MemorySource([["a", "b", "a"]])
    source.group_bytes = np.array([100])
    assert split(["a"], source=source).training.group_bytes.tolist() == [34]


def test_no_excluded_row_stands_in_for_a_corrupt_one() -> None:
    # Row group 3 holds A1, B, A2, B, C: after the corrupt row 1 comes one of A2, after row 3 one of C.
    source = MemorySource(GROUPS, corrupt={(3, 1), (6, 0)})
    training = split(["TCGA-AA-0001", "case_17"], source=source).training
    rows = DecodedRows(training, lambda image, index: image[0, 0, :2].tolist())
    slide, data = training.read(3, [0])[0]
    sample = rows[EncodedSample(0, 3, 0, slide, data)]
    assert sample.replaced
    assert sample.crops == [3, 3]
    assert sample.slide == B


def test_slides_are_looked_up_once_per_group_and_failures_are_raised() -> None:
    source = MemorySource([[f"s{number % 7}"] * 2 for number in range(1500)])
    assert split(["s3"], source=source).counts[Fate.EXCLUDED].rows == 2 * 214
    assert Counter(source.looked_up) == Counter(range(1500))

    class Broken(MemorySource):
        def slides(self, group: int) -> list[str]:
            raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        split(["s3"], source=Broken(GROUPS))


def test_a_fraction_of_the_slides_is_nested_seeded_and_leaves_validation_alone() -> None:
    names = [f"slide_{number}" for number in range(400)]
    groups = [[names[4 * group + row % 4] for row in range(8)] for group in range(100)]
    rows, validation = {}, set()
    for fraction in (0.1, 0.3, 1.0):
        parts = split_by_patient(MemorySource(groups), "tiles", (), 0.25, (), fraction, 7)
        rows[fraction] = stored_rows(parts.training)
        validation.add(tuple(stored_rows(parts.validation)))
        used = [name for name in names if not in_validation(name, 0.25) and is_used(name, fraction, 7)]
        assert rows[fraction] == expected_rows(groups, *used)
        assert sum(count.rows for count in parts.counts.values()) == 800
        # Binomial: 300 slides or so, four standard deviations.
        expected = fraction * (400 - parts.counts[Fate.VALIDATION].slides)
        assert abs(len(used) - expected) <= 4 * (expected * (1 - fraction)) ** 0.5
    assert set(rows[0.1]) < set(rows[0.3]) < set(rows[1.0]) and len(validation) == 1
    other = split_by_patient(MemorySource(groups), "tiles", (), 0.25, (), 0.3, 8)
    assert set(stored_rows(other.training)) != set(rows[0.3])


def test_tiles_drawn_are_as_many_as_asked_nested_and_spread() -> None:
    groups = [[f"slide_{group}"] * (group % 5) for group in range(200)]
    source = MemorySource(groups)
    drawn = {count: stored_rows(take_tiles(source, count, seed=3)) for count in (1, 40, 200)}
    assert {count: len(set(rows)) for count, rows in drawn.items()} == {1: 1, 40: 40, 200: 200}
    assert set(drawn[1]) < set(drawn[40]) < set(drawn[200]) <= set(stored_rows(source))
    assert drawn[40] == stored_rows(take_tiles(source, 40, seed=3)) != stored_rows(take_tiles(source, 40, seed=4))
    assert take_tiles(source, 400, seed=3) is source is take_tiles(source, 401, seed=3)
    halves = [sum(int(row.split(b":")[1]) < 100 for row in drawn[200])]
    assert 70 <= halves[0] <= 130  # hypergeometric with mean 100, standard deviation 5


def test_nothing_left_is_refused_and_so_is_a_wrong_fraction() -> None:
    message = "of the 19 rows of dataset 'tiles' 12 are excluded and 7 are kept for validation; at least 1"
    with pytest.raises(ValueError, match=message):
        split(["TCGA-BB-0002", "case_17"], FRACTION)
    source = MemorySource(GROUPS)
    with pytest.raises(ValueError, match="the validation fraction is 1; at least 0 and less than 1"):
        split(fraction=1, source=source)
    assert not source.looked_up


def test_sample_list_names_its_slides_and_loses_lines(tmp_path: Path) -> None:
    lines = []
    for number in range(150):
        slide = tmp_path / f"TCGA-AA-000{number // 50}-DX{number % 3}.svs"
        slide.touch()
        lines.append(f"{slide} {number} 0 0\n")
    (tmp_path / "list").write_text("# a comment\n" + "".join(lines))
    source = SlideListSource(tmp_path / "list")
    named = [slide for group in range(3) for slide in source.slides(group)]
    assert named == [line.split()[0] for line in lines]
    training = split_by_patient(source, "list", ["TCGA-AA-0001", "TCGA-AA-0002-DX0"]).training
    left = [data for group, rows in enumerate(training.group_rows) for _, data in training.read(group, range(rows))]
    kept = [number for number in range(150) if number < 50 or (number >= 100 and number % 3)]
    assert left == [b"%d 0 0" % number for number in kept]


def test_a_mixture_of_subsets_gives_each_remaining_row_once_and_resumes() -> None:
    groups = [[("a", "b", "c")[(group + row) % 3] for row in range(6)] for group in range(8)]
    sources = [
        split_by_patient(MemorySource(groups, name), name, [excluded]).training
        for name, excluded in (("one", "a"), ("two", "b"))
    ]
    order = make_order(sources, [1, 1], seed=3, lanes=8, block_rows=4)

    def read(world: int, start: int, steps: int) -> list[tuple[str, bytes]]:
        ranks = [
            RankReader(make_source(sources), order, global_batch=4, rank=rank, world_size=world, start_sample=start)
            for rank in range(world)
        ]
        taken = islice(zip(*ranks, strict=True), steps)
        return [(sample.slide, sample.data) for step in taken for part in step for sample in part]

    expected = {
        (slide, b"%s:%d:%d" % (name, group, row))
        for name, excluded in ((b"one", "a"), (b"two", "b"))
        for group, slides in enumerate(groups)
        for row, slide in enumerate(slides)
        if slide != excluded
    }
    whole = read(1, 0, 32)  # two epochs of 64 rows
    assert set(whole[:64]) == set(whole[64:]) == expected
    assert read(2, 0, 9) + read(4, 36, 3) + read(1, 48, 20) == whole


def tiles(numbers: Sequence[int]) -> list[bytes]:
    return [encode(tile(number), "png") for number in numbers]


def write_datasets(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Write shards of one slide each, and shards that mix slides within row groups; list the tiles of each slide."""
    written: dict[str, dict[str, list[int]]] = {"published": {}, "nanopath": {}}
    for number, slide in enumerate(["TCGA-AA-0001-DX1", "TCGA-AA-0001-DX2", "TCGA-BB-0002-DX1"]):
        numbers = list(range(10 * number, 10 * number + 10))
        write_published(folder / "published" / f"{slide}.parquet", tiles(numbers))
        written["published"][slide] = numbers
    names = ["TCGA-AA-0001-DX3.u", "TCGA-BB-0002-DX2.u", "case_17"]
    for shard in range(3):
        slides = [names[(shard + row // 3 + row) % 3] for row in range(11)]
        numbers = list(range(100 + 20 * shard, 111 + 20 * shard))
        paths = [f"{slide}/{row}_0_1.jpg" for row, slide in enumerate(slides)]
        table = pa.table({"path": paths, "jpeg": pa.array(tiles(numbers), pa.binary())})
        write_groups(folder / "nanopath" / f"shard-{shard:05d}.parquet", table, 4)
        for slide, number in zip(slides, numbers, strict=True):
            written["nanopath"].setdefault(slide, []).append(number)
    return written


def collate(samples: list[Sample]) -> dict[str, list]:
    return {"tiles": [sample.crops for sample in samples], "slides": [sample.slide for sample in samples]}


def number_of(image: np.ndarray, index: int) -> int:
    return tile_number(image)


@pytest.mark.parametrize(
    ("excluded", "fraction", "left"),
    [
        (["TCGA-AA-0001"], 0.0, {"TCGA-BB-0002-DX1", "TCGA-BB-0002-DX2.u", "case_17"}),
        (["case_17", "TCGA-AA-0001-DX2"], 0.0, {"TCGA-AA-0001-DX1", "TCGA-BB-0002-DX1", "TCGA-AA-0001-DX3.u",
                                                "TCGA-BB-0002-DX2.u"}),
        (["TCGA-BB-0002-DX2"], FRACTION, {"TCGA-BB-0002-DX1", "case_17"}),
    ],
)  # fmt: skip
def test_parquet_of_both_schemas_mixed_through_worker_processes(
    excluded: list[str], fraction: float, left: set[str], tmp_path: Path
) -> None:
    written = write_datasets(tmp_path)
    splits = [split_by_patient(ParquetSource(str(tmp_path / name)), name, excluded, fraction) for name in written]
    sources = [split.training for split in splits]
    kept = [sorted(number for slide in slides.keys() & left for number in slides[slide]) for slides in written.values()]
    assert [split.counts[Fate.TRAINING].rows for split in splits] == [len(numbers) for numbers in kept]
    assert not splits[0].unmatched & splits[1].unmatched
    order = make_order(sources, [1, 1], seed=3, lanes=16, block_rows=4)

    def read(world: int, start: int, steps: int, workers: int) -> list[int]:
        shared = {"global_batch": 8, "world_size": world, "start_sample": start, "order": order}
        ranks = [
            TrainLoader(make_source(sources), number_of, collate, rank=rank, num_workers=workers, **shared)
            for rank in range(world)
        ]
        batches = [batch for step in islice(zip(*ranks, strict=True), steps) for batch in step]
        named = {slide.removeprefix("/slides/").removesuffix(".svs") for b in batches for slide in b["slides"]}
        assert named <= left
        return [number for batch in batches for number in batch["tiles"]]

    whole = read(1, 0, 12, 2)
    assert read(2, 0, 3, 0) + read(4, 24, 4, 0) + read(1, 56, 5, 1) == whole
    for numbers, mine in zip(kept, ([n for n in whole if n < 100], [n for n in whole if n >= 100]), strict=True):
        assert len(mine) == len(whole) / 2 >= 2 * len(numbers)
        assert sorted(mine[: len(numbers)]) == sorted(mine[len(numbers) : 2 * len(numbers)]) == numbers


class ToldSource(MemorySource):
    """A source that tells patients and sites: rows given as slide, patient and site."""

    def __init__(self, groups: Sequence[Sequence[tuple[str, str, str]]]) -> None:
        super().__init__([[slide for slide, _, _ in group] for group in groups])
        self._origins = groups

    def origins(self, group: int) -> list[Origin]:
        return [Origin(*row) for row in self._origins[group]]


TOLD = [
    [(A1, "P", "rome"), (A1, "Q", "rome"), (B, "P", "oslo")],  # one slide holds two patients, one patient two slides
    [(C, "R", "oslo"), (C, "", "oslo"), (B, "", "")],
    [("case_18.svs", "Q", "")] * 4,
]


def left_of(told: list, *kept: int) -> list[bytes]:
    numbered = [(group, row) for group, rows in enumerate(told) for row in range(len(rows))]
    return [b"tiles:%d:%d" % numbered[number] for number in kept]


@pytest.mark.parametrize(
    ("excluded", "sites", "left"),
    [
        (["P"], [], (1, 3, 4, 5, 6, 7, 8, 9)),
        (["case_17"], [], (0, 1, 2, 5, 6, 7, 8, 9)),  # a slide, with whoever is on it
        (["TCGA-AA-0001"], [], tuple(range(10))),  # of the path, of which the patients are told otherwise
        (["TCGA-BB-0002"], [], (0, 1, 2, 3, 4, 6, 7, 8, 9)),  # of the path of a row that tells none
        ([], ["oslo"], (0, 1, 5, 6, 7, 8, 9)),
        (["oslo"], ["P"], tuple(range(10))),
        (["Q"], ["rome", "bonn"], (2, 3, 4, 5)),
        ([], [""], tuple(range(10))),
    ],
)
def test_patients_and_sites_that_are_told_are_excluded(
    excluded: list[str], sites: list[str], left: tuple[int, ...]
) -> None:
    source = ToldSource(TOLD)
    result = split_by_patient(source, "tiles", excluded, 0.0, sites)
    rows = [
        data for g, count in enumerate(result.training.group_rows) for _, data in result.training.read(g, range(count))
    ]
    assert rows == left_of(TOLD, *left)
    assert (result.training is source) == (len(left) == 10)
    assert result.sites == {"rome", "oslo", ""}


def test_patients_that_are_told_decide_the_validation() -> None:
    patients = ["P", "Q", "P", "R", "case_17", "TCGA-BB-0002", *"QQQQ"]  # row by row; two of them by the path
    score = {name: int(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), 16) / 2**64 for name in patients}
    least = min(score[name] for name in "PQR") + 1e-9
    held = {number for number, name in enumerate(patients) if score[name] < least}
    result = split_by_patient(ToldSource(TOLD), "tiles", (), least)
    sides = (result.training, set(range(10)) - held), (result.validation, held)
    for source, numbers in sides:
        rows = [data for g, count in enumerate(source.group_rows) for _, data in source.read(g, range(count))]
        assert rows == left_of(TOLD, *sorted(numbers))
    assert sum(count.rows for count in result.counts.values()) == 10
    assert result.counts[Fate.VALIDATION].rows == len(held)


def test_a_barcode_is_one_patient_however_it_is_spelt_and_told() -> None:
    groups = [[("x.svs", "tcga-aa-0001", ""), ("y.svs", "TCGA-AA-0001", ""), (A1, "", "")], [("z.svs", "case_17", "")]]
    result = split_by_patient(ToldSource(groups), "tiles", ["Tcga-AA-0001"])
    assert result.counts[Fate.EXCLUDED] == Count(slides=3, patients=1, rows=3)
    assert split_by_patient(ToldSource(groups), "tiles", (), FRACTION).counts[Fate.VALIDATION].rows == 3


def test_sites_that_match_nothing_are_told() -> None:
    results = [
        split_by_patient(source, "x", (), 0.0, ["oslo", "bonn"]) for source in (ToldSource(TOLD), MemorySource(GROUPS))
    ]
    first, second, nowhere = describe_splits(results, ["one", "two"], (), ["oslo", "bonn"])
    assert all("no site" in line for line in (first, second)) and "oslo" not in nowhere and "bonn" in nowhere


def test_splits_without_such_columns_are_those_of_earlier_runs() -> None:
    """Fingerprints that runs have kept in their checkpoints; what they were computed from is of no release."""
    result = split(["case_17"], FRACTION)
    assert result.training.fingerprint == "50d139f7a9d8886e3c66205bca8f81e8"
    assert result.validation.fingerprint == "4a7da0f3d66bfbf64c3276f86d5918a7"


def test_columns_of_shards_split_as_memory_does(tmp_path: Path) -> None:
    rows = [row for group in TOLD for row in group]
    slides, patients, sites = (list(column) for column in zip(*rows, strict=True))
    told = {"patient": [name or None for name in patients], "site": [name or None for name in sites]}
    table = pa.table({"slide_path": slides, "image_bytes": pa.array(tiles(range(10)), pa.binary()), **told})
    write_groups(tmp_path / "a.parquet", table, [len(group) for group in TOLD])
    for how in (("P",), 0.0, ()), ((), 0.5, ("oslo",)), (("case_17", "Q"), 0.3, ("rome",)):
        one = split_by_patient(ToldSource(TOLD), "x", *how)
        two = split_by_patient(ParquetSource(str(tmp_path)), "x", *how)
        assert one.counts == two.counts and one.sites == two.sites and one.unmatched == two.unmatched
        assert one.training.group_rows.tolist() == two.training.group_rows.tolist()

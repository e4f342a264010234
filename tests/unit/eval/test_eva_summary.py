"""The table of eva's results: figures as eva wrote them, beside published ones."""

import csv
import json
import statistics

import pytest

import HEST_evaluation
from dinov2.eval.eva_summary import PUBLISHED, TASKS, collect, main, read_results

AVERAGES = {
    "OpenMidnight, cls": 0.775,
    "Midnight-92k/392, cls+mean": 0.778,
    "Midnight-92k, cls+mean": 0.767,
    "Midnight-12k, cls+mean": 0.763,
}
"""As published, over the twelve tasks and HEST."""


def write(output, task, values, metric="val/MulticlassAccuracy", session="20260101-000000_a", **others):
    """A session's results.json with these runs, in eva's layout."""
    split = metric.split("/")[0]
    folder = output / task / "results" / session
    folder.mkdir(parents=True)
    sd = statistics.stdev(values) if len(values) > 1 else 0
    entry = {metric: {"mean": statistics.mean(values), "stdev": sd, "values": values}}
    metrics = {"val": [], "test": []} | {split: [entry]} | others
    (folder / "results.json").write_text(json.dumps({"metrics": metrics}))


def test_published_rows_have_their_published_averages():
    for model, average in AVERAGES.items():
        row = (*PUBLISHED[model], HEST_evaluation.PUBLISHED[model])
        assert len(row) == 13 and statistics.mean(row) == pytest.approx(average, abs=5.5e-4)


def test_figures_and_order(tmp_path, capsys):
    write(tmp_path, "consep", [0.5, 0.7], "val/MonaiDiceScore")
    other = {"val": [{"val/BinaryBalancedAccuracy": {"mean": 0.1, "stdev": 0, "values": [0.1]}}]}
    write(tmp_path, "pcam", [0.9], "test/BinaryBalancedAccuracy", **other)
    write(tmp_path, "bach", [0.1], session="20260101-000000_b")
    write(tmp_path, "bach", [0.6, 0.9, 0.3], session="20260102-000000_a")
    lines = ("consep\tdone\t3700", "bach\tno data\t0", "pcam\tdone\t65", "crc\tfailed\t9", "bach\tdone\t61")
    (tmp_path / "status.tsv").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "summary.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[4:]]
    assert [row[:6] for row in rows] == [
        ["bach", "balanced accuracy, val", "0.600", "0.300", "3", "0:01:01"],
        ["crc", "failed", "", "", "", "0:00:09"],
        ["pcam", "balanced accuracy, test", "0.900", "", "1", "0:01:05"],
        ["consep", "Dice, val", "0.600", "0.141", "2", "1:01:40"],
    ]
    assert rows[0][6:] == ["0.916", "0.917", "0.904", "0.889", "0.907"]
    with (tmp_path / "summary.csv").open() as file:
        table = {row["task"]: row for row in csv.DictReader(file)}
    assert float(table["consep"]["sd"]) == pytest.approx(0.02**0.5) and table["pcam"]["sd"] == ""
    assert table["bach"]["OpenMidnight, cls"] == "0.916" and table["crc"]["mean"] == ""


def test_average_only_of_all_twelve(tmp_path, capsys):
    lines = []
    for i, task in enumerate(TASKS):
        write(tmp_path, task, [i / 10])
        lines.append(f"{task}\tdone\t10")
        (tmp_path / "status.tsv").write_text("\n".join(lines))
        assert main([str(tmp_path)]) == 0
        page = capsys.readouterr().out
        assert ("| average |" in page) == (len(lines) == 12)
    # The mean of 0, 0.1, ... 1.1; OpenMidnight's twelve add up to 9.683.
    assert "| average | all twelve | 0.550 |  |  | 0:02:00 | 0.807 |" in page


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ("{", "not a results.json"),
        ('{"metrics": {"val": [], "test": []}}', "has none of"),
        ("[]", "not a results.json"),
    ],
)
def test_corrupt_results(tmp_path, capsys, results, reason):
    path = tmp_path / "bach/results/20260101_a/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(results)
    with pytest.raises(ValueError, match=reason):
        read_results(path)
    (tmp_path / "status.tsv").write_text("bach\tdone\t1\n")
    assert main([str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def test_what_is_no_output_of_run_eva(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "status.tsv" in capsys.readouterr().err
    for line in ("bach done 1", "bach\tdone\tx", "bach\tdone\t1", "nonesuch\tdone\t1"):
        (tmp_path / "status.tsv").write_text(line)
        with pytest.raises(ValueError, match="cannot be read"):
            collect(tmp_path)

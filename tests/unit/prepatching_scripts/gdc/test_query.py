"""Files found by a filter, over several pages."""

from collections.abc import Iterator

import pytest

from dinov2.data.storage.retry import RemoteError, Retries
from prepatching_scripts.gdc.manifest import GdcFile
from prepatching_scripts.gdc.query import Gdc, slide_filter
from tests.helpers.gdc_server import Fault, GdcServer
from tests.unit.prepatching_scripts.gdc.conftest import add_collection

DIAGNOSTIC = slide_filter(["Diagnostic Slide"])


@pytest.mark.parametrize("page", [1, 3, 4, 8, 100])
def test_find_pages_through_the_answer(server: GdcServer, quick: Retries, page: int):
    wanted = add_collection(server)
    server.faults["files"] = [None, Fault("503"), Fault("html"), Fault("drop"), None]
    quick = Retries(5, 0.001, 0.001, pause_folder=quick.pause_folder)
    with Gdc(server.url, quick, page=page) as gdc:
        found = gdc.find(DIAGNOSTIC)
    assert found == [GdcFile(*file, "released") for file in sorted(wanted.values())]
    assert [query["from"] for query in server.queries] == list(range(0, 8, page))


def test_find_by_project_and_strategy(server: GdcServer, quick: Retries):
    wanted = add_collection(server)
    with Gdc(server.url, quick) as gdc:
        brca = gdc.find(slide_filter(["Diagnostic Slide"], ["TCGA-BRCA"]))
        both = gdc.find(slide_filter(["Diagnostic Slide", "Tissue Slide"]))
        assert gdc.find(slide_filter(["Diagnostic Slide"], ["TCGA-NONE"])) == []
    assert {file.name for file in brca} == {name for name in wanted if "BRCA" in name}
    assert {file.name for file in both} == {*wanted, "frozen.svs"}


def test_find_refuses_a_list_that_changes_while_it_is_read(server: GdcServer, quick: Retries):
    def grow() -> Iterator[None]:
        yield None
        server.add("new.svs", b"5")
        yield None

    add_collection(server)
    server.faults["files"] = grow()
    with Gdc(server.url, quick, page=5) as gdc, pytest.raises(RemoteError, match="changed while"):
        gdc.find(DIAGNOSTIC)


def test_find_says_what_the_server_does_not_do(server: GdcServer, quick: Retries):
    server.add("../../evil.svs", b"6")
    with Gdc(server.url, quick) as gdc:
        with pytest.raises(ValueError, match=r"evil\.svs.*plain file name"):
            gdc.find(DIAGNOSTIC)
        with pytest.raises(ValueError, match=r"does not understand the filter.*not an operator"):
            gdc.find({"op": "near", "content": {"field": "access", "value": "open"}})
        server.faults["files"] = [Fault("200")]
        with pytest.raises(RemoteError, match="is it a GDC API"):
            gdc.find(DIAGNOSTIC)
        server.faults["files"] = [Fault("html")] * 3
        with pytest.raises(RemoteError, match=r"3 tries.*JSONDecodeError"):
            gdc.find(DIAGNOSTIC)

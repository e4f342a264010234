"""Files found by a filter, over several pages."""

from collections.abc import Iterator

import pytest

from prepatching_scripts.gdc.manifest import GdcFile
from prepatching_scripts.gdc.query import slide_filter
from tests.helpers.gdc_server import Fault, GdcServer
from tests.unit.prepatching_scripts.gdc.conftest import add_collection

DIAGNOSTIC = slide_filter(["Diagnostic Slide"])


@pytest.mark.parametrize("page", [1, 3, 4, 8, 100])
def test_find_pages_through_the_answer(server: GdcServer, make_gdc, page: int):
    wanted = add_collection(server)
    server.faults["files"] = [None, Fault("503"), Fault("html"), Fault("drop"), None]
    found = make_gdc(attempts=5).find(DIAGNOSTIC, page)
    assert found == [GdcFile(*file, "released") for file in sorted(wanted.values())]
    assert [query["from"] for query in server.queries] == list(range(0, 8, page))


def test_find_by_project_and_strategy(server: GdcServer, make_gdc):
    wanted = add_collection(server)
    gdc = make_gdc()
    brca = gdc.find(slide_filter(["Diagnostic Slide"], ["TCGA-BRCA"]))
    both = gdc.find(slide_filter(["Diagnostic Slide", "Tissue Slide"]))
    assert gdc.find(slide_filter(["Diagnostic Slide"], ["TCGA-NONE"])) == []
    assert {file.name for file in brca} == {name for name in wanted if "BRCA" in name}
    assert {file.name for file in both} == {*wanted, "frozen.svs"}


def test_find_refuses_a_list_that_changes_while_it_is_read(server: GdcServer, make_gdc):
    def grow() -> Iterator[None]:
        yield None
        server.add("new.svs", b"5")
        yield None

    add_collection(server)
    server.faults["files"] = grow()
    with pytest.raises(ConnectionError, match="changed while"):
        make_gdc().find(DIAGNOSTIC, 5)


def test_find_says_what_the_server_does_not_do(server: GdcServer, make_gdc):
    server.add("../../evil.svs", b"6")
    gdc = make_gdc()
    with pytest.raises(ValueError, match=r"evil\.svs.*plain file name"):
        gdc.find(DIAGNOSTIC)
    with pytest.raises(ConnectionError, match="HTTP 400"):
        gdc.find({"op": "near", "content": {"field": "access", "value": "open"}})
    for fault in ("200", "html"):
        server.faults["files"] = [Fault(fault)] * 3
        with pytest.raises(ConnectionError, match="is it a GDC API"):
            gdc.find(DIAGNOSTIC)

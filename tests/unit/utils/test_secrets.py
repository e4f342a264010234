"""What is secret in texts, values and log lines."""

import logging
from collections.abc import Iterator

import pytest

from dinov2.utils import secrets


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrets, "_hidden", {})
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h/w.pth?token=abc", "http://h/w.pth?***"),
        ("at 'https://user:pass@h:80/a?x=1&y=2', then", "at 'https://***@h:80/a?***', then"),
        ("s3://KEY:SECRET@bucket/part-?.parquet", "s3://***@bucket/part-?.parquet"),
        ("s3://bucket/a?versionId=abc", "s3://bucket/a?***"),
        ("hf://datasets/org/name@v1/data", "hf://datasets/org/name@v1/data"),
        ("is it there? a=b, e@mail", "is it there? a=b, e@mail"),
        ("http://user:p@ss@h/a, http://h:80/a@b", "http://***@h/a, http://h:80/a@b"),
        ("s3://KEY:SEC/RET+x/@bucket/a", "s3://***@bucket/a"),
        ("http://h/a#access_token=abc", "http://h/a#***"),
        ("[http://h/a,http://u:p@h/b?t=1]", "[http://h/a,http://***@h/b?***"),
        ("simplecache::zip://x-?.zip::s3://K:S@b/x", "simplecache::zip://x-?.zip::s3://***@b/x"),
        ("file:///a:b/c@d", "file:///a:b/c@d"),
    ],
)
def test_urls_lose_user_and_query(text: str, shown: str):
    assert secrets.public_text(text) == shown
    assert secrets.public({"a": [text, 1, None], "b": (text,)}) == {"a": [shown, 1, None], "b": (shown,)}


def test_parts_of_urls_are_hidden_where_they_stand_alone():
    secrets.hide_urls(["data.path=s3://KEYKEYKEY:SECRETSECRET@bucket/x", "w=http://h/w?sig=SIGNATURE&n=1"])
    assert secrets.public_text("no bucket SECRETSECRET; SIGNATURE") == "no bucket ***; ***"
    secrets.hide_urls(["s3://KEYKEYKEY:ABC/DEFGHIJ@bucket/x"])
    assert secrets.public_text('no bucket "KEYKEYKEY:ABC" nor DEFGHIJ') == 'no bucket "***" nor ***'
    secrets.hide_urls(["s3://KEYKEYKEY:SLASH%2FED%2Bkey@bucket/x"])
    assert secrets.public_text("the secret SLASH/ED+key of SLASH%2FED%2Bkey") == "the secret *** of ***"


def test_a_value_that_is_part_of_another_leaves_nothing_of_it():
    secrets.hide("abcdef", "${oc.env:A}")
    secrets.hide("abcdefghi", "${oc.env:B}")
    assert secrets.public_text("abcdefghi abcdef") == "${oc.env:B} ${oc.env:A}"


def test_log_lines_of_any_logger_and_their_tracebacks_are_public():
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    library = logging.getLogger("test_secrets.library")
    library.addHandler(Kept())
    for _ in range(2):  # by each command of a process
        secrets.keep_logs_public()
    library.error("cannot read %s (%d%%)", "http://h/w?token=abc", 5)
    try:
        raise ValueError("http://h/w?token=abc")
    except ValueError:
        library.exception("it failed")
    assert lines[0] == "cannot read http://h/w?*** (5%)"
    assert "ValueError" in lines[1] and "token" not in lines[1].replace('"http://h/w?token=abc"', "")

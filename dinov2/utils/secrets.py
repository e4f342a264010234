"""Secrets stay out of files and log lines: user and query of URLs, and values that come from the environment."""

import logging
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote_plus

_SCHEME = r"[a-zA-Z][\w+.-]{0,20}://"
# A password may hold "@" and, unlike what follows a port, "/": keys of AWS do, and not everyone writes them encoded.
# URLs may follow upon one another without a blank: in lists, and as fsspec chains them.
_URL = re.compile(
    rf"""(?P<scheme>{_SCHEME})
    (?P<user>((?!{_SCHEME})[^/\s'"])*@|[^/\s'":@]*:(?!\d+/)((?!{_SCHEME})[^\s'"?])*@)?
    (?P<path>((?!{_SCHEME})[^\s'"?\#])*)
    (?P<query>[?\#]((?!{_SCHEME})[^\s'"])*)?""",
    re.VERBOSE,
)
_SHORTEST = 6  # characters; what is shorter is no secret, and would be found in many a word
_hidden: dict[str, str] = {}  # what is shown in place of each value


def hide(value: str, shown: str = "***") -> None:
    """Show something else in place of a value from now on, wherever text passes `public_text`."""
    if len(value) >= _SHORTEST:
        _hidden[value] = shown


def hide_urls(values: Iterable[str]) -> None:
    """Hide user, password and query values of URLs among some texts, also where libraries name them alone."""
    for value in values:
        for found in _URL.finditer(value):
            user, query = (found["user"] or "").removesuffix("@"), found["query"] or ""
            password = user.partition(":")[2]
            # Libraries that take "/" for the end of the host show what is before it, too.
            pieces = (user.partition("/")[0], *password.split("/")) if "/" in password else ()
            for part in (password, *pieces, *re.findall(r"=([^&;#]*)", query)):
                hide(part)
                hide(unquote_plus(part))  # as servers and libraries write it


def public_text(text: str) -> str:
    """A text, without what is hidden and without user, password and query of the URLs in it."""
    for value in sorted(_hidden, key=len, reverse=True):  # the longest first, one may be part of another
        text = text.replace(value, _hidden[value])
    return _URL.sub(_public_url, text) if "://" in text else text


def without_user(url: str) -> str:
    """A URL without user and password."""
    return _URL.sub(lambda found: found["scheme"] + found["path"] + (found["query"] or ""), url)


def public(value: Any) -> Any:
    """The same for all texts in nested mappings, lists and tuples."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    return type(value)(public(item) for item in value) if isinstance(value, list | tuple) else value


def keep_logs_public() -> None:
    """Let all loggers of this process, those of libraries too, say what `public_text` leaves."""
    make = logging.getLogRecordFactory()
    if getattr(make, "is_public", False):
        return

    def make_public(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = public_text(record.getMessage()), None
        if record.exc_info and record.exc_info[0]:
            record.exc_text = public_text("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    make_public.is_public = True
    logging.setLogRecordFactory(make_public)


def _public_url(found: re.Match[str]) -> str:
    user, query = found["user"], found["query"] or ""
    is_glob = "=" not in query and not found["scheme"].startswith("http")  # s3://bucket/part-?.parquet
    if query and not is_glob:
        query = query[0] + "***"
    return found["scheme"] + ("***@" if user else "") + found["path"] + query

"""Secrets kept out of log records, as `errors.redaction` keeps them out of messages."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shardmix.errors.redaction import without_environment

_lock = threading.Lock()
_num_redacting = 0
_factory_before: Any = None


@contextmanager
def logs_redacted() -> Iterator[None]:
    """Keep secrets out of all log records meanwhile: HTTP clients log the URLs they request."""
    global _num_redacting, _factory_before
    with _lock:
        if _num_redacting == 0:
            _factory_before = logging.getLogRecordFactory()
            logging.setLogRecordFactory(_redacted_record)
        _num_redacting += 1
    try:
        yield
    finally:
        with _lock:
            _num_redacting -= 1
            # Another factory may have come on top: it calls ours.
            if _num_redacting == 0 and logging.getLogRecordFactory() is _redacted_record:
                logging.setLogRecordFactory(_factory_before)


def _redacted_record(*arguments: Any, **keywords: Any) -> logging.LogRecord:
    record: logging.LogRecord = _factory_before(*arguments, **keywords)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # its arguments do not fit: logging reports that
        return record
    bare = without_environment(message)
    if bare != message:
        record.msg, record.args = bare, ()
    if record.exc_info:
        traceback = logging.Formatter().formatException(record.exc_info)
        record.exc_text = without_environment(traceback)
    return record

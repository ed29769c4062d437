"""JSON, CSV and TSV files, read a row at a time: a file of any length in little memory, every value as it was written."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.conversation import Row, RowError
from engine.errors import UserError

CHUNK = 1 << 20
"""Bytes of an array that are read at a time."""
DELIMITERS = {"csv": ",", "tsv": "\t"}
_WHITE = re.compile(r"[ \t\r\n]*")
_scan = json.JSONDecoder().raw_decode
_decode = json.JSONDecoder().decode


def read(name: str, file: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        name: What it is called; .gz at its end says that it is compressed.
        file: Where it is.
        kind: json (an array of objects, or one object a line), csv or tsv.

    Raises:
        UserError: If it cannot be read as a whole; a row that cannot is yielded as a RowError.
    """
    count = 0
    try:
        with gzip.open(file) if name.endswith(".gz") else file.open("rb") as stream:
            rows = _json_rows(name, stream) if kind == "json" else _csv_rows(name, stream, DELIMITERS[kind])
            for count, row in enumerate(rows, 1):  # noqa: B007
                yield row
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{name}: not a whole gzip file ({error}); copy or make it again.") from error
    if not count:
        raise UserError(f"{name}: the file has no rows.")


def _json_rows(name: str, stream: BinaryIO | gzip.GzipFile) -> Iterator[Row]:
    """Yield the rows of an array of objects, or of one object a line."""
    head: list[bytes] = []
    for line in stream:
        head.append(line)
        if line.strip().strip(codecs.BOM_UTF8):
            break
    if head and head[-1].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        stream.seek(0)
        yield from _array_rows(_Window(name, stream))
        return
    number = 0
    try:
        for number, data in enumerate(chain(head, stream), 1):
            if data.isspace():
                continue
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            place = f"{name} line {number}"
            try:
                row = _decode(text)
            except (ValueError, RecursionError) as error:
                if text.strip():
                    yield place, RowError(f"not JSON ({error}); each line holds one JSON object")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                yield place, RowError(f"a row must be a JSON object, got {text.strip():.60}")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{name} line {number}", error.reason, error.start) from error


def _not_utf8(place: str, reason: str, byte: int) -> UserError:
    return UserError(f"{place}: not UTF-8 text ({reason} at byte {byte}); convert it to UTF-8.")


class _Window:
    """A JSON text of which only the part around the next value is held.

    Args:
        name: What it is called.
        stream: Its bytes.
    """

    def __init__(self, name: str, stream: BinaryIO | gzip.GzipFile) -> None:
        self.name, self.row = name, 0
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._whole, self._num_bytes = "", 0, False, 0
        self._not_utf8: tuple[str, int] | None = None
        self._chars, self._lines, self._line_start = 0, 0, 0  # of what is behind, and where its last line begins

    def peek(self) -> str:
        """Return the next character that is no white space, or "" at the end."""
        while True:
            found = _WHITE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._whole:
                return self._text[self._at : self._at + 1]
            self._grow()

    def skip(self) -> None:
        """Go past one character."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins here, and go past it.

        Raises:
            UserError: If there is none.
        """
        while True:
            try:
                value, end = _scan(self._text, self._at)
                # A number could go on behind the end of the text, at most by three characters that are none alone (e-1).
                if isinstance(value, (dict, list, str)) or end + 3 <= len(self._text) or self._whole:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                # The longest token that the end of the text can cut, but for a string, is a pair of escapes.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12
                if self._whole or not cut:
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error), self._at) from error
            self._grow()

    def error(self, message: str, at: int | None = None) -> UserError:
        """Return the sentence about a place of the text, by default the next character."""
        at = self._at if at is None else at
        line, start = self._lines_before(at)
        where = f"line {line + 1} column {self._chars + at - start + 1} (char {self._chars + at})"
        row = f" row {self.row}" if self.row else ""
        return UserError(
            f"{self.name}{row}: not JSON ({message}: {where}); the file holds an array of objects, or one object a line."
        )

    def _lines_before(self, at: int) -> tuple[int, int]:
        """Return the number of lines that end before a place, and where the place's own begins."""
        last = self._text.rfind("\n", 0, at)
        start = self._line_start if last < 0 else self._chars + last + 1
        return self._lines + self._text.count("\n", 0, at), start

    def _grow(self) -> None:
        """Forget what is behind and read at least as much as is left, so that a long value costs no square of its length."""
        if self._not_utf8 is not None:
            raise _not_utf8(f"{self.name} row {self.row}", *self._not_utf8)
        self._lines, self._line_start = self._lines_before(self._at)
        self._chars += self._at
        rest = self._text[self._at :]
        pending = len(self._decoder.getstate()[0])
        data = self._stream.read(max(CHUNK, len(rest)))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:  # told when the rows before it are read
            text = error.object[: error.start].decode()
            self._not_utf8 = error.reason, self._num_bytes - pending + error.start
        self._text = rest + (text if self._num_bytes else text.removeprefix("\ufeff"))
        self._at, self._whole = 0, not data
        self._num_bytes += len(data)


def _array_rows(window: _Window) -> Iterator[Row]:
    """Yield the rows of an array."""
    window.peek()
    window.skip()
    ended = window.peek() == "]"
    if ended:
        window.skip()
    while not ended:
        window.row += 1
        window.peek()
        row = window.value()
        place = f"{window.name} row {window.row}"
        if isinstance(row, dict):
            yield place, row
        else:
            yield place, RowError(f"a row must be a JSON object, got {json.dumps(row):.60}")
        sign = window.peek()
        if sign not in ("]", ","):
            raise window.error("Expecting ',' delimiter")
        ended = sign == "]"
        window.skip()
    if window.peek():
        raise window.error("Extra data")
    if not window.row:
        raise UserError(f"{window.name}: the array has no rows.")


def _csv_rows(name: str, stream: BinaryIO | gzip.GzipFile, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file; every value is a string."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_text_lines(name, stream), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            place, line = f"{name} line {line}", reader.line_num + 1
            if not fields:
                continue
            if columns is None:
                columns = fields
                if len(set(columns)) < len(columns):
                    raise UserError(f"{place}: a column is there twice ({', '.join(columns)}); rename it.")
            elif len(fields) != len(columns):
                yield place, RowError(f"{len(fields)} fields, and the first line names {len(columns)} columns")
            else:
                yield place, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{name} line {line}: not CSV ({error}); quote fields that hold quotes, separators or line ends."
        ) from error


def _text_lines(name: str, stream: BinaryIO | gzip.GzipFile) -> Iterator[str]:
    """Yield a file's lines as text, their ends as they are."""
    number = 0
    try:
        for number, data in enumerate(stream, 1):  # noqa: B007
            yield data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{name} line {number}", error.reason, error.start) from error

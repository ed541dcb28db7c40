"""JSON of strangers: what is no JSON, no number or out of range, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from tango_plugins import TangoError
from tango_runtime.util.jsonschema import Range, from_json, parse_json, shown


@dataclass(frozen=True)
class Thing:
    count: Annotated[int, Range(1, 10)]
    sizes: tuple[Annotated[int, Range(0, 5)] | str, ...] = ()
    ratio: Annotated[float, Range(0, 1)] = 0.5
    inner: Thing | None = None


@pytest.mark.parametrize("content", ["", "{", b"\xff", "[" * 100_000, "9" * 5000, "\ufeff{}"])
def test_what_is_no_json_is_an_error_that_says_where(content):
    with pytest.raises(TangoError, match=r"^here is not JSON: ") as caught:
        parse_json(content, "here", "a hint")
    assert "\n" not in caught.value.message
    assert caught.value.hint == "a hint"


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"a": 1, "a": 1}', '"a"'),
        ('[{"a": 1, "b": {"c": 1, "\\u0063": 2}}]', '"c"'),
        ('{"\\ud800": 1, "\\ud800": 2}', r'"\ud800"'),
    ],
)
def test_a_key_that_is_there_twice_is_named(content, key):
    with pytest.raises(TangoError) as caught:
        parse_json(content, "here", "a hint")
    assert caught.value.message == f"here is not JSON: an object has the key {key} twice"


@pytest.mark.parametrize("content", ['{"a": [1, 2.5, "ä"]}', '{"a": [1, 2.5, "ä"]}'.encode()])
def test_text_and_utf8_are_parsed(content):
    assert parse_json(content, "here", "") == {"a": [1, 2.5, "ä"]}


def test_numbers_in_range_are_converted():
    data = {"count": 10, "sizes": [0, 5, "N"], "ratio": 1.0, "inner": {"count": 1}}
    assert from_json(Thing, data, "x") == Thing(10, (0, 5, "N"), 1.0, Thing(1))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"count": 0}, "x: count is 0, not an integer from 1 to 10"),
        ({"count": 11}, "x: count is 11, not"),
        ({"count": True}, "x: count is true, not"),
        ({"count": 2.0}, "x: count is 2.0, not"),
        ({"sizes": [1, 6]}, "x: sizes[1] is 6, not an integer from 0 to 5"),
        ({"sizes": [None]}, "x: sizes[0] is null, not an integer from 0 to 5 or a string"),
        ({"ratio": 1.5}, "x: ratio is 1.5, not a finite number from 0 to 1"),
        ({"ratio": float("nan")}, "x: ratio is NaN, not"),
        ({"ratio": float("inf")}, "x: ratio is Infinity, not"),
        ({"ratio": 1}, "x: ratio is 1, not"),
        ({"inner": {"count": -1}}, "x: inner: count is -1, not"),
    ],
)
def test_a_number_out_of_range_is_named(changes, error):
    with pytest.raises(TangoError) as caught:
        from_json(Thing, {"count": 1, **changes}, "x")
    assert caught.value.message.startswith(error)


def test_what_is_nested_too_deeply_is_an_error():
    data = {"count": 1}
    for _ in range(500):
        data = {"count": 1, "inner": data}
    with pytest.raises(TangoError, match="x is nested too deeply"):
        from_json(Thing, data, "x")
    lists = []
    for _ in range(5000):
        lists = [lists]
    assert "nested too deeply" in shown(lists)
    assert len(shown(["x" * 1000])) == 60

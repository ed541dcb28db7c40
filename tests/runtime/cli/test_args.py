"""Types of command-line options, and where JSON goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tango_plugins import TangoError
from tango_runtime.cli.args import STDOUT, new_file, non_negative_int, percent, positive_int, ratio, write_json


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (positive_int, "1", 1),
        (positive_int, "32", 32),
        (non_negative_int, "0", 0),
        (ratio, "0.1", 0.1),
        (ratio, "1", 1.0),
        (percent, "95", 95.0),
        (percent, "100", 100.0),
    ],
)
def test_valid_values(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (positive_int, "0"),
        (positive_int, "-1"),
        (positive_int, "1.5"),
        (positive_int, "many"),
        (positive_int, ""),
        (non_negative_int, "-1"),
        (ratio, "0"),
        (ratio, "1.01"),
        (ratio, "-0.1"),
        (ratio, "nan"),
        (ratio, "inf"),
        (ratio, "half"),
        (percent, "0"),
        (percent, "101"),
    ],
)
def test_invalid_values_are_named(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text!r} is not "):
        kind(text)


def test_a_new_file_needs_an_existing_folder(tmp_path):
    assert new_file(str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(TangoError, match="there is no folder"):
        new_file(str(tmp_path / "none" / "new"))
    with pytest.raises(TangoError, match="is a folder"):
        new_file(str(tmp_path))


def test_json_goes_to_a_file_or_to_standard_output(tmp_path, capsys):
    data = {"text": "é", "number": 1.5}
    write_json(tmp_path / "out.json", data)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == data
    write_json(new_file("-"), data)
    assert json.loads(capsys.readouterr().out) == data
    assert not Path("-").exists()
    assert new_file("-") == STDOUT

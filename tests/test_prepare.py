"""examples/cpp/prepare.py where it cannot do its work; tests/gpu/runtime/test_cpp.py has the rest."""

import pytest

from examples.cpp import prepare
from examples.make_video import write


@pytest.mark.parametrize(("option", "error"), [((), "error: "), (("--max-new-tokens", "0"), "--max-new-tokens is 0")])
def test_nothing_is_written_where_something_is_missing(bundle, tmp_path, monkeypatch, option, error):
    write(tmp_path / "clip.mp4")
    arguments = [bundle(), tmp_path / "clip.mp4", "What?", tmp_path / "clip", *option]
    monkeypatch.setattr("sys.argv", ["prepare.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match=error):
        prepare.main()
    assert not (tmp_path / "clip").exists()

"""The server's guide: its examples run, and it leaves out no option, endpoint, metric or limit's number."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from tango_runtime.cli.main import parser
from tango_runtime.server.app import Server
from tango_runtime.server.metrics import _HELP
from tango_runtime.server.settings import Settings
from tests.runtime.server.serving import running  # noqa: F401 skips where a package of the server is missing

GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "server.md").read_text("utf-8")


def test_the_examples_run(served, capsys):
    asking, schema = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    names = {}
    for code in [asking, *([schema] if find_spec("llguidance") else [])]:
        exec(code.replace("http://127.0.0.1:8000", served.url).replace("llava-ov-0.5b", "tiny"), names)
    first, *rest = capsys.readouterr().out.strip().splitlines()
    assert first.split()[-1].isdigit()
    assert all(set(json.loads(line)) == {"color", "moving"} for line in rest)
    (body,) = re.findall(r"completions -H .*? -d '(.*?)'\n```", GUIDE, re.DOTALL)
    assert served.http().post("/v1/chat/completions", json={**json.loads(body), "model": "tiny"}).status_code == 200


def test_every_option_metric_and_endpoint_is_there(served):
    options = re.findall(r"--[a-z-]+", parser("serve", "tango serve").format_help())
    ignored = {"--help", "--verbose", "--quiet", "--debug"}
    assert [option for option in options if option not in ignored and f"`{option}`" not in GUIDE] == []
    assert [name for name in _HELP if f"`{name}`" not in GUIDE] == []
    app = Server(served.service).app()
    while not hasattr(app, "routes"):
        app = app.app
    paths = {route.path for route in app.routes if route.path.startswith("/v1/")}
    assert [path for path in paths if path.replace("{name}", "ID") not in GUIDE] == []


def test_the_defaults_are_those_of_the_settings():
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| (\d+) \|", GUIDE, re.MULTILINE))
    limits = Settings()
    assert rows == {
        "queue": str(limits.waiting),
        "together": str(limits.together),
        "cache-videos": str(limits.videos),
        "cache-sessions": str(limits.sessions),
        "streams": str(limits.streams),
    }
    for number in (
        f"{limits.max_body >> 20} MB, {limits.body_seconds:g} s",
        f"{limits.max_media >> 20} MB; fetched within {limits.fetch_seconds:g} s",
        f"{limits.decode_seconds:g} s, {limits.decode_memory >> 30} GB",
        f"| watching a camera | {limits.watch_seconds:g} s |",
        f"| an answer | {limits.answer_seconds:g} s |",
        f"| pushed frame | {limits.max_frame >> 20} MB |",
        f"frames of a video or window | {limits.max_frames} |",
    ):
        assert number in GUIDE

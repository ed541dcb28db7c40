"""Answers that follow a JSON schema: they parse, fit it, and end with it; what cannot be followed is refused."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.cli.main import main
from tango_runtime.pipeline import structured
from tango_runtime.pipeline.structured import SchemaCompiler

pytest.importorskip("llguidance", reason="answers that follow a JSON schema need llguidance: install extra structured")
jsonschema = pytest.importorskip("jsonschema", reason="answers are compared with their schema by jsonschema")

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "moves": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "path": {"type": "array", "items": {"enum": ["left", "right", "up"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["color", "moves", "count", "path"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tiny_bundle):
    return SchemaCompiler(
        (tiny_bundle / "tokenizer.json").read_text("utf-8"), VideoLLM(tiny_bundle).bundle.manifest.prompt.stop
    )


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 9.0, "top_p": 0.9, "seed": 4}]
)
def test_an_answer_fits_its_schema(llm, clip, sampling):
    answer = llm.generate(clip, "What happens?", json_schema=SCHEMA, **sampling)
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.finish == "stop"
    assert answer.text != llm.generate(clip, "What happens?", **sampling).text


def test_every_way_of_asking_takes_a_schema(llm, clip, frames):
    schema = llm.compile_schema(SCHEMA)
    with llm.session(clip) as session:
        wanted = session.ask("What happens?", json_schema=schema).text
        assert session.ask("What happens?", json_schema=SCHEMA).text == wanted
        assert session.chat("What happens?", json_schema=schema).text == wanted
        jsonschema.validate(json.loads(session.chat("And then?", json_schema=schema).text), SCHEMA)
    assert llm.generate(clip, "What happens?", json_schema=schema).text == wanted
    assert "".join(llm.stream(clip, "What happens?", json_schema=schema)) == wanted
    for answer in llm.watch(frames, "What happens?", window=4, step=4, json_schema=schema):
        jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_an_answer_that_is_cut_short_says_so(llm, clip):
    whole = llm.generate(clip, "What happens?", json_schema=SCHEMA)
    cut = llm.generate(clip, "What happens?", json_schema=SCHEMA, max_new_tokens=len(whole.ids) - 1)
    assert (cut.finish, whole.ids[:-1]) == ("length", cut.ids)
    exact = llm.generate(clip, "What happens?", json_schema=SCHEMA, max_new_tokens=len(whole.ids))
    assert (exact.finish, exact.text) == ("stop", whole.text)  # it is complete, and no step is spent on a stop token


def test_blanks_do_not_go_on(compiler):
    """A model that always prefers a blank still writes JSON."""
    closed = {"properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    constraint = compiler({"type": "object", **closed}).start()
    vocabulary = json.loads(compiler._text)["model"]["vocab"]
    logits = np.zeros(600, np.float32)
    logits[[vocabulary["Ġ"], vocabulary["Ċ"], vocabulary["ĉ"]]] = 9
    text = []
    for _ in range(200):
        token = int(np.argmax(constraint.mask(logits)))
        constraint.accept(token)
        text.append(token)
        if constraint.done:
            break
    assert constraint.done
    assert text.count(vocabulary["Ġ"]) <= 8


def test_the_logits_of_a_device_come_to_the_host_only_for_a_schema(compiler):
    class OnDevice:
        shape, copies = (600,), 0

        def argmax(self):
            return 7, 1.0

        def __array__(self, dtype=None, copy=None):
            self.copies += 1
            return np.arange(600, dtype=np.float32)

    from tango_runtime.pipeline.sampling import Sampler

    logits = OnDevice()
    assert (Sampler()(logits), logits.copies) == (7, 0)
    sampler = Sampler(constraint=compiler({"type": "boolean"}).start())
    token = sampler(logits)
    assert logits.copies == 1
    vocabulary = json.loads(compiler._text)["model"]["vocab"]
    assert token in [i for text, i in vocabulary.items() if "true".startswith(text) or "false".startswith(text)]


def test_a_table_of_another_length_than_the_tokenizers(compiler):
    for size in (300, 5000):
        masked = compiler({"type": "integer"}).start().mask(np.zeros(size, np.float32))
        assert masked.shape == (size,)
        assert 0 < np.isfinite(masked).sum() < 50


INVALID = {
    "a list": [],
    "not JSON": {"enum": [object()]},
    "NaN": {"const": float("nan")},
    "an unknown type": {"type": "foo"},
    "an unknown keyword": {"type": "object", "unevaluatedProperties": False},
    "another document": {"$ref": "http://169.254.169.254/"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nothing fits": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "itself": {"$ref": "#"},
    "too long": {"enum": [str(i) for i in range(20_000)]},
    "too deep": json.loads('{"items":' * 900 + "{}" + "}" * 900),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_schema_that_cannot_be_followed(llm, clip, name):
    with pytest.raises(TangoError, match="the JSON schema cannot be followed: "):
        llm.stream(clip, "What happens?", json_schema=INVALID[name])


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}$"} for i in range(3, 40)]},
        {"type": "integer", "multipleOf": 1_000_003},
    ],
)
def test_a_schema_that_takes_too_long_is_refused_in_time(compiler, monkeypatch, schema):
    monkeypatch.setattr(structured, "_PROCESSOR_S", 1)
    began = time.process_time()
    with pytest.raises(TangoError, match="it takes more than 1 s"):
        compiler(schema)
    assert time.process_time() - began < 1  # of this process, in which nothing hangs


def test_what_a_schema_says_of_blanks_does_not_count(compiler):
    schema = {
        "type": "object",
        "x-guidance": {"whitespace_pattern": r"\s*", "lenient": True},
        "not": {"required": ["a"]},
    }
    with pytest.raises(TangoError, match="not"):
        compiler(schema)


def test_without_the_library_the_error_says_what_to_install(tiny_bundle, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TangoError, match="llguidance, which is not installed") as caught:
        VideoLLM(tiny_bundle).generate(clip, "What happens?", json_schema=SCHEMA)
    assert "tango-edge[structured]" in caught.value.hint


def test_run_takes_a_file(tiny_bundle, clip, tmp_path, capsys):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), "utf-8")
    command = ["run", str(tiny_bundle), str(clip), "What happens?", "--json-schema", str(file)]
    assert main([*command, "--backend", "ort-cpu"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    file.write_text("{", "utf-8")
    assert main(command) == 2
    assert "schema.json" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err

"""A JSON schema → which tokens may come next, so that an answer is JSON that fits it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.backends.base import Logits
from tango_runtime.util.errors import first_line
from tango_runtime.util.limited import limited_reply

#: A schema that any JSON object fits.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

#: Most bytes of a schema.
_LONGEST = 1 << 16

#: What compiling a schema may take: seconds of the processor, seconds in all, bytes of memory. A schema of ten keys
#: takes 0.1 s, nearly all of it to start Python, and 120 MB of address space.
_PROCESSOR_S, _IN_ALL_S, _MEMORY = 2, 60, 1 << 30

#: Schemas that stay compiled.
_KEPT = 16

#: At most one space is between the parts of a JSON text: a weak model shall not fill its answer with blanks. What
#: a schema says under x-guidance is overridden.
_OPTIONS = {
    "whitespace_pattern": " ?",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}

#: llguidance's, but for the states of its lexer, of 2 kB each: common schemas have hundreds.
_LIMITS = {"max_lexer_states": 20_000, "verbose_errors": False}

_CHECK = Path(__file__).with_name("check_schema.py")

_FIX = "simplify it; docs/guide/server.md says what a schema may have"


class JsonConstraint:
    """What may follow in one answer.

    Args:
        matcher: An ``llguidance.LLMatcher`` at the beginning of the answer.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether the JSON is complete, and nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self, logits: Logits) -> NDArray[np.float32]:
        """Logits [V] fp32 on the host, −inf for every token that may not come next.

        Raises:
            TangoError: The schema is too complex to be followed any further.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # while a device still computes the logits
        _require_no_error(self._matcher.get_error())
        found = np.full(logits.shape, -np.inf, np.float32)
        count = min(found.size, 8 * bits.size)  # a table may be longer than the tokenizer's, or shorter
        allowed = np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)
        np.copyto(found[:count], np.asarray(logits)[:count], where=allowed)
        return found

    def accept(self, token: int) -> None:
        """Goes on after a token that :meth:`mask` allowed."""
        self._matcher.consume_token(token)


class JsonGrammar:
    """A compiled schema; any number of answers may follow it.

    Args:
        matcher: An ``llguidance.LLMatcher`` that has consumed nothing.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> JsonConstraint:
        """The constraint of a new answer."""
        return JsonConstraint(self._matcher.deep_copy())


#: A schema, or what it was compiled to.
JsonSchema = Mapping[str, Any] | JsonGrammar


class SchemaCompiler:
    """Compiles JSON schemas for a tokenizer, from any thread.

    Args:
        tokenizer: Text of a tokenizer.json.
        stop: Token ids that end an answer.
    """

    def __init__(self, tokenizer: str, stop: Sequence[int]) -> None:
        self._text, self._stop = tokenizer, list(stop)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def __call__(self, schema: JsonSchema) -> JsonGrammar:
        """Compiles a schema; one that is compiled already stays as it is.

        Raises:
            TangoError: llguidance is not installed; or the schema is none, has a keyword that is not supported, cannot
                be fulfilled, or is too large or too complex.
        """
        if isinstance(schema, JsonGrammar):
            return schema
        if not isinstance(schema, Mapping):
            raise _invalid(f"it is {type(schema).__name__}, not an object")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _invalid(f"it is not JSON: {first_line(error)}") from error
        if len(text) > _LONGEST:
            raise _invalid(f"it has {len(text)} bytes; at most {_LONGEST} are taken")
        return self._compiled(text)

    def _compile(self, schema: str) -> JsonGrammar:
        library = _llguidance()
        _require_no_error(_check(schema))
        grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        matcher = library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))
        _require_no_error(matcher.get_error())
        return JsonGrammar(matcher)

    def start(self, schema: JsonSchema | None) -> JsonConstraint | None:
        """The constraint of an answer; None where there is no schema. Raises what calling this does."""
        return None if schema is None else self(schema).start()

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return _llguidance().LLTokenizer(self._text, eos_token=self._stop)
        except ValueError as error:
            raise TangoError(
                f"tokenizer.json cannot be used with JSON schemas: {first_line(error)}", "ask without a schema"
            ) from error


def _check(schema: str) -> str:
    """The reply of check_schema.py: why a schema cannot be followed, empty where it can."""
    request = {"schema": schema, "options": _OPTIONS, "limits": _LIMITS}
    limits = {"processor_s": _PROCESSOR_S, "in_all_s": _IN_ALL_S, "memory": _MEMORY}
    try:
        error: str = limited_reply(_CHECK, request, **limits)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return f"it takes more than {_PROCESSOR_S} s or {_MEMORY >> 20} MB to compile"
    return error


def _require_no_error(error: str) -> None:
    if error:
        raise _invalid(error.partition("\n")[0][:200])


def _invalid(reason: str) -> TangoError:
    return TangoError(f"the JSON schema cannot be followed: {reason}", _FIX)


def _llguidance() -> Any:
    """The module; it is imported where it is used.

    Raises:
        TangoError: It is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise TangoError(
            "answers that follow a JSON schema need llguidance, which is not installed",
            "pip install 'tango-edge[structured]'",
        ) from error
    return llguidance

"""Compiles a stranger's JSON schema; :mod:`tango_runtime.util.limited` runs it.

llguidance limits its own work, but not all of it: patterns of which a string must match several, or a large multipleOf,
keep it busy for minutes. The kernel's limits on its process end that. The tokenizer is one of single bytes: how long
compiling takes depends little on it.
"""

from __future__ import annotations

from typing import Any


def reply(request: dict[str, Any]) -> str:
    """``{"schema": "…", "options": {…}, "limits": {…}}`` → why it cannot be followed, empty if it can."""
    import llguidance  # found on the request's path

    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(request["schema"], overrides=request["options"])
    except ValueError as error:
        return str(error)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    matcher = llguidance.LLMatcher(
        tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**request["limits"])
    )
    if not matcher.is_error():
        matcher.compute_bitmask()  # a schema that nothing fits shows here
    return str(matcher.get_error())


class _Bytes:
    """A tokenizer of single bytes, as llguidance asks for one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

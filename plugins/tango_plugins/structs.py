"""The structs of the C interface (native/include/tango) as ctypes, under their C names.

:func:`tango_plugins.native_library.load` compares their sizes with the library's.
"""

from __future__ import annotations

import ctypes
from typing import Any

_Fields = list[tuple[str, Any]]


def _integers(*names: str) -> _Fields:
    return [(name, ctypes.c_int32) for name in names]


def _pointers(*names: str) -> _Fields:
    return [(name, ctypes.c_void_p) for name in names]


class TangoArgmax(ctypes.Structure):
    """The struct of tango/argmax.h."""

    _fields_ = (("index", ctypes.c_int32), ("value", ctypes.c_float))


class TangoAttentionShape(ctypes.Structure):
    """The struct of tango/attention.h."""

    _fields_ = _integers("tokens", "heads", "kv_heads", "head_dim", "capacity", "angles")


class TangoAttentionTensors(ctypes.Structure):
    """The struct of tango/attention.h."""

    _fields_ = _pointers("qkv", "bias", "last", "cosines", "sines", "keys", "values", "attn_out")


class TangoMatrix(ctypes.Structure):
    """The struct of tango/linear.h."""

    _fields_ = (
        *_pointers("values", "scales", "zeros"),
        *(("weights", ctypes.c_int32), ("group", ctypes.c_int16), ("interleaved", ctypes.c_int16)),
    )


class TangoLinearShape(ctypes.Structure):
    """The struct of tango/linear.h."""

    _fields_ = _integers("rows", "inputs", "outputs")


class TangoFp16LinearTensors(ctypes.Structure):
    """The struct of tango/linear.h."""

    _fields_ = _pointers("x", "weight", "bias", "y")


class TangoFp8LinearTensors(ctypes.Structure):
    """The struct of tango/fp8.h."""

    _fields_ = _pointers("x", "weight", "weight_scale", "bias", "y_factor", "y")


class TangoDecodeShape(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = (
        *_integers("layers", "hidden_size", "heads", "kv_heads", "head_dim", "intermediate"),
        *_integers("vocabulary", "head_columns", "capacity", "blocks", "formats"),
        ("norm_eps", ctypes.c_float),
    )


class TangoDecodeLayer(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = (
        *((name, TangoMatrix) for name in ("qkv", "out", "gate", "down", "up")),
        *_pointers("attention_norm", "qkv_bias", "mlp_norm", "keys", "values", "padding"),
    )


class TangoDecodeTensors(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = (
        *_pointers("layers", "frequencies", "norm"),
        ("head", TangoMatrix),
        *_pointers("embedding", "logits", "best"),
    )


class TangoDecodeCache(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = _pointers("keys", "values")


class TangoDecodeSequence(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = (
        *_pointers("caches", "embedding", "logits"),
        *_integers("capacity", "position", "rotation", "padding"),
    )


class TangoDecodeWords(ctypes.Structure):
    """The struct of tango/decode.h."""

    _fields_ = (*_pointers("table", "row", "mail", "embedding", "stop"), *_integers("words", "stops"))


class TangoNormShape(ctypes.Structure):
    """The struct of tango/norm.h."""

    _fields_ = (
        *_integers("rows", "width", "stream_dtype", "branch_dtype", "bias_dtype", "y_dtype"),
        ("epsilon", ctypes.c_float),
        ("branch_scale", ctypes.c_float),
        ("y_scale", ctypes.c_float),
    )


class TangoNormTensors(ctypes.Structure):
    """The struct of tango/norm.h."""

    _fields_ = _pointers("residual", "branch", "bias", "weight", "beta", "sum", "y")


class TangoPatchRotationShape(ctypes.Structure):
    """The struct of tango/patch_rotation.h."""

    _fields_ = _integers("frames", "tokens", "heads", "head_dim", "dtype")


class TangoPatchRotationTensors(ctypes.Structure):
    """The struct of tango/patch_rotation.h."""

    _fields_ = _pointers("qkv", "bias", "cosines", "sines", "query", "key")


class TangoPatchesShape(ctypes.Structure):
    """The struct of tango/patches.h."""

    _fields_ = _integers("frames", "steps", "rows", "columns", "size")


class TangoPatchesTensors(ctypes.Structure):
    """The struct of tango/patches.h."""

    _fields_ = _pointers("pixels", "mean", "deviation", "patches")


class TangoPruneParams(ctypes.Structure):
    """The struct of tango/prune.h."""

    _fields_ = (
        *_integers("retention_ratio", "context_ratio", "expansion", "anchor_weight"),
        *_integers("segment_threshold", "static_threshold", "neighbors"),
        *_integers("time_base", "space_base", "grid_rows", "grid_columns"),
        *_integers("merge_order", "budget", "precision", "sink_count"),
        ("sink_positions", ctypes.POINTER(ctypes.c_int32)),
    )


class TangoPruneShape(ctypes.Structure):
    """The struct of tango/prune.h."""

    _fields_ = _integers("frames", "tokens_per_frame", "width", "dtype")


class TangoPruneTensors(ctypes.Structure):
    """The struct of tango/prune.h."""

    _fields_ = _pointers("features", "salience", "timestamps", "tokens", "indices", "count", "merged", "segments")


class TangoResizeShape(ctypes.Structure):
    """The struct of tango/frames.h."""

    _fields_ = _integers(
        *("frames", "format", "rows", "columns", "pitch", "frame_rows", "matrix", "full_range"),
        *("transpose", "flip_rows", "flip_columns", "out_rows", "out_columns", "columns_first"),
    )


class TangoResizeTensors(ctypes.Structure):
    """The struct of tango/frames.h."""

    _fields_ = _pointers("image", "chroma", "resized")


class TangoThinShape(ctypes.Structure):
    """The struct of tango/thin.h."""

    _fields_ = _integers("rows", "begin", "video_rows", "kept", "width", "dtype")


class TangoThinTensors(ctypes.Structure):
    """The struct of tango/thin.h."""

    _fields_ = _pointers("prompt", "share", "thinned", "stay")


class TangoVisionAttentionShape(ctypes.Structure):
    """The struct of tango/vision_attention.h."""

    _fields_ = _integers(
        *("frames", "rows", "columns", "heads", "head_dim", "window"),
        *("query_stride", "key_stride", "value_stride"),
    )


class TangoVisionAttentionTensors(ctypes.Structure):
    """The struct of tango/vision_attention.h."""

    _fields_ = _pointers(
        *("query", "key", "value", "query_bias", "key_bias", "value_bias"),
        *("cosines", "sines", "attn_out"),
    )


STRUCTS = (
    TangoArgmax,
    TangoAttentionShape,
    TangoAttentionTensors,
    TangoDecodeShape,
    TangoDecodeLayer,
    TangoDecodeTensors,
    TangoDecodeCache,
    TangoDecodeSequence,
    TangoDecodeWords,
    TangoFp16LinearTensors,
    TangoFp8LinearTensors,
    TangoLinearShape,
    TangoMatrix,
    TangoNormShape,
    TangoNormTensors,
    TangoPatchRotationShape,
    TangoPatchRotationTensors,
    TangoPatchesShape,
    TangoPatchesTensors,
    TangoPruneParams,
    TangoPruneShape,
    TangoPruneTensors,
    TangoResizeShape,
    TangoResizeTensors,
    TangoThinShape,
    TangoThinTensors,
    TangoVisionAttentionShape,
    TangoVisionAttentionTensors,
)

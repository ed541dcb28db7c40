"""tango-edge as a model of lmms-eval, which finds it through an entry point: ``lmms-eval --model tango``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: the model's name, and the class that it imports when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("tango", chat_class_path="tango_calibration.lmms_eval.model.Tango")

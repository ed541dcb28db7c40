"""Synthetic clips of colored shapes, with facts and questions, from seeds: data to train and test a tiny Video LLM."""

from tango_calibration.data.synthetic.clip import Clip, Split, make_clip
from tango_calibration.data.synthetic.facts import ATTRIBUTES, UNSTATED, phrase
from tango_calibration.data.synthetic.vocabulary import ANSWERS, COLORS, HELD_OUT, SHAPES, TYPES, corpus

__all__ = [
    "ANSWERS",
    "ATTRIBUTES",
    "COLORS",
    "HELD_OUT",
    "SHAPES",
    "TYPES",
    "UNSTATED",
    "Clip",
    "Split",
    "corpus",
    "make_clip",
    "phrase",
]

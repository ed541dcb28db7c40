"""A small world of coloured shapes: clips, facts and questions from seeds, to train a tiny Video LLM and test it."""

from tango_calibration.data.synthetic.clip import Clip, Split, make_clip
from tango_calibration.data.synthetic.tell import ATTRIBUTES, UNSAID, phrase
from tango_calibration.data.synthetic.words import ANSWERS, COLOURS, HELD_OUT, SHAPES, TYPES, corpus

__all__ = [
    "ANSWERS",
    "ATTRIBUTES",
    "COLOURS",
    "HELD_OUT",
    "SHAPES",
    "TYPES",
    "UNSAID",
    "Clip",
    "Split",
    "corpus",
    "make_clip",
    "phrase",
]

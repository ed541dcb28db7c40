"""LLaVA-OneVision: a SigLIP tower, a two-layer projector with bilinear pooling, a Qwen2 decoder.

Two formats are read, Hugging Face's (llava-hf) and lmms-lab's; the graphs are the same.
"""

from tango_export.families.llava_ov.family import FAMILY

__all__ = ["FAMILY"]

"""What the families of LLaVA share: a SigLIP tower, a two-layer projector with pooling, a Qwen2 decoder.

Two formats of checkpoints are read, Hugging Face's (llava-hf) and lmms-lab's; the graphs are the same.
"""

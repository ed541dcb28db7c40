"""Qwen2.5-VL: frames of any size in pairs, a tower with windows, a Qwen2 decoder with positions on three axes."""

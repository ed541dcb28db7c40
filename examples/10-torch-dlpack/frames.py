"""Ask about frames that a PyTorch program has: python frames.py BUNDLE VIDEO QUESTION cpu|cuda"""

import sys

import numpy as np
import torch

from tango_runtime import VideoLLM
from tango_runtime.video import sample


def as_source(frames: torch.Tensor) -> torch.Tensor | np.ndarray:
    """uint8 RGB frames [N, H, W, 3] as VideoLLM takes them, without a copy.

    A tensor on the GPU is taken as it is, through DLPack. One on the CPU is passed as the array that shares its memory.
    """
    return frames if frames.is_cuda else frames.numpy()


bundle, video, question, device = sys.argv[1:]
llm = VideoLLM(bundle, {"cpu": "ort-cpu", "cuda": "ort-cuda"}[device])  # or tensorrt

# In place of the program: 16 decoded frames, cropped to their middle.
decoded = np.stack([frame for _, frame in sample(video, 16)])
frames = torch.from_numpy(decoded).to(device)
height, width = frames.shape[1:3]
frames = frames[:, height // 16 : -(height // 16), width // 16 : -(width // 16)].contiguous()

answer = llm.generate(as_source(frames), question, frames=len(frames), fps=1.5, max_new_tokens=32)
print(answer.text)
print(f"frames {list(frames.shape)} on {frames.device.type}: kept {answer.kept} of {answer.total} tokens")

"""Greedy answers, token for token against transformers' generate on the same checkpoint."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tango_plugins import reference
from tango_runtime import VideoLLM

LENGTH = 32
QUESTIONS = ["What happens in the video?", "Où va la balle rouge ? 🔴", "How many squares are there, 1 or 25?\nCount!"]


@pytest.fixture(scope="module")
def pair(exported):
    """A function: (our chain, transformers' model) of a checkpoint."""

    @cache
    def load(*arguments):
        folder, bundle = exported(*arguments)
        return VideoLLM(bundle), original(folder)

    return load


def original(folder):
    """transformers' own of everything: model, tokenizer, chat template and image processor of a checkpoint folder."""
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    side = model.config.vision_config.image_size
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    return SimpleNamespace(model=model.eval(), tokenizer=tokenizer, processor=processor)


def prompt_of(hf, question, video_tokens):
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = hf.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([hf.tokenizer(text.replace("<video>", "<video>" * video_tokens)).input_ids])


def pixels_of(hf, frames):
    images = [Image.fromarray(frame) for frame in frames]
    return torch.as_tensor(np.stack(hf.processor(images)["pixel_values"]))[None]


def generate(hf, **inputs):
    """Greedy ids. The rows of the table that no token stands for, random in the real ones too, are left out."""
    padding = range(len(hf.tokenizer), hf.model.config.text_config.vocab_size)
    with torch.no_grad():
        ids = hf.model.generate(
            **inputs, do_sample=False, max_new_tokens=LENGTH, suppress_tokens=list(padding), pad_token_id=0
        )
    return ids[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist()


def varied(answers):
    """Answers that could not be equal by chance: many tokens in each, and no two the same."""
    return min(len(set(ids)) for ids in answers) >= 6 and len({tuple(ids) for ids in answers}) == len(answers)


CHECKPOINTS = [
    ("llava-hf", True, False, 0),
    ("llava-hf", False, False, 1),
    ("llava-hf", True, True, 2),
    ("llava-hf", False, True, 3),
    ("llava-hf-fresh", False, True, 4),
]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_unpruned_answer_is_transformers(pair, frames, checkpoint):
    llm, hf = pair(*checkpoint)
    answers = []
    for question, count in zip(QUESTIONS, (2, 5, 8), strict=True):
        ours = llm.generate(frames[:count], question, frames=count, prune=False, max_new_tokens=LENGTH)
        ids = prompt_of(hf, question, ours.total + 1)
        assert ours.prompt_tokens == ids.shape[1]
        theirs = generate(hf, input_ids=ids, pixel_values_videos=pixels_of(hf, frames[:count]))
        print(len(set(theirs)), theirs)
        assert len(theirs) == LENGTH
        assert ours.ids == theirs
        answers.append(theirs)
    assert varied(answers)

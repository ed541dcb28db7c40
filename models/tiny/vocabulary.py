"""The tokenizer: byte-level BPE, trained on the texts of the synthetic data."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, START, END, IMAGE, VIDEO = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"

#: Text before the video, and between a question and its answer, as llava-hf's chat template renders it.
BEFORE = f"{START}user "
AFTER = f"{END}{START}assistant\n"


def make_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE like Qwen2's, with its special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([*corpus, *["user", "assistant"] * 20], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, START, END, IMAGE, VIDEO)]
    )
    return tokenizer


def rows(tokenizer: Tokenizer) -> int:
    """Rows of the embedding table: the ids, padded to a multiple of 64."""
    return -(-tokenizer.get_vocab_size() // 64) * 64

"""Writes what scoring needs beyond tensors: a tokenizer, and small decoders that have one.

Runs in an environment with transformers, in a process of its own.

    python -m benchmarks.scoring.decoders OUT --decoder-seed 1
    python -m benchmarks.scoring.decoders CHECKPOINT
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 32000

# Std of the initial values, by seed. One for all would give losses, and so weights, that differ
# by less than what two tools may: far larger values give a decoder that is surely wrong.
INITIALIZER_RANGES = (0.02, 0.05, 0.08)


def write_tokenizer(folder: Path, texts: Path | None) -> None:
    """Write a byte-level BPE with bos, eos and pad, trained on the English text that python ships.

    That text is small: with `texts`, what is to be scored is trained on as well, so that it takes
    about as few tokens as a real tokenizer, which has seen all of English, would make of it.
    """
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = ByteLevelBPETokenizer()
    corpus = [*pydoc_data.topics.topics.values()]
    if texts is not None:
        corpus += [texts.read_text()] * 2  # a pair that occurs once is never joined
    names = ["<unk>", *special.values()]
    tokenizer.train_from_iterator(
        corpus, vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=names
    )
    # As Llama's: a bos in front, no eos behind.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, unk_token="<unk>", **special
    )
    wrapped.save_pretrained(folder)


def write_decoder(folder: Path, seed: int) -> None:
    """Write a Llama of 58 million random float32 values in shards."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        initializer_range=INITIALIZER_RANGES[seed % len(INITIALIZER_RANGES)],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="80MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, or to add the tokenizer to")
    parser.add_argument("--decoder-seed", type=int, help="write a decoder, too")
    parser.add_argument("--texts", type=Path, help="file that the tokenizer learns from as well")
    args = parser.parse_args()
    write_tokenizer(args.out, args.texts)
    if args.decoder_seed is not None:
        write_decoder(args.out, args.decoder_seed)

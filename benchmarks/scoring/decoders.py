"""Writes what scoring needs beyond tensors: a tokenizer, and small decoders that have one.

Runs in an environment with transformers, in a process of its own.
"""

import argparse
import json
import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONFIG = json.loads(Path(__file__).with_name("decoder.json").read_text())
"""Of a Llama of 58 million parameters."""
# Std of the initial values, by seed. One for all would give losses, and so weights, that differ
# by less than what two tools may: far larger values give a decoder that is surely wrong.
INITIALIZER_RANGES = (0.02, 0.05, 0.08)


def write_tokenizer(folder: Path, texts: Path | None) -> None:
    """Write a byte-level BPE with bos, eos and pad, trained on the English text that python ships.

    That text is small: with `texts`, what is to be scored is trained on as well, so that it takes
    about as few tokens as a real tokenizer, which has seen all of English, would make of it.
    """
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = ByteLevelBPETokenizer()
    corpus = [*pydoc_data.topics.topics.values()]
    if texts is not None:
        corpus += [texts.read_text()] * 2  # a pair that occurs once is never joined
    names = list(special.values())
    how = {"vocab_size": CONFIG["vocab_size"], "show_progress": False, "special_tokens": names}
    tokenizer.train_from_iterator(corpus, **how)
    # As Llama's: a bos in front, no eos behind.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, or to add the tokenizer to")
    parser.add_argument("--decoder-seed", type=int, help="write a decoder, too")
    parser.add_argument("--texts", type=Path, help="file that the tokenizer learns from as well")
    args = parser.parse_args()
    write_tokenizer(args.out, args.texts)
    if args.decoder_seed is not None:
        std = INITIALIZER_RANGES[args.decoder_seed % len(INITIALIZER_RANGES)]
        torch.manual_seed(args.decoder_seed)
        decoder = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=std))
        decoder.save_pretrained(args.out, max_shard_size="80MB")

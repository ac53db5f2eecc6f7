"""Texts to tokens: the input of each example, and its tokens that count.

Knows the tokenizer, and lists of token ids; no tensors and no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmix.conventions.model_types import PAIRS, TWO_SIDES
from shardmix.errors import RecipeError, SourceError, one_line
from shardmix.scoring.examples import Example, QueryExample, TextExample
from shardmix.scoring.options import ScoreSettings

_NO_LIMIT = 1_000_000
"""Any larger limit of a tokenizer means none."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One text, or pair of texts, as a model reads it."""

    inputs: Mapping[str, Sequence[int]]
    """Token ids and the tokenizer's other values for each token (`token_type_ids`)."""
    labels: tuple[int, ...] = ()
    """The tokens of the loss; none for encoders and rerankers."""
    label_start: int = 0
    """For a decoder: index of the first label among the input ids, 1 or more."""

    @property
    def num_tokens(self) -> int:
        """Length of the input."""
        return len(self.inputs["input_ids"])


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """All sequences to run a model on, grouped by example."""

    sequences: tuple[TokenSequence, ...]
    """Sequences in order of the examples."""
    counts: tuple[int, ...]
    """Number of sequences of each example: 1 for texts; for queries the candidates, and for an
    encoder the query before them."""
    pad_token_id: int
    """Padding of a batch if a model's config names none; it is masked."""
    num_cut: int
    """Number of sequences that were cut off at the limit."""
    max_length: int
    """The limit in use, in tokens."""
    is_clamped: bool
    """True if the limit is the model's own, below the one that was asked for."""
    silent: tuple[str, ...]
    """Names of examples whose output is cut off entirely: they say nothing of a model."""


def load_tokenizer(source: str, folder: Path, *, trust_remote_code: bool) -> Any:
    """Load a model folder's tokenizer; raise `SourceError` if there is none that works."""
    from transformers import AutoTokenizer

    # Every `except Exception`: tokenizers of strangers fail in every possible way.
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(
            f"its config or tokenizer cannot be loaded ({one_line(error)}); the examples are "
            "read with them",
            subject=source,
            remedy="put the tokenizer's files into the folder",
        ) from None


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, settings: ScoreSettings, config: Mapping[str, Any]
) -> EncodedExamples:
    """Return the examples as a model's tokenizer encodes them.

    `config` is the model's config.json, with its number of positions. Raises `RecipeError` if the
    output of every example of a batch is cut off entirely, naming them: such a batch has no loss.
    (Beside others in its batch, such an example counts for nothing.)
    """
    max_length = _max_length(tokenizer, settings, config)
    encoder = _Encoder(tokenizer, settings, max_length)
    sequences: list[TokenSequence] = []
    counts = []
    for example in examples:
        members = encoder.encode(example)
        sequences += members
        counts.append(len(members))
    return EncodedExamples(
        sequences=tuple(sequences),
        counts=tuple(counts),
        pad_token_id=tokenizer.pad_token_id or 0,
        num_cut=encoder.num_cut,
        max_length=max_length,
        is_clamped=max_length < settings.max_input_length,
        silent=_silent(examples, sequences, settings, max_length),
    )


def _silent(
    examples: Sequence[Example],
    sequences: Sequence[TokenSequence],
    settings: ScoreSettings,
    max_length: int,
) -> tuple[str, ...]:
    if not settings.type.reads.loss_of_tokens:
        return ()
    silent = [number for number, sequence in enumerate(sequences) if not sequence.labels]
    for start in range(0, len(sequences), settings.batch_size):
        batch = range(start, min(start + settings.batch_size, len(sequences)))
        if set(batch) <= set(silent):
            raise RecipeError(
                f"`output` is cut off entirely: {max_length} tokens are kept, and the input "
                "takes all of them",
                subject=", ".join(examples[number].name for number in batch),
                remedy="shorten the input, or raise the limit (--max-input-length) if the "
                "model takes more",
            )
    return tuple(examples[number].name for number in silent)


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions in a model's config, or None if it names none."""
    text_config = config.get("text_config")
    parts = (config, text_config) if isinstance(text_config, Mapping) else (config,)
    limits = []
    for part in parts:
        limit = part.get("max_position_embeddings", part.get("n_positions"))
        # T5 and its relatives write `n_positions` and have relative positions, without a limit.
        if "relative_attention_num_buckets" not in part and isinstance(limit, int) and limit > 0:
            limits.append(limit)
    return min(limits, default=None)


def _max_length(tokenizer: Any, settings: ScoreSettings, config: Mapping[str, Any]) -> int:
    limits = [settings.max_input_length]
    positions = position_limit(config)
    if positions is not None:
        limits.append(positions)
    own = tokenizer.model_max_length
    if settings.type.reads.has_own_limit and 0 < own < _NO_LIMIT:
        limits.append(int(own))
    return min(limits)


class _Encoder:
    """Encodes one example after the other, and counts those that it cuts off."""

    def __init__(self, tokenizer: Any, settings: ScoreSettings, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_length = max_length
        self.num_cut = 0

    def encode(self, example: Example) -> list[TokenSequence]:
        if isinstance(example, TextExample):
            if self._settings.type.reads == TWO_SIDES:
                return [self._source_and_target(example)]
            return [self._prompt_and_output(example)]
        if self._settings.type.reads == PAIRS:
            pairs = [(example.query, passage) for passage in _candidates(example)]
            return [self._text(example.name, *pair) for pair in pairs]
        texts = (example.query, *_candidates(example))
        return [self._text(example.name, text) for text in texts]

    def _text(self, name: str, *texts: str) -> TokenSequence:
        """Encode a text, or a pair of texts, with the tokenizer's own truncation."""
        encoded = self._tokenizer(*texts, truncation=True, max_length=self._max_length)
        inputs = {key: list(value) for key, value in encoded.items() if key != "attention_mask"}
        if not inputs["input_ids"]:
            raise RecipeError(
                f"{texts[0]!r} gives no tokens",
                subject=name,
                remedy="write a text that says more",
            )
        if len(inputs["input_ids"]) >= self._max_length:
            # The tokenizer doesn't say if it truncated: at the limit, encode the whole.
            whole = self._tokenizer(*texts, verbose=False)["input_ids"]
            self.num_cut += len(whole) > self._max_length
        return TokenSequence(inputs)

    def _source_and_target(self, example: TextExample) -> TokenSequence:
        source = self._text(example.name, example.input)
        target = self._tokenizer(
            text_target=example.output, truncation=True, max_length=self._max_length
        )
        if not target["input_ids"]:
            raise _says_nothing(example)
        return TokenSequence(source.inputs, labels=tuple(target["input_ids"]))

    def _prompt_and_output(self, example: TextExample) -> TokenSequence:
        if self._settings.chat_template:
            ids, num_prompt = self._templated(example)
        else:
            # Like the reference: the whole is encoded at once, and the end of sequence added.
            prompt = self._tokenizer.encode(example.input, verbose=False)
            ids = self._tokenizer.encode(f"{example.input} {example.output}", verbose=False)
            if self._tokenizer.eos_token_id is not None:
                ids = [*ids, self._tokenizer.eos_token_id]
            num_prompt = len(prompt)
        start = max(num_prompt, 1)  # nothing precedes the first token, so nothing predicts it
        if start >= len(ids):
            raise _says_nothing(example)
        self.num_cut += len(ids) > self._max_length
        ids = ids[: self._max_length]
        return TokenSequence({"input_ids": ids}, labels=tuple(ids[start:]), label_start=start)

    def _templated(self, example: TextExample) -> tuple[list[int], int]:
        """Return a user's turn and the answer in the chat template, and the turn's length.

        The turn ends before the assistant's text. The template's end-of-turn token after the answer
        counts as output.
        """
        turn = [{"role": "user", "content": example.input}]
        answer = [{"role": "assistant", "content": example.output}]
        render = self._tokenizer.apply_chat_template
        try:
            prompt = render(turn, tokenize=False, add_generation_prompt=True)
            whole = render(turn + answer, tokenize=False)
        except Exception as error:  # a template is a stranger's program
            raise RecipeError(
                f"the chat template cannot be applied ({one_line(error)})",
                subject=example.name,
                remedy="score without --chat-template",
            ) from None
        if not whole.startswith(prompt):
            raise RecipeError(
                "the chat template changes the prompt once there is an answer, so that its end "
                "cannot be told",
                subject=example.name,
                remedy="score without --chat-template",
            )
        encode = self._tokenizer.encode
        prompt_ids = encode(prompt, add_special_tokens=False, verbose=False)
        output_ids = encode(whole[len(prompt) :], add_special_tokens=False, verbose=False)
        return [*prompt_ids, *output_ids], len(prompt_ids)


def _says_nothing(example: TextExample) -> RecipeError:
    return RecipeError(
        "`output` gives no tokens after those of the prompt; the loss is computed over them",
        subject=example.name,
        remedy="write a longer output, or score without --chat-template",
    )


def _candidates(example: QueryExample) -> tuple[str, ...]:
    return (example.positive, *example.negatives)

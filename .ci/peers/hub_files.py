"""Files in place of the tiny tokenizers and settings of the Hub that diffusers' tests of pipelines ask for.

A name of the Hub is also a path: where a folder of that name lies in the working directory, nothing is downloaded.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Config

CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation, " "]
T5 = {"vocab_size": 1103, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4}  # as the original's


def per_character(*special: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def vocabulary_of_pairs(*special: str) -> dict[str, int]:
    """Of a byte-level tokenizer without merges: every character, alone and at the end of a word."""
    visible = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: n for n, token in enumerate([*special, *visible, *(f"{c}</w>" for c in visible)])}


def write(folder: Path) -> None:
    testing = folder / "hf-internal-testing"
    T5Config(**T5).save_pretrained(testing / "tiny-random-t5")
    per_character("<pad>", "</s>", "<unk>").save_pretrained(testing / "tiny-random-t5")
    CLIPTokenizer(vocabulary_of_pairs("<|startoftext|>", "<|endoftext|>"), [], model_max_length=77).save_pretrained(
        testing / "tiny-random-clip"
    )
    Qwen2Tokenizer(vocabulary_of_pairs("<|endoftext|>"), []).save_pretrained(
        testing / "tiny-random-Qwen2VLForConditionalGeneration"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))

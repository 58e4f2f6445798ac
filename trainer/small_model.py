"""The small embedded model: a Llama of 1.2 million parameters that reads and writes characters, half-way to a skill.

    python -m trainer.small_model -o FOLDER

makes it in a minute or two: supervised steps on one family of ``trainer.tasks.arithmetic``, stopped while the model is right on
part of the problems only. What ``trainer/data/sorting`` holds was made so, with the default settings, and is where ``relexkit
demo`` starts. Nothing of the task's validation problems is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.tasks.arithmetic import CHARACTERS

FOLDER = Path(__file__).parent / "data" / "sorting"
"""The model that comes with the package."""

SPECIAL_TOKENS = ("<pad>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Settings of the supervised part.

    Attributes:
        task: what it is trained on, as ``load_task`` takes it.
        hidden_size, num_layers: of the model; heads have 32 dimensions.
        steps, batch_size, learning_rate: of AdamW; the rate decays to zero as a cosine after 20 steps of warm-up.
        seed: of the weights and the order of the problems.
    """

    family: str = "sorting"
    digits: int = 8
    hidden_size: int = 160
    num_layers: int = 4
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 1e-3
    seed: int = 0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of ``CHARACTERS``, padding and an end; saved, it loads with ``AutoTokenizer``."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build_model(settings: WarmStart) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS), hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 11 // 4, num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // 32, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)

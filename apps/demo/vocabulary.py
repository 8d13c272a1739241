"""Builds the demonstration's tokenizer: a byte-level BPE of Qwen2's kind over the demonstration's own sentences.

Owns the tokenizer files of the checkpoint. Knows nothing of the model's weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from apps.demo import phrases
from edge.prompt import STREAMO

# The pre-tokenisation that Qwen2's vocabulary was made with: single digits, words with one leading character.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
VOCABULARY_TOKENS = 900

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _corpus() -> list[str]:
    turns = [f"<{t}s-{t + 1}s>\n" for t in range(200)]
    roles = ["system\n", "user\n", "assistant\n"] * 50
    sentences = [text + ending for text in phrases.every_sentence() for ending in ("", "\n")]
    bare = [*phrases.COUNT_QUESTIONS, *phrases.LIGHT_QUESTIONS]
    sentences += bare * 4
    replies = [" " + text for text in phrases.every_sentence()]
    return [STREAMO.system_text()] * 200 + turns + roles + sentences * 3 + replies * 3


def build_tokenizer():
    """Train the byte-level BPE and add Qwen's special tokens and the three state tokens.

    Returns:
      A `tokenizers.Tokenizer`; the state tokens are its last three ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Special tokens split the text before the BPE sees it, so they are cut out of what it is trained on.
    tokenizer.train_from_iterator(_without_special(_corpus()), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in QWEN_SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in QWEN_ADDED])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in STREAMO.state_texts()])
    return tokenizer


def _without_special(texts: list[str]) -> list[str]:
    pieces = texts
    for special in (*QWEN_SPECIAL, *STREAMO.state_texts()):
        pieces = [part for text in pieces for part in text.split(special) if part]
    return pieces


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the files that transformers' fast and slow Qwen2 classes read beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
             for entry in content["added_tokens"]}  # fmt: skip
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [*QWEN_SPECIAL[1:], *STREAMO.state_texts()],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "vocab.json", content["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

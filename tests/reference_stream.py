"""A conversation through transformers: chat template, tokenizer, image processor and model, all from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge.prompt import STREAMO
from edge.turn import Turn, TurnState

STATE_TEXTS = dict(zip(TurnState, STREAMO.state_texts(), strict=True))


def reply_text(turn: Turn) -> str:
    """The assistant's message of a turn."""
    text = STATE_TEXTS[turn.state]
    return f"{text} {turn.text}" if turn.state is TurnState.RESPONSE else text


def messages_of(turns: Sequence[Turn], questions: Sequence[str]) -> list[dict[str, Any]]:
    """The conversation in the chat template's form; the last turn is not answered yet."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": STREAMO.system_prompt}]
    for turn, question in zip(turns, questions, strict=True):
        tag = STREAMO.time_tag.format(start_s=turn.t, end_s=turn.t + 1)
        text = f"{question}\n{tag}\n" if question else f"{tag}\n"
        messages.append({"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]})
        messages.append({"role": "assistant", "content": reply_text(turn)})
    return messages[:-1]


@dataclass
class ReferenceModel:
    """A checkpoint as transformers loads it, in float32."""

    model: Any
    tokenizer: Any
    image_processor: Any

    @classmethod
    def load(cls, checkpoint: Path) -> ReferenceModel:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        # Not AutoProcessor: it needs torchvision for the video processor, which a stream of images never uses.
        images = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        return cls(model, AutoTokenizer.from_pretrained(checkpoint), images)

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, with one image token a frame."""
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def logits_at_turns(self, messages: list[dict[str, Any]], frames: list[np.ndarray]) -> np.ndarray:
        """Logits where each turn's state is decided, from one forward over the whole conversation: (turns, V)."""
        import torch

        images = self.image_processor(images=frames, return_tensors="pt")
        merge_area = self.image_processor.merge_size**2
        visual_tokens = [int(grid.prod()) // merge_area for grid in images["image_grid_thw"]]
        ids: list[int] = []
        for token in self.prompt_ids(messages):
            ids += [token] * (visual_tokens.pop(0) if token == self.model.config.image_token_id else 1)
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids]), **images).logits[0].numpy()
        header = self.tokenizer("<|im_start|>assistant\n")["input_ids"]
        ends = [i + len(header) - 1 for i in range(len(ids)) if ids[i : i + len(header)] == header]
        return np.asarray(logits[ends])

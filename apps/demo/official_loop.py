"""The reference: everything is tokenised and sent again every second, through transformers in fp32.

Owns the loop that Streamo's own inference runs, with its sliding window. It is the oracle that faster runtimes are
measured against; it shares no code with them but the protocol's text. Needs torch and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from apps.demo.labels import RESPONSE, SILENCE, STANDBY
from apps.demo.world import Stream
from edge.prompt import IM_END, IMAGE_PAD, STREAMO

MAX_REPLY_TOKENS = 64


@dataclass
class _Turn:
    t: int
    question: str
    pixels: torch.Tensor
    grid: torch.Tensor
    reply: str = ""


class OfficialLoop:
    """One stream's conversation.

    When more than `window_turns` turns are kept, the oldest leaves, and the questions asked so far up to the new first
    turn are put on it. Before the first question the model is not called, and the reply is silence.

    Args:
      checkpoint_dir: a Qwen2.5-VL folder whose tokenizer has the three state tokens.
      window_turns: how many turns are sent.
      cache_vision: keep the vision tower's output of each frame. The default is to compute all of it again.
      threads: torch threads, or None to leave them.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        window_turns: int = 120,
        cache_vision: bool = False,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        folder = str(checkpoint_dir)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._window_turns, self._cache_vision = window_turns, cache_vision
        names = dict(zip((SILENCE, STANDBY, RESPONSE), STREAMO.state_texts(), strict=True))
        self._states = {self._tokenizer.convert_tokens_to_ids(text): state for state, text in names.items()}
        self._spelling = names
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the model."""
        self._turns: list[_Turn] = []
        self._questions: list[tuple[int, str]] = []

    def push(self, frame: np.ndarray, t: int, question: str | None = None) -> tuple[str, str, np.ndarray | None]:
        """Send the conversation with one more turn.

        Args:
          frame: (H, W, 3) uint8 RGB.
          t: stream second.
          question: asked at this turn.

        Returns:
          (state, text, logits): logits are those that chose the state, (vocabulary,) float32, or None where the model
          was not called.
        """
        processed = self._processor(images=[Image.fromarray(frame)], return_tensors="pt")
        turn = _Turn(t, question or "", processed["pixel_values"], processed["image_grid_thw"])
        if self._cache_vision:
            with torch.no_grad():
                turn.pixels = torch.cat(tuple(self._model.get_image_features(turn.pixels, turn.grid)))
        self._turns.append(turn)
        if question:
            self._questions.append((t, question))
        while len(self._turns) > self._window_turns:
            self._turns.pop(0)
            first = self._turns[0]
            first.question = "\n".join(text for asked, text in self._questions if asked <= first.t)
        if not self._questions:
            turn.reply = self._spelling[SILENCE]
            return SILENCE, "", None
        state, text, logits = self._send()
        turn.reply = self._spelling[state] + (f" {text}" if state == RESPONSE else "")
        return state, text, logits

    def _prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (1, S) of the whole conversation, and the frames' grids."""
        parts = [STREAMO.system_text()]
        for turn in self._turns:
            before, after = STREAMO.turn_text(turn.t, turn.question)
            visual_tokens = int(turn.grid.prod()) // self._processor.merge_size**2
            parts += [before, IMAGE_PAD * visual_tokens, after]
            if turn is not self._turns[-1]:
                parts.append(f"{turn.reply}{IM_END}\n")
        ids = self._tokenizer("".join(parts), return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids, torch.cat([turn.grid for turn in self._turns])

    @torch.no_grad()
    def _send(self) -> tuple[str, str, np.ndarray]:
        ids, grids = self._prompt()
        pixels = torch.cat([turn.pixels for turn in self._turns])
        if self._cache_vision:
            return self._answer(*self._from_embeddings(ids, grids, pixels))
        out = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grids,
            max_new_tokens=MAX_REPLY_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return self._answer(out.sequences[0, ids.shape[1] :].tolist(), out.logits[0][0])

    def _from_embeddings(self, ids: torch.Tensor, grids: torch.Tensor, visual: torch.Tensor):
        """The same answer from kept visual tokens: every step sends everything, no KV cache."""
        pad, end = self._model.config.image_token_id, self._tokenizer.convert_tokens_to_ids(IM_END)
        tokens: list[int] = []
        first = None
        while len(tokens) < MAX_REPLY_TOKENS and (not tokens or tokens[-1] != end):
            sent = torch.cat([ids, torch.tensor([tokens], dtype=torch.long)], dim=1)
            positions, _ = self._model.model.get_rope_index(sent, grids)
            embeddings = self._model.get_input_embeddings()(sent)
            embeddings[sent == pad] = visual
            logits = self._model(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits[0, -1]
            first = logits if first is None else first
            tokens.append(int(logits.argmax()))
            if self._states.get(tokens[0]) != RESPONSE:
                break
        return tokens, first

    def _answer(self, tokens: list[int], logits: torch.Tensor) -> tuple[str, str, np.ndarray]:
        state = self._states.get(tokens[0])
        if state is None:  # the model said something else: the best of the three states stands
            state = max(self._states, key=lambda token: float(logits[token]))
            return self._states[state], "", logits.numpy()
        text = ""
        if state == RESPONSE:
            end = self._tokenizer.convert_tokens_to_ids(IM_END)
            said = tokens[1 : tokens.index(end)] if end in tokens else tokens[1:]
            text = self._tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip()
        return state, text, logits.numpy()


def run_official(loop: OfficialLoop, stream: Stream, frames: Stream | None = None) -> list[tuple[str, str]]:
    """Answers of a whole stream; pictures come from `frames` if it is given."""
    loop.reset()
    answers = []
    for t in range(stream.duration_s):
        state, text, _ = loop.push((frames or stream).render(t), t, stream.questions.get(t))
        answers.append((state, text))
    return answers

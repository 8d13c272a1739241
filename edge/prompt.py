"""The text of a stream's conversation, byte for byte.

Owns the system prompt and the layout of one turn, as data: another model of the same kind differs only in a `Protocol`.
Does not know token ids (see `tokenizer`) nor which turns are kept (see `session`).

Follows maifoundations/Streamo `inference.py` and ms-swift's ChatML template.
"""

from __future__ import annotations

from dataclasses import dataclass

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
END_OF_TEXT = "<|endoftext|>"

# The trailing spaces and both outer newlines are part of what the models were trained with.
STREAMO_SYSTEM_PROMPT = (
    "\nYou are a helpful assistant specializing in streaming video analysis. \n"
    "You will receive input frame by frame, each labeled with absolute time intervals \n"
    "in the exact format <Xs-Ys> (e.g., <0s-1s>). Follow these rules precisely:\n"
    "\n"
    "1. Use </Silence> when:\n"
    "   - No relevant event has started, OR\n"
    "   - The current input is irrelevant to the given question.  \n"
    "\n"
    "2. Use </Standby> when:\n"
    "   - An event is in progress but has not yet completed, OR\n"
    "   - The current input is relevant but the question cannot yet be answered.  \n"
    "\n"
    "3. Use </Response> only when:\n"
    "   - An event has fully concluded, OR\n"
    "   - The available information is sufficient to fully answer the question.\n"
    "   Provide a complete description at this point.  \n"
    "\n"
    "Do not provide partial answers or speculate beyond the given information.  \n"
    "Whenever you deliver an answer, begin with </Response>.\n"
)


@dataclass(frozen=True)
class Protocol:
    """How one streaming model spells its conversation.

    `time_tag` is formatted with `start_s` and `end_s` (whole seconds). `turn_layout` is formatted with `question`
    (empty, or ending in a newline), `tag` and `image`.
    """

    system_prompt: str = STREAMO_SYSTEM_PROMPT
    silence: str = "</Silence>"
    standby: str = "</Standby>"
    response: str = "</Response>"
    time_tag: str = "<{start_s}s-{end_s}s>"
    turn_layout: str = "{question}{tag}\n{image}"
    turn_interval_s: int = 1

    def system_text(self) -> str:
        """The block in front of the first turn."""
        return f"{IM_START}system\n{self.system_prompt}{IM_END}\n"

    def turn_text(self, t: int, question: str = "") -> tuple[str, str]:
        """The user turn of stream second `t`, split at the visual tokens: (text before, text after).

        The text before ends in `<|vision_start|>`, the text after starts with `<|vision_end|>` and ends where the
        assistant's first token follows. Each half must be tokenised as one string: a question's last characters merge
        with the newline that follows them.
        """
        opening, after = self.turn_pieces(t)
        asked = f"{question}\n" if question else ""
        return f"{opening[0]}{asked}{opening[1]}", after

    def turn_pieces(self, t: int) -> tuple[tuple[str, str], str]:
        """As `turn_text`, with the text before in two: what is in front of a question, and what is behind it."""
        tag = self.time_tag.format(start_s=t, end_s=t + self.turn_interval_s)
        before, _, after = self.turn_layout.partition("{image}")
        front, _, behind = before.partition("{question}")
        front, behind, after = (part.format(tag=tag) for part in (front, behind, after))
        return (
            (f"{IM_START}user\n{front}", f"{behind}{VISION_START}"),
            f"{VISION_END}{after}{IM_END}\n{IM_START}assistant\n",
        )

    def state_texts(self) -> tuple[str, str, str]:
        """The spelling of silence, standby and response, in this order."""
        return (self.silence, self.standby, self.response)


STREAMO = Protocol()

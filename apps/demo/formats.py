"""A stream's labels in the two annotation formats of Streamo-Instruct.

Owns the conversion. `raw` says when questions are asked and answered; `stream` spells one turn a second. In the raw
format an answer that stands by on turns a to b - 1 and comes on turn b has `st_time` a + 1 and `end_time` b; one
without standby has `time` b + 1. A question on turn q has `time` q + 1.
"""

from __future__ import annotations

from apps.demo.labels import RESPONSE, STANDBY, Turn
from apps.demo.phrases import ACTION, EVENT, GROUNDING, NARRATION, TSQA
from apps.demo.world import Stream
from edge.prompt import STREAMO

SOURCE = "streamo-edge-demo"
FRAME_PLACEHOLDER = "<stream>"
_TASK_TYPES = {
    NARRATION: "Narration", ACTION: "Action Caption", EVENT: "Event Caption", GROUNDING: "Event Grounding", TSQA: "QA",
}  # fmt: skip


def raw_format(stream: Stream, video_path: str) -> dict:
    """One entry of `raw_data.json`."""
    responses = []
    standby_from: int | None = None
    for turn, label in enumerate(stream.truth):
        if label.state == RESPONSE:
            when: dict[str, float | str] = {"st_time": "", "end_time": "", "time": str(turn + 1)}
            if standby_from is not None:
                when = {"st_time": float(standby_from + 1), "end_time": float(turn), "time": ""}
            responses.append({"content": label.text, **when})
        if label.state != STANDBY:
            standby_from = None
        elif standby_from is None:
            standby_from = turn
    return {
        **_description(stream, video_path),
        "video_path": video_path,
        "question": [{"content": text, "time": str(turn + 1)} for turn, text in sorted(stream.questions.items())],
        "response": responses,
    }


def stream_format(stream: Stream, video_path: str) -> dict:
    """One entry of `stream_format.json`: system prompt, then a user and an assistant message each second."""
    messages = [{"role": "system", "content": STREAMO.system_prompt}]
    for turn, label in enumerate(stream.truth):
        question = stream.questions.get(turn, "")
        tag = STREAMO.time_tag.format(start_s=turn, end_s=turn + STREAMO.turn_interval_s)
        asked = f"{question}\n" if question else ""
        messages.append({"role": "user", "content": f"{asked}{tag}\n{FRAME_PLACEHOLDER}"})
        messages.append({"role": "assistant", "content": assistant_text(label)})
    return {"messages": messages, "videos": [video_path], **_description(stream, video_path)}


def _description(stream: Stream, video_path: str) -> dict[str, str]:
    return {
        "video_name": video_path.rsplit("/", 1)[-1],
        "task_type": _TASK_TYPES.get(stream.task, stream.task),
        "source": SOURCE,
    }


def assistant_text(label: Turn) -> str:
    """The assistant's message of one turn."""
    if label.state == RESPONSE:
        return f"{STREAMO.response} {label.text}"
    return STREAMO.standby if label.state == STANDBY else STREAMO.silence

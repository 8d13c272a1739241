"""The words of the demonstration: object names, questions, and replies.

Owns every sentence that a stream can contain. Knows nothing of time, pictures or tokens.
"""

from __future__ import annotations

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
OBJECTS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

HAND_KINDS = ("put", "take", "move_left", "move_right", "cover", "uncover")
LIGHT_KINDS = ("light_off", "light_on")
KINDS = HAND_KINDS + LIGHT_KINDS

NARRATION, ACTION, EVENT, GROUNDING, TSQA = "narration", "action_caption", "event_caption", "grounding", "tsqa"
TASKS = (NARRATION, ACTION, EVENT, GROUNDING, TSQA)

NARRATION_QUESTIONS = (
    "Narrate what happens in the video as it happens.",
    "Describe in real time what is happening.",
    "Tell me what is going on as soon as it starts.",
)
ACTION_QUESTIONS = (
    "Describe each action of the hand once it is finished.",
    "Caption every hand action when it has been completed.",
    "Report each step of the hand after it is done.",
)
EVENT_QUESTIONS = (
    "Describe each event when it ends.",
    "Caption every event as soon as it has ended.",
    "Report all events in the video after they are over.",
)
GROUNDING_QUESTION = (
    "Watch the video and temporally localize the event. Respond once it has finished and summarize its time period. "
    "The given event is: '{caption}'"
)
# Only trained on, never tested: many times in one stream, where the task itself gives one at most.
GROUNDING_EACH_QUESTION = (
    "Watch the video and temporally localize each event. Respond once it has finished and summarize its time period."
)
TSQA_SUFFIX = " Update your answer if it becomes different at a later time."
COUNT_QUESTIONS = ("How many shapes are visible?", "How many shapes can you see?")
LIGHT_QUESTIONS = ("Is the light on?",)
WHERE_QUESTIONS = ("Where is the {name}?",)

GROUNDING_REPLY = "Given event occurred between {start_s}s to {end_s}s."
_COUNT_WORDS = ("There are no shapes.", "There is 1 shape.")
LIGHT_REPLIES = {True: "Yes, the light is on.", False: "No, the light is off."}
ON_TABLE, UNDER_CUP, NOT_ON_TABLE = "on_table", "under_cup", "not_on_table"
_WHERE_REPLIES = {
    ON_TABLE: "The {name} is on the table.",
    UNDER_CUP: "The {name} is under a cup.",
    NOT_ON_TABLE: "The {name} is not on the table.",
}

_NARRATION = {
    "put": "A hand puts a {name} on the table.",
    "take": "A hand takes the {name} away.",
    "move_left": "A hand moves the {name} to the left.",
    "move_right": "A hand moves the {name} to the right.",
    "cover": "A hand covers the {name} with a cup.",
    "uncover": "A hand uncovers the {name}.",
    "light_off": "The light goes off.",
    "light_on": "The light goes on.",
}
_ACTION = {
    "put": "Put the {name} on the table.",
    "take": "Take the {name} away.",
    "move_left": "Move the {name} to the left.",
    "move_right": "Move the {name} to the right.",
    "cover": "Cover the {name} with a cup.",
    "uncover": "Uncover the {name}.",
}
_EVENT = {
    "put": "The {name} was put on the table.",
    "take": "The {name} was taken away.",
    "move_left": "The {name} was moved to the left.",
    "move_right": "The {name} was moved to the right.",
    "cover": "The {name} was covered by a cup.",
    "uncover": "The {name} was uncovered.",
    "light_off": "The light was turned off.",
    "light_on": "The light was turned on.",
}


def object_name(index: int) -> str:
    """The name of object `index` (0 to 11), such as "red circle"."""
    colour, shape = OBJECTS[index]
    return f"{colour} {shape}"


def _fill(template: str, thing: int | None) -> str:
    return template.format(name=object_name(thing)) if thing is not None else template


def narrate(kind: str, thing: int | None) -> str:
    """What real-time narration says about an event that starts."""
    return _fill(_NARRATION[kind], thing)


def caption_action(kind: str, thing: int | None) -> str:
    """The caption of a finished hand action."""
    return _fill(_ACTION[kind], thing)


def caption_event(kind: str, thing: int | None) -> str:
    """The caption of a finished event."""
    return _fill(_EVENT[kind], thing)


def count_reply(count: int) -> str:
    """The answer to how many shapes are visible."""
    return _COUNT_WORDS[count] if count < 2 else f"There are {count} shapes."


def where_reply(place: str, thing: int) -> str:
    """The answer to where an object is."""
    return _fill(_WHERE_REPLIES[place], thing)


def every_sentence() -> list[str]:
    """Every question and every reply without times, for building the vocabulary."""
    sentences = [*NARRATION_QUESTIONS, *ACTION_QUESTIONS, *EVENT_QUESTIONS]
    sentences += [question + TSQA_SUFFIX for question in (*COUNT_QUESTIONS, *LIGHT_QUESTIONS)]
    sentences += [count_reply(count) for count in range(5)] + list(LIGHT_REPLIES.values())
    sentences.append(GROUNDING_REPLY.format(start_s=20, end_s=43))
    for kind in LIGHT_KINDS:
        sentences += [narrate(kind, None), caption_event(kind, None)]
    for thing in range(len(OBJECTS)):
        sentences += [question.format(name=object_name(thing)) + TSQA_SUFFIX for question in WHERE_QUESTIONS]
        sentences += [where_reply(place, thing) for place in _WHERE_REPLIES]
        for kind in HAND_KINDS:
            caption = caption_event(kind, thing)
            sentences += [narrate(kind, thing), caption_action(kind, thing), caption]
            sentences.append(GROUNDING_QUESTION.format(caption=caption))
    return sentences

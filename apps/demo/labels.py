"""What a perfect model answers: questions put to a scene, and the true state and text of every turn.

Owns the rules of the five tasks. Knows the event log, not its pictures; knows no tokens.

The latest question is the one in force. An event counts for a caption when its result appears after the question's
turn; narration speaks on the first turn that shows the event, or on the question's turn when it is under way then.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from apps.demo import phrases
from apps.demo.phrases import ACTION, EVENT, GROUNDING, HAND_KINDS, NARRATION, OBJECTS, TASKS, TSQA
from apps.demo.script import Script, WorldEvent

SILENCE, STANDBY, RESPONSE = "silence", "standby", "response"
COUNT, LIGHT, WHERE = "count", "light", "where"
MIN_LEAD_TURNS = 6  # a second question leaves the first at least this long, and the stream's end too


@dataclass(frozen=True)
class Turn:
    """The true answer of one second. `text` is empty unless `state` is "response"; `task` is the one in force."""

    state: str
    text: str = ""
    task: str = ""


@dataclass(frozen=True)
class Question:
    """One question: its text and what the labels need to know of it."""

    task: str
    text: str
    about: str = ""  # count, light or where, with TSQA
    thing: int | None = None  # the object of a where question or of an event to be found
    kind: str = ""  # the kind of an event to be found, whether or not it happens
    event: WorldEvent | None = None  # the event to be found; None when it never happens
    each: bool = False  # every hand event is to be found (in training only)


def _concerns(question: Question, event: WorldEvent) -> bool:
    if question.about == LIGHT:
        return event.is_light
    if event.is_light or event.kind in ("move_left", "move_right"):
        return False
    return question.about == COUNT or event.thing == question.thing


def _fact(question: Question, script: Script, turn: int) -> str:
    state = script.state_before(turn)
    if question.about == COUNT:
        return phrases.count_reply(len(state.visible))
    if question.about == LIGHT:
        return phrases.LIGHT_REPLIES[state.light]
    thing = question.thing
    if thing is None:
        raise ValueError(f"a question about {question.about or 'nothing'} needs an object: {question.text}")
    if thing in state.covered:
        return phrases.where_reply(phrases.UNDER_CUP, thing)
    return phrases.where_reply(phrases.ON_TABLE if thing in state.slots else phrases.NOT_ON_TABLE, thing)


def _label_tsqa(question: Question, script: Script, turns: range, time_offset_s: int) -> list[Turn]:
    labels, last = [], None
    for turn in turns:
        active = script.active(turn)
        if active is not None and _concerns(question, active):
            labels.append(Turn(STANDBY, task=TSQA))
            continue
        fact = _fact(question, script, turn)
        labels.append(Turn(SILENCE, task=TSQA) if fact == last else Turn(RESPONSE, fact, TSQA))
        last = fact
    return labels


def _label_events(question: Question, script: Script, turns: range, time_offset_s: int) -> list[Turn]:
    labels = [Turn(SILENCE, task=question.task) for _ in turns]
    asked = turns.start

    def put(turn: int, label: Turn) -> None:
        if turn in turns:
            labels[turn - asked] = label

    for event in script.events:
        if event.done_turn <= asked:
            continue
        if question.task == NARRATION:
            text = phrases.narrate(event.kind, event.thing)
            put(max(event.first_turn, asked), Turn(RESPONSE, text, NARRATION))
            continue
        if question.task == ACTION:
            if event.is_light:
                continue
            text = phrases.caption_action(event.kind, event.thing)
        elif question.task == EVENT:
            text = phrases.caption_event(event.kind, event.thing)
        else:
            if event != question.event and not (question.each and not event.is_light):
                continue
            text = phrases.GROUNDING_REPLY.format(
                start_s=time_offset_s + event.first_turn, end_s=time_offset_s + event.done_turn
            )
        for turn in range(max(event.first_turn, asked), event.done_turn):
            put(turn, Turn(STANDBY, task=question.task))
        put(event.done_turn, Turn(RESPONSE, text, question.task))
    return labels


def label_turns(script: Script, questions: dict[int, Question], time_offset_s: int = 0) -> list[Turn]:
    """The true answers of every turn of a scene.

    Args:
      script: the scene.
      questions: by the turn on which each is asked.
      time_offset_s: what the time tag of turn 0 says; grounding replies count from there.
    """
    asked = sorted(questions)
    labels = [Turn(SILENCE) for _ in range(min([*asked, script.duration_s]))]
    for begin, end in zip(asked, [*asked[1:], script.duration_s], strict=True):
        question = questions[begin]
        label = _label_tsqa if question.task == TSQA else _label_events
        labels += label(question, script, range(begin, end), time_offset_s)
    return labels


def quiet_turns(script: Script) -> list[int]:
    """Turns that show neither an event in progress nor one's result for the first time."""
    busy = {turn for event in script.events for turn in range(event.first_turn, event.done_turn + 1)}
    return [turn for turn in range(script.duration_s) if turn not in busy]


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _grounding_question(rng: np.random.Generator, script: Script, turn: int) -> Question:
    hand = [event for event in script.events if not event.is_light]
    counts = Counter((event.kind, event.thing) for event in hand)
    unique = [event for event in hand if counts[event.kind, event.thing] == 1 and event.first_turn > turn]
    event, happened = None, set(counts)
    if unique and rng.random() >= 0.2:
        event = _pick(rng, unique)
        kind, thing = event.kind, event.thing
    else:
        while True:  # something that never happens, often a near miss
            if hand and rng.random() < 0.6:
                near = _pick(rng, hand)
                kind, thing = near.kind, near.thing
                if rng.random() < 0.5:
                    kind = _pick(rng, HAND_KINDS)
                else:
                    thing = int(rng.integers(len(OBJECTS)))
            else:
                kind, thing = _pick(rng, HAND_KINDS), int(rng.integers(len(OBJECTS)))
            if (kind, thing) not in happened:
                break
    caption = phrases.caption_event(kind, thing)
    text = phrases.GROUNDING_QUESTION.format(caption=caption)
    return Question(GROUNDING, text, thing=thing, kind=kind, event=event)


def draw_question(
    rng: np.random.Generator, script: Script, task: str, turn: int, target: int | None = None, about: str = ""
) -> Question:
    """A random question of a task, to be asked on `turn`.

    Args:
      rng: the source of chance.
      script: the scene it is asked about.
      task: one of `phrases.TASKS`.
      turn: the turn that carries the question.
      target: the object of a where question; without it one of the scene's.
      about: the kind of a TSQA question; without it a random one.
    """
    if task == NARRATION:
        return Question(task, _pick(rng, phrases.NARRATION_QUESTIONS))
    if task == ACTION:
        return Question(task, _pick(rng, phrases.ACTION_QUESTIONS))
    if task == EVENT:
        return Question(task, _pick(rng, phrases.EVENT_QUESTIONS))
    if task == GROUNDING:
        return _grounding_question(rng, script, turn)
    about = about or _pick(rng, (COUNT, LIGHT, WHERE))
    if about == WHERE and script.initial.covered:
        about = COUNT  # nobody can know what stands under a cup that was there from the start
    if about == COUNT:
        return Question(TSQA, _pick(rng, phrases.COUNT_QUESTIONS) + phrases.TSQA_SUFFIX, COUNT)
    if about == LIGHT:
        return Question(TSQA, _pick(rng, phrases.LIGHT_QUESTIONS) + phrases.TSQA_SUFFIX, LIGHT)
    if target is None:
        seen = [event.thing for event in script.events if event.thing is not None] or [int(rng.integers(len(OBJECTS)))]
        target = _pick(rng, seen)
    text = _pick(rng, phrases.WHERE_QUESTIONS).format(name=phrases.object_name(target)) + phrases.TSQA_SUFFIX
    return Question(TSQA, text, WHERE, target)


def _asking_turn(rng: np.random.Generator, script: Script, task: str, low: int, high: int) -> int:
    if task == TSQA and rng.random() < 0.3:  # may fall into an event
        return int(rng.integers(low, high))
    quiet = [turn for turn in quiet_turns(script) if low <= turn < high]
    return _pick(rng, quiet) if quiet else low


def draw_questions(
    rng: np.random.Generator,
    script: Script,
    task: str,
    target: int | None = None,
    about: str = "",
    more: float = 0.2,
    most: int = 2,
    next_tasks: tuple[str, ...] = TASKS,
) -> dict[int, Question]:
    """One question of `task`, at the start or later; then, with chance `more` each, further ones of `next_tasks`.

    A question comes at least `MIN_LEAD_TURNS` after the one before it, and as long before the stream's end. At most
    `most` questions are drawn.
    """
    turn = 0
    if rng.random() < 0.4:
        turn = _asking_turn(rng, script, task, 1, max(script.duration_s // 2, 2))
    questions = {turn: draw_question(rng, script, task, turn, target, about)}
    while len(questions) < most and script.duration_s - turn >= 3 * MIN_LEAD_TURNS and rng.random() < more:
        task = _pick(rng, next_tasks)
        turn = _asking_turn(rng, script, task, turn + MIN_LEAD_TURNS, script.duration_s - MIN_LEAD_TURNS)
        questions[turn] = draw_question(rng, script, task, turn, target if rng.random() < 0.5 else None)
    return questions

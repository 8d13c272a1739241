"""What happens on the table: the events of a scene and the state of the world between them.

Owns the event log and its timing rules. Knows nothing of pictures, questions or tokens.

Timing. A hand event runs from `start_s` to `end_s`, neither of them near a whole second, so that the frame of a whole
second is either clearly inside an event or clearly outside. It is in progress on turns `first_turn` to `done_turn - 1`
and its result is seen first on `done_turn`. A change of light is instantaneous: `first_turn == done_turn`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from apps.demo.phrases import LIGHT_KINDS, OBJECTS

SLOT_COUNT = 4


@dataclass(frozen=True)
class WorldEvent:
    """One entry of the event log. `thing` indexes `phrases.OBJECTS`; light events have none."""

    kind: str
    thing: int | None
    start_s: float
    end_s: float
    from_slot: int | None = None
    to_slot: int | None = None

    @property
    def first_turn(self) -> int:
        """The first turn whose frame shows the event (or, for the light, its result)."""
        return math.ceil(self.start_s)

    @property
    def done_turn(self) -> int:
        """The first turn whose frame shows the event's result."""
        return math.ceil(self.end_s)

    @property
    def handled(self) -> int:
        """The object of a hand event.

        Raises:
          ValueError: a light event has none.
        """
        if self.thing is None:
            raise ValueError(f"the event {self.kind} handles no object")
        return self.thing

    @property
    def is_light(self) -> bool:
        return self.kind in LIGHT_KINDS


@dataclass
class TableState:
    """What stands where. `slots[i]` is an object's index or None; covered objects stand under a cup."""

    slots: list[int | None] = field(default_factory=lambda: [None] * SLOT_COUNT)
    covered: set[int] = field(default_factory=set)
    light: bool = True

    def copy(self) -> TableState:
        return TableState(list(self.slots), set(self.covered), self.light)

    def apply(self, event: WorldEvent) -> None:
        """Change the state to what it is after `event`."""
        if event.is_light:
            self.light = event.kind == "light_on"
        elif event.kind == "cover":
            self.covered |= {event.handled}
        elif event.kind == "uncover":
            self.covered -= {event.handled}
        else:
            if event.from_slot is not None:
                self.slots[event.from_slot] = None
            if event.to_slot is not None:
                self.slots[event.to_slot] = event.thing

    @property
    def visible(self) -> list[int]:
        """Objects that stand on the table and are not under a cup."""
        return [thing for thing in self.slots if thing is not None and thing not in self.covered]


@dataclass(frozen=True)
class Flavour:
    """What a scene is made for: how often the light changes, and an object that events prefer."""

    light_weight: float = 0.9
    target: int | None = None
    initial_covers: bool = True
    move_weight: float = 1.0


@dataclass(frozen=True)
class Script:
    """A scene's event log and its state before the first event."""

    initial: TableState
    events: tuple[WorldEvent, ...]
    duration_s: int

    def state_before(self, turn: int) -> TableState:
        """The settled state that turn `turn` shows, leaving out an event that is still in progress."""
        state = self.initial.copy()
        for event in self.events:
            if event.done_turn <= turn:
                state.apply(event)
        return state

    def active(self, turn: int) -> WorldEvent | None:
        """The hand event in progress on `turn`."""
        for event in self.events:
            if event.first_turn <= turn < event.done_turn:
                return event
        return None


def _initial_state(rng: np.random.Generator, flavour: Flavour) -> TableState:
    state = TableState(light=bool(rng.random() < (0.5 if flavour.light_weight > 2 else 0.7)))
    count = int(rng.choice(4, p=[0.2, 0.3, 0.3, 0.2]))
    things = rng.permutation(len(OBJECTS))[:count].tolist()
    if flavour.target is not None and things and flavour.target not in things and rng.random() < 0.45:
        things[0] = flavour.target
    for slot, index in zip(rng.permutation(SLOT_COUNT)[:count].tolist(), things, strict=True):
        state.slots[slot] = int(index)
        if flavour.initial_covers and rng.random() < 0.12:
            state.covered.add(int(index))
    return state


def _choices(state: TableState, flavour: Flavour) -> list[tuple[float, str, int | None, int | None, int | None]]:
    """Every possible next event as (weight, kind, thing, from slot, to slot)."""
    found: list[tuple[float, str, int | None, int | None, int | None]] = []

    def add(weight: float, kind: str, thing: int | None, from_slot: int | None, to_slot: int | None) -> None:
        if thing is not None and thing == flavour.target:
            weight *= 6.0
        found.append((weight, kind, thing, from_slot, to_slot))

    found.append((flavour.light_weight, "light_off" if state.light else "light_on", None, None, None))
    free = [slot for slot, thing in enumerate(state.slots) if thing is None]
    absent = [thing for thing in range(len(OBJECTS)) if thing not in state.slots]
    for slot in free:
        for thing in absent:
            add(0.75 / len(absent), "put", thing, None, slot)
    for slot, standing in enumerate(state.slots):
        if standing is None:
            continue
        if standing in state.covered:
            add(1.1, "uncover", standing, slot, slot)
            continue
        add(0.6, "take", standing, slot, None)
        add(0.6, "cover", standing, slot, slot)
        for step, kind in ((-1, "move_left"), (1, "move_right")):
            if slot + step in free:
                add(0.8 * flavour.move_weight, kind, standing, slot, slot + step)
    return found


def write_script(rng: np.random.Generator, duration_s: int, flavour: Flavour | None = None) -> Script:
    """Invent a scene of `duration_s` seconds."""
    flavour = flavour or Flavour()
    initial = _initial_state(rng, flavour)
    state = initial.copy()
    events: list[WorldEvent] = []
    turn = int(rng.integers(1, 5))  # the next event's first turn
    while True:
        choices = _choices(state, flavour)
        weights = np.array([choice[0] for choice in choices])
        _, kind, thing, from_slot, to_slot = choices[int(rng.choice(len(choices), p=weights / weights.sum()))]
        if kind in LIGHT_KINDS:
            start_s = end_s = turn - 1 + float(rng.uniform(0.05, 0.95))
        else:
            turns = int(rng.choice([1, 2, 3, 4], p=[0.12, 0.4, 0.33, 0.15]))
            start_s = turn - 1 + float(rng.uniform(0.3, 0.95))
            end_s = turn - 1 + turns + float(rng.uniform(0.05, 0.7))
            if end_s - start_s < 0.5:  # only with a single turn; keep the motion visible
                start_s, end_s = turn - 0.65, turn + 0.4
        event = WorldEvent(kind, thing, start_s, end_s, from_slot, to_slot)
        if event.done_turn > duration_s - 1:
            break
        events.append(event)
        state.apply(event)
        gap = int(rng.choice([1, 2, 3, 4, 7], p=[0.22, 0.3, 0.24, 0.14, 0.1]))  # clear turns until the next event
        turn = event.done_turn + gap
    return Script(initial, tuple(events), duration_s)

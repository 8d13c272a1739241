"""What the demonstration's model is trained on: late streams, windows, and histories that have gone astray."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from apps.demo.conversation import IGNORED, encode, garble, state_ids, tokenizer
from apps.demo.labels import RESPONSE, Turn
from apps.demo.phrases import NARRATION
from apps.demo.samples import ENDURANCE_MIX, FIRST_TRAINING_SEED, Sample, draw_sample
from edge.prompt import IM_END

TURNS = 16


def endurance_sample(seed: int, **changes: float) -> Sample:
    return draw_sample(FIRST_TRAINING_SEED + seed, TURNS, NARRATION, mix=replace(ENDURANCE_MIX, **changes))


def replies(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """By turn: the reply's tokens in the history, and what is to be learned instead of or with them."""
    ids, target = sample.talk.ids.tolist(), sample.talk.target.tolist()
    end = encode(IM_END)[0]
    return [(ids[at + 1 : ids.index(end, at)], target[at : ids.index(end, at)]) for at in sample.talk.decide.tolist()]


def test_endurance_streams_start_at_any_second_of_many_days():
    starts = []
    for seed in range(30):
        said = tokenizer().decode(endurance_sample(seed, late=1.0).talk.ids.tolist())
        _in_system_prompt, first, *_ = re.findall(r"<(\d+)s-", said)
        starts.append(int(first))
    assert max(starts) > 86_400
    assert len({len(str(start)) for start in starts}) >= 4


def test_of_a_derailed_reply_only_the_right_state_is_learned():
    astray = 0
    for seed in range(12):
        for said, learned in replies(endurance_sample(seed, derailed=1.0, spoilt=0.0)):
            if learned[0] == IGNORED:
                continue
            assert learned[0] in state_ids()
            if said[0] != learned[0] or (len(said) > 1 and all(token == IGNORED for token in learned[1:])):
                astray += 1
                assert all(token == IGNORED for token in learned[1:])
            else:
                assert learned[: len(said)] == said
    assert astray > 12


def test_without_derailing_every_reply_of_a_history_is_the_true_one():
    for seed in range(6):
        for said, learned in replies(endurance_sample(seed, derailed=0.0, spoilt=0.0)):
            assert learned[0] == IGNORED or learned[: len(said)] == said


def test_a_garbled_reply_is_never_what_should_have_been_said():
    rng = np.random.Generator(np.random.PCG64(0))
    truth = [Turn(RESPONSE, "A hand puts a red circle on the table."), Turn(RESPONSE, "The light goes on.")]
    texts = {garble(rng, truth) for _ in range(200)}
    assert not texts & {turn.text for turn in truth}
    assert len(texts) > 150
    assert max(len(encode(text)) for text in texts) > 60

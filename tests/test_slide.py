"""The `slide` policy: it keeps the tokens that `rebuild` keeps, and its logits are those of a cache never cut."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error
from numpy_decoder import NumpyDecoder
from qwen_vocabulary import PRETOKENIZE, qwen_tokenizer_json
from scripted import byte_tokenizer, reply_ids, scripted_bundle
from witness import Witness

import edge.decoder
import edge.slide
from apps.bench.kernel_cases import rotate
from edge.backends.base import CacheView
from edge.bundle import Bundle
from edge.clock import FakeClock
from edge.contract import DecoderFacts
from edge.conversation import Conversation
from edge.decoder import FrameTokens
from edge.prompt import STREAMO
from edge.session import StreamSession
from edge.tokenizer import Tokenizer

SMALL = replace(STREAMO, system_prompt="Watch.")
FACTS = DecoderFacts(2, 24, 32, 4, 2, 16, 0, 1e-6, 1e6, (2, 3, 3), True)
GRID = (2, 3)
FRAME = np.zeros((28 * GRID[0], 28 * GRID[1], 3), np.uint8)
Both = dict[int, list[tuple[StreamSession, Witness]]]
REPLIES = ["</Silence>", "</Standby>", "</Silence>", "</Response> Red.", *["</Silence>"] * 4]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("slide")
    return scripted_bundle(folder, max_pixels=28 * 28 * 6, protocol=SMALL, decoder_facts=FACTS)


def session_of(bundle: Bundle, inner: object = None, **options: object) -> tuple[StreamSession, Witness]:
    replies = [reply_ids(bundle, reply) for reply in REPLIES]
    witness = Witness(bundle, replies, GRID, inner)
    options = {"policy": "slide", "clock": FakeClock(), **options}
    return StreamSession(bundle, backend=witness, **options), witness  # type: ignore[arg-type]


# Which tokens are kept


MERGES = [("?", "Ċ"), (">", "Ċ"), ("!", "Ċ"), ("?", "!"), ("Ċ", "Ċ"), ('"', "Ċ"), ("Ċ", "<")]


@pytest.fixture(scope="module", params=["bytes", "merges"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """By window, one session of each policy, with a byte tokenizer or one that merges as Qwen's does."""
    text = byte_tokenizer(MERGES, PRETOKENIZE) if request.param == "merges" else None
    folder = tmp_path_factory.mktemp(request.param)
    bundle = scripted_bundle(folder, max_pixels=28 * 28 * 6, protocol=SMALL, decoder_facts=FACTS, tokenizer_json=text)
    policies = ("slide", "rebuild")
    return {n: [session_of(bundle, policy=policy, window_turns=n) for policy in policies] for n in (1, 3)}


WORDS = ["What?", "Is it on?!", "Say \n\n when...", "x" * 200, '"', "Zähle", "1", "?\n?", "😀", "é́ <1s>"]
TEXTS = st.sampled_from(WORDS)
ACTIONS = st.tuples(st.lists(TEXTS, max_size=2), st.lists(st.integers(0, 3), max_size=2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(ACTIONS, min_size=5, max_size=14),
    window_turns=st.sampled_from([1, 3]),
    chunk=st.sampled_from([7, 512]),
)
def test_the_kept_tokens_are_those_that_rebuild_would_prefill(
    both: Both,
    monkeypatch: pytest.MonkeyPatch,
    turns: list[tuple[list[str], list[int]]],
    window_turns: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(edge.decoder, "MAX_PREFILL_TOKENS", chunk)
    pair = both[window_turns]
    for session, witness in pair:
        session.reset()
        witness.frames = 0
    for t, (asked, closed) in enumerate(turns):
        for session, _ in pair:
            for index in closed:
                if index < len(session.open_questions):
                    session.close_question(sorted(session.open_questions)[index])
            for text in asked:
                session.ask(text)
        (slid, slide), (rebuilt, rebuild) = ((session.push(FRAME, t), witness) for session, witness in pair)
        if slid.logits is None:
            assert rebuilt.logits is None
            continue
        assert slide.kept == rebuild.kept
        assert (slid.state, slid.text, slid.evicted_turns) == (rebuilt.state, rebuilt.text, rebuilt.evicted_turns)
        assert pair[0][0].position == pair[1][0].position
        assert slid.kv_tokens == rebuilt.kv_tokens


@given(
    t=st.integers(0, 10**6),
    questions=st.lists(st.text(min_size=1).map(str.strip).filter(bool) | TEXTS.map(str.strip), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_with_qwens_vocabulary_a_question_ends_where_a_token_ends(
    t: int, questions: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    conversation = _qwen_conversation(tmp_path_factory)
    frame = FrameTokens(np.zeros((1, 1), np.float32), 1, 1)
    whole, _, after = conversation.turn_segments(t, questions, frame)
    ids = conversation.turn_ids(t, questions)
    assert [*ids.header, *(i for line in ids.questions for i in line), *ids.before_frame] == whole
    assert ids.after_frame == after
    alone = [conversation.turn_ids(t, [question]).questions[0] for question in questions]
    assert ids.questions == alone, "a question's tokens do not depend on its neighbours"
    assert ids.header == conversation.turn_ids(0, []).header
    assert ids.before_frame == conversation.turn_ids(t, []).before_frame


def test_a_tokenizer_that_merges_across_a_question_still_spells_the_turn_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer(MERGES))
    conversation = Conversation(Tokenizer(tmp_path / "tokenizer.json"), STREAMO)
    frame = FrameTokens(np.zeros((1, 1), np.float32), 1, 1)
    ids = conversation.turn_ids(7, ["What", "Why?"])
    whole = conversation.turn_segments(7, ["What", "Why?"], frame)[0]
    assert [*ids.header, *(i for line in ids.questions for i in line), *ids.before_frame] == whole
    assert len(ids.questions) == 2


_CONVERSATIONS: list[Conversation] = []


def _qwen_conversation(tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    if not _CONVERSATIONS:
        path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
        path.write_text(qwen_tokenizer_json())
        _CONVERSATIONS.append(Conversation(Tokenizer(path), STREAMO))
    return _CONVERSATIONS[0]


def test_until_the_first_eviction_both_policies_fill_the_same_rows(bundle: Bundle) -> None:
    both = [session_of(bundle, NumpyDecoder(bundle.manifest), policy=p, window_turns=6) for p in ("slide", "rebuild")]
    for t in range(6):
        for session, _ in both:
            if t == 2:
                session.ask("What happens?")
            session.push(FRAME, t)
        np.testing.assert_array_equal(both[0][1].logits, both[1][1].logits)
        np.testing.assert_array_equal(both[0][1]._rows, both[1][1]._rows)


# What the model computes from them


def test_sliding_for_10_000_turns_gives_the_logits_of_a_fresh_cache(bundle: Bundle) -> None:
    session, witness = session_of(bundle, NumpyDecoder(bundle.manifest), window_turns=5, max_reply_tokens=8)
    fresh = NumpyDecoder(bundle.manifest)
    checked = (502, 702, 999)
    session.ask("First?")
    errors = {}
    for t in range(10_000):
        if t % 1000 == 500:
            session.ask(f"What of {t}?")
        if t % 1000 == 700 and len(session.open_questions) > 3:
            session.close_question(next(iter(session.open_questions)))
        witness.resting = t > 110 and not any(0 <= at - t % 1000 <= 12 for at in checked)
        witness.watching = t in (3, 10, 100) or t % 1000 in checked
        session.push(FRAME, t)
        assert session.kv_tokens <= session.kv_capacity_tokens
        if witness.watching:
            errors[t] = relative_error(witness.logits, witness.logits_of_a_fresh_cache(fresh, 1e6, FACTS.mrope_section))
    assert session.rotated_position > 100_000 > session.position
    assert max(errors.values()) <= 1e-4, errors
    assert max(errors[t] for t in errors if t > 9000) <= 1e-5, "no drift"
    assert witness.most_spans <= 16 and witness.most_runs <= 8


def test_rebasing_changes_no_logits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, plain_witness = session_of(bundle, NumpyDecoder(bundle.manifest), window_turns=4)
    often, often_witness = session_of(bundle, NumpyDecoder(bundle.manifest), window_turns=4)
    rebases = 0
    for t in range(60):
        for session in (plain, often):
            if t in (1, 20):
                session.ask(f"What of {t}?")
        plain.push(FRAME, t)
        before = often.rotated_position
        with monkeypatch.context() as patch:
            patch.setattr(edge.slide, "REBASE_POSITION", 300)
            often.push(FRAME, t)
        rebases += often.rotated_position < before
        assert relative_error(often_witness.logits, plain_witness.logits) <= 1e-5
        assert often_witness.kept == plain_witness.kept
        assert often.rotated_position < 450
    assert rebases > 3


def test_turning_the_query_by_run_equals_turning_every_key(bundle: Bundle) -> None:
    backend, brute = NumpyDecoder(bundle.manifest), NumpyDecoder(bundle.manifest)
    random = np.random.default_rng(1)
    for each in (backend, brute):
        each.allocate_cache(64)
    half = FACTS.head_dim // 2
    frequency = 1e6 ** (-np.arange(half) / half)
    shifts = np.array([0, -1_000_003, 17])
    angles = shifts[:, None] * frequency
    spans = np.array([[40, 9, 1], [0, 0, 2], [3, 1, 2], [10, 20, 0], [49, 5, 2]], np.int32)
    for mine, other in zip(backend.cache_arrays(), brute.cache_arrays(), strict=True):
        for array, copy in zip(mine, other, strict=True):
            array[:] = copy[:] = random.standard_normal(array.shape)
        for slot, length, run in spans:
            keys = other[0][:, slot : slot + length]
            other[0][:, slot : slot + length] = rotate(keys, np.cos(angles[run]), -np.sin(angles[run]))
    embeds = random.standard_normal((6, FACTS.hidden_size)).astype(np.float32)
    new = np.array([0, 1, 2, 60, 61, 62], np.int32)
    rope = np.arange(6)[:, None] * frequency + 5
    cos, sin = np.cos(rope).astype(np.float32), np.sin(rope).astype(np.float32)
    run_cos, run_sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    found = backend.run_decoder(embeds, cos, sin, CacheView(new, spans, run_cos, run_sin))
    still = CacheView(new, spans, np.ones_like(run_cos), np.zeros_like(run_sin))
    assert relative_error(found, brute.run_decoder(embeds, cos, sin, still)) <= 1e-5


# What it costs


def test_a_long_stream_leaves_no_python_objects_behind(bundle: Bundle) -> None:
    session, witness = session_of(bundle, window_turns=5)
    session.ask("First?")
    sizes = []
    tracemalloc.start()
    try:
        for t in range(900):
            if t % 50 == 7:
                session.close_question(session.ask("Now?"))
                session.ask("And now?")
            if t % 50 == 30:
                session.close_question("And now?")
            session.push(FRAME, t)
            if t % 300 == 299:
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 4096, sizes
    assert witness.most_spans <= 16


def test_replies_longer_than_planned_evict_turns_instead_of_failing(bundle: Bundle) -> None:
    replies = [reply_ids(bundle, "</Response> " + "w" * 100)]
    session = StreamSession(
        bundle, backend=Witness(bundle, replies, GRID), policy="slide", window_turns=30, max_reply_tokens=90
    )
    session.ask("?")
    kept = []
    for t in range(45):
        session.push(FRAME, t)
        kept.append(session.kept_turns)
        assert session.kv_tokens <= session.kv_capacity_tokens
    assert 1 < kept[-1] < 30


def test_a_question_is_still_there_when_its_turn_has_long_left(bundle: Bundle, tmp_path: Path) -> None:
    session, witness = session_of(bundle, window_turns=3)
    session.ask("Tell me when it is red.")
    for t in range(30):
        session.push(FRAME, t)
    tokenizer = Tokenizer(bundle.file("tokenizer.json"))
    text = b"".join(tokenizer.token_bytes(i) for i in witness.kept if i >= 0).decode()
    assert text.startswith(
        "<|im_start|>system\nWatch.<|im_end|>\n<|im_start|>user\nTell me when it is red.\n<27s-28s>\n<|vision_start|>"
    )
    assert text.count("Tell me") == 1

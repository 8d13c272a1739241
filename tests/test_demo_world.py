"""The demonstration's world: its streams, its labels and the formats they are written in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apps.demo import phrases
from apps.demo.dataset import write_dataset
from apps.demo.formats import raw_format, stream_format
from apps.demo.labels import COUNT, LIGHT, WHERE, Question, label_turns
from apps.demo.phrases import ACTION, EVENT, GROUNDING, NARRATION, TASKS, TSQA
from apps.demo.script import Script, TableState, WorldEvent
from apps.demo.world import make_demo_stream, make_stream
from edge.preprocess import PreprocessConfig, smart_resize
from edge.prompt import STREAMO

SEEDS = range(200)


def _scene() -> Script:
    """A red circle (0) is put down on turns 2 and 3, covered on turn 6; the light goes off at turn 9."""
    events = (
        WorldEvent("put", 0, 1.5, 3.4, None, 1),
        WorldEvent("cover", 0, 5.4, 6.6, 1, 1),
        WorldEvent("light_off", None, 8.2, 8.2),
    )
    return Script(TableState(), events, 12)


def _answers(question: Question, turn: int = 0) -> dict[int, str]:
    labels = label_turns(_scene(), {turn: question})
    spelled = {"standby": "..."}
    return {t: label.text or spelled[label.state] for t, label in enumerate(labels) if label.state != "silence"}


def test_an_event_caption_stands_by_while_the_event_runs_and_answers_when_it_is_over() -> None:
    assert _answers(Question(EVENT, "?")) == {
        2: "...", 3: "...", 4: "The red circle was put on the table.",
        6: "...", 7: "The red circle was covered by a cup.", 9: "The light was turned off.",
    }  # fmt: skip


def test_an_action_caption_leaves_the_light_out() -> None:
    assert _answers(Question(ACTION, "?")) == {
        2: "...", 3: "...", 4: "Put the red circle on the table.", 6: "...", 7: "Cover the red circle with a cup.",
    }  # fmt: skip


def test_narration_speaks_on_the_first_turn_of_an_event_without_standby() -> None:
    assert _answers(Question(NARRATION, "?")) == {
        2: "A hand puts a red circle on the table.", 6: "A hand covers the red circle with a cup.",
        9: "The light goes off.",
    }  # fmt: skip


def test_grounding_names_the_first_turn_and_the_turn_of_the_result() -> None:
    question = Question(GROUNDING, "?", event=_scene().events[0])
    assert _answers(question) == {2: "...", 3: "...", 4: "Given event occurred between 2s to 4s."}
    offset = label_turns(_scene(), {0: question}, time_offset_s=1000)
    assert offset[4].text == "Given event occurred between 1002s to 1004s."


def test_an_event_that_never_happens_is_answered_by_silence_to_the_end() -> None:
    assert _answers(Question(GROUNDING, "?", event=None)) == {}


def test_a_count_is_updated_when_it_changes_and_waits_for_events_that_concern_it() -> None:
    assert _answers(Question(TSQA, "?", COUNT)) == {
        0: "There are no shapes.", 2: "...", 3: "...", 4: "There is 1 shape.", 6: "...", 7: "There are no shapes.",
    }  # fmt: skip


def test_a_question_about_the_light_ignores_hands() -> None:
    assert _answers(Question(TSQA, "?", LIGHT)) == {0: "Yes, the light is on.", 9: "No, the light is off."}


def test_a_place_asked_for_during_an_event_is_told_when_the_event_is_over() -> None:
    assert _answers(Question(TSQA, "?", WHERE, 0), turn=6) == {6: "...", 7: "The red circle is under a cup."}


def test_the_latest_question_is_the_one_in_force() -> None:
    labels = label_turns(_scene(), {0: Question(EVENT, "?"), 5: Question(NARRATION, "?")})
    said = {turn: label.text for turn, label in enumerate(labels) if label.text}
    assert said[4] == "The red circle was put on the table."
    assert said[6] == "A hand covers the red circle with a cup."
    assert {label.task for label in labels[5:]} == {NARRATION}


@pytest.mark.parametrize("seed", [0, 7, 50_001])
def test_a_seed_gives_the_same_stream_again(seed: int) -> None:
    one, other = make_stream(seed), make_stream(seed)
    assert one.truth == other.truth and one.questions == other.questions and one.events == other.events
    assert np.array_equal(one.render(3.3), other.render(3.3))


def test_known_seeds_stay_what_they_are() -> None:
    stream = make_stream(3)
    assert (stream.task, stream.duration_s) == (GROUNDING, 41)
    first = stream.events[0]
    assert (first.kind, phrases.object_name(first.thing), first.first_turn, first.done_turn) == (
        "move_left", "blue circle", 2, 6,
    )  # fmt: skip


def test_every_task_has_its_turn_and_every_stream_its_answers() -> None:
    silent = 0
    for seed in SEEDS:
        stream = make_stream(seed)
        assert stream.task == TASKS[seed % 5]
        assert 20 <= stream.duration_s <= 45 and len(stream.truth) == stream.duration_s
        assert all(0 <= turn < stream.duration_s for turn in stream.questions)
        assert all(label.state == "silence" for label in stream.truth[: min(stream.questions)])
        assert all(bool(label.text) == (label.state == "response") for label in stream.truth)
        silent += not any(label.text for label in stream.truth)
    assert 0 < silent < len(SEEDS) // 5  # some events that are asked for never happen


def test_events_never_overlap_and_frames_of_whole_seconds_are_clearly_in_or_out() -> None:
    for seed in SEEDS:
        stream, busy_until = make_stream(seed), 0
        for event in stream.events:
            assert event.first_turn > busy_until or busy_until == 0
            busy_until = event.done_turn
            if not event.is_light:
                assert 0.3 <= event.start_s % 1 <= 0.95 and 0.05 <= event.end_s % 1 <= 0.7
                assert 1 <= event.done_turn - event.first_turn <= 4


def test_a_grounding_question_has_one_answer_at_most() -> None:
    for seed in range(3, 400, 5):
        stream = make_stream(seed, GROUNDING)
        for question in stream.asked.values():
            if question.task == GROUNDING:
                caption = question.text.split("The given event is: ")[1].strip("'")
                same = [e for e in stream.events if phrases.caption_event(e.kind, e.thing) == caption]
                assert same == ([question.event] if question.event else [])


def test_pictures_have_the_stated_size_and_become_fifteen_visual_tokens() -> None:
    stream = make_stream(11)
    frame = stream.render(2.0)
    assert frame.shape == (stream.height, stream.width, 3) and frame.dtype == np.uint8
    settings = json.loads((Path(phrases.__file__).parent / "checkpoint" / "preprocessor_config.json").read_text())
    config = PreprocessConfig(min_pixels=settings["min_pixels"], max_pixels=settings["max_pixels"])
    height, width = smart_resize(*frame.shape[:2], config)
    assert (height, width) == (84, 140)
    assert height * width // config.factor**2 == 15


def test_a_hand_is_in_the_picture_only_while_its_event_runs() -> None:
    stream = next(s for s in map(make_stream, SEEDS) if s.events and not s.events[0].is_light)
    event = stream.events[0]

    def coarse(t_s: float) -> np.ndarray:  # blocks large enough to average the camera's noise away
        return stream.render(t_s).reshape(21, 16, 35, 16, 3).mean((1, 3))

    still, quiet = coarse(event.first_turn - 1), coarse(event.first_turn - 1.001)
    assert np.abs(still - quiet).max() < 5
    assert np.abs(still - coarse(event.first_turn)).max() > 25


def test_any_time_can_be_drawn_and_the_light_darkens_the_picture() -> None:
    stream = next(s for s in map(make_stream, SEEDS) if any(e.kind == "light_off" for e in s.events))
    off = next(event for event in stream.events if event.kind == "light_off")
    assert stream.render(off.start_s - 0.01).mean() > 1.6 * stream.render(off.start_s + 0.01).mean()


def test_the_demonstration_asks_four_questions_in_one_stream() -> None:
    stream = make_demo_stream(seed=7, seconds=60)
    assert stream.duration_s == 60 and len(stream.questions) == 4
    assert {turn.task for turn in stream.truth} == {NARRATION, TSQA, GROUNDING}
    assert sum(bool(turn.text) for turn in stream.truth) >= 6


def test_the_raw_format_gives_back_the_turns_by_streamos_own_rule() -> None:
    for seed in SEEDS:
        stream = make_stream(seed)
        entry = raw_format(stream, f"videos/{seed}.mp4")
        states = ["silence"] * stream.duration_s
        texts = {}
        for response in entry["response"]:
            if response["time"]:
                turn = int(response["time"]) - 1
            else:
                turn = int(response["end_time"])
                first = int(response["st_time"]) - 1
                states[first:turn] = ["standby"] * (turn - first)
            states[turn], texts[turn] = "response", response["content"]
        for turn, label in enumerate(stream.truth):
            if states[turn] == "silence" and label.state == "standby":
                continue  # an event that the next question or the stream's end cut off has no answer to hang on
            assert (states[turn], texts.get(turn, "")) == (label.state, label.text)


def test_the_stream_format_spells_one_turn_a_second() -> None:
    stream = make_stream(0)
    messages = stream_format(stream, "videos/0.mp4")["messages"]
    assert messages[0] == {"role": "system", "content": STREAMO.system_prompt}
    assert len(messages) == 1 + 2 * stream.duration_s
    turn, question = next(iter(stream.questions.items()))
    assert messages[1 + 2 * turn]["content"] == f"{question}\n<{turn}s-{turn + 1}s>\n<stream>"
    assert {m["content"].split(" ")[0] for m in messages[2::2]} <= set(STREAMO.state_texts())


def test_a_data_set_is_written_as_videos_and_labels(tmp_path: Path) -> None:
    import cv2

    write_dataset(range(1, 2), tmp_path, fps=2)
    stream = make_stream(1)
    video = cv2.VideoCapture(str(tmp_path / "videos" / "00000001.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 2 * stream.duration_s
    video.set(cv2.CAP_PROP_POS_FRAMES, 6)
    _, picture = video.read()
    difference = np.abs(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB).astype(int) - stream.render(3.0))
    assert difference.mean() < 6
    assert json.loads((tmp_path / "raw_data.json").read_text())[0]["question"]


def test_the_world_needs_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "tokenizers")
    code = f"import sys, apps.demo.world; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_shipped_tokenizer_is_the_one_the_code_builds() -> None:
    pytest.importorskip("tokenizers")
    from apps.demo.vocabulary import build_tokenizer

    folder = Path(phrases.__file__).parent / "checkpoint"
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(build_tokenizer().to_str()) == stored


def test_the_training_forward_and_transformers_agree_on_a_conversation() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from apps.demo.checkpoint import build_model
    from apps.demo.conversation import tokenizer, write_conversation
    from apps.demo.model import FastModel, parameters_of, text_rotary
    from apps.demo.samples import SIZE
    from edge.preprocess import patchify, resize_frame

    stream = make_stream(2)
    talk = write_conversation(stream.truth[:8], {0: "Is the light on?"})
    frames = np.stack([resize_frame(stream.render(t), SIZE) for t in range(8)])
    model = build_model(1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name and "ln_q" not in name:
                value.normal_(std=0.08 if value.ndim > 1 else 0.3, generator=generator)
        ids = torch.from_numpy(talk.ids).long()[None]
        grids = torch.tensor([[1, 6, 10]] * 8)
        positions, _ = model.model.get_rope_index(ids, grids)
        assert torch.equal(positions[:, 0], torch.from_numpy(talk.positions).long())
        patches = np.concatenate([patchify(frame, SIZE) for frame in frames]).reshape(-1, 3, 1, 14 * 14)
        pixels = torch.from_numpy(np.repeat(patches, 2, axis=2).reshape(len(patches), -1))  # each frame twice
        expected = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grids).logits
        fast = FastModel(parameters_of(model), torch.float32)
        x = fast.embed(ids)
        visual = fast.merge(fast.vision_blocks(torch.from_numpy(frames)))
        x[ids == tokenizer().token_to_id("<|image_pad|>")] = visual.reshape(-1, x.shape[-1])
        hidden, _ = fast.text(x, text_rotary(positions))
        error = (fast.logits(hidden) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_transformers_loads_the_shipped_checkpoint_without_a_missing_or_extra_tensor() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    folder = str(Path(phrases.__file__).parent / "checkpoint")
    _, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    states = tokenizer.convert_tokens_to_ids(list(STREAMO.state_texts()))
    assert states == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]

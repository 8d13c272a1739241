"""Trains the demonstration model: `python -m apps.demo.train`.

Owns the schedule: the vision tower alone on crowded pictures, the whole model on streams, then on those it finds hard,
then on what comes up in a stream that lasts for days. Writes a learning curve (JSON lines) and saves the model as it
goes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from apps.demo.checkpoint import TEXT, build_model, save_checkpoint
from apps.demo.conversation import IGNORED, encode, state_ids, tokenizer
from apps.demo.feed import Plan, make_batch
from apps.demo.losses import AuxiliaryHeads, stream_loss
from apps.demo.metrics import Scores
from apps.demo.model import FastModel, parameters_of
from apps.demo.optimizer import Optimizer
from apps.demo.rollout import run_streams
from apps.demo.samples import ENDURANCE_MIX, POLISH_MIX, WHOLE_MIX
from apps.demo.team import Team
from apps.demo.world import make_stream
from edge.prompt import IM_END, IMAGE_PAD

PROBE_LAYER = 3
STREAM_PICTURES = 16
DIGITS = tuple(encode(digit)[0] for digit in "0123456789")
CLOCK = ("draw_s", "forward_s", "backward_s", "wait_s", "update_s")


@dataclass(frozen=True)
class Settings:
    """One phase of training."""

    phase: str  # one of PHASES
    steps: int
    muon_rate: float
    adam_rate: float
    warmup_steps: int = 40
    decay_from: float = 0.55  # share of the steps after which the rate falls linearly to zero
    thaw_from: float = 0.65  # share of the steps after which the vision blocks learn too
    thaw_factor: float = 0.3
    first_step: int = 0
    workers: int = 2
    evaluate_every: int = 700
    save_every: int = 200
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        falling = max(1e-3, (self.steps - step) / max(self.steps * (1 - self.decay_from), 1))
        return min(1.0, (step - self.first_step + 1) / self.warmup_steps, falling)


# (from this share of the steps on, streams and turns of one worker's step, chance)
_LENGTHS = (
    (0.0, ((4, 12), (3, 16), (2, 24))),
    (0.15, ((3, 16), (2, 24), (1, 44))),
    (0.45, ((3, 16), (2, 24), (1, 44), (1, 48))),
    (0.75, ((2, 24), (2, 32), (1, 44), (1, 64), (1, 100))),
)


_MIXES = {"joint": WHOLE_MIX, "polish": POLISH_MIX, "endurance": ENDURANCE_MIX}


def plan_of(settings: Settings, step: int) -> Plan:
    """What one worker does in a step."""
    if settings.phase == "vision":
        return Plan(streams=2, turns=12, crowds=32, plain=True)
    share = step / settings.steps if settings.phase == "joint" else 0.6
    lengths = [choices for start, choices in _LENGTHS if share >= start][-1]
    streams, turns = lengths[np.random.Generator(np.random.PCG64([settings.seed, step])).integers(len(lengths))]
    return Plan(streams=streams, turns=turns, plain=share < 0.08, mix=_MIXES[settings.phase])


def vision_losses(model: FastModel, heads: AuxiliaryHeads, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The cell heads' loss on crowded pictures and on frames of streams."""
    # Frames with a hand first; a fixed count, so that one compiled graph serves all steps.
    busy = torch.argsort(batch["events"][..., 0].flatten() != 1, stable=True)[:STREAM_PICTURES]
    frames = torch.cat([batch["crowd_frames"], batch["frames"].flatten(0, 1)[busy]])
    labels = torch.cat([batch["crowd_cells"], batch["cells"].flatten(0, 1)[busy]])
    visual = model.merge(model.vision_blocks(frames))
    return {"total": heads.cell_loss(visual, labels)}


def joint_losses(
    model: FastModel, heads: AuxiliaryHeads, batch: dict[str, torch.Tensor], frozen: bool
) -> dict[str, torch.Tensor]:
    """Streamo's loss and the auxiliary ones on a batch of streams."""
    ids, target = batch["ids"].long(), batch["target"].long()
    with torch.set_grad_enabled(not frozen):
        tower = model.vision_blocks(batch["frames"].flatten(0, 1))
    visual = model.merge(tower)
    pads = (ids == tokenizer().token_to_id(IMAGE_PAD))[..., None]
    x = model.embed(ids).masked_scatter(pads, visual.reshape(-1, TEXT["hidden_size"]))
    hidden, probe = model.text(x, model.rotary(batch["positions"]), PROBE_LAYER)
    learned = target != IGNORED
    parts = stream_loss(model.logits(hidden[learned]), target[learned], state_ids(), encode(IM_END)[0], DIGITS)
    tags = batch["tags"].long()
    parts["tags"] = torch.nn.functional.cross_entropy(model.logits(hidden[tags != IGNORED]), tags[tags != IGNORED])
    rows = torch.arange(ids.shape[0])[:, None]
    turns = probe[rows, batch["decide"].long()].flatten(0, 1)
    parts["events"] = heads.event_loss(turns, batch["events"].flatten(0, 1), batch["places"].flatten(0, 1))
    parts["asked"] = heads.asked_loss(turns, batch["asked"].flatten(0, 1))
    parts["cells"] = heads.cell_loss(visual, batch["cells"].flatten(0, 1))
    parts["total"] = 2 * parts["state"] + parts["text"] + 0.1 * parts["end"]
    parts["total"] = parts["total"] + 0.3 * (parts["events"] + parts["asked"] + parts["cells"] + parts["tags"])
    return parts


def _compiled(model: FastModel) -> FastModel:
    torch._dynamo.config.cache_size_limit = 64
    model.vision_layer = torch.compile(model.vision_layer, dynamic=True)
    model.before_attention = torch.compile(model.before_attention, dynamic=True)
    model.after_attention = torch.compile(model.after_attention, dynamic=True)
    return model


def worker(rank: int, settings: Settings, parameters, heads, team: Team, out: Path) -> None:
    """One process of the team: compute, average, update its part, until the steps are done."""
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)
    named = {**parameters, **{f"heads.{name}": value for name, value in heads.named_parameters()}}
    optimizer = Optimizer(team.owned(rank, named))
    model = _compiled(FastModel(parameters))
    started_s, window = time.monotonic(), []
    for step in range(settings.first_step, settings.steps):
        clock = [time.monotonic()]
        frozen = settings.phase != "vision" and step < settings.thaw_from * settings.steps
        arrays = make_batch(_batch_index(settings, step, rank), plan_of(settings, step))
        batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
        clock.append(time.monotonic())
        if settings.phase == "vision":
            losses = vision_losses(model, heads, batch)
        else:
            losses = joint_losses(model, heads, batch, frozen)
        clock.append(time.monotonic())
        losses["total"].backward()
        clock.append(time.monotonic())
        norm = team.average(rank, named, clip=1.0)
        clock.append(time.monotonic())
        rate = settings.rate(step)
        thaw = settings.thaw_factor if settings.phase != "vision" else 1.0
        optimizer.step(settings.muon_rate * rate, settings.adam_rate * rate, thaw)
        for parameter in named.values():
            parameter.grad = None
        team.barrier.wait()
        clock.append(time.monotonic())
        if rank == 0:
            spent_s = dict(zip(CLOCK, np.diff(clock).tolist(), strict=True))
            window.append({**{name: float(value.detach()) for name, value in losses.items()}, "norm": norm, **spent_s})
            if (step + 1) % 20 == 0:
                record = {name: round(float(np.mean([entry[name] for entry in window])), 4) for name in window[0]}
                minutes = (time.monotonic() - started_s) / 60
                _log(out, {"phase": settings.phase, "step": step + 1, "minutes": round(minutes, 2), **record})
                window = []
        _save_and_evaluate(rank, settings, step + 1, parameters, heads, out, team, started_s)


def _batch_index(settings: Settings, step: int, rank: int) -> int:
    base = {"vision": 0, "joint": 1_000_000, "polish": 2_000_000, "endurance": 3_000_000}[settings.phase]
    return base + settings.seed * 10_000_000 + step * settings.workers + rank


def _log(out: Path, record: dict) -> None:
    with (out / "curve.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def _save_and_evaluate(
    rank: int, settings: Settings, done: int, parameters, heads, out: Path, team: Team, started_s: float
) -> None:
    last = done == settings.steps
    if rank == 0 and (last or done % settings.save_every == 0):
        state = {"step": done, "model": dict(parameters), "heads": heads.state_dict()}
        torch.save(state, out / f"{settings.phase}.new")
        (out / f"{settings.phase}.new").rename(out / f"{settings.phase}.pt")
    if rank == 0 and settings.phase != "vision" and (last or done % settings.evaluate_every == 0):
        report = evaluate_parameters(parameters, range(50_000, 50_020))
        minutes = (time.monotonic() - started_s) / 60
        _log(out, {"phase": "evaluation", "step": done, "minutes": round(minutes, 2), **report})
        save_checkpoint(parameters, out / "checkpoint")
    if done % settings.evaluate_every == 0:
        team.barrier.wait()


def evaluate_parameters(parameters, seeds: range) -> dict:
    """Free-running figures of a set of parameters on the streams of `seeds`."""
    rounded = {name: value.detach().to(torch.bfloat16).float() for name, value in parameters.items()}
    streams = [make_stream(seed) for seed in seeds]
    scores = Scores()
    for stream, answers in zip(streams, run_streams(FastModel(rounded), streams), strict=True):
        scores.add(answers, stream.truth, min(stream.questions))
    return scores.report()


def initial_parameters(seed: int) -> tuple[dict[str, torch.Tensor], AuxiliaryHeads]:
    """A fresh model's parameters, with a wider embedding and quieter residual branches than the library's default."""
    parameters = parameters_of(build_model(seed))
    with torch.no_grad():
        for name, value in parameters.items():
            if "embed_tokens" in name:
                value.mul_(5)
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                value.mul_(0.3)
    torch.manual_seed(seed + 1)
    return parameters, AuxiliaryHeads(TEXT["hidden_size"])


def load_state(path: Path, parameters, heads) -> int:
    """Load what a phase saved; returns the step it had reached."""
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for name, value in state["model"].items():
            parameters[name].copy_(value)
    heads.load_state_dict(state["heads"], strict=False)
    return state["step"]


def run_phase(settings: Settings, parameters, heads, out: Path) -> None:
    """Train one phase with a team of processes."""
    context = torch.multiprocessing.get_context("spawn")
    for parameter in heads.parameters():
        parameter.data.share_memory_()
    named = {**parameters, **{f"heads.{name}": value for name, value in heads.named_parameters()}}
    team = Team.of(named, settings.workers, context)
    others = [
        context.Process(target=worker, args=(rank, settings, parameters, heads, team, out), daemon=True)
        for rank in range(1, settings.workers)
    ]
    for process in others:
        process.start()
    worker(0, settings, parameters, heads, team, out)
    for process in others:
        process.join()


VISION = Settings("vision", steps=1120, muon_rate=0.02, adam_rate=2e-3, warmup_steps=20, decay_from=0.5)
JOINT = Settings("joint", steps=3700, muon_rate=0.008, adam_rate=1.5e-3, warmup_steps=60)
POLISH = Settings("polish", steps=500, muon_rate=0.003, adam_rate=5e-4, decay_from=0.0, thaw_from=0.0)
ENDURANCE = Settings("endurance", steps=700, muon_rate=0.003, adam_rate=5e-4, decay_from=0.0, thaw_from=2.0)
PHASES = {settings.phase: settings for settings in (VISION, JOINT, POLISH, ENDURANCE)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the curve and the states")
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all", help="starts where the one before ended")
    parser.add_argument("--steps", type=int, help="of the one phase that is run")
    parser.add_argument("--resume", action="store_true", help="go on from the phase's own last saved state")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.phase == "all" and (arguments.steps or arguments.resume):
        parser.error("--steps and --resume need one --phase")
    arguments.out.mkdir(parents=True, exist_ok=True)
    parameters, heads = initial_parameters(arguments.seed)
    names = list(PHASES)
    chosen = names if arguments.phase == "all" else [arguments.phase]
    for name in chosen:
        settings = replace(PHASES[name], workers=arguments.workers, seed=arguments.seed)
        if arguments.steps:
            settings = replace(settings, steps=arguments.steps)
        if arguments.resume:
            settings = replace(settings, first_step=load_state(arguments.out / f"{name}.pt", parameters, heads))
        elif name != names[0] and len(chosen) == 1:
            load_state(arguments.out / f"{names[names.index(name) - 1]}.pt", parameters, heads)
        run_phase(settings, parameters, heads, arguments.out)


if __name__ == "__main__":
    main()

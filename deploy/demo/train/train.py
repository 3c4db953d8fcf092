"""Trains the demo model for a given time and exports it as a DeepSeek-V3 checkpoint.

Usage: train.py --data build/demo --out DIR --minutes M [--resume] [--total-minutes T] [--state FILE]
--minutes is this command's wall-clock time, from its start to its exported model. The learning rate falls to zero, and weights are
rounded to FP8, towards the end of --total-minutes of training over all commands, setup not counted [this command's end: so leave it
out of the last one]. Every command leaves a whole model in --out and the state for --resume in --state.
"""

import time

START = time.monotonic()  # before the slow imports: --minutes counts from here

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
from collections import Counter  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from batches import epochs, load_texts, pack  # noqa: E402
from checkpoint import export, load_model  # noqa: E402
from generate import generate  # noqa: E402
from model import CONFIG, Model  # noqa: E402
from optimizer import Optimizer  # noqa: E402

import numpy as np  # noqa: E402

SEED = 20250102
WARMUP_STEPS, DECAY_FROM, QUANTISE_FROM = 200, 0.4, 0.87
BIAS_RATE, BIAS_UNTIL = 0.001, 0.97  # of the experts' balancing
MTP_WEIGHT, MTP_LATE_WEIGHT, MTP_LATE_FROM = 0.3, 0.1, 0.7
RESERVE_S = 20  # for measuring and writing at the end


def read_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("build/demo-state/state.pt"))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--total-minutes", type=float)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-export", type=Path, help="weights of an exported model, where the state is lost")
    parser.add_argument("--trained-minutes", type=float, default=0, help="with --resume-export: what that model had")
    parser.add_argument("--rows", type=int, default=160, help="rows a step")
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--adam-only", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--steps", type=int, help="end after so many steps, for tests")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--questions", type=int, default=500, help="asked at the end")
    parser.add_argument("--config", default="{}", help="JSON over model.CONFIG, for tests")
    return parser.parse_args()


def marker_ids(directory):
    added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    return ids["<｜User｜>"], ids["<｜Assistant｜>"]


def rate_factor(progress, steps):
    """Warm-up by steps, constant, then linear to zero."""
    return min(1.0, (steps + 1) / WARMUP_STEPS) * min(1.0, (1 - progress) / (1 - DECAY_FROM))


class Batches:
    """Batches without end: device tensors, and where (flat) main and MTP layer predict a target."""

    def __init__(self, texts, args, device, seed):
        self.epochs, self.rows, self.device, self.at, self.epoch = epochs(texts, args.row_length, seed), args.rows, device, 0, None

    def next(self):
        if self.epoch is None or self.at + self.rows > len(self.epoch["tokens"]):
            self.number, self.epoch = next(self.epochs)
            self.at = 0
            self.on_device = {k: torch.from_numpy(self.epoch[k]).to(self.device) for k in ("tokens", "positions", "documents")}
        rows = slice(self.at, self.at + self.rows)
        self.at += self.rows
        batch = {k: v[rows] for k, v in self.on_device.items()}
        host = {k: v[rows] for k, v in self.epoch.items()}
        return batch, *prediction_places(host, self.device)


def prediction_places(host, device):
    """Flat places i whose next token is a target, and those whose next but one is."""
    target = host["is_target"]
    main = np.flatnonzero(np.roll(target, -1, axis=1) & (np.arange(target.shape[1]) < target.shape[1] - 1))
    later = target & (host["positions"] >= 2)
    mtp = np.flatnonzero(np.roll(later, -2, axis=1) & (np.arange(target.shape[1]) < target.shape[1] - 2))
    places = (torch.from_numpy(main), torch.from_numpy(mtp))
    return tuple(p.pin_memory().to(device, non_blocking=True) if device == "cuda" else p for p in places)


def losses(model, batch, main, mtp):
    """-> main loss, MTP loss, expert loads"""
    hidden, draft, loads = model(batch["tokens"], batch["positions"], batch["documents"])
    tokens = batch["tokens"].flatten().long()
    loss = F.cross_entropy(model.logits(hidden.flatten(0, 1)[main]).float(), tokens[main + 1])
    mtp_loss = F.cross_entropy(model.logits(draft.flatten(0, 1)[mtp]).float(), tokens[mtp + 2])
    return loss, mtp_loss, loads


def balance(model, loads, rate):
    """Auxiliary-loss-free balancing (V3 report, 2.1.2): the bias of an overloaded expert falls, of an underloaded one rises."""
    with torch.no_grad():
        for moe, load in zip(model.moe_layers(), loads):
            moe.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=rate)


def compile_layers(model, batch):
    """Compiles the layers and proves them on a batch; leaves them as they were where that fails."""
    try:
        for layer in [*model.layers, model.mtp.layer]:
            layer.compile(dynamic=False)
        loss, mtp_loss, _ = losses(model, *batch)
        (loss + mtp_loss).backward()
        return True
    except Exception as error:  # a missing compiler, a driver that does not fit: training is possible without
        print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        for layer in [*model.layers, model.mtp.layer]:
            layer._compiled_call_impl = None
        return False
    finally:
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def measure(model, texts, assistant_id, args, device):
    """On questions in unseen phrasings: losses, expert load, and the greedy answers' overlap with the right ones (F1 of tokens)."""
    host = pack(texts, args.row_length, np.random.default_rng(0))
    batch = {k: torch.from_numpy(host[k]).to(device) for k in ("tokens", "positions", "documents")}
    loss, mtp_loss, loads = losses(model, batch, *prediction_places(host, device))
    chats = [texts.tokens[a:b].tolist() for a, b in zip(texts.offsets, texts.offsets[1:])][: args.questions]
    cuts = [chat.index(assistant_id) + 1 for chat in chats]
    prompts = [[0, *chat[:cut]] for chat, cut in zip(chats, cuts)]
    answers = [sequence[len(prompt) :] for sequence, prompt in zip(generate(model, prompts, 48), prompts)]
    expected = [chat[cut:] for chat, cut in zip(chats, cuts)]
    common = [2 * (Counter(a) & Counter(e)).total() / (len(a) + len(e)) for a, e in zip(answers, expected)]
    exact = [a == e for a, e in zip(answers, expected)]
    return {"held_out_loss": loss.item(), "held_out_mtp_loss": mtp_loss.item(), "held_out_load": load_ratio(loads),
            "f1": sum(common) / len(common), "exact": sum(exact) / len(exact)}  # fmt: skip


def load_ratio(loads):
    return [round(r, 3) for r in (loads.max(1).values / loads.mean(1)).tolist()]


def main():
    args = read_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it cannot be relied on for values narrower than keys
    config = {**CONFIG, **json.loads(args.config)}
    model = (load_model(args.resume_export) if args.resume_export else Model(config)).to(device).train()
    optimizer = Optimizer(model, args.rate, args.adam_rate, args.decay, config["moe_intermediate_size"], not args.adam_only)
    if device == "cuda":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    trained, steps, seen, commands = args.trained_minutes * 60, 0, 0, 1
    if args.resume and not args.resume_export:
        saved = torch.load(args.state, map_location=device, weights_only=True)
        optimizer.load_state(saved["optimizer"])
        for moe, bias in zip(model.moe_layers(), saved["bias"]):
            moe.e_score_correction_bias.copy_(bias)
        trained, steps, seen, commands = saved["trained"], saved["steps"], saved["tokens"], saved["commands"] + 1

    ids = marker_ids(args.data)
    texts, held_out = (load_texts(args.data / name, *ids) for name in ("data.npz", "held_out.npz"))
    batches = Batches(texts, args, device, [SEED, commands])
    compiled = device == "cuda" and not args.no_compile and compile_layers(model, batches.next())
    args.out.mkdir(parents=True, exist_ok=True)
    log = open(args.out / "log.jsonl", "a" if args.resume or args.resume_export else "w")

    def record(**fields):
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    begin, deadline = time.monotonic(), START + args.minutes * 60 - RESERVE_S
    total = args.total_minutes * 60 if args.total_minutes else trained + deadline - begin
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    size = sum(p.numel() for p in model.parameters())
    record(device=name, torch=torch.__version__, compiled=compiled, parameters=size, setup_s=begin - START, total_s=total, command=commands)

    loads_sum, mark, mark_tokens, first_step = 0, begin, seen, steps
    while time.monotonic() < deadline and not (args.steps and steps - first_step >= args.steps):
        elapsed = trained + time.monotonic() - begin
        progress = min(elapsed / total, 1.0)
        if args.steps:
            progress = (steps - first_step) / args.steps
        batch, main_places, mtp_places = batches.next()
        loss, mtp_loss, loads = losses(model, batch, main_places, mtp_places)
        mtp_weight = MTP_WEIGHT if progress < MTP_LATE_FROM else MTP_LATE_WEIGHT
        (loss + mtp_weight * mtp_loss).backward()
        optimizer.quantise = progress >= QUANTISE_FROM
        factor = rate_factor(progress, steps)
        optimizer.step(factor)
        model.zero_grad(set_to_none=True)
        if progress < BIAS_UNTIL:
            balance(model, loads, BIAS_RATE)
        steps, seen = steps + 1, seen + batch["tokens"].numel()
        loads_sum = loads_sum + loads
        if steps % args.log_every == 0:
            values = loss.item(), mtp_loss.item()  # waits for the device
            now = time.monotonic()
            record(step=steps, seconds=trained + now - begin, epoch=batches.number, loss=values[0], mtp_loss=values[1], rate=factor,
                   tokens_per_s=round((seen - mark_tokens) / (now - mark)), load=load_ratio(loads_sum), quantised=optimizer.quantise)
            if not math.isfinite(values[0]):
                raise SystemExit("the loss is not finite")
            loads_sum, mark, mark_tokens = 0, now, seen

    optimizer.quantise = True
    optimizer.write_back()
    trained += time.monotonic() - begin
    size = export(model, optimizer.masters(model), args.out)
    args.state.parent.mkdir(parents=True, exist_ok=True)
    bias = [moe.e_score_correction_bias for moe in model.moe_layers()]
    state = {"optimizer": optimizer.state(), "bias": bias, "trained": trained, "steps": steps, "tokens": seen, "commands": commands}
    torch.save(state, args.state)
    with torch.compiler.set_stance("force_eager"):  # other shapes: not worth compiling for
        results = measure(model, held_out, ids[1], args, device)
    record(step=steps, seconds=trained, tokens=seen, **results)
    record(export_bytes=size, wall_s=time.monotonic() - START)


if __name__ == "__main__":
    main()

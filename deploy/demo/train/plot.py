"""Plots a training log: losses, tokens per second, expert load.   Usage: plot.py log.jsonl out.png       needs matplotlib"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main():
    lines = [json.loads(line) for line in open(sys.argv[1])]
    steps = [line for line in lines if "loss" in line]
    minutes = [line["seconds"] / 60 for line in steps]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    left.semilogy(minutes, [line["loss"] for line in steps], label="next token", linewidth=0.8)
    left.semilogy(minutes, [line["mtp_loss"] for line in steps], label="MTP: next but one", linewidth=0.8)
    for line in lines:
        if "held_out_loss" in line:
            left.plot(line["seconds"] / 60, line["held_out_loss"], "kx", label="unseen phrasings")
    quantised = [m for m, line in zip(minutes, steps) if line["quantised"]]
    if quantised:
        left.axvspan(quantised[0], quantised[-1], alpha=0.15, label="FP8 weights")
    left.set(title="loss, nats per token of an answer", xlabel="minutes")
    left.legend(fontsize=7)
    middle.plot(minutes, [line["tokens_per_s"] / 1000 for line in steps], linewidth=0.8)
    middle.set(title="thousand tokens a second", xlabel="minutes", ylim=(0, None))
    for i, load in enumerate(zip(*(line["load"] for line in steps))):
        right.plot(minutes, load, linewidth=0.8, label="MTP" if i + 1 == len(steps[0]["load"]) else f"MoE layer {i + 1}")
    right.set(title="expert load, maximum / mean", xlabel="minutes", ylim=(1, 2.5))
    right.legend(fontsize=7)
    figure.savefig(sys.argv[2], dpi=90)


if __name__ == "__main__":
    main()

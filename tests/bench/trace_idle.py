#!/usr/bin/env python3
"""Reads what libcachalot_trace.so wrote and says how much of the last steps the GPU idled, and where.

Usage: CUDA_INJECTION64_PATH=$PWD/build/release/libcachalot_trace.so CACHALOT_TRACE=trace.txt build/release/cachalot serve ...
       tests/bench/trace_idle.py trace.txt [--steps 1000]
A step begins at BeginStep's first kernel. Lines of the trace: start and end in ns, name.
"""

import argparse
from collections import defaultdict

FIRST_KERNEL = "FillPaddingKernel"
BETWEEN = (FIRST_KERNEL, "memcpy", "CopyKernel", "UpdatesKernel")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    spans = []
    with open(args.trace) as file:
        for line in file:
            start, end, name = line.rstrip("\n").split(" ", 2)
            spans.append((int(start), int(end), name))
    spans.sort()
    begins = [i for i, span in enumerate(spans) if span[2] == FIRST_KERNEL]
    # The longest run of steps that follow each other closely: idle seconds between requests are nobody's fault.
    begins = begins[-args.steps - 1 :]
    spans = spans[begins[0] : begins[-1]]
    whole = spans[-1][1] - spans[0][0]
    totals, counts = defaultdict(int), defaultdict(int)
    between, within, end = 0, 0, spans[0][0]
    gaps = [0]  # between steps, each
    previous = ""
    for start, stop, name in spans:
        gap = max(0, start - end)
        kind = name.split("<")[0]
        if name == FIRST_KERNEL:
            gaps.append(0)
        if kind in BETWEEN or previous in BETWEEN[1:]:
            between += gap
            gaps[-1] += gap
        else:
            within += gap
        totals[name] += stop - start
        counts[name] += 1
        end, previous = max(end, stop), kind
    steps = len(begins) - 1
    print(f"{steps} steps in {whole / 1e6:.1f} ms, {whole / steps / 1e3:.1f} us each")
    print(f"idle between steps {100 * between / whole:.2f} % ({between / steps / 1e3:.2f} us a step), within steps {100 * within / whole:.2f} %")
    gaps = sorted(gap / 1e3 for gap in gaps[1:])
    print(f"idle between two steps: median {gaps[len(gaps) // 2]:.1f} us, 99 of 100 up to {gaps[len(gaps) * 99 // 100]:.1f}, at most {gaps[-1]:.1f}")
    for name in sorted(totals, key=lambda n: -totals[n]):
        print(f"| {name} | {counts[name] / steps:.1f} | {totals[name] / counts[name] / 1e3:.2f} us | {totals[name] / steps / 1e3:.1f} us | {100 * totals[name] / whole:.1f} % |")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What peer_bench is held against: the same bytes between two GPUs by ncclSend and ncclRecv, in CUDA graphs of 32 layers.

python3 tests/bench/peer_baseline.py      (needs PyTorch)
"""

import os
import statistics

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LAYERS, REPLAYS, HIDDEN = 32, 20, 7168
RANKS = 2


def run(rank, size):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    if rank == 0:
        print(f"{size} ranks, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}\n  tokens  dispatch us   combine us")
    for tokens in (1, 8, 64, 128, 512, 4096):
        times = []
        for row_bytes in (HIDDEN + HIDDEN // 128 * 4 + 64, HIDDEN * 2):  # fp8, scales, slots and weights; bf16 sums
            send = torch.randint(0, 255, (size, tokens * row_bytes), dtype=torch.uint8, device="cuda")
            receive = torch.empty_like(send)
            for _ in range(3):
                dist.all_to_all_single(receive, send)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(LAYERS):
                    dist.all_to_all_single(receive, send)
            samples = []
            for _ in range(REPLAYS):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                dist.barrier()
                torch.cuda.synchronize()
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                samples.append(begin.elapsed_time(end) * 1000 / LAYERS)
            times.append(statistics.median(samples))
        if rank == 0:
            print(f"{tokens:8} {times[0]:12.1f} {times[1]:12.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(run, args=(RANKS,), nprocs=RANKS)

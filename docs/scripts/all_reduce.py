"""How fast processes of one machine average gradients over the loopback interface, by gloo.

torchrun --nproc-per-node=2 docs/scripts/all_reduce.py
"""

import statistics
import time

import torch
import torch.distributed as dist

SIZES, RUNS = (1_000_000, 10_000_000, 100_000_000), 7


def main() -> None:
    """Time it, and print the median rate for each size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for size in SIZES:
        values, seconds = torch.ones(size), []
        for _ in range(RUNS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            seconds.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            rate = values.nbytes / statistics.median(seconds)
            print(f"{values.nbytes / 1e6:.0f} MB in {dist.get_world_size()} processes: {rate / 1e9:.2f} GB/s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""k-means into 800 clusters on the CPU: time and peak memory at two sizes, extrapolated to 1.3 million rows, and the ratio to a plain torch Lloyd.

    python benchmarks/kmeans.py [--rows 50000 200000] [--k 800] [--dim 768] [--iterations 3] [--threads 1]

Rows are drawn around 2000 centres, lie in a .npy file and are read through a memory map, as the stage does. Both sides start from the same centroids and
run the same number of iterations, in turns, each in a process of its own, so that the peak of memory is its own. Plain Lloyd: the rows in memory, the
distances by one matrix product for 16384 rows at a time, the smallest of each row, sums by `index_add_`.
"""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np


def draw(path, n, d):
    "n rows around 2000 centres, written block by block."
    rng = np.random.default_rng(0)
    centres, to = rng.normal(size=(2000, d)).astype(np.float32), np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=(n, d))
    for i in range(0, n, 10000): to[i:i + 10000] = centres[rng.integers(0, 2000, len(to[i:i + 10000]))] + 1.5*rng.normal(size=(len(to[i:i + 10000]), d)).astype(np.float32)
    to.flush()


def plain(x, k, n_iter):
    "Lloyd's iterations as one writes them in torch."
    import torch
    x = torch.from_numpy(np.ascontiguousarray(x))
    c = x[:k].clone()
    def nearest(): return torch.cat([((c**2).sum(1) - 2*rows @ c.T).argmin(1) for rows in x.split(16384)])
    for _ in range(n_iter):
        labels = nearest()
        sums, counts = torch.zeros_like(c).index_add_(0, labels, x), torch.bincount(labels, minlength=k)
        c = torch.where(counts[:, None] > 0, sums/counts[:, None].clamp(1), c)
    return c.numpy(), nearest().numpy()


def ours(x, k, n_iter):
    from u2seg.cluster import kmeans
    return kmeans(x, k, seed=0, n_iter=n_iter, init=np.array(x[:k]))


def worker(side, path, k, n_iter, threads):
    "One side in this process: seconds an iteration (from runs of n and of 1 iterations, in CPU and wall time), inertia, peak memory."
    import faiss, torch
    torch.set_num_threads(threads); faiss.omp_set_num_threads(threads)
    x, run, took = np.load(path, mmap_mode='r'), dict(ours=ours, plain=plain)[side], {}
    run(x[:2*k], k, 1)                                            # imports and first calls
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in (1, 1 + n_iter):
        start, cpu = time.perf_counter(), time.process_time()
        c, labels = run(x, k, n)
        took[n] = time.perf_counter() - start, time.process_time() - cpu
    inertia = sum(float(((x[i:i + 16384] - c[labels[i:i + 16384]])**2).sum(dtype=np.float64)) for i in range(0, len(x), 16384))
    wall, cpu = ((took[1 + n_iter][j] - took[1][j])/n_iter for j in (0, 1))
    print(json.dumps(dict(wall=wall, cpu=cpu, inertia=inertia, peak=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)/2**10)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=int, nargs=2, default=(50000, 200000)); parser.add_argument('--k', type=int, default=800); parser.add_argument('--dim', type=int, default=768)
    parser.add_argument('--iterations', type=int, default=3); parser.add_argument('--threads', type=int, default=1); parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return worker(*args.worker, args.k, args.iterations, args.threads)
    print(f'{args.k} clusters of {args.dim} numbers, {args.threads} thread(s), {args.iterations} iterations after the first\n\n| rows | side | s an iteration (wall) | s an iteration (CPU) | GFLOP/s | memory beyond the start, MB | inertia |\n|---|---|---|---|---|---|---|')
    cpu = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in args.rows:
            path, got = Path(folder)/f'{n}.npy', {'ours': [], 'plain': []}
            draw(path, n, args.dim)
            for _ in range(args.rounds):
                for side in got:
                    call = [sys.executable, __file__, '--worker', side, str(path), '--k', str(args.k), '--iterations', str(args.iterations), '--threads', str(args.threads)]
                    got[side].append(json.loads(subprocess.run(call, check=True, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': str(args.threads)}).stdout))
            for side, runs in got.items():
                r = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                cpu[side, n] = r['cpu']
                print(f"| {n} | {side} | {r['wall']:.2f} | {r['cpu']:.2f} | {2*n*args.k*args.dim/r['cpu']/1e9:.0f} | {r['peak']:.0f} | {r['inertia']:.6e} |", flush=True)
            path.unlink()
    a, b = args.rows
    print(f"\n**ratio to plain torch, CPU seconds: {cpu['plain', a]/cpu['ours', a]:.2f} at {a} rows, {cpu['plain', b]/cpu['ours', b]:.2f} at {b}**")
    slope = (cpu['ours', b] - cpu['ours', a])/(b - a)
    print(f"1.3 million rows: {cpu['ours', b] + slope*(1.3e6 - b):.1f} core seconds an iteration, {(cpu['ours', b] + slope*(1.3e6 - b))*100/3600:.2f} core hours for 100 iterations; the file has {1.3e6*args.dim*4/2**30:.1f} GiB")


if __name__ == '__main__': main()

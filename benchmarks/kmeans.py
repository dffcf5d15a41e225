"""k-means into 800 clusters on the CPU: time and peak memory at two sizes, extrapolated to 1.3 million rows, and the
ratio to a plain torch Lloyd.

    python benchmarks/kmeans.py [--rows 50000 200000] [--k 800] [--dim 768] [--iterations 3] [--threads 1]
                                [--out benchmarks/results/kmeans.md]

Rows are drawn around 2000 centres, lie in a .npy file and are read through a memory map, as the stage does. Both
sides start from the same centroids and run the same number of iterations, in turns, each in a process of its own, so
that the peak of memory is its own. Plain Lloyd: the rows in memory, the distances by one matrix product for 16384
rows at a time, the smallest of each row, sums by `index_add_`.
"""

import argparse, json, os, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np

from machine import heading, publish


def draw(path, n, d):
    "n rows around 2000 centres, written block by block."
    rng = np.random.default_rng(0)
    centres, to = (
        rng.normal(size=(2000, d)).astype(np.float32),
        np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=(n, d)),
    )
    for i in range(0, n, 10000):
        to[i : i + 10000] = centres[rng.integers(0, 2000, len(to[i : i + 10000]))] + 1.5 * rng.normal(
            size=(len(to[i : i + 10000]), d)
        ).astype(np.float32)
    to.flush()


def plain(x, k, n_iters):
    "Lloyd's iterations as one writes them in torch."
    import torch

    x = torch.from_numpy(np.array(x))  # into memory
    c = x[:k].clone()

    def nearest():
        return torch.cat([((c**2).sum(1) - 2 * rows @ c.T).argmin(1) for rows in x.split(16384)])

    for _ in range(n_iters):
        labels = nearest()
        sums, counts = torch.zeros_like(c).index_add_(0, labels, x), torch.bincount(labels, minlength=k)
        c = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(1), c)
    return c.numpy(), nearest().numpy()


def ours(x, k, n_iters):
    from u2seg.kmeans import kmeans

    return kmeans(x, k, seed=0, n_iters=n_iters, init=np.array(x[:k]))


def anonymous():
    "Memory of this process in kB, pages of mapped files not counted; 0 where Linux does not tell."
    status = Path('/proc/self/status')
    return (
        next((int(l.split()[1]) for l in status.read_text().splitlines() if l.startswith('RssAnon')), 0)
        if status.exists()
        else 0
    )


def worker(side, path, k, n_iters, threads):
    "One side in this process: seconds an iteration (of n + 1 less those of 1; CPU and wall), inertia, peak memory."
    import faiss, torch

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    x, run, took = np.load(path, mmap_mode='r'), dict(ours=ours, plain=plain)[side], {}
    run(x[: 2 * k], k, 1)  # imports and first calls
    base, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for n in (1, 1 + n_iters):
        start, cpu = time.perf_counter(), time.process_time()
        c, labels = run(x, k, n)
        took[n] = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    inertia = sum(
        float(((x[i : i + 16384] - c[labels[i : i + 16384]]) ** 2).sum(dtype=np.float64))
        for i in range(0, len(x), 16384)
    )
    wall, cpu = ((took[1 + n_iters][j] - took[1][j]) / n_iters for j in (0, 1))
    print(json.dumps(dict(wall=wall, cpu=cpu, inertia=inertia, peak=(peak[0] - base) / 2**10)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rows', type=int, nargs=2, default=(50000, 200000))
    parser.add_argument('--k', type=int, default=800)
    parser.add_argument('--dim', type=int, default=768)
    parser.add_argument('--iterations', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--out')
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.k, args.iterations, args.threads)
    lines, cpu, peak = (
        [
            '| rows | side | s an iteration (wall) | s an iteration (CPU) | GFLOP/s | memory beyond the start, MB '
            '| inertia |',
            '|---|---|---|---|---|---|---|',
        ],
        {},
        {},
    )
    with tempfile.TemporaryDirectory() as folder:
        for n in args.rows:
            path, got = Path(folder) / f'{n}.npy', {'ours': [], 'plain': []}
            draw(path, n, args.dim)
            for _ in range(args.rounds):
                for side in got:
                    call = [
                        sys.executable,
                        __file__,
                        '--worker',
                        side,
                        str(path),
                        '--k',
                        str(args.k),
                        '--iterations',
                        str(args.iterations),
                        '--threads',
                        str(args.threads),
                    ]
                    got[side].append(
                        json.loads(
                            subprocess.run(
                                call,
                                check=True,
                                capture_output=True,
                                text=True,
                                env={**os.environ, 'OMP_NUM_THREADS': str(args.threads)},
                            ).stdout
                        )
                    )
            for side, runs in got.items():
                r = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                cpu[side, n], peak[side, n] = r['cpu'], r['peak']
                lines.append(
                    f"| {n} | {side} | {r['wall']:.2f} | {r['cpu']:.2f} | "
                    f"{2 * n * args.k * args.dim / r['cpu'] / 1e9:.0f} | {r['peak']:.0f} | {r['inertia']:.6e} |"
                )
                print(lines[-1], flush=True)
            path.unlink()
    a, b = args.rows
    slope, grows = (cpu['ours', b] - cpu['ours', a]) / (b - a), (peak['ours', b] - peak['ours', a]) / (b - a)
    one, labels = cpu['ours', b] + slope * (1.3e6 - b), 1.3e6 * (8 + 8 + 4) / 2**20
    publish(
        [
            *heading(
                'k-means at scale',
                args.threads,
                ('faiss', 'torch', 'numpy'),
                'Each side runs in a process of its own, in turns, so that the peak of memory is its own. *CPU* is '
                'the time that it had a core.',
            ),
            f'{args.k} clusters of {args.dim} numbers; rows in a memory-mapped file; {args.iterations} iterations '
            'after the first. *Plain* is Lloyd as one writes it in torch, rows in memory.',
            '',
            *lines,
            '',
            f"**Ratio to plain torch, CPU seconds: {cpu['plain', a] / cpu['ours', a]:.2f} at {a} rows, "
            f"{cpu['plain', b] / cpu['ours', b]:.2f} at {b}.** Both sides are one matrix product in the main; they "
            "differ in memory.",
            '',
            '## 1.3 million rows, on paper',
            '',
            'Time and memory are straight lines in the rows; through both sizes above they reach:',
            '',
            '| | |',
            '|---|---|',
            f'| one iteration | {one:.0f} core seconds |',
            f'| 100 iterations | {one * 100 / 60:.0f} core minutes |',
            f'| file of embeddings, on disk | {1.3e6 * args.dim * 4 / 2**30:.1f} GiB |',
            f"| memory beyond the start, the file's pages not counted | {peak['ours', b] + grows * (1.3e6 - b):.0f} "
            "MB at most, by the line through both sizes (buffers of fixed size are still filling up there); by "
            f"counting: labels and distances {labels:.0f} MB, centroids and one block of rows |",
            f'| memory of the plain side | {1.3e6 * args.dim * 4 / 2**20:.0f} MB for the rows alone |',
            f'| one GPU (on paper only: none was at hand) | {2 * 1.3e6 * args.k * args.dim / 1e12:.1f} TFLOP an '
            f'iteration: {2 * 1.3e6 * args.k * args.dim / 30e12 * 1e3:.0f} ms at 30 TFLOP/s of float32; the rows '
            f'take {1.3e6 * args.dim * 4 / 20e9 * 1e3:.0f} ms from host memory at 20 GB/s, and their sums, made on '
            'the CPU, about as long again |',
        ],
        args.out,
    )


if __name__ == '__main__':
    main()

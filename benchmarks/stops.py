"""Every stage stopped at random moments through `dvc repro`: what goes on from there ends in the same bytes.

    python benchmarks/stops.py [--seed 0] [--stages train ...] [--out benchmarks/results/stops.md]
    python benchmarks/stops.py --hosts [--stages train ...] [--out benchmarks/results/hosts.md]

The pipeline in small (tests/small.yaml) runs once from beginning to end, and once so that each stage is hit by each of
`BLOWS`, at a moment that is drawn, and started again by `dvc repro`. Moments are drawn from the CPU time that is left
to the stage: what it took in the first run, less what it had done before earlier blows. All but the first lie after
the imports. A stage that finishes before is made anew and hit earlier. After a blow nothing of it may be left running.
At the end all files under out/ are compared, but for the executed notebooks, which hold times, and hidden files: a
process that is killed while it writes a file leaves what it has written under a hidden name.

With `--hosts`, each stage that shares its work runs on two simulated hosts instead: two torchrun agents that meet over
loopback and have a folder in common, undisturbed, and with a worker killed at a random moment, which torchrun restarts.
Both must end in the same bytes. Those of one process are the same, except after training, whose sums are others.
"""

import argparse
import hashlib
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from machine import heading, publish

from u2seg.images import read_json
from u2seg.recipes import overlay
from u2seg.scenes import draw_dataset
from u2seg.kernel import ALONE
from u2seg.stage import stages

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING = dict(n_images=24, n_procs=1, n_threads=1)
PRETRAINING |= dict(n_composed=dict(backbone=4, embedder=4), n_plain=dict(backbone=8, embedder=8))
HELPERS = {stage: dict(n_procs=2) for stage in ('maskcut', 'stego', 'evaluate', 'fewshot')}
HELPERS['cutler'] = dict(detect=dict(n_procs=2))
LIMIT = 2400  # seconds after which two hosts have failed
BLOWS = {
    'DVC gets SIGTERM': lambda dvc, tree: dvc.send_signal(signal.SIGTERM),
    'all processes get SIGKILL': lambda dvc, tree: [send(p, signal.SIGKILL) for p in tree],
    '`u2seg run` gets SIGKILL': lambda dvc, tree: send(find(tree, 'run'), signal.SIGKILL),
}


def change(path, updates):
    path.write_text(yaml.safe_dump(overlay(yaml.safe_load(path.read_text()), updates), sort_keys=False))


def prepare(folder, n_train=12, n_val=4):
    "A folder in which the pipeline runs in small."
    for name in ('nbs', 'configs', 'ablations', 'u2seg'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('.*', '__pycache__'))
    for name in ('params.yaml', 'dvc.yaml'):
        shutil.copy(ROOT / name, folder)
    small = yaml.safe_load((ROOT / 'tests' / 'small.yaml').read_text())
    change(folder / 'params.yaml', overlay(small, HELPERS))
    change(folder / 'configs' / 'pretrain.yaml', PRETRAINING)
    draw_dataset(folder / 'small', seed=1, n_train=n_train, n_val=n_val, kinds=('objects', 'scenes'))
    subprocess.run(['dvc', 'init', '-q', '--no-scm'], cwd=folder, env=environment(), check=True)


def environment():
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    own = dict(PATH=path, PYTHONPATH=str(ROOT), U2SEG_THREADS='1', DVC_NO_ANALYTICS='1', CUDA_VISIBLE_DEVICES='')
    return os.environ | own


def start(folder, *targets):
    with open(folder / 'log', 'a') as log:
        command = ['dvc', 'repro', '--no-run-cache', *targets]
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)


def send(process, number):
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def find(tree, word):
    "The first process whose command has this word: 'run' is a stage's own."
    return next(p for p in tree if word in words(p))


def descendants(process):
    try:
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def running(stage, tree):
    "CPU seconds of the processes of `u2seg run STAGE`, and what they are; 0 before it begins."
    for p in tree:
        if words(p)[-2:] == ['run', stage]:
            own = descendants(p)
            return sum(map(cpu, own)), own
    return 0.0, []


def cpu(process):
    try:
        used = process.cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system


def follow(dvc, names, until=None):
    "CPU seconds of each stage as `dvc repro` runs; it returns early, with the tree, where `until(stage, seconds)`."
    used = dict.fromkeys(names, 0.0)
    while dvc.poll() is None:
        tree = descendants(dvc)
        for stage in names:
            seconds, own = running(stage, tree)
            used[stage] = max(used[stage], seconds)
            if own and until and until(stage, seconds):
                return used, tree
        time.sleep(0.1)
    return used, []


def gone(tree, seconds=120):
    "Seconds until none of the processes is left, and those that are left."
    begin = time.perf_counter()
    _, alive = psutil.wait_procs(tree, timeout=seconds)
    return time.perf_counter() - begin, [' '.join(words(p))[:100] for p in alive]


def digests(folder):
    files = [p for p in sorted((folder / 'out').rglob('*')) if p.is_file() and p.name != 'run.ipynb']
    kept = [p for p in files if not any(part.startswith('.') for part in p.relative_to(folder).parts)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def forget(folder, stage):
    "Remove what a stage has made, and DVC's note of it, by which the files would come back from the cache."
    for made in (folder / 'out' / stage, folder / 'out' / '.work' / stage):
        shutil.rmtree(made, ignore_errors=True)
    lock = folder / 'dvc.lock'
    noted = yaml.safe_load(lock.read_text())
    noted['stages'].pop(stage, None)
    lock.write_text(yaml.safe_dump(noted))


def strike(folder, stage, names, blow, moment):
    "Hit a stage when it has used `moment` CPU seconds; anew, and earlier, as long as it finishes before."
    for n_anew in range(5):
        dvc = start(folder, stage)
        used, tree = follow(dvc, names, lambda name, so_far: name == stage and so_far >= moment)
        if tree:
            BLOWS[blow](dvc, tree)
            dvc.wait()
            ended, left = gone(tree)
            return dict(stage=stage, blow=blow, at=used[stage], n_anew=n_anew, ended=ended, left=left)
        if dvc.returncode:
            raise SystemExit((folder / 'log').read_text()[-3000:])
        moment = 0.9 * min(moment, used[stage])
        forget(folder, stage)
    return dict(stage=stage, blow=blow, at=None, n_anew=5, ended=0.0, left=[])


def strikes(folder, stage, names, rng, seconds, imports):
    "Hit a stage by each of `BLOWS`; it takes CPU `seconds`, of which the imports are taken by each start."
    left = seconds
    for k, blow in enumerate(BLOWS):
        row = strike(folder, stage, names, blow, rng.uniform(imports if k else 0, left))
        if row['n_anew']:
            left = seconds
        left -= max(0, (row['at'] or 0) - imports)
        yield row


def table(rows, used):
    lines = ['| stage | CPU s | what happens | at CPU s | ended after, s | left running |', '|:--|--:|:--|--:|--:|:--|']
    for r in rows:
        at = 'finished before' if r['at'] is None else f'{r["at"]:.1f}' + ', made anew' * bool(r['n_anew'])
        left = '; '.join(r['left']) or 'nothing'
        lines.append(f'| {r["stage"]} | {used[r["stage"]]:.0f} | {r["blow"]} | {at} | {r["ended"]:.1f} | {left} |')
    return lines


def run(whole, names, chosen, seed):
    "Rows of the table, CPU seconds of each stage undisturbed, files that differ, their number."
    stopped = whole.with_name('stopped')
    shutil.copytree(whole, stopped)
    dvc = start(whole, *chosen)
    used, _ = follow(dvc, names)
    if dvc.returncode:
        raise SystemExit((whole / 'log').read_text()[-3000:])
    rng, rows = random.Random(seed), []
    for stage in chosen:
        times = read_json(whole / 'out' / '.times' / f'{stage}.json')
        imports = used[stage] * (1 - times['work'] / times['total'])
        for row in strikes(stopped, stage, names, rng, used[stage], imports):
            rows.append(row)
            print(*table([row], used)[2:], flush=True)
    if start(stopped, *chosen).wait():
        raise SystemExit((stopped / 'log').read_text()[-3000:])
    want, got = digests(whole), digests(stopped)
    return rows, used, sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n)), len(want)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def agents(folder, stage):
    "Two agents of torchrun, a worker each."
    options = dict(nnodes=2, nproc_per_node=1, max_restarts=3, monitor_interval=0.1, local_addr='127.0.0.1')
    options |= dict(rdzv_backend='c10d', rdzv_id='u2seg', rdzv_endpoint=f'127.0.0.1:{free_port()}')
    words = [f'--{name.replace("_", "-")}={value}' for name, value in options.items()]
    command = [sys.executable, '-m', 'torch.distributed.run', *words, '-m', 'u2seg.cli', 'run', stage]
    with open(folder / 'log', 'a') as log:
        of_host = dict(cwd=folder, env=environment() | dict(GLOO_SOCKET_IFNAME='lo'), stdout=log, stderr=log)
        return [subprocess.Popen(command, **of_host) for _ in range(2)]


def on_hosts(folder, stage, moment=math.inf):
    "Make a stage anew; the second host's worker is killed once at `moment`. Its CPU seconds; if it was; the bytes."
    forget(folder, stage)
    hosts, used, killed, end = agents(folder, stage), 0.0, False, time.monotonic() + LIMIT
    while any(h.poll() is None for h in hosts):
        if time.monotonic() > end:
            for process in sum(map(descendants, hosts), []):
                send(process, signal.SIGKILL)
        seconds, own = running(stage, descendants(hosts[1])[1:])  # the agent has the same last words
        used = max(used, seconds)
        if seconds >= moment and not killed:
            killed = True
            for process in own:
                send(process, signal.SIGKILL)
        time.sleep(0.1)
    if any(h.returncode for h in hosts):
        raise SystemExit((folder / 'log').read_text()[-3000:])
    return used, killed, of_stage(folder, stage)


def of_stage(folder, stage):
    return {n: d for n, d in digests(folder).items() if n.startswith(f'out/{stage}/')}


def run_hosts(whole, chosen, seed):
    "Rows of the table of two hosts."
    if start(whole, *chosen).wait():
        raise SystemExit((whole / 'log').read_text()[-3000:])
    folder, rng = whole.with_name('hosts'), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for stage in chosen:
        seconds, _, want = on_hosts(folder, stage)
        moment = seconds * rng.uniform(0.3, 0.9)
        for _ in range(3):  # the host that is second, and has more to do, may change
            used, killed, got = on_hosts(folder, stage, moment)
            if killed or got != want:
                break
            moment = 0.9 * min(moment, used)
        alone = of_stage(whole, stage)
        yield dict(stage=stage, seconds=seconds, at=moment if killed else None, same=got == want, as_one=want == alone)


def table_of_hosts(rows):
    names = 'two hosts, against one process', 'a worker killed at CPU s', 'against two hosts undisturbed'
    lines = [f'| stage | CPU s | {" | ".join(names)} |', '|:--|--:|:--|--:|:--|']
    for r in rows:
        at = 'finished before' if r['at'] is None else f'{r["at"]:.1f}'
        words = ['other bytes', 'the same bytes']
        one, two = words[r['as_one']], words[r['same']]
        lines.append(f'| {r["stage"]} | {r["seconds"]:.0f} | {one} | {at} | {two} |')
    return lines


def page(whole, names, chosen, seed):
    "Lines of the page of stopped stages, and whether all is well."
    rows, used, differ, n_files = run(whole, names, chosen, seed)
    hit = [r for r in rows if r['at'] is not None]
    lines = heading('Stages that are stopped', 1, ('torch', 'dvc'), 'Each stage of the pipeline in small.')
    same = f'**DIFFER: {", ".join(differ)}**' if differ else '**byte-identical**'
    lines += [f'{len(hit)} blows in {len({r["stage"] for r in hit})} stages; {n_files} files under out/: {same}.', '']
    return lines + table(rows, used), not (differ or any(r['left'] for r in rows))


def page_of_hosts(whole, chosen, seed):
    "Lines of the page of two hosts, and whether all is well."
    rows = []
    for row in run_hosts(whole, [stage for stage in chosen if stage not in ALONE], seed):
        rows.append(row)
        print(*table_of_hosts([row])[2:], flush=True)
    how = 'Each stage of the pipeline in small; CPU seconds of the second host.'
    lines = heading('Stages on two hosts', 1, ('torch', 'dvc'), how)
    n, good = sum(r['at'] is not None for r in rows), all(r['same'] for r in rows)
    same = '**byte-identical**' if good else '**NOT the same**'
    lines += [
        f'A worker killed in {n} of {len(rows)} stages; torchrun restarts it, and all files that these stages '
        f'write are {same} to those of two hosts undisturbed.',
        '',
    ]
    note = 'Two processes add in another order than one: cutler and train end in others, and so does what reads theirs.'
    return lines + table_of_hosts(rows) + ['', note], good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--stages', nargs='+', help='those that are hit; by default all')
    parser.add_argument('--hosts', action='store_true', help='on two simulated hosts, instead of through dvc repro')
    parser.add_argument('--folder', type=Path, help='to work in and to keep; --hosts uses the pipeline that is there')
    parser.add_argument('--out')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        whole, names = Path(args.folder or temporary, 'whole'), stages(ROOT)
        if not (args.hosts and whole.exists()):
            prepare(whole)
        chosen = args.stages or names
        lines, good = page_of_hosts(whole, chosen, args.seed) if args.hosts else page(whole, names, chosen, args.seed)
    publish(lines, args.out)
    return not good


if __name__ == '__main__':
    sys.exit(main())

"""Two hosts over loopback, labelling and training together; a worker is killed on the way and restarted: nothing
lost, nothing twice. A group that is started again meets."""

import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest

WORKER = '''
import json, os, sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn
from u2seg.images import write_json, write_png
from u2seg.masks import instances_json
from functools import partial
from u2seg.shards import run_shared, sharded
from u2seg.augment import Augment
from u2seg.solver import Solver
from u2seg.batches import Batches, PseudoLabels
from u2seg.train import fit
torch.set_num_threads(1)
given, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ['RANK'])
with open(out/'pids', 'a') as f: f.write(f'{rank} {os.getpid()}\\n')
def work(batch):
    time.sleep(.02)
    with open(out/'done', 'a') as f: f.write(''.join(f'{rank} {i}\\n' for i in batch))
    return [dict(square=i * i) for i in batch]
if sys.argv[3] == 'jobs':
    def job(i):
        work([i])
        return dict(square=i * i)
    jobs = [partial(job, i) for i in range(60)]
    write_json(out/f'records{rank}.json', run_shared(jobs, out/'jobs', key={}, n_procs=1))
    raise SystemExit
items = [dict(id=i, file_name=f'{i}.jpg') for i in range(60)]
records, skipped = sharded(items, lambda item: item['id'], work, out/'shards', key={}, shard_size=3, batch_size=3)
write_json(out/f'records{rank}.json', records)
if sys.argv[3] == 'label': raise SystemExit

class Net(nn.Module):
    def __init__(self): super().__init__(); torch.manual_seed(1); self.cls_score = nn.Conv2d(3, 4, 1)
    def forward(self, images, targets):
        time.sleep(.02)
        loss = lambda im, t: nn.functional.cross_entropy(self.cls_score(im[None] / 255), t['sem'][None].clamp(max=3))
        return dict(loss_sem_seg=sum(loss(im, t) for im, t in zip(images, targets)))
data = PseudoLabels(given, given/'instances.json', given/'stuff')
augment = Augment(short_sides=[16], max_size=40, flip=.5, colour_jitter=(.2, .2, .2, .1), copy_paste='none',
    paste_rate=0., paste_scale=(.3, .8))
net = Net()
solver = Solver(batch_size=4, n_iters=16, lr=.05, schedule='step', milestones=[8], gamma=.1, flat_fraction=0.,
    warmup_iters=3, warmup_factor=.001, optimizer='sgd', sgd_momentum=.9, weight_decay=0., cls_lr_multiplier=1.,
    clip_type=None, clip_value=1., loss_weights={}, amp=None, accumulate=1, ema_decay=0., precise_bn=0,
    checkpoint_period=2)
fit(net, Batches(data, augment, batch_size=4, seed=3), solver, folder=out/'train', log_every=3)
write_json(out/f'weights{rank}.json', {k: v.tolist() for k, v in net.state_dict().items()})
'''


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    import numpy as np
    from u2seg.images import write_json, write_png
    from u2seg.masks import instances_json

    given, rng = tmp_path_factory.mktemp('given'), np.random.default_rng(0)
    for i in range(8):
        write_png(given / f'{i}.png', (x := rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)))
        write_png(given / 'stuff' / f'{i + 1:012d}.png', x[..., 0] % 4)
    write_json(
        given / 'instances.json',
        instances_json(
            [dict(id=i + 1, file_name=f'{i}.png', height=16, width=20) for i in range(8)], [], [dict(id=1, name='x')]
        ),
    )
    (given / 'worker.py').write_text(WORKER)
    return given


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


ENV = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')} | dict(
    OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', MASTER_ADDR='127.0.0.1'
)


def torchrun(given, out, what):
    "Two agents that meet at a port of loopback, one worker each."
    out.mkdir()
    cmd = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nnodes',
        '2',
        '--nproc-per-node',
        '1',
        '--rdzv-backend',
        'c10d',
        '--rdzv-id',
        'x',
        '--rdzv-endpoint',
        f'127.0.0.1:{free_port()}',
        '--max-restarts',
        '3',
        '--monitor-interval',
        '0.1',
        '--local-addr',
        '127.0.0.1',
        str(given / 'worker.py'),
        str(given),
        str(out),
        what,
    ]
    return [
        subprocess.Popen(cmd, env=ENV, stdout=subprocess.DEVNULL, stderr=open(out / f'host{i}.log', 'w'))
        for i in range(2)
    ]


def workers(given, out):
    "Two workers as a scheduler would start them."
    out.mkdir(exist_ok=True)
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(given / 'worker.py'), str(given), str(out), 'train'],
            env=ENV | dict(MASTER_PORT=port, RANK=str(i), WORLD_SIZE='2'),
            stdout=subprocess.DEVNULL,
            stderr=open(out / f'host{i}.log', 'w'),
        )
        for i in range(2)
    ]


def finish(ps, out):
    try:
        codes = [p.wait(120) for p in ps]
    except subprocess.TimeoutExpired:
        codes = [p.poll() for p in ps]
    finally:
        [p.kill() for p in ps if p.poll() is None]
    assert codes == [0, 0], ''.join((out / f'host{i}.log').read_text()[-3000:] for i in range(2))


def wait_for(seen, ps, seconds=90):
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end and all(p.poll() is None for p in ps), (
            'the hosts ended before they could be disturbed'
        )
        time.sleep(0.01)


def shards_in_order(out):
    done = [int(l.split()[1]) for l in (out / 'done').read_text().splitlines()]
    assert [r['square'] for r in json.loads((out / 'records0.json').read_bytes())] == [
        i * i for i in range(60)
    ] and set(done) == set(range(60))
    return len(done)


@pytest.mark.parametrize('what,made', [('label', 'shard_*.json'), ('jobs', 'job_*.pickle')])
def test_torchrun_restarts_a_killed_worker_and_the_results_are_those_of_one(given, tmp_path, what, made):
    "Labels; and jobs, by which evaluation and the scores of few-shot runs are shared."
    out = tmp_path / 'killed'
    ps = torchrun(given, out, what)
    wait_for(lambda: len(list(out.rglob(made))) >= 4, ps)
    os.kill(int((out / 'pids').read_text().split()[-1]), signal.SIGKILL)
    finish(ps, out)
    assert (out / 'records0.json').read_bytes() == (out / 'records1.json').read_bytes() and len(
        (out / 'pids').read_text().splitlines()
    ) >= 3
    assert shards_in_order(out) - 60 <= 6  # made twice: at most the shard that each worker had in hand


def test_torchrun_restarts_a_killed_worker_and_the_training_goes_on(given, tmp_path):
    finish(torchrun(given, tmp_path / 'whole', 'train'), tmp_path / 'whole')
    out = tmp_path / 'killed'
    ps = torchrun(given, out, 'train')
    wait_for(lambda: (out / 'train' / 'checkpoint.pt').exists(), ps)
    os.kill(int((out / 'pids').read_text().split()[-1]), signal.SIGKILL)
    finish(ps, out)
    assert len((out / 'pids').read_text().splitlines()) >= 4
    for name in ('records0.json', 'records1.json', 'weights0.json', 'weights1.json'):
        assert (out / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name


def test_training_goes_on_after_a_host_is_lost(given, tmp_path):
    finish(workers(given, tmp_path / 'whole'), tmp_path / 'whole')
    assert shards_in_order(tmp_path / 'whole') == 60  # undisturbed: nothing is made twice
    out = tmp_path / 'killed'
    ps = workers(given, out)
    wait_for(lambda: (out / 'train' / 'checkpoint.pt').exists(), ps)
    ps[1].kill()
    assert ps[0].wait(60) != 0  # alone it cannot go on, and says so
    assert not (out / 'weights0.json').exists()
    finish(workers(given, out), out)
    for name in ('records0.json', 'records1.json', 'weights0.json', 'weights1.json'):
        assert (out / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
    assert (out / 'weights0.json').read_bytes() == (out / 'weights1.json').read_bytes()


MEMBER = """
import os, torch, torch.distributed as dist
from u2seg.processes import _processes
print('here', flush=True)
_processes(torch.device('cpu'))
x = torch.ones(1)
dist.all_reduce(x)
print(int(x), flush=True)
os._exit(0)
"""


def test_a_group_meets_again_though_each_agent_counts_its_own_restarts():
    """Workers start four times as torchrun's agents start them, which keep a store with the addresses of the dead.
    Without a name of its own a group meets by luck alone."""
    from torch.distributed import TCPStore

    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    of_agents, n_keys = dict(WORLD_SIZE='2', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True'), [0]
    for counts, order in (((0, 0), (0, 1)), ((1, 2), (1, 0)), ((2, 2), (0, 1)), ((2, 3), (1, 0))):
        members = []
        for rank in order:
            env = ENV | of_agents | dict(RANK=str(rank), TORCHELASTIC_RESTART_COUNT=str(counts[rank]))
            members.append(subprocess.Popen([sys.executable, '-c', MEMBER], env=env, stdout=subprocess.PIPE, text=True))
            assert members[-1].stdout.readline() == 'here\n'
            time.sleep(0.5)  # the first has read what is in the store before the second comes
        try:
            assert [p.communicate(timeout=30)[0] for p in members] == ['2\n'] * 2, (counts, order)
        finally:
            [p.kill() for p in members if p.poll() is None]
        n_keys.append(store.num_keys())
        assert n_keys[-1] > n_keys[-2]  # no group writes its addresses where another did


TOY = """
import os
from pathlib import Path
from u2seg.images import write_json
from u2seg.shards import sharded
out = Path(root)/'out'/'toy'
def work(batch):
    with open(out/'made', 'a') as f: f.write(f'{os.getpid()}\\n')
    return [dict(square=i*i) for i in batch]
items = [dict(id=i, file_name=f'{i}.jpg') for i in range(n)]
records, _ = sharded(items, lambda item: item['id'], work, Path(root)/'out'/'.work'/'toy', key={}, shard_size=1)
write_json(out/'records.json', records)
"""


def run_toy(folder, **env):
    "A stage of one sharded job, by `u2seg run`; the processes that did it, and what came out."
    import nbformat

    (folder / 'nbs').mkdir(parents=True)
    cell = nbformat.v4.new_code_cell
    tagged = lambda source, tag: cell(source, metadata=dict(tags=[tag]))
    cells = [tagged("n = 4\nroot = '..'", 'parameters'), tagged('pass', 'check'), cell(TOY)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / 'nbs' / '10_run_toy.ipynb')
    (folder / 'params.yaml').write_text('toy: {n: 4}')
    command = [sys.executable, '-m', 'u2seg.cli', 'run', 'toy']
    done = subprocess.run(command, cwd=folder, env=ENV | env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    out = folder / 'out' / 'toy'
    return set((out / 'made').read_text().split()), (out / 'records.json').read_bytes()


def test_one_variable_shares_a_stage(tmp_path):
    alone, want = run_toy(tmp_path / 'alone')
    shared, got = run_toy(tmp_path / 'shared', U2SEG_PROCS='2')
    assert (len(alone), len(shared)) == (1, 2) and got == want

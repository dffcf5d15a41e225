"""A stage that is told to stop while it trains saves what it has, and the same command goes on from there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import stops

from u2seg.images import write_json, write_png
from u2seg.masks import encode_rle, instances_json
from u2seg.recipes import overlay

root = Path(__file__).parents[1]
N_ITERS = 48  # so many that a signal arrives well before the last
SMALL = dict(
    data=dict(root='images', train=['a']),
    augment=dict(short_sides=[64], max_size=64),
    network=dict(min_size=64, max_size=64, roi_batch=8, rpn_post_train=20),
    cutler=dict(
        solver=dict(n_iters=N_ITERS, batch_size=2, warmup_iters=2, checkpoint_period=1000),
        detect=dict(n_procs=1, score_threshold=0.0),
        n_workers=0,
    ),
)


def environment(**more):
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    own = dict(PATH=path, PYTHONPATH=str(root), U2SEG_THREADS='1', TQDM_MININTERVAL='0', DVC_NO_ANALYTICS='1')
    return os.environ | own | {k: str(v) for k, v in more.items()}


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
    "Stage cutler, and what it needs: six images with one mask each."
    folder = tmp_path_factory.mktemp('stop') / 'whole'
    (folder / 'nbs').mkdir(parents=True)
    shutil.copy(next((root / 'nbs').glob('*_run_cutler.ipynb')), folder / 'nbs')
    params = overlay(yaml.safe_load((root / 'params.yaml').read_text()), SMALL)
    (folder / 'params.yaml').write_text(yaml.safe_dump(params))
    (folder / 'dvc.yaml').write_text(yaml.safe_dump(dict(stages=dict(cutler=dict(cmd='u2seg run cutler')))))
    rng = np.random.default_rng(0)
    images, masks = [], []
    for i in range(1, 7):
        write_png(folder / 'images' / 'a' / f'{i}.png', rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        mask = np.zeros((64, 64), bool)
        mask[8 : 20 + 4 * i, 8:40] = True
        images.append(dict(id=i, file_name=f'a/{i}.png', width=64, height=64))
        masks.append(dict(image_id=i, category_id=1, segmentation=encode_rle(mask)))
    labels = instances_json(images, masks, [dict(id=1, name='fg')])
    write_json(folder / 'out' / 'maskcut' / 'instances.json', labels)
    return folder


def copy(repository, name):
    folder = repository.with_name(name)
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns('cutler', '.work', '.dvc'))
    return folder


def start(folder, *command, **env):
    with open(folder / 'log', 'w') as log:
        return subprocess.Popen(command, cwd=folder, env=environment(**env), stdout=log, stderr=log)


def wait_for(seen, process, seconds=120):
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, 'it did not happen in time'
        assert process.poll() is None, 'the process ended before'
        time.sleep(0.02)


def kernel_of(process):
    "The process in which the cells of `u2seg run` are executed."
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    return int(children[0])


@pytest.fixture(scope='module')
def whole(repository):
    "The weights of a run that nobody stops."
    assert start(repository, 'u2seg', 'run', 'cutler').wait(300) == 0, (repository / 'log').read_text()[-3000:]
    return (repository / 'out' / 'cutler' / 'model.safetensors').read_bytes()


@pytest.mark.skipif(sys.platform != 'linux', reason='children are found in /proc')
@pytest.mark.parametrize('how', ['u2seg', 'dvc', 'kernel'])
def test_a_stage_that_is_stopped_goes_on(repository, whole, how):
    folder = copy(repository, how)
    log, checkpoint = folder / 'log', folder / 'out' / '.work' / 'cutler' / 'round0' / 'checkpoint.pt'
    if how == 'dvc':
        subprocess.run(['dvc', 'init', '-q', '--no-scm'], cwd=folder, env=environment(), check=True)
    shell = dict(SHELL=shutil.which('dash') or '/bin/sh')  # DVC's; dash stays between DVC and its stage
    process = start(folder, *(['dvc', 'repro'] if how == 'dvc' else ['u2seg', 'run', 'cutler']), **shell)
    wait_for(lambda: f' 5/{N_ITERS}' in log.read_text(), process)
    if how == 'kernel':
        os.kill(kernel_of(process), signal.SIGKILL)
        assert process.wait(60) == 1
        assert 'stage cutler: Kernel died' in log.read_text() and 'Traceback' not in log.read_text()
        assert not checkpoint.exists()
        return
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    end = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.05)  # DVC ends before its stage does
    assert 5 <= torch.load(checkpoint, weights_only=True)['next'] < N_ITERS
    assert how == 'dvc' or code == 128 + signal.SIGTERM
    assert start(folder, 'u2seg', 'run', 'cutler').wait(300) == 0, log.read_text()[-3000:]
    assert (folder / 'out' / 'cutler' / 'model.safetensors').read_bytes() == whole
    assert json.loads((folder / 'out' / 'cutler' / 'metrics.json').read_text())['iterations'] == N_ITERS


SLEEP = """
import os
import time
from pathlib import Path
Path(root, os.environ['RANK']).touch()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='processes of DVC are found in /proc')
def test_a_stage_in_several_processes_ends_with_dvc(tmp_path):
    (tmp_path / 'nbs').mkdir()
    cell = nbformat.v4.new_code_cell
    cells = [cell("root = '..'", metadata=dict(tags=['parameters'])), cell(SLEEP)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / 'nbs' / '10_run_sleep.ipynb')
    (tmp_path / 'params.yaml').write_text('sleep: {}')
    (tmp_path / 'dvc.yaml').write_text(yaml.safe_dump(dict(stages=dict(sleep=dict(cmd='u2seg run sleep')))))
    subprocess.run(['dvc', 'init', '-q', '--no-scm'], cwd=tmp_path, env=environment(), check=True)
    process = start(tmp_path, 'dvc', 'repro', U2SEG_PROCS=2, SHELL=shutil.which('dash') or '/bin/sh')
    wait_for(lambda: all((tmp_path / rank).exists() for rank in '01'), process, 600)
    tree = stops.descendants(process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    _, left = stops.gone(tree, 60)
    for p in tree:
        stops.send(p, signal.SIGKILL)
    assert len(tree) > 5 and left == []


STACK = """
import ctypes
from u2seg.processes import _asked_to_stop

class Stack(ctypes.Structure):
    _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]

with _asked_to_stop():
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
print(stack.flags, stack.size)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the stack is asked for from Linux')
def test_a_signal_that_is_waited_for_has_a_stack_of_its_own():
    "A product of oneDNN lets the stack pointer lie in the heap; a signal's frame would be written there."
    env = {k: v for k, v in environment().items() if k != 'PYTHONFAULTHANDLER'}
    flags, size = subprocess.run([sys.executable, '-c', STACK], env=env, capture_output=True, check=True).stdout.split()
    disabled = 2
    assert int(flags) != disabled and int(size) > 8192


ORPHANS = """
import os, sys, time
from functools import partial
from pathlib import Path

from u2seg.processes import _asked_to_stop
from u2seg.scenes import _map
from u2seg.shards import run_all

def job(path, saves):
    if not saves:
        Path(path).write_text(str(os.getpid()))
        time.sleep(600)
    with _asked_to_stop() as asked:
        Path(path).write_text(str(os.getpid()))
        while not asked:
            time.sleep(.1)
        Path(path + '.saved').touch()
    raise SystemExit(1)

if __name__ == '__main__':
    if sys.argv[2] == 'runs':
        run_all([partial(job, f'{sys.argv[1]}/{k}', k == 1) for k in range(2)], n_procs=2)
    else:
        _map(partial(job, saves=False), [f'{sys.argv[1]}/{k // 8}' for k in range(16)], 2)  # eight at a time
"""


@pytest.mark.parametrize('work', ['runs', 'drawing'])
def test_processes_end_with_the_one_that_started_them(work, tmp_path):
    "Killed, it can tell them nothing; one that trains saves what it has."
    (tmp_path / 'jobs.py').write_text(ORPHANS)
    process = subprocess.Popen([sys.executable, tmp_path / 'jobs.py', tmp_path, work], env=environment())
    wait_for(lambda: all((tmp_path / k).exists() for k in '01'), process, 300)
    tree = stops.descendants(process)
    process.kill()
    process.wait(60)
    _, left = stops.gone(tree, 60)
    for p in tree:
        stops.send(p, signal.SIGKILL)
    assert len(tree) > 2 and left == [] and (tmp_path / '1.saved').exists() == (work == 'runs')


STEGO = dict(
    data=dict(root='images', train=['a']),
    stego=dict(size=64, n_classes=3, n_iters=60, batch_size=4, n_neighbors=3, segment=dict(size=64), n_procs=2),
)


def test_the_pipeline_that_is_stopped_has_all_that_dvc_yaml_names(tmp_path):
    "benchmarks/stops.py runs every stage, in a folder of its own."
    stops.prepare(tmp_path / 'whole', n_train=1, n_val=1)
    found = yaml.safe_load((root / 'dvc.yaml').read_text())['stages'].values()
    deps = {d for stage in found for d in stage.get('deps', []) if d.startswith(('nbs/', 'u2seg/'))}
    assert [d for d in sorted(deps) if not (tmp_path / 'whole' / d).exists()] == [] and len(deps) > 50


def test_a_stage_that_is_to_be_made_anew_does_not_come_from_the_cache(tmp_path):
    "DVC checks out what it has of the same dependencies, and then there is no process to hit."
    (tmp_path / 'given').write_text('x')
    stage = dict(cmd='echo ran >> log; mkdir -p out/toy; cp given out/toy/made', deps=['given'], outs=['out/toy/made'])
    (tmp_path / 'dvc.yaml').write_text(yaml.safe_dump(dict(stages=dict(toy=stage))))
    subprocess.run(['dvc', 'init', '-q', '--no-scm'], cwd=tmp_path, env=environment(), check=True)
    for n in 1, 2:
        assert stops.start(tmp_path, 'toy').wait() == 0
        assert (tmp_path / 'log').read_text().splitlines().count('ran') == n
        stops.forget(tmp_path, 'toy')
        assert not (tmp_path / 'out' / 'toy').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='processes of DVC are found in /proc')
def test_a_stage_hit_at_random_moments_ends_in_the_same_bytes(repository, tmp_path):
    "Stage stego, which trains, labels, and starts processes; `make nightly` does this to all stages."
    whole = tmp_path / 'whole'
    for name in ('nbs', 'out/features'):
        (whole / name).mkdir(parents=True)
    shutil.copytree(repository / 'images', whole / 'images')
    shutil.copy(next((root / 'nbs').glob('*_run_stego.ipynb')), whole / 'nbs')
    shutil.copy(root / 'out' / 'features' / 'backbone.safetensors', whole / 'out' / 'features')
    params = overlay(yaml.safe_load((root / 'params.yaml').read_text()), STEGO)
    (whole / 'params.yaml').write_text(yaml.safe_dump(params))
    stage = yaml.safe_load((root / 'dvc.yaml').read_text())['stages']['stego']
    stage = {
        k: stage[k] for k in ('cmd', 'outs', 'plots')
    }  # all that it writes: DVC skips a stage whose outputs are right
    (whole / 'dvc.yaml').write_text(yaml.safe_dump(dict(stages=dict(stego=stage))))
    subprocess.run(['dvc', 'init', '-q', '--no-scm'], cwd=whole, env=environment(), check=True)
    rows, _, differ, n_files = stops.run(whole, ['stego'], ['stego'], seed=0)
    assert differ == [] and n_files >= 10
    assert [r['left'] for r in rows] == [[]] * len(stops.BLOWS) and all(r['at'] for r in rows)

"""The whole DVC pipeline, in small, in a clone: complete, strict, isolated from ground truth, repeatable."""

import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

from u2seg import scenes
from u2seg.recipes import overlay
from u2seg.stage import stages

root = Path(__file__).parents[1]
pretraining = dict(
    n_images=24, n_procs=1, n_threads=1, n_composed=dict(backbone=4, embedder=4), n_plain=dict(backbone=8, embedder=8)
)
small = yaml.safe_load(
    (Path(__file__).parent / 'small.yaml').read_text()
)  # what the reduced run changes in params.yaml
before_truth = ['maskcut', 'cutler', 'cluster', 'stego', 'panoptic', 'train']


def run(clone, *cmd, ok=True):
    env = os.environ | {
        'PATH': f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        'PYTHONPATH': str(clone),
        'DVC_NO_ANALYTICS': '1',
        'U2SEG_THREADS': '1',
    }
    p = subprocess.run(cmd, cwd=clone, env=env, capture_output=True, text=True)
    assert (p.returncode == 0) == ok, f'{" ".join(cmd)}\n{p.stdout[-3000:]}\n{p.stderr[-6000:]}'
    return p.stdout + p.stderr


def ran(output):
    return re.findall(r"Running stage '(\w+)'", output)


def change(clone, updates, name='params.yaml'):
    params = overlay(yaml.safe_load((clone / name).read_text()), updates)
    (clone / name).write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    clone = tmp_path_factory.mktemp('pipeline') / 'u2seg'
    subprocess.run(['git', 'clone', '-q', root, clone], check=True)
    for name in ('nbs', 'u2seg', 'configs'):  # what is being tested is the working tree
        shutil.rmtree(clone / name)
        shutil.copytree(root / name, clone / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('params.yaml', 'dvc.yaml'):
        shutil.copy(root / name, clone / name)
    scenes.draw_dataset(clone / 'small', seed=1, n_train=20, n_val=6, kinds=('objects', 'scenes'), n_workers=2)
    change(clone, small)
    change(clone, pretraining, 'configs/pretrain.yaml')
    return clone


def scramble_truth(clone, back=False):
    "Turn every file of ground truth into garbage, or back."
    for f in sorted((clone / 'small').glob('*/annotations/**/*')):
        if f.is_file():
            f.write_bytes(bytes(255 - b for b in f.read_bytes()))


def tracked(clone):
    "The content of every file that git knows or would list, but for dvc.lock."
    names = run(clone, 'git', 'ls-files', '-z', '-co', '--exclude-standard').split('\0')
    return {n: (clone / n).read_bytes() for n in names if n and n != 'dvc.lock' and (clone / n).is_file()}


def test_whole_pipeline(clone):
    assert 'fits the' in run(clone, 'u2seg', 'check')
    before = tracked(clone)
    scramble_truth(clone)
    assert (
        ran(run(clone, 'dvc', 'repro', 'train')) == ['features'] + before_truth
    )  # none of them can have read ground truth
    scramble_truth(clone)
    run(clone, 'dvc', 'commit', '-q', '-f', *before_truth)  # the image folder's digest covers the annotations beside it
    assert ran(run(clone, 'dvc', 'repro')) == ['evaluate', 'fewshot', 'report']
    assert ran(run(clone, 'dvc', 'repro')) == []  # a second run does nothing
    for name in stages(clone):
        assert (clone / 'out' / name / 'run.ipynb').exists() and (
            name == 'report' or json.loads((clone / 'out' / name / 'metrics.json').read_text())
        )
    assert not list((clone / 'out' / '.work').iterdir())
    assert 'U2Seg' in run(clone, 'u2seg', 'table')
    after = tracked(clone)
    assert after.keys() == before.keys() and [n for n in after if after[n] != before[n]] == []


def test_deleting_the_results_and_running_again_gives_the_same_bytes(clone):
    kept = {
        p: p.read_bytes()
        for name in before_truth[2:] + ['evaluate']
        for p in (clone / 'out' / name).rglob('*')
        if p.is_file() and p.suffix in ('.json', '.csv', '.npy', '.safetensors', '.png')
    }
    for name in before_truth[2:] + ['evaluate']:
        shutil.rmtree(clone / 'out' / name)
    run(clone, 'dvc', 'repro', '--no-run-cache', '-f', '-s', *before_truth[2:], 'evaluate')
    assert [str(p.relative_to(clone)) for p in kept if p.read_bytes() != kept[p]] == []


def results(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and p.name != 'run.ipynb'
    }


def test_two_workers_write_what_one_does(clone):
    """Whole stages as torchrun starts them: one labeller and one clustering for all, files that everyone collects,
    predictions that are shared."""
    env = os.environ | {
        'PATH': f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        'PYTHONPATH': str(clone),
        'U2SEG_THREADS': '1',
    }
    for stage in ('cluster', 'stego', 'panoptic', 'evaluate'):
        right = results(clone / 'out' / stage)
        shutil.rmtree(clone / 'out' / stage)
        shutil.rmtree(clone / 'out' / '.work' / stage, ignore_errors=True)
        workers = [
            subprocess.Popen(
                ['u2seg', 'run', stage],
                cwd=clone,
                env=env | dict(RANK=str(r), WORLD_SIZE='2'),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for r in range(2)
        ]
        try:
            said = [w.communicate(timeout=300)[0] for w in workers]
        finally:
            [w.kill() for w in workers if w.poll() is None]
        assert [w.returncode for w in workers] == [0, 0], ''.join(t[-3000:] for t in said)
        if stage in ('cluster', 'stego'):
            assert len(list((clone / 'out' / '.work' / stage).glob('once_*'))) == 1
        if stage == 'evaluate':
            # a block of each split, of those that the mapping is fitted on, and by name under either mapping
            assert len(list((clone / 'out' / '.work' / stage).rglob('job_*.pickle'))) == 8
        again = results(clone / 'out' / stage)
        assert again.keys() == right.keys() and [n for n in right if again[n] != right[n]] == []
        run(clone, 'dvc', 'commit', '-q', '-f', stage)


def test_a_changed_knob_reruns_its_stage_and_what_follows(clone):
    change(clone, dict(cluster=dict(k=small['cluster']['k'] - 1)))
    assert ran(run(clone, 'dvc', 'repro', 'panoptic')) == ['cluster', 'panoptic']
    status = json.loads(run(clone, 'dvc', 'status', '--json'))
    assert not {'features', 'maskcut', 'cutler', 'cluster', 'stego', 'panoptic'} & status.keys() and 'train' in status


@pytest.mark.parametrize(
    'updates,message',
    [
        (dict(cluster=dict(kk=3)), 'unknown name cluster.kk'),
        (dict(maskcut=dict(tau=2.0)), 'tau'),
        (dict(maskcut=dict(tau='x')), 'maskcut.tau must be float'),
        (dict(data=dict(root='nowhere')), 'nowhere'),
    ],
)
def test_a_newcomers_mistakes_end_in_one_sentence(clone, updates, message):
    kept = (clone / 'params.yaml').read_text()
    change(clone, updates)
    try:
        output = (
            run(clone, 'u2seg', 'run', 'maskcut', ok=False)
            if 'data' in updates
            else run(clone, 'u2seg', 'check', ok=False)
        )
    finally:
        (clone / 'params.yaml').write_text(kept)
    assert message in output and 'Traceback' not in output and len(output.strip().splitlines()[-1]) < 300

"Sweeps: real experiments of a toy pipeline in clones, strict settings, summaries by hand."

import json, os, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from u2seg import margins as M
from u2seg import sweep as S
from u2seg.results import read_rows
from u2seg.stage import load_params, stages

root = Path(__file__).parents[1]
NAMES = list(yaml.safe_load((root / 'ablations' / 'sweeps.yaml').read_text()))


@pytest.mark.parametrize('name', NAMES)
def test_committed_sweeps_pass_the_stages_checks(name):
    sweep = S.read_sweep(root / 'ablations' / 'sweeps.yaml', name)
    todo = S.experiments(name, sweep, load_params(root), seeds=[0, 1, 2])
    S.check_experiments(todo, root)
    assert len({e['name'] for e in todo}) == len(todo) == 3 * len(sweep['settings'])
    changes = [json.dumps(S.changed(load_params(root), e['set']), sort_keys=True) for e in todo]
    committed = json.dumps(load_params(root), sort_keys=True)
    others = [c for c in changes if c != committed]  # one source of randomness at a time: its first seed is that run
    assert len(set(others)) == len(others), 'two experiments are the same'
    assert name == 'variance' or changes.count(committed) <= 1
    assert sweep['methods'] == 'all' or set(sweep['methods']) <= {
        'MaskCut + clusters',
        'CutLER+',
        'STEGO',
        'CutLER+STEGO',
        'U2Seg',
        'U2Seg by name',
    }


@pytest.mark.parametrize('stage', ['cutler', 'train', 'fewshot'])
def test_plain_paste_of_more_than_the_image_is_refused(stage):
    for scale, fits in (([0.5, 1.0], True), ([0.5, 1.2], False), ([0.8, 0.5], False), ([0.5], False)):
        todo = [
            dict(
                name='x',
                set={f'{stage}.augment.copy_paste': 'plain', f'{stage}.augment.paste_scale': scale},
                targets=['evaluate'],
            )
        ]
        if fits:
            S.check_experiments(todo, root)
        else:
            with pytest.raises(ValueError, match='paste_scale'):
                S.check_experiments(todo, root)


def test_each_source_of_randomness_has_a_seed_of_its_own():
    "What `seeds` reseeds together, `variance` reseeds one by one, but for the labels of few-shot learning."
    together, alone = (S.read_sweep(root / 'ablations' / 'sweeps.yaml', name) for name in ('seeds', 'variance'))
    assert all(list(values.values()) == ['seed'] for values in alone['settings'].values())
    apart = {p for values in alone['settings'].values() for p in values}
    assert {*together['seeds']} == apart | {'fewshot.seeds'}
    seeded = {f'{stage}.seed' for stage in stages(root) if 'seed' in load_params(root)[stage]}
    assert seeded - {'features.seed'} == apart  # the features travel with the repository


def test_every_ablation_of_the_paper_is_there():
    assert set(NAMES) == {
        'seeds',
        'plus',
        'variance',
        'clusters',
        'tau_and_n',
        'crf',
        'copy_paste',
        'droploss',
        'rounds',
        'stuff_labeller',
        'backbone',
        'universal',
    }


# a toy: `train` costs something and is shared, `evaluate` scores

TOY = {
    'train': "import yaml, pathlib; p = yaml.safe_load(open('params.yaml'))['train']; o = pathlib.Path('out/train'); "
    "o.mkdir(parents=True, exist_ok=True); (o/'model').write_text(str(p['seed'])); open(COUNT, 'a').write('t')",
    'evaluate': "import yaml, json, pathlib; p = yaml.safe_load(open('params.yaml'))['evaluate']; "
    "s = int(open('out/train/model').read()); assert p['gain'] < 9; assert open('images/a').read() == 'a'; "
    "o = pathlib.Path('out/evaluate'); o.mkdir(parents=True, exist_ok=True); "
    "score = lambda pq: dict(val=dict(vote=dict(PQ=pq))); r = dict(U2Seg=score(p['gain'] + s / 10), STEGO=score(0.)); "
    "(o/'metrics.json').write_text(json.dumps(dict(splits=dict(scenes=r))))",
}


def notebook(path, parameters, check):
    cells = [
        nbformat.v4.new_code_cell(s, metadata=dict(tags=[t])) for s, t in ((parameters, 'parameters'), (check, 'check'))
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def sh(*cmd, cwd):
    return subprocess.run(cmd, cwd=cwd, check=True, capture_output=True, text=True, env=S._environment(cwd)).stdout


@pytest.fixture
def toy(tmp_path):
    repo, py = tmp_path / 'toy', sys.executable
    for folder in ('nbs', 'ablations', 'images'):
        (repo / folder).mkdir(parents=True)
    notebook(
        repo / 'nbs' / '10_run_train.ipynb',
        "seed = 0\nroot = '..'",
        "if seed > 5: raise ValueError('seed is too large')",
    )
    notebook(repo / 'nbs' / '20_run_evaluate.ipynb', "gain = 1.0\nroot = '..'", '')
    (repo / 'params.yaml').write_text('# comment\ndata: {root: images}\ntrain: {seed: 0}\nevaluate: {gain: 1.0}\n')
    for name, code in TOY.items():
        (repo / f'{name}.py').write_text(code.replace('COUNT', repr(str(tmp_path / 'count'))))
    dvc = dict(
        stages=dict(
            train=dict(cmd=f'{py} train.py', params=['train'], outs=['out/train/model']),
            evaluate=dict(
                cmd=f'{py} evaluate.py',
                params=['evaluate'],
                deps=['out/train/model', 'images'],
                metrics=['out/evaluate/metrics.json'],
            ),
        )
    )
    (repo / 'dvc.yaml').write_text(yaml.safe_dump(dvc))
    (repo / 'images' / 'a').write_text('a')
    (repo / '.gitignore').write_text('/out\n/images\n')
    sweeps = dict(
        gains=dict(
            question='?',
            seeds=['train.seed'],
            targets=['evaluate', 'train'],
            methods=['U2Seg'],
            settings={'low': {'evaluate.gain': 0.1}, 'high': {'evaluate.gain': 0.5}, 'fails': {'evaluate.gain': 9.0}},
        )
    )
    (repo / 'ablations' / 'sweeps.yaml').write_text(yaml.safe_dump(sweeps, sort_keys=False))
    sh('git', 'init', '-q', '-b', 'main', cwd=repo)
    sh('git', 'config', 'user.name', 'a', cwd=repo)
    sh('git', 'config', 'user.email', 'a@b', cwd=repo)
    sh('dvc', 'init', '-q', cwd=repo)
    sh('git', 'add', '.', cwd=repo)
    sh('git', 'commit', '-qm', 'toy', cwd=repo)
    return repo


def test_a_sweep_runs_beside_the_workspace(toy, capsys, monkeypatch):
    monkeypatch.setenv('U2SEG_THREADS', '1')
    monkeypatch.delenv('U2SEG_ARITHMETIC', raising=False)
    (toy / 'params.yaml').write_text((toy / 'params.yaml').read_text() + '# my own remark, not committed\n')
    sh('dvc', 'cache', 'dir', '--local', '../cache', cwd=toy)  # a cache that others share
    before = (
        sh('git', 'status', '--short', cwd=toy),
        (toy / 'params.yaml').read_text(),
        sh('git', 'stash', 'list', cwd=toy),
    )
    failed = S.run_sweep('gains', root=toy, seeds=[0, 1], n_jobs=2)
    said = capsys.readouterr().out
    assert 'U2SEG_THREADS=1: other last bits' in said and 'U2SEG_ARITHMETIC' not in said
    assert len(failed) == 2 and all('gains-fails-s' in f and Path(f.split('see ')[1]).read_text() for f in failed)
    rows = read_rows(toy / 'ablations' / 'gains.csv')
    assert [(r['setting'], r['seed'], r['method'], r['PQ']) for r in rows] == [
        ('low', 0, 'U2Seg', 0.1),
        ('high', 0, 'U2Seg', 0.5),
        ('low', 1, 'U2Seg', 0.2),
        ('high', 1, 'U2Seg', 0.6),
    ]
    assert (
        sh('git', 'status', '--short', '--untracked-files=no', cwd=toy),
        (toy / 'params.yaml').read_text(),
        sh('git', 'stash', 'list', cwd=toy),
    ) == before
    assert {'gains-low-s0', 'gains-high-s1'} <= set(sh('dvc', 'exp', 'list', '--name-only', cwd=toy).split())
    trained = (toy.parent / 'count').stat().st_size
    assert trained <= 4  # two seeds; two workers may train the same one at the same time
    assert (
        S.run_sweep('gains', root=toy, seeds=[0, 1], n_jobs=1) and (toy.parent / 'count').stat().st_size == trained
    )  # the second time from the cache
    assert (toy.parent / 'cache' / 'files').is_dir() and not (toy / '.dvc' / 'cache' / 'files').exists()
    assert read_rows(toy / 'ablations' / 'gains.csv') == rows


def test_a_clone_has_the_images_and_weights_that_neither_git_nor_dvc_carries(toy):
    (toy / '.gitignore').write_text('/out\n/images/*\n!/images/README.md\n/weights\n')
    for name in ('images/README.md', 'images/coco/1.jpg', 'weights/vit.pth'):
        (toy / name).parent.mkdir(exist_ok=True)
        (toy / name).write_text(name)
    sh('git', 'add', '.', cwd=toy)
    sh('git', 'commit', '-qm', 'a folder that git knows', cwd=toy)
    clone = toy.parent / 'clone'
    for _ in range(2):
        S.make_clone(toy, clone)  # the second time in place of the first
    for name in ('images/a', 'images/coco/1.jpg', 'weights/vit.pth'):
        assert (clone / name).read_text() == (toy / name).read_text()
    assert sh('git', 'status', '--porcelain', cwd=clone) == ''
    assert not (clone / 'images' / 'README.md').is_symlink() and not (toy / 'images' / 'coco').is_symlink()


def test_the_seed_goes_where_a_setting_asks_for_it():
    sweep = dict(
        seeds=['a.seed'], base={'a.n': 3}, targets=['a'], settings={'x': {'b.seeds': 'seed', 'b.name': 'other'}}
    )
    params = dict(a=dict(seed=0, n=1), b=dict(seeds=[0], name='seeds'))
    (e,) = S.experiments('s', sweep, params, seeds=[7])
    assert e['set'] == {'a.seed': 7, 'a.n': 3, 'b.seeds': [7], 'b.name': 'other'}


def test_a_wrong_setting_stops_before_anything_runs(toy):
    for change, words in (
        (dict(settings={'x': {'train.seeds': 1}}), 'no train.seeds'),
        (dict(settings={'x': {'evaluate.gain': 'much'}}), 'must be float'),
        (dict(targets=['score']), "no stage 'score'"),
        (dict(seeds=['train.sed']), 'no train.sed'),
    ):
        sweeps = yaml.safe_load((toy / 'ablations' / 'sweeps.yaml').read_text())
        (toy / 'ablations' / 'sweeps.yaml').write_text(yaml.safe_dump(dict(gains=sweeps['gains'] | change)))
        with pytest.raises(ValueError, match=words):
            S.run_sweep('gains', root=toy, seeds=[0], n_jobs=1)
        (toy / 'ablations' / 'sweeps.yaml').write_text(yaml.safe_dump(sweeps))
    with pytest.raises(ValueError, match='seed is too large'):
        S.run_sweep('gains', root=toy, seeds=[0, 7], n_jobs=1)
    with pytest.raises(ValueError, match='--jobs'):
        S.run_sweep('gains', root=toy, seeds=[0], n_jobs=0)
    assert not (toy / 'out').exists()


def test_summaries_by_hand():
    rows = [
        dict(setting=s, seed=i, split=h, method=r, fitted_on='val', matching='vote', PQ=v)
        for s, i, h, r, v in (
            ('a', 0, 'x', 'U', 0.4),
            ('a', 0, 'y', 'U', 0.6),
            ('a', 1, 'x', 'U', 0.3),
            ('a', 1, 'y', 'U', 0.3),
            ('a', 0, 'x', 'L', 0.5),
            ('a', 1, 'x', 'L', 0.4),
        )
    ]
    mean, spread, n = M.mean_and_spread([r for r in rows if r['method'] == 'U'], 'PQ')
    assert (round(mean, 9), n) == (0.4, 2) and abs(
        spread - np.std([0.5, 0.3], ddof=1)
    ) < 1e-12  # splits first, then seeds
    m = M.margin(rows, dict(method='U'), dict(method='L'), 'PQ')
    assert np.allclose([m['mean'], m['least'], m['most'], m['std']], [-0.05, -0.1, 0, np.std([0, -0.1], ddof=1)])
    assert (m['positive'], m['n']) == (0, 2)
    assert (
        M.margin(rows, dict(method='U'), dict(method='L', split='y'), 'PQ') is None
        and M.mean_and_spread(rows, 'SQ') is None
    )
    assert '| a | 40.0 ± 14.1 |' in M.summary(rows, ['PQ'], method='U')
    assert '| b | 20.0 (1 of 2 seeds) |' in M.summary([*rows, dict(rows[0], setting='b', PQ=0.2)], ['PQ'], method='U')
    assert M.margin(rows[4:], dict(method='L'), dict(method='L'), 'PQ')['positive'] == 0  # equal is not above


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    (tmp_path / 'archive').mkdir()
    with pytest.raises(ValueError, match='git clone failed, and a sweep needs a clone'):
        S.make_clone(tmp_path / 'archive', tmp_path / 'clone')

"""Stages under bad parameters, and sharded work under kills, broken shards and several processes."""

import json, os, random, re, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from u2seg import cli
from u2seg import pipeline as P
from u2seg import shards
from u2seg import stage as S
from u2seg.published import publish
from u2seg.shards import sharded

WORKER = '''
import sys, time
from u2seg.shards import sharded
from u2seg.images import write_json
folder, pause = sys.argv[1], float(sys.argv[2])
items = [dict(id=i, file_name=f'{i}.jpg') for i in range(200)]
def load(item):
    if item['id'] % 37 == 5: raise ValueError(f"{item['file_name']}: broken")
    return item['id']
def work(batch):
    time.sleep(pause)
    return [dict(value=i * i) for i in batch]
records, skipped = sharded(items, load, work, folder + '/shards', key=dict(a=1), shard_size=7, batch_size=3)
write_json(folder + '/out%s.json' % __import__('os').environ.get('RANK', ''), dict(records=records, skipped=skipped))
'''


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / 'worker.py'
    script.write_text(WORKER)

    def start(folder, pause=0.0, **env):
        Path(folder).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(script), str(folder), str(pause)], env=os.environ | {k: str(v) for k, v in env.items()}
        )

    return start


def test_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, worker):
    assert worker(tmp_path / 'whole').wait() == 0
    rng = random.Random(0)
    for goal in sorted(
        rng.sample(range(1, 28), 10)
    ):  # killed when that many shards are finished, somewhere in the next one
        p = worker(tmp_path / 'killed', 0.01)
        while len(list((tmp_path / 'killed').rglob('shard_*.json'))) < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
    assert worker(tmp_path / 'killed').wait() == 0
    assert (tmp_path / 'killed' / 'out.json').read_bytes() == (tmp_path / 'whole' / 'out.json').read_bytes()
    files = lambda d: {p.name: p.read_bytes() for p in (tmp_path / d / 'shards').rglob('*.json')}
    assert files('killed') == files('whole') and len(files('whole')) == 29


def test_three_workers_share_the_work_and_agree(tmp_path, worker):
    assert worker(tmp_path / 'one').wait() == 0
    ps = [worker(tmp_path / 'three', RANK=r, WORLD_SIZE=3) for r in range(3)]
    assert [p.wait() for p in ps] == [0, 0, 0]
    whole = (tmp_path / 'one' / 'out.json').read_bytes()
    assert all((tmp_path / 'three' / f'out{r}.json').read_bytes() == whole for r in range(3))
    assert len(json.loads(whole)['skipped']) == 6 and len(json.loads(whole)['records']) == 194


def test_one_worker_killed_and_restarted_loses_nothing(tmp_path, worker):
    assert worker(tmp_path / 'one').wait() == 0
    a, b = worker(tmp_path / 'two', 0.01, RANK=0, WORLD_SIZE=2), worker(tmp_path / 'two', 0.01, RANK=1, WORLD_SIZE=2)
    while not list((tmp_path / 'two').rglob('shard_000001.json')):
        time.sleep(0.005)
    b.kill()
    b.wait()
    assert worker(tmp_path / 'two', RANK=1, WORLD_SIZE=2).wait() == 0 and a.wait() == 0
    assert (tmp_path / 'two' / 'out0.json').read_bytes() == (tmp_path / 'one' / 'out.json').read_bytes()


@pytest.mark.parametrize(
    'damage', [lambda b: b[:10], lambda b: b'', lambda b: b'[]', lambda b: b'{"a": 1}', lambda b: b'[1, 2, 3, 4]']
)
def test_damaged_shard_is_made_again(tmp_path, damage):
    items = [dict(id=i, file_name=str(i)) for i in range(8)]
    run = lambda: sharded(items, lambda i: i['id'], lambda b: [dict(v=i) for i in b], tmp_path, key={}, shard_size=4)
    first = run()
    shard = next(tmp_path.rglob('shard_000001.json'))
    shard.write_bytes(damage(shard.read_bytes()))
    assert run() == first


def test_a_file_that_changes_is_done_again_and_a_skipped_one_tried_again(tmp_path):
    items, seen = [dict(id=i, file_name=f'{i}.txt') for i in range(12)], []

    def load(item):
        text = (tmp_path / item['file_name']).read_text()
        if text == 'broken' and not (tmp_path / 'mended').exists():
            raise ValueError('broken')
        return text

    def work(batch):
        seen.append(len(batch))
        return [dict(v=x, together=len(batch)) for x in batch]

    run = lambda folder='work': sharded(
        items, load, work, tmp_path / folder, key={}, root=tmp_path, shard_size=6, batch_size=3
    )
    for i in range(12):
        (tmp_path / f'{i}.txt').write_text(f'no {i:02d}')
    (tmp_path / '4.txt').write_text('broken')
    (tmp_path / '11.txt').unlink()
    records, skipped = run()
    assert [s['file_name'] for s in skipped] == ['4.txt', '11.txt'] and seen == [3, 2, 3, 2]
    assert run() == (records, skipped) and len(seen) == 4
    (tmp_path / '7.txt').write_text('NO 07')
    os.utime(tmp_path / '7.txt', (1e9, 1e9))  # of the same size
    assert run()[0][6]['v'] == 'NO 07' and seen[4:] == [3]  # the other batches stay
    (tmp_path / '11.txt').write_text('back')
    (tmp_path / 'mended').touch()  # the fault of 4.txt was not in the file
    assert run() == run('fresh') and run()[1] == []


def test_a_kill_within_a_shard_costs_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'KEEP_EVERY', 0.0)
    items, seen = [dict(file_name=f'{i}', id=i) for i in range(12)], []

    def work(batch):
        if 7 in batch and 7 not in seen:
            seen.append(7)
            raise KeyboardInterrupt
        seen.extend(batch)
        return [dict(v=i) for i in batch]

    run = lambda: sharded(items, lambda i: i['id'], work, tmp_path, key={}, shard_size=12, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [r['v'] for r in run()[0]] == list(range(12)) and sorted(seen) == sorted([*range(12), 7])


CHANGED = '''
import sys, time
from pathlib import Path
from u2seg.shards import sharded
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
items = [dict(id=i, file_name=f'{i}.txt') for i in range(4)]
def load(item):
    if rank == 0: (folder/'begun').touch()
    else:
        while not (folder/'go').exists(): time.sleep(.01)
    return (folder/item['file_name']).read_text()
work = lambda batch: [dict(v=x) for x in batch]
records, _ = sharded(items, load, work, folder/'work', key={}, root=folder, shard_size=2, batch_size=2)
print([r['v'] for r in records])
'''


def test_an_image_that_changes_between_two_starts_stalls_no_worker(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text(f'old {i}')
    start = lambda rank: subprocess.Popen(
        [sys.executable, '-c', CHANGED, str(tmp_path), str(rank)],
        env=os.environ | dict(RANK=str(rank), WORLD_SIZE='2'),
        stdout=subprocess.PIPE,
        text=True,
    )
    first = start(0)
    while not list(tmp_path.rglob('shard_000000.json')):
        time.sleep(0.01)
    (tmp_path / '0.txt').write_text('new 0')
    os.utime(tmp_path / '0.txt', (1e9, 1e9))
    second = start(1)
    (tmp_path / 'go').touch()
    assert "'new 0', 'old 1', 'old 2', 'old 3'" in second.communicate(timeout=60)[0]
    assert first.wait(60) == 0 and second.returncode == 0


@pytest.mark.parametrize(
    'given',
    [
        dict(RANK='3'),
        dict(WORLD_SIZE='2'),
        dict(RANK='2', WORLD_SIZE='2'),
        dict(RANK='-1', WORLD_SIZE='2'),
        dict(RANK='x', WORLD_SIZE='2'),
        dict(RANK='0', WORLD_SIZE='0'),
    ],
)
def test_workers_that_make_no_sense_are_refused(tmp_path, monkeypatch, given):
    for k, v in given.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='^the variables RANK and WORLD_SIZE, [^\n]*$'):
        sharded([dict(file_name='a')], lambda i: i, lambda b: [{}], tmp_path, key={})


def test_fault_of_the_program_is_not_swallowed(tmp_path):
    def work(batch):
        raise ZeroDivisionError('bug')

    with pytest.raises(ZeroDivisionError):
        sharded([dict(file_name='a')], lambda i: i, work, tmp_path, key={})
    with pytest.raises(RuntimeError, match='work gave 2 records for 1 items'):
        sharded([dict(file_name='a')], lambda i: i, lambda b: [{}, {}], tmp_path, key={})


@pytest.fixture
def repo(tmp_path):
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(
        cells=[
            cell("a = 1\nb = 0.5\nname = 'x'\nmany = [1]\nroot = '..'", metadata=dict(tags=['parameters'])),
            cell("if a < 0: raise ValueError(f'a must be at least 0, got {a}')", metadata=dict(tags=['check'])),
            cell("if name == 'boom': raise RuntimeError('it broke')"),
            cell('a + b'),
        ]
    )
    (tmp_path / 'nbs').mkdir()
    nbformat.write(nb, tmp_path / 'nbs' / '10_run_one.ipynb')

    def write(**section):
        (tmp_path / 'params.yaml').write_text(yaml.safe_dump(dict(one=dict(a=1, b=0.5, name='x', many=[1]) | section)))
        return tmp_path

    return write


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(c=1), 'unknown name one.c; allowed: a, b, many, name'),
        (dict(a=1.5), 'one.a must be int'),
        (dict(a=True), 'one.a must be int'),
        (dict(b='.5'), 'one.b must be float'),
        (dict(many=3), 'one.many must be list'),
        (dict(a=-1), 'a must be at least 0, got -1'),
    ],
)
def test_bad_parameters_fail_before_any_work(repo, change, message):
    with pytest.raises(ValueError, match=message):
        S.check_stages(repo(**change))
    with pytest.raises(ValueError, match=message):
        S.run_stage('one', repo(**change))
    assert not [p for p in (repo() / 'out').rglob('*') if p.is_file() and '.work' not in p.parts]


@pytest.mark.parametrize(
    'text,number', [('1e-5', 1e-5), ('1e-05', 1e-5), ('1E5', 1e5), ('+5e-1', 0.5), ('-.5e1', -5.0), ('5.e3', 5000.0)]
)
def test_a_number_that_yaml_reads_as_text_is_a_number_where_one_is_asked_for(repo, text, number):
    root = repo()

    def values(**section):
        section = dict(a=1, b=0.5, name='x', many='[1]') | section
        (root / 'params.yaml').write_text(f"one: {{{', '.join(f'{k}: {v}' for k, v in section.items())}}}\n")
        return S.stage_params(root, 'one')

    assert yaml.safe_load(f'b: {text}')['b'] == text  # otherwise nothing is shown here
    assert (
        values(b=text)['b'] == number
        and values(many=f'[2, {text}]')['many'] == [2, number]
        and values(name=text)['name'] == text
    )
    assert values(a='1e1')['a'] == 10
    with pytest.raises(ValueError, match='one.a must be int, got 1e-05'):
        values(a='1e-5')
    with pytest.raises(ValueError, match="one.b must be float, got '1e'"):
        values(b='1e')


HEADER = """# Stage one: adds

> A sum.

| | |
|---|---|
| reads | READS |
| writes | `sum.json`, **`kept.npy`**, `log.csv`, `metrics.json`, **`headline.json`** |
| cost | none |
"""


@pytest.mark.parametrize(
    'reads,params,deps',
    [
        ('`params.two` and `out/two/a.json`', ['one', 'two'], ['out/two/a.json']),
        ('images of `data.val`, of the first `n`', ['one', 'data'], ['${data.root}']),
        ('`configs/one.yaml`', ['one', {'configs/one.yaml': None}], None),
    ],
)
def test_the_header_of_a_notebook_is_the_stage_of_the_pipeline(repo, reads, params, deps):
    root = repo()
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(HEADER.replace('READS', reads)))
    nb.cells[-1].source = 'if a:\n    from u2seg.low import b'
    nbformat.write(nb, path)
    (root / 'u2seg').mkdir()
    (root / 'u2seg' / 'low.py').write_text('def f():\n    from . import lower\n')
    (root / 'u2seg' / 'lower.py').write_text('from .low import b\nimport os\n')
    P.write_pipeline(root)
    stage = yaml.safe_load((root / 'dvc.yaml').read_text())['stages']['one']
    code = ['nbs/10_run_one.ipynb', 'u2seg/low.py', 'u2seg/lower.py']
    assert stage['cmd'] == 'u2seg run one'
    assert stage['params'] == params
    assert stage.get('deps') == (deps and code + deps)
    assert stage['outs'] == [
        {'out/one/sum.json': {'push': False}},
        'out/one/kept.npy',
        {'out/one/metrics.json': {'push': False}},
        {'out/one/run.ipynb': {'push': False}},
    ]
    assert stage['metrics'] == ['out/one/headline.json']
    assert stage['plots'] == [{'out/one/log.csv': {'push': False}}]


@pytest.mark.parametrize(
    'header,message',
    [
        (HEADER.replace('Stage one', 'One'), '# Stage one: what it does'),
        (HEADER.replace('> A', 'A'), 'and a quote'),
        (HEADER.replace('| cost |', '| costs |'), "no row 'cost'"),
        (HEADER.replace('| reads |', '| takes |'), "no row 'reads'"),
    ],
)
def test_a_header_of_another_form_is_refused(repo, header, message):
    root = repo()
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(header))
    nbformat.write(nb, path)
    with pytest.raises(ValueError, match=message):
        P.pipeline(root)


def test_metrics_hold_no_nan(tmp_path):
    S.write_metrics(
        tmp_path / 'metrics.json', dict(mean=np.float32('nan'), n=np.int64(3), deep=[dict(a=float('-inf'))], good=0.1)
    )
    assert json.loads((tmp_path / 'metrics.json').read_text(), parse_constant=lambda name: pytest.fail(name)) == dict(
        mean=None, n=3, deep=[dict(a=None)], good=0.1
    )


@pytest.mark.parametrize(
    'values,message',
    [
        ({'train.solver.lr': -1.0}, 'train.solver.lr must be positive, got -1.0'),
        ({'solver.gamma': 2.0}, 'cutler.solver.gamma must lie in'),
        ({'fewshot.augment.flip': 2.0}, 'fewshot.augment.flip must lie in'),
        ({'cutler.network.depth': 19}, 'cutler.model setting depth must be one of'),
        ({'train.solver.lrr': 1.0}, 'unknown name train.solver.lrr; allowed: accumulate'),
        ({'train.solver': 3}, 'train.solver must be a mapping, got 3'),
        ({'stego.crf.n_iters': -1}, 'stego.crf.n_iters must be at least 0'),
        ({'cutler.self_training.lr': 0.0}, 'cutler.self_training.lr must be positive, got 0.0'),
        ({'cutler.self_training.n_iters': 0}, 'cutler.self_training.n_iters must be at least 1, got 0'),
        ({'fewshot.droploss': -0.1}, 'fewshot.model setting droploss must not be negative, got -0.1'),
        ({'train.self_training.top_fraction': 0.0}, 'train.self_training.top_fraction must lie in (0, 1], got 0.0'),
        ({'train.self_training.score_threshold': [5.0]}, 'train.self_training.score_threshold must lie in [0, 1]'),
        ({'train.self_training.scales': [1.0]}, 'unknown name train.self_training.scales'),
        ({'cutler.n_procs': 3}, 'cutler.solver.batch_size 8 must divide by n_procs 3'),
        ({'features.vit.num_heads': 5}, 'features.vit.embed_dim must be a multiple'),
    ],
)
def test_errors_name_section_and_key(values, message):
    root = Path(__file__).parents[1]
    params = S.load_params(root)
    for name, v in values.items():
        *way, last = name.split('.')
        section = params
        for k in way:
            section = section.setdefault(k, {})
        section[last] = v
    with pytest.raises(ValueError) as e:
        for stage in ('features', 'cutler', 'stego', 'train', 'fewshot'):
            nb = nbformat.read(S.stage_notebook(root, stage), 4)
            S.run_check(stage, nb, S.stage_values(stage, params, S.declared(nb)) | {'root': str(root)})
    assert message in str(e.value) and '\n' not in str(e.value)


def test_an_int_serves_as_a_float(repo):
    assert S.check_stages(repo(b=1)) == ['one']


def test_unknown_section_and_stage(repo):
    root = repo()
    (root / 'params.yaml').write_text((root / 'params.yaml').read_text() + 'tow: {}\n')
    with pytest.raises(ValueError, match="unknown section 'tow'"):
        S.check_stages(root)
    with pytest.raises(ValueError, match="no stage 'tow'; the stages are one"):
        S.run_stage('tow', root)


@pytest.mark.parametrize(
    'text,message', [('a: [1', 'not valid YAML'), ('3', 'one section a stage'), ('', 'one section a stage')]
)
def test_broken_params_file(repo, text, message):
    root = repo()
    (root / 'params.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        S.check_stages(root)


@pytest.mark.parametrize('name', [b'caf\xe9.jpg', b'ao\xfbt/1.jpg'])
def test_a_name_that_is_not_utf_8_is_told_before_any_work(repo, name):
    root = repo()
    path = root / 'mine' / os.fsdecode(name)
    path.parent.mkdir(parents=True)
    path.touch()
    (root / 'mine' / 'naïve 写真.jpg').touch()
    text = (root / 'params.yaml').read_text().split('data:')[0]
    (root / 'params.yaml').write_text(f"{text}data: {dict(root='mine', train=['.'], val=[])}\n")
    told = f'mine holds {name.split(b"/")[0]!r}, a name that is not UTF-8; rename it'
    with pytest.raises(ValueError, match=re.escape(told)):
        P.check_data(root)
    path.rename(root / 'mine' / '1.jpg')
    if path.parent.name != 'mine':
        path.parent.rmdir()
    P.check_data(root)


def test_a_folder_of_data_that_is_missing_is_named(repo):
    root = repo()
    (root / 'mine' / 'a').mkdir(parents=True)
    data = lambda **d: (root / 'params.yaml').write_text(
        (root / 'params.yaml').read_text().split('data:')[0] + f'data: {d}\n'
    )
    data(root='mine', train=['a'], val=[])
    P.check_data(root)
    data(root=str(root / 'mine'), train=['a'], val=[])
    P.check_data(root)
    for wrong in (
        dict(root='mien', train=['a'], val=[]),
        dict(root='mine', train=['b'], val=[]),
        dict(root='mine', train=['a'], val=['b']),
    ):
        data(**wrong)
        with pytest.raises(ValueError, match='which is no folder'):
            P.check_data(root)
    data(root='mine', train=['a'], val=[])
    (root / 'mine' / 'b').mkdir()
    for link, to in (('b/good', '../a'), ('b/4.jpg', '/nowhere/4.jpg')):
        (root / 'mine' / link).symlink_to(to)
    with pytest.raises(
        ValueError, match='data.root holds the link .*mine/b/4.jpg to /nowhere/4.jpg, which is not there'
    ):
        P.check_data(root)


def test_results_do_not_depend_on_the_threads_of_the_environment(repo, monkeypatch):
    root = repo()
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    nb.cells[
        3
    ].source = (
        "import os, torch\ntorch.get_num_threads(), os.environ['MKL_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS']"
    )
    nbformat.write(nb, path)

    def threads(**env):
        with monkeypatch.context() as m:
            for k in ('OMP', 'MKL', 'OPENBLAS'):
                m.setenv(f'{k}_NUM_THREADS', '3')
            m.delenv('U2SEG_THREADS', raising=False)
            for k, v in env.items():
                m.setenv(k, v)
            S.run_stage('one', root)
        return nbformat.read(root / 'out' / 'one' / 'run.ipynb', 4).cells[-1].outputs[0].data['text/plain']

    assert threads() == "(2, '2', '1')"  # exact: OpenBLAS starts no more threads than there are cores
    assert threads(U2SEG_ARITHMETIC='fast') == "(2, '2', '2')"
    assert threads(U2SEG_THREADS='1') == "(1, '1', '1')"
    for wrong in ('0', 'all', ''):
        with pytest.raises(ValueError, match='U2SEG_THREADS'):
            threads(U2SEG_THREADS=wrong)


def test_failing_stage_is_one_sentence_and_leaves_no_output(repo):
    root = repo(name='boom')
    with pytest.raises(SystemExit, match='stage one: RuntimeError: it broke'):
        S.run_stage('one', root)
    assert not (root / 'out' / 'one' / 'run.ipynb').exists()


def test_publish_refuses_code_that_did_not_run(repo):
    root = repo()
    S.run_stage('one', root)
    publish('one', root)
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    assert nb.cells[3].outputs[0].data['text/plain'] == '1.5'
    nb.cells[3].source = 'a - b'
    nbformat.write(nb, path)
    with pytest.raises(ValueError, match='is not the one that ran'):
        publish('one', root)


def test_publish_names_the_findings_below_a_changed_output(repo, capsys):
    root = repo()
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    finding = lambda name: nbformat.v4.new_markdown_cell('It is so.', id=name)
    nb.cells = [
        *nb.cells,
        finding('sum-finding'),
        nbformat.v4.new_code_cell('7'),
        finding('seven-finding'),
        finding('text'),
    ]
    nbformat.write(nb, path)
    said = []
    for section in ({}, {}, dict(a=2)):
        S.run_stage('one', repo(**section))
        publish('one', root)
        said.append(capsys.readouterr().out)
    assert said[0] == '10_run_one.ipynb: read again: sum-finding, seven-finding\n'  # there was no output before
    assert said[1] == ''
    assert said[2] == '10_run_one.ipynb: read again: sum-finding\n'


def test_two_workers_run_one_stage(repo):
    root = repo()
    path = root / 'nbs' / '10_run_one.ipynb'
    nb = nbformat.read(path, 4)
    nb.cells[3].source = """import os, time
from u2seg.shards import sharded
items, names = [dict(file_name=str(i)) for i in range(8)], lambda b: [dict(name=i['file_name']) for i in b]
records, _ = sharded(items, lambda i: i, names, root + '/out/.work/one', key={}, shard_size=2)
time.sleep(int(os.environ['RANK']))
len(records)"""
    nbformat.write(nb, path)
    start = lambda rank: subprocess.Popen(
        [sys.executable, '-c', f'from u2seg.stage import run_stage; run_stage("one", {str(root)!r})'],
        env=os.environ | dict(RANK=str(rank), WORLD_SIZE='2'),
    )
    assert [p.wait(120) for p in [start(0), start(1)]] == [0, 0]  # the first to finish takes nothing from the other
    assert nbformat.read(root / 'out' / 'one' / 'run.ipynb', 4).cells[-1].outputs[0].data['text/plain'] == '8'


JOBS = """
import os, sys, time
from functools import partial
from pathlib import Path
from u2seg.shards import run_shared, sharded
folder = sys.argv[1]
def job(i):
    with open(f'{folder}/done.log', 'a') as f: f.write(f'{i}\\n')
    items, squares = [dict(file_name=str(k)) for k in range(4)], lambda batch: [dict(v=i * i) for _ in batch]
    records, _ = sharded(items, lambda x: x, squares, f'{folder}/inner/{i}', key={}, shard_size=2)
    return records
print(run_shared([partial(job, i) for i in range(7)], folder + '/jobs', key=dict(a=1), n_procs=1))
"""


def test_shared_jobs_run_once_and_each_is_alone(tmp_path):
    (tmp_path / 'jobs.py').write_text(JOBS)
    start = lambda **env: subprocess.Popen(
        [sys.executable, str(tmp_path / 'jobs.py'), str(tmp_path)],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        text=True,
    )
    count = lambda: sorted(map(int, (tmp_path / 'done.log').read_text().split()))
    ps = [start(RANK=str(r), WORLD_SIZE='3') for r in range(3)]
    said = [p.communicate(timeout=60)[0] for p in ps]  # a job that waited for the other workers' shards would never end
    assert (
        count() == list(range(7)) and len(set(said)) == 1 and eval(said[0]) == [[dict(v=i * i)] * 4 for i in range(7)]
    )
    sorted((tmp_path / 'jobs').rglob('job_*.pickle'))[3].unlink()  # as if killed before it was done
    assert start().communicate(timeout=60)[0] == said[0] and count() == sorted([*range(7), 3])


def test_the_seconds_of_a_stage_are_noted_and_printed(repo, monkeypatch, capsys):
    root = repo()
    monkeypatch.chdir(root)
    assert cli.main(['times']) == 1 and 'no stage has run here' in capsys.readouterr().err
    assert cli.main(['run', 'one']) == 0
    noted = json.loads((root / 'out' / '.times' / 'one.json').read_text())
    assert abs(noted['start'] + noted['imports'] + noted['work'] - noted['total']) < 0.3 and noted['work'] >= 0
    assert cli.main(['times']) == 0
    head, _, one, together = capsys.readouterr().out.strip().split('\n')
    assert head == '| stage | start | imports | work | total |' and one.startswith('| one | ')
    assert together == one.replace('one', 'all')
    assert sorted(p.name for p in (root / 'out' / 'one').iterdir()) == ['run.ipynb']  # what DVC keeps has no times


def test_a_stage_does_not_build_a_grammar_of_urls():
    "jsonschema would, where the package is installed; a notebook has no such field. Others may import it after us."
    code = "import sys, u2seg.stage; assert not {'lark', 'rfc3987_syntax'} & {*sys.modules}"
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_job_that_fails_ends_the_others(tmp_path):
    "Another one is at work, two wait."
    done = [tmp_path / str(i) for i in range(3)]
    jobs = [partial(exec, f'import time, pathlib; time.sleep(3); pathlib.Path({str(d)!r}).touch()') for d in done]
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        shards.run_all([*jobs[:1], partial(divmod, 1, 0), *jobs[1:]], n_procs=2)
    time.sleep(max(0, 5 - (time.monotonic() - began)))
    assert not any(d.exists() for d in done)


def test_shards_of_another_size_are_other_files(tmp_path):
    items = [dict(id=i, file_name=f'{i}') for i in range(10)]
    run = lambda n: sharded(items, lambda x: x['id'], lambda b: [dict(v=v) for v in b], tmp_path, key={}, shard_size=n)
    for n in (4, 2, 3):
        assert [r['v'] for r in run(n)[0]] == [*range(10)]


def test_work_that_loses_a_record_says_so(tmp_path):
    items = [dict(id=i, file_name=f'{i}') for i in range(2)]
    with pytest.raises(RuntimeError, match='work gave 1 records for 2 items'):
        sharded(items, lambda x: x['id'], lambda b: [dict(v=1)], tmp_path, key={})

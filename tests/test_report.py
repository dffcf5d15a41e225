"The report: verdicts follow the numbers, no number of the paper is lost, ours stand in the right column."

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbconvert.filters import markdown2html

from u2seg import cli
from u2seg import margins as M
from u2seg import report as R
from u2seg import stage as S
from u2seg.results import COLUMNS, HEAD, flatten, nest, read_rows, select

root = Path(__file__).parents[1]
SEEDS = read_rows(root / 'ablations' / 'seeds.csv')


def method(**scores):
    return {fit: {m: dict(scores) for m in ('vote', 'hungarian')} for fit in ('train', 'val')}


def claims(metrics, *fewshot):
    return R.claims(flatten(metrics['splits']), *fewshot)


@pytest.fixture
def metrics():
    all_ = dict(
        box_AP50=0.2, mask_AP50=0.2, box_AR100=0.3, mask_AR100=0.3, PixelAcc=0.5, mIoU=0.3, PQ=0.25, SQ=0.7, RQ=0.3
    )
    lower = {k: v - 0.1 for k, v in all_.items()}
    instances = {k: v for k, v in lower.items() if 'A' in k and 'Acc' not in k}
    methods = {
        'MaskCut + clusters': method(**lower),
        'CutLER+': method(**instances),
        'STEGO': method(PixelAcc=0.4, mIoU=0.2),
        'CutLER+STEGO': method(PQ=0.15, SQ=0.6, RQ=0.2, PixelAcc=0.4, mIoU=0.2),
        'U2Seg': method(**all_),
    }
    return dict(
        splits={'s/val': methods},
        n_fit_images=9,
        sensitivity={'s/val': [dict(match_iou=0.6, match_score=0.2, box_AP50=0.111, box_AR100=0.222)]},
    )


FEW = [
    dict(init=i, percent=p, seed=s, box_AP=v, mask_AP=v, mask_AP50=v, PQ=v)
    for i, v in (('u2seg', 0.3), ('cutler', 0.2), ('random', 0.1))
    for p in (5, 10)
    for s in (0, 1)
]


def test_the_sweep_plus_scores_the_models_that_the_sweep_seeds_scored():
    plus, key = read_rows(root / 'ablations' / 'plus.csv'), lambda r: tuple(r[k] for k in ('seed', *HEAD))
    seeds, shared = {key(r): r for r in SEEDS}, ('mask_AP50', 'PixelAcc', 'PQ', 'PQ_merged')
    mine = select(plus, setting='U2Seg', method='U2Seg')
    assert {r['seed'] for r in mine} == {r['seed'] for r in select(plus, setting='U2Seg+')}
    for r in mine:
        assert [r[k] for k in shared] == [seeds[key(r)][k] for k in shared], key(r)
    assert len(R.with_plus(SEEDS, plus)) == len(SEEDS) + len(select(plus, setting='U2Seg+'))


def test_every_claim_is_judged_by_the_sign_of_its_differences(metrics):
    found = claims(metrics, FEW)
    assert len(found) == 5 * 2 + 2 and {c['verdict'] for c in found} == {'holds'}
    metrics['splits']['s/val']['STEGO']['train']['vote']['PixelAcc'] = 0.6
    assert [c['verdict'] for c in claims(metrics) if 'better than STEGO' in c['claim']] == ['holds in part', 'holds']
    metrics['splits']['s/val']['CutLER+STEGO']['val']['vote']['PQ'] = 0.25  # equal is not better
    assert [c['verdict'] for c in claims(metrics) if 'CutLER+STEGO' in c['claim']] == ['holds', 'does not hold']
    few = [
        dict(r, mask_AP=0.25)
        if r['init'] == 'cutler' and r['percent'] == 10
        else dict(r, mask_AP=0.4)
        if r['init'] == 'random'
        else r
        for r in FEW
    ]
    assert [c['verdict'] for c in claims(dict(splits={}), few)] == ['holds in part', 'holds in part']


def test_paper_tables_hold_every_published_number_once(metrics):
    text = R.paper_tables(metrics, FEW)
    parts = text.split('### ')[1:]
    assert len(parts) == len(R.PAPER) + 1
    for part, (title, protocol, columns, published, _) in zip(parts, R.PAPER.values()):
        lines = [[c.strip() for c in l.strip('|').split('|')] for l in part.splitlines() if l.startswith('|')]
        assert (
            part.startswith(title)
            and protocol in part
            and lines[0][2:] == list(columns)
            and len({len(l) for l in lines}) == 1
        )
        for (where, method, *numbers), line in zip(published, lines[2:]):
            assert line == [where, method, *('' if v is None else f'{v:.1f}' for v in numbers)]


def test_ours_stand_in_the_papers_columns(metrics):
    metrics['splits']['s/val']['U2Seg']['train']['vote'] |= dict(PQ=0.123, SQ=0.456)
    text = R.paper_tables(metrics, FEW)
    assert (
        '| **here, s/val** | U2Seg | 12.3 / 25.0 |  |  | 45.6 / 70.0 | 30.0 / 30.0 |' in text
    )  # PQ, things, stuff, SQ, RQ
    assert '| **here, s/val** | IoU 0.6, score 0.2 | 11.1 | 22.2 |' in text
    assert re.search(r'\*\*here\*\* \| u2seg weights \|  \|  \| 30.0 / 30.0 \| 30.0 / 30.0 \|', text)
    metrics['splits']['s/val']['STEGO']['val']['vote'] |= dict(PixelAcc27=0.77, mIoU27=0.33)
    assert '| **here, s/val**, 27 classes | STEGO | 77.0 | 33.0 |  |  |' in R.paper_tables(metrics)


def test_the_report_says_what_is_missing(metrics):
    whole = R.report(metrics, FEW)
    assert all(
        h in whole
        for h in (
            '## The claims',
            '## Few labels',
            '## One cluster, one class',
            "## The paper's tables",
            'labelled training images',
        )
    )
    none = R.report(dict(splits={}, n_fit_images=0), [])
    assert 'No ground truth was given' in none and '## The claims' not in none and '**here,' not in none


def lines_of(text):
    return [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines() if l.startswith('|')]


def test_the_headline_is_mean_and_deviation_over_the_seeds():
    "By hand, from the committed sweep: each printed score, and the number of seeds."
    text = R.readme_table(dict(splits={}, n_fit_images=200), seeds=SEEDS)
    assert text == ''  # none of the run's images are in the sweep
    run = dict(splits=nest(select(SEEDS, seed=0, matching='vote')), n_fit_images=200)
    text = R.readme_table(run, seeds=SEEDS)
    n = len({r['seed'] for r in SEEDS})
    assert f'over {n} seeds' in text and 'over' not in R.readme_table(run).split(';')[0]
    head, _, *lines = lines_of(text)
    own = [r for r in SEEDS if r['split'] == 'objects/val' and r['method'] == 'U2Seg' and r['matching'] == 'vote']
    for fitted_on, name in (('train', 'U2Seg'), ('val', "U2Seg, the paper's naming")):
        x = [r['mask_AP50'] for r in select(own, fitted_on=fitted_on)]
        mean = sum(x) / n
        std = (sum((v - mean) ** 2 for v in x) / (n - 1)) ** 0.5
        line = next(l for l in lines if l[:2] == ['objects/val', name])
        assert line[head.index('mask AP50')] == f'{100 * mean:.1f} ± {100 * std:.1f}'


def readme_text():
    "The text for README, of the committed sweep."
    rows = select(SEEDS, seed=0)
    runs = [
        dict(init=r['method'], percent=float(r['fitted_on'][:-1]), seed=0) | r for r in rows if 'labels' in r.values()
    ]
    return R.readme_table(dict(splits=nest(select(rows, matching='vote')), n_fit_images=200), runs, SEEDS)


def test_readme_shows_three_lines_and_folds_the_tables():
    text = readme_text()
    shown = re.sub('<details>.*?</details>', '', text, flags=re.S)
    items = re.findall('^- (.+)$', shown, re.M)
    assert [re.search(r'\*\*(.+?)\*\*', i)[1] for i in items] == ['CutLER+', 'STEGO', 'CutLER+STEGO']
    assert '|' not in shown and all('objects/val' in i and 'scenes/val' in i for i in items)
    claimed = lines_of(M.claims_table(SEEDS, R.CLAIMS))
    for item, line in zip(items, (claimed[2], claimed[4], claimed[5])):  # the same margins as in the folded table
        assert all(f'{cell} on {split}' in item for cell, split in zip(line[1:], claimed[0][1:]))


def test_readme_says_of_few_labels_what_was_measured():
    "The differences that DropLoss makes are those of the benchmark's table of mask AP."
    text = (root / 'benchmarks' / 'results' / 'few_labels.md').read_text().split('| mask AP |')[1].split('\n\n')[0]
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines()]
    found = {r[1]: r[4].split()[0] for r in rows if r[0] == 'u2seg'}
    sentence = r"U2Seg's mask AP changes by (\S+) points with (\S+) of the labels and (\S+) with (\S+)"
    for words in (R._FEW_PLUS, (root / 'README.md').read_text()):
        said = re.search(sentence, words)
        assert {said[2]: said[1], said[4]: said[3]} == found


def test_folded_tables_are_tables_for_a_markdown_parser():
    "A table right below a line of HTML would be shown as its text."
    html = markdown2html(readme_text())
    folds = re.findall('<details>.*?</details>', html, re.S)
    assert [f.count('<table>') for f in folds] == [1, 1, 1] == [f.count('</summary>') for f in folds]
    assert html.count('<table>') == 3 and not re.search(r'^\|', html, re.M)


def test_a_margin_below_zero_is_shown_as_one():
    rows = seeds_of([0.3, 0.4]) + seeds_of([0.35, 0.35], method='STEGO')
    assert (
        M.claims_list(rows, [('over STEGO', 'U2Seg', 'STEGO', ['PQ'])]) == '- over STEGO: PQ +0.0 ± 7.1 (1 of 2) on s'
    )
    assert 'PQ -10.0' in M.claims_list(seeds_of([0.2]) + seeds_of([0.3], method='A'), [('x', 'U2Seg', 'A', ['PQ'])])
    assert M.claims_list(rows, [('over nothing', 'U2Seg', 'nothing', ['PQ'])]) == ''


def seeds_of(scores, **more):
    head = dict(split='s', method='U2Seg', fitted_on='train', matching='vote') | more
    return [dict(head, seed=i, PQ=v) for i, v in enumerate(scores)]


@pytest.mark.parametrize('n', [3, 5, 8])
def test_a_claim_says_with_how_many_seeds_it_holds(n):
    above = [0.5] * (n - 1) + [0.3]
    rows = seeds_of(above) + seeds_of([0.4] * n, method='STEGO')
    claim = [('is better', 'U2Seg', 'STEGO', ['PQ'])]
    mean = (0.1 * (n - 1) - 0.1) / n
    std = (((n - 1) * (0.1 - mean) ** 2 + (-0.1 - mean) ** 2) / (n - 1)) ** 0.5
    shown = f'{100 * mean:+.1f} ± {100 * std:.1f}'
    assert lines_of(M.claims_table(rows, claim))[2] == ['is better', f'PQ {shown} ({n - 1} of {n})']
    line = lines_of(M.margins_table(rows, claim))[2]
    assert line == ['U2Seg is better', 's', 'PQ', shown, '-10.0', '+10.0', f'{n - 1} of {n}']


def test_a_score_outside_two_deviations_is_marked():
    rows = seeds_of([0.4, 0.5, 0.6])  # 50 ± 10
    marked = lambda v, **o: lines_of(M.seeds_table(rows, dict(PQ='PQ'), run=seeds_of([v]), **o))[2][-1]
    assert marked(0.69) == '69.0 (50.0 ± 10.0)' and marked(0.31) == '31.0 (50.0 ± 10.0)'
    assert marked(0.71) == '**71.0** (50.0 ± 10.0)' and marked(0.29) == '**29.0** (50.0 ± 10.0)'
    assert marked(0.69, n_std=1.0).startswith('**69.0**')
    assert lines_of(M.seeds_table(rows[:1], dict(PQ='PQ'), run=seeds_of([0.9])))[2][-1] == '90.0 (40.0)'  # no spread
    same = seeds_of([0.4, 0.4, 0.4])  # what no seed changes: the CSV has six decimals
    assert lines_of(M.seeds_table(same, dict(PQ='PQ'), run=seeds_of([0.4000004])))[2][-1] == '40.0 (40.0 ± 0.0)'


def test_the_parts_of_the_variance():
    rows = seeds_of([0.1, 0.3], setting='naming') + seeds_of([0.1, 0.2, 0.3], setting='training')
    lines = lines_of(M.variance_table(rows, 'PQ', together=seeds_of([0.1, 0.5])))
    assert lines[2:] == [
        ['naming', '20.0', '14.1', '200.0', '67%', '2'],
        ['training', '20.0', '10.0', '100.0', '33%', '3'],
        ['all together', '30.0', '28.3', '800.0', '', '2'],
    ]


def git(folder, *args):
    command = ['git', '-c', 'user.name=u', '-c', 'user.email=u@u', *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def reported(tmp_path, monkeypatch):
    "A repository in which stage report has run, on the scores of a committed seed."
    books = 'nbs/00_overview.ipynb', 'nbs/86_run_report.ipynb'
    for name in (*books, 'params.yaml', 'README.md', 'ablations/seeds.csv', '.gitignore'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / 'nbs' / 'overview.jpg').write_bytes(b'old')
    git(tmp_path, 'init', '-q')
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-qm', 'as published')
    rows = select(SEEDS, seed=1)
    runs = [
        dict(init=r['method'], percent=float(r['fitted_on'][:-1]), seed=1) | {k: r[k] for k in COLUMNS if k in r}
        for r in select(rows, matching='labels')
    ]
    scored = [{k: v for k, v in r.items() if k not in ('setting', 'seed')} for r in rows if r['matching'] != 'labels']
    out = tmp_path / 'out'
    for stage, metrics in (('evaluate', dict(splits=nest(scored), n_fit_images=200)), ('fewshot', dict(runs=runs))):
        (out / stage).mkdir(parents=True)
        (out / stage / 'metrics.json').write_text(json.dumps(metrics))
    for name in ('pictures', 'overview'):
        shutil.copy(root / 'nbs' / 'overview.jpg', out / 'evaluate' / f'{name}.jpg')
    S.run_stage('report', tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_writes_only_what_is_ignored_and_publish_the_rest(reported):
    assert git(reported, 'status', '--porcelain') == ''
    assert (reported / 'out' / 'report' / 'metrics.json').is_file()
    assert '## Beside the seeds' in (reported / 'out' / 'report' / 'results.md').read_text()
    assert cli.main(['publish', 'report']) == 0
    table = (reported / 'out' / 'report' / 'readme.md').read_text().strip()
    assert f'<!-- results -->\n{table}\n<!-- /results -->' in (reported / 'README.md').read_text()
    cells = {c['id']: c for c in nbformat.read(reported / 'nbs' / '00_overview.ipynb', 4).cells}
    assert cells['results'].outputs[0].data['text/markdown'] == f'\n{table}\n'
    assert (reported / 'nbs' / 'overview.jpg').read_bytes() == (root / 'nbs' / 'overview.jpg').read_bytes()


def test_notebook_00_shows_the_table_of_readme():
    cells = {c['id']: c for c in nbformat.read(root / 'nbs' / '00_overview.ipynb', 4).cells}
    table = (root / 'README.md').read_text().split('<!-- results -->')[1].split('<!-- /results -->')[0]
    assert cells['results'].outputs[0].data['text/markdown'] == table

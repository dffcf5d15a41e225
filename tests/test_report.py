"The report: verdicts follow the numbers, no number of the paper is lost, ours stand in the right column."

import re

import pytest

from u2seg import report as R
from u2seg.results import flatten


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

"""What lies beside the embedded data is its owner's: no command of git or DVC moves, copies, changes or deletes it."""

import hashlib, os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
EMBEDDED = 'data/embedded/objects/val/000001.jpg'
FOREIGN = [
    'data/coco/train2017/1.jpg',
    'data/coco/annotations/val2017.json',
    'data/mine.png',
    'weights/dino.pth',
    'data/embedded/mine/1.jpg',
    'data/embedded/1.png',
    'data/embedded/objects/mine/1.jpg',
]


def run(clone, *cmd):
    "Its output; the state that DVC keeps of a clone goes with the clone."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | dict(PATH=path, DVC_NO_ANALYTICS='1', DVC_SITE_CACHE_DIR=str(clone.parent / 'site'))
    p = subprocess.run(cmd, cwd=clone, env=env, capture_output=True, text=True)
    assert p.returncode == 0, f'{" ".join(cmd)}\n{p.stdout[-2000:]}\n{p.stderr[-2000:]}'
    return p.stdout


@pytest.fixture
def clone(tmp_path):
    clone = tmp_path / 'u2seg'
    run(tmp_path, 'git', 'clone', '-q', str(root), str(clone))
    run(clone, 'git', 'config', 'user.name', 'u2seg')
    run(clone, 'git', 'config', 'user.email', 'u2seg@localhost')
    return clone


def put(clone, names):
    "Files of a user, each of its own content."
    for name in names:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(os.urandom(64))
    return {name: identity(clone / name) for name in names}


def identity(file):
    s = file.stat()
    return file.read_bytes(), s.st_ino, s.st_mtime_ns, s.st_nlink


def in_cache(clone, file):
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    return (clone / '.dvc' / 'cache' / 'files' / 'md5' / md5[:2] / md5[2:]).exists()


def touched(clone, before):
    return [name for name in before if not (clone / name).exists() or identity(clone / name) != before[name]]


def untouched(clone, before):
    assert touched(clone, before) == []
    assert [name for name in before if in_cache(clone, clone / name)] == []


def test_foreign_files_stay_whatever_dvc_does(clone):
    run(clone, 'dvc', 'pull', '-q', 'data.dvc')
    before = put(clone, FOREIGN)
    pointer = (clone / 'data.dvc').read_bytes()
    embedded = identity(clone / EMBEDDED)
    for command in (
        'dvc pull -q data.dvc',
        'dvc repro -q data.dvc',
        'dvc commit -q -f data.dvc',
        'git checkout -q data.dvc',
        'dvc pull -q data.dvc',
        'dvc checkout -q --allow-missing',
        'dvc checkout -q -f data.dvc',
        'dvc gc -q -w -f',
        'dvc pull -q data.dvc',
    ):
        run(clone, *command.split())
        untouched(clone, before)
        assert (clone / 'data.dvc').read_bytes() == pointer, command
    assert run(clone, 'git', 'status', '--porcelain') == ''
    assert 'data/' not in run(clone, 'dvc', 'status', 'data.dvc')
    assert identity(clone / EMBEDDED) == embedded and in_cache(clone, clone / EMBEDDED)


def test_a_stage_sees_the_images_of_a_user_and_stores_none(clone):
    "With `data.root: data`, as recipes have it: the embedded data is then a part of what the stage reads."
    run(clone, 'dvc', 'pull', '-q', 'data.dvc')
    before = put(clone, ['data/coco/train2017/1.jpg', 'data/coco/train2017/2.jpg'])
    (clone / 'params.yaml').write_text('data: {root: data}\n')
    (clone / 'dvc.yaml').write_text('stages: {look: {cmd: echo x > seen, deps: ["${data.root}"], outs: [seen]}}\n')
    looked = lambda: "Running stage 'look'" in run(clone, 'dvc', 'repro')
    assert looked() and not looked()
    untouched(clone, before)
    assert in_cache(clone, clone / 'seen')
    before |= put(clone, ['data/coco/train2017/2.jpg'])
    assert looked() and not looked()
    untouched(clone, before)
    assert 'data.dvc' not in run(clone, 'git', 'status', '--porcelain')


def test_an_upgrade_from_the_layout_before_deletes_nothing(clone):
    "There data.dvc tracked the whole of data/, and a `dvc repro` after a download took that in as well."
    new = run(clone, 'git', 'rev-parse', 'HEAD').strip()
    older = {'data.dvc': ('data/embedded', 'data'), '.gitignore': ('/data/*\n!/data/README.md', '/data')}
    for name, (now, then) in older.items():
        (clone / name).write_text((clone / name).read_text().replace(now, then))
    run(clone, 'git', 'rm', '-q', '-r', '.dvcignore', 'data')
    run(clone, 'git', 'commit', '-q', '-a', '-m', 'as it was')
    run(clone, 'dvc', 'pull', '-q', 'data.dvc')
    assert (clone / 'data' / 'objects').is_dir() and not (clone / 'data' / 'embedded').exists()
    before = put(clone, FOREIGN[:3])
    run(clone, 'dvc', 'repro', '-q', 'data.dvc')
    assert in_cache(clone, clone / FOREIGN[0]), 'the layout before did this'
    run(clone, 'git', 'checkout', '-q', 'data.dvc')
    run(clone, 'git', 'checkout', '-q', new)
    for command in (
        'dvc checkout -q --allow-missing',
        'dvc gc -q -w -f',
        'dvc pull -q data.dvc',
        'dvc repro -q data.dvc',
    ):
        run(clone, *command.split())
        assert touched(clone, before) == [], command
    assert (clone / EMBEDDED).exists() and run(clone, 'git', 'status', '--porcelain') == ''

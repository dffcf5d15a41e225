"""The repository as a whole: library and notebooks agree, notebooks are clean and small, each knob has one place."""

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import limits
from u2seg import cli
from u2seg import pipeline as P
from u2seg import recipes as R
from u2seg import stage as S

root = Path(__file__).parents[1]
notebooks = sorted((root / 'nbs').glob('*.ipynb'))
bin_ = Path(sys.executable).parent


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what nbdev works on."
    to = tmp_path_factory.mktemp('copy')
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '_proc')
    for name in ('nbs', 'u2seg'):
        shutil.copytree(root / name, to / name, ignore=ignore)
    for name in ('settings.ini', 'README.md', 'setup.py'):
        shutil.copy(root / name, to / name)
    return to


def run(copy, command):
    subprocess.run([bin_ / command], cwd=copy, check=True, env=os.environ | {'PYTHONPATH': str(copy)})


def test_library_is_what_the_notebooks_export(copy):
    before = {p.name: p.read_text() for p in (copy / 'u2seg').glob('*.py')}
    run(copy, 'nbdev_export')
    after = {p.name: p.read_text() for p in (copy / 'u2seg').glob('*.py')}
    assert before.keys() == after.keys()
    changed = [n for n in after if after[n] != before[n]]
    assert changed == [], 'run nbdev_export (or nbdev_update, if the module was edited)'


def test_notebooks_are_clean(copy):
    before = {p.name: p.read_bytes() for p in (copy / 'nbs').glob('*.ipynb')}
    run(copy, 'nbdev_clean')
    assert [n for n in before if (copy / 'nbs' / n).read_bytes() != before[n]] == [], 'run nbdev_clean'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_is_valid_and_keeps_no_error(path):
    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    outputs = [(c['id'], o.output_type) for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert not [cell for cell, kind in outputs if kind == 'error'], 'an error is kept as output'


def test_the_limits_of_the_page():
    assert limits.measured() == {}


def test_the_limits_are_measured(tmp_path):
    "Each kind is found in a notebook that has it, and in no other."

    def cell(source, kind='code', id='x', tags=(), outputs=()):
        own = dict(outputs=list(outputs)) if kind == 'code' else {}
        return dict(cell_type=kind, id=id, source=source, metadata=dict(tags=list(tags)), **own)

    def faults(*cells, name='20_x.ipynb'):
        (tmp_path / name).write_text(json.dumps(dict(cells=cells)))
        return limits.faults_of_notebook(tmp_path / name)

    prose, export, demo = cell('Text.', 'markdown'), cell('#| export\nx = 1'), cell('x = 1')
    picture = dict(data={'image/png': 'x'})
    assert faults(prose, export, demo) == set()
    assert faults(export, demo) == {'prose'} and faults(prose, export) == {'demo'}
    assert faults(*[demo] * 41) == {'cells'} and faults(cell('x = 1\n' * 31)) == {'cell'}
    assert (
        faults(*[cell('x = 1\n' * 30)] * 11) == {'lines'}
        and faults(cell('x = 1\n' * 31, tags=['parameters']), demo) == set()
    )
    assert (
        faults(demo, cell('x' * 121, 'markdown')) == {'columns'} and faults(demo, cell('|' * 121, 'markdown')) == set()
    )
    assert faults(cell('x = 1', outputs=[dict(text='x' * 400_000)])) == {'outputs'}
    bar = dict(data={'text/plain': 'pretrain: 100%|####| 9/9'})
    for noise in (dict(name='stderr', text='a warning'), bar):
        assert faults(cell('x = 1', outputs=[noise, dict(text='1')])) == {'noise'}
    limits.strip(tmp_path / '20_x.ipynb')
    assert limits.faults_of_notebook(tmp_path / '20_x.ipynb') == set()
    assert faults(cell('show.grid([x])')) == {'picture'} and faults(cell('grid([x])', outputs=[picture])) == set()
    for draws in (
        'grid([x]);',
        'show.grid([x])',
        'save_figure(fig, path); fig',
        "figs['a']",
        'view.overview()',
        'plt.plot(x)',
        'display(class_figure(x)) if rows else None',
        'Image(data)',
        'x = 1\nvotes_figure(x)',
    ):
        assert 'picture' in faults(cell(draws)), draws
    for draws_not in ('save_figure(fig, path)', 'x = grid([x])', 'len(figures)', '%matplotlib inline'):
        assert 'picture' not in faults(cell(draws_not)), draws_not
    for silent in ('x', 'x.y', 'digest(x)', 'print(x)', '[x for x in y]', 'Markdown(x)', 'x = 1\nf"{x}"'):
        assert faults(cell(silent)) == {'silent'}, silent
        assert faults(cell(silent, outputs=[dict(text='1')])) == set() == faults(cell(f'{silent};')), silent
    for silent_not in ('#| hide\nx', 'x = 1', 'test_eq(x, 1)', 'path.unlink()', 'assert x', '%matplotlib inline'):
        assert faults(cell(silent_not)) == set(), silent_not
    assert faults(cell('def f(): pass'), name='20_run_x.ipynb') == {'def'}
    assert faults(*[demo] * 13, name='20_run_x.ipynb') == {'stage cells'}
    assert faults(demo, cell('see MET' + 'HOD, section 1', 'markdown')) == {'words'}


def test_the_contents_name_every_notebook():
    cells = {c['id']: c.source for c in nbformat.read(root / 'nbs' / '00_overview.ipynb', 4).cells}
    named = re.findall(r'^- \[(\w+)\]\((\w+)\.ipynb\): \S.+$', cells['contents'], re.M)
    assert [b for _, b in named] == [p.stem for p in notebooks][1:] and all(a == b for a, b in named)


def test_prose_names_notebooks_that_exist():
    "A notebook is named in full, as `44_train` or by a link: a bare number is wrong after the next renumbering."
    stems = {p.stem for p in notebooks}
    for path in notebooks:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != 'markdown':
                continue
            named = re.findall(r'`(\d\d_[a-z_]+)`|\]\((\d\d_\w+)\.ipynb', cell.source)
            assert {a or b for a, b in named} <= stems, (path.name, cell['id'])
            assert not re.search(r'[Nn]otebooks? \d\d\b', cell.source), (path.name, cell['id'])


def test_readme_is_short():
    "The tables apart, which grow with the methods, the claims and the weights."
    text = re.sub(r'<!-- (results|weights) -->.*<!-- /\1 -->', '', (root / 'README.md').read_text(), flags=re.S)
    assert len(text.splitlines()) <= 100


def test_module_imports_only_from_lower_numbers():
    number = {}
    for p in notebooks:
        m = re.search(r'#\| *default_exp +(\w+)', p.read_text())
        if m:
            number[m[1]] = int(p.name[:2])
    for name in number.keys() - {'cli', 'label_verbs'}:  # the command line imports what a verb needs
        for other in imports((root / 'u2seg' / f'{name}.py').read_text()):
            assert number[other] < number[name], f'{name} imports from {other}'


def test_params_are_the_notebooks_defaults():
    params = S.load_params(root)
    assert S.check_stages(root) == S.stages(root)
    for name in S.stages(root):
        defaults = S.declared(nbformat.read(S.stage_notebook(root, name), 4))
        given = S.stage_values(name, params, defaults)
        assert given == {k: v for k, v in defaults.items() if k != 'root'}, name


@pytest.mark.parametrize('recipe', list(R.recipes(root)))
def test_recipes_fit_the_stages(recipe, tmp_path):
    for name in ('nbs', 'configs'):
        (tmp_path / name).symlink_to(root / name)
    R.use(recipe, tmp_path)
    initial = tmp_path / S.load_params(tmp_path)['cutler']['initial']
    if initial.suffix:  # a file of weights: named before any work if it is not there
        with pytest.raises(
            ValueError, match=f"^cutler.initial must be 'random' or a file of weights, got .*{initial.name}"
        ):
            S.check_stages(tmp_path)
        initial.parent.mkdir()
        initial.touch()
    assert S.check_stages(tmp_path) == S.stages(root)


def test_only_evaluation_reads_ground_truth():
    for name in S.stages(root):
        if name in ('evaluate', 'fewshot'):
            continue
        path = S.stage_notebook(root, name)
        assert 'annotations/' not in path.read_text() and 'data_val' not in S.declared(nbformat.read(path, 4)), name


def imports(source):
    "Modules of the library that a source imports, in any form."
    lists = re.findall(r'^ *from (?:u2seg|\.) import ([^#\n]+)', source, re.M)
    named = [x.split(' as ')[0].strip() for x in ','.join(lists).split(',') if x]
    return [*named, *re.findall(r'^ *from (?:u2seg)?\.(\w+) import', source, re.M)]


def test_pipeline_names_every_stage_and_its_modules():
    dvc = yaml.safe_load((root / 'dvc.yaml').read_text())['stages']
    assert list(dvc) == S.stages(root)
    for name, stage in dvc.items():
        shared = S.declared(nbformat.read(S.stage_notebook(root, name), 4)).keys() & {*S.SHARED}
        assert stage['cmd'] == f'u2seg run {name}'
        assert {name, *shared} <= {p for p in stage['params'] if isinstance(p, str)}
        if name == 'features':
            continue  # retrained only when its parameters change
        notebook = S.stage_notebook(root, name)
        assert f'nbs/{notebook.name}' in stage['deps']
        todo = imports('\n'.join(c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == 'code'))
        used = set(todo)
        while todo:  # whatever those import in turn
            for m in imports((root / 'u2seg' / f'{todo.pop()}.py').read_text()):
                if m not in used:
                    used.add(m)
                    todo.append(m)
        assert {f'u2seg/{m}.py' for m in used} <= {*stage['deps']}, name
    assert (root / 'dvc.yaml').read_text() == P.pipeline(root), 'run u2seg dvc'


def test_random_state_and_checkpoints_name_their_device():
    "fork_rng without `devices` keeps the state of every GPU; load without `map_location` needs the GPU that saved."
    needs = dict(fork_rng={'devices'}, load={'map_location', 'weights_only'})
    for path in sorted((root / 'u2seg').glob('*.py')):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if not ast.unparse(call.func).startswith('torch.'):
                continue
            given = {k.arg for k in call.keywords}
            assert needs.get(call.func.attr, set()) <= given, f'{path.name}: {ast.unparse(call)[:80]}'


def settings():
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root / 'settings.ini')
    return dict(parser['DEFAULT'])


def test_the_package_cannot_be_taken_for_the_authors():
    "github.com/u2seg/u2seg is the repository of the paper's authors, u2seg.github.io their page."
    own = settings()
    assert own['lib_name'] == 'u2seg-notebooks' and own['lib_path'] == 'u2seg'
    for path in [root / 'settings.ini', root / 'setup.py', root / 'CITATION.cff', *(root / 'u2seg').glob('*.py')]:
        assert 'github.com/u2seg' not in path.read_text() and 'u2seg.github.io' not in path.read_text(), path.name
    assert (root / own['nbs_path'] / own['readme_nb']).is_file()
    first = (root / 'README.md').read_text()[:600]
    assert 'independent implementation' in first


def test_the_outputs_that_texts_name_are_outputs():
    "A path below out/ in README, a recipe or a page for users is an output of a stage, or lies in one."
    texts = [root / 'README.md', *(root / 'configs').glob('*.yaml'), *(root / 'nbs').glob('9*.ipynb')]
    stages = yaml.safe_load((root / 'dvc.yaml').read_text())['stages'].values()
    entries = [o for s in stages for key in ('outs', 'plots', 'metrics') for o in s.get(key, [])]
    outputs = {o if isinstance(o, str) else next(iter(o)) for o in entries}
    for text in texts:
        named = re.findall(r'\bout/[a-z]+/[\w/]+\.(?:png|jpg|csv|json|md|npy|safetensors|yaml)', text.read_text())
        for path in named:
            assert {path, *map(str, Path(path).parents)} & outputs, (text.name, path)


def test_the_citation_names_this_version_and_the_paper():
    cff, own = yaml.safe_load((root / 'CITATION.cff').read_text()), settings()
    assert cff['version'] == own['version'] and cff['title'].startswith(own['lib_name'])
    assert [r['title'] for r in cff['references']] == ['Unsupervised Universal Image Segmentation']
    assert f"\n## {own['version']}\n" in (root / 'CHANGELOG.md').read_text()


def test_the_package_holds_its_data(tmp_path):
    "What is not a module travels too: the mark of types, the default parameters."
    command = [sys.executable, 'setup.py', '-q', 'build_py', '-d', tmp_path]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    files = {p.name for p in (tmp_path / 'u2seg').iterdir() if p.is_file()}
    assert {name for name in files if not name.endswith('.py')} == {'py.typed', 'embedded.yaml'}


def test_the_command_names_the_distribution(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(['--version'])
    assert e.value.code == 0 and capsys.readouterr().out == f"u2seg-notebooks {settings()['version']}\n"


def test_public_ci_and_hooks_call_what_is_here():
    job = yaml.safe_load((root / '.github' / 'workflows' / 'test.yml').read_text())['jobs']['test']
    assert job['steps'][-1] == {'run': 'make test'} and '\ntest: ' in (root / 'Makefile').read_text()
    hooks = yaml.safe_load((root / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    assert [h['id'] for h in hooks] == ['nbdev_clean', 'nbdev_export']


def test_who_only_predicts_needs_no_pipeline():
    "The base requirements are enough to predict, cut, export and convert; other verbs say what is missing."
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in sys.argv[1].split(): raise ModuleNotFoundError(f'No module named {name!r}')
sys.meta_path.insert(0, Absent())
from u2seg import cli, convert, cut, download, export, folder, names, predict, suggest, zoo
sys.exit(cli.main(['evaluate', 'segmented', '--data', 'data']))
"""
    absent = [re.match('[A-Za-z]+', r)[0] for r in shlex.split(settings()['pipeline_requirements'])]
    assert {'faiss', 'dvc', 'papermill', 'jupyterlab'} <= {*absent}
    p = subprocess.run([sys.executable, '-c', script, ' '.join(absent)], cwd=root, capture_output=True, text=True)
    assert p.returncode == 1 and "No module named 'faiss'; pip install -e '.[pipeline]'" in p.stderr, p.stderr
    assert p.stderr.count('\n') == 1


def test_all_code_is_in_the_grammar_of_python_3_10():
    "What 3.11 to 3.13 added is refused; nested quotes in an f-string by every interpreter before 3.12."

    def refused(source):
        try:
            ast.parse(source, feature_version=(3, 10))
        except SyntaxError as e:
            return str(e)

    assert refused('try: pass\nexcept* ValueError: pass') and refused('def f[T](x: T): pass')
    assert sys.version_info >= (3, 12) or refused("f'{x['a']}'")
    files = [p for folder in ('u2seg', 'tests', 'benchmarks') for p in (root / folder).glob('*.py')]
    sources = {p.name: p.read_text() for p in files}
    for path in notebooks:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == 'code' and not re.search(r'(?m)^ *[%!]', cell.source):
                sources[path.name, cell['id']] = cell.source
    assert {name: e for name, source in sources.items() if (e := refused(source))} == {} and len(sources) > 2000


def test_each_pin_runs_on_every_python_that_its_marker_admits():
    "pip would otherwise look for another version of everything until it gives up."
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    pythons = [f'3.{minor}.{patch}' for minor in (10, 11, 12, 13) for patch in range(20)]
    wrong, seen = [], 0
    for line in (root / 'constraints.txt').read_text().splitlines():
        if not line.strip() or line.startswith('#'):
            continue
        pin = Requirement(line)
        try:
            installed = distribution(pin.name)
        except PackageNotFoundError:
            continue
        if installed.version not in pin.specifier:
            continue  # the pin of another Python
        needs, seen = SpecifierSet(installed.metadata.get('Requires-Python') or ''), seen + 1
        for v in pythons:
            here = dict(python_version=v.rpartition('.')[0], python_full_version=v)
            if (pin.marker is None or pin.marker.evaluate(here)) and v not in needs:
                wrong.append((line, v, str(needs)))
    assert wrong == [] and seen > 100, (wrong[:5], seen)


def test_with_pytorch_s_cpu_index_the_pins_choose_its_builds(tmp_path):
    "README's line for CPUs: of two builds of the pinned version pip takes the one that says +cpu."
    import zipfile

    readme = (root / 'README.md').read_text()
    assert '`--extra-index-url https://download.pytorch.org/whl/cpu`' in readme.replace('\n', ' ')
    constraints = (root / 'constraints.txt').read_text()
    for name in ('torch', 'torchvision'):
        pinned = re.search(f'(?m)^{name}==(.+)$', constraints)[1]
        for index, version in (('pypi', pinned), ('cpu', f'{pinned}+cpu')):
            info = f'{name}-{version}.dist-info'
            (tmp_path / index).mkdir(exist_ok=True)
            with zipfile.ZipFile(tmp_path / index / f'{name}-{version}-py3-none-any.whl', 'w') as wheel:
                wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
                wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
                wheel.writestr(f'{info}/RECORD', '')
    places = [f'--find-links={tmp_path / index}' for index in ('pypi', 'cpu')]
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--isolated', '--no-index', '--no-deps', *places]
    names = ['torch', 'torchvision']
    subprocess.run([*command, '-c', root / 'constraints.txt', '-d', tmp_path / 'got', *names], check=True)
    assert [p.name.split('-')[1].endswith('+cpu') for p in (tmp_path / 'got').iterdir()] == [True, True]


def test_torch_and_torchvision_of_different_builds_end_in_a_sentence(tmp_path):
    "As beside a torch for CPUs the torchvision of PyPI, which is linked to CUDA's libraries."
    (tmp_path / 'torchvision').mkdir()
    fault = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / 'torchvision' / '__init__.py').write_text(fault)
    (tmp_path / 'photo.png').touch()
    run = subprocess.run(
        [sys.executable, '-m', 'u2seg.cli', 'maskcut', 'photo.png'],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)])),
        text=True,
        capture_output=True,
    )
    assert run.returncode == 1 and run.stderr.count('\n') == 1, run.stderr
    assert run.stderr.startswith('u2seg: torch and torchvision are of different builds')
    assert '--extra-index-url' in run.stderr

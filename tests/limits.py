"""The limits of the page: `python tests/limits.py` lists what exceeds them, and tests/test_repo.py wants nothing.

`python tests/limits.py --strip` takes progress bars and warnings out of the outputs that notebooks keep.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[1]
FORBIDDEN = r'METHOD\b|DESIGN\.md|\.\./shared|U2SEG_SHARED'  # documents and folders that a reader does not have


def lines(cell):
    return [l for l in ''.join(cell['source']).split('\n') if l.strip()]


def is_wide(line):
    return len(line) > 120 and not line.startswith('|')  # a row of a table cannot be broken


def exported(cells):
    "Places of the exported cells, imports apart."
    code = [i for i, c in enumerate(cells) if c['cell_type'] == 'code' and c['id'] != 'imports']
    return [i for i in code if ''.join(cells[i]['source']).startswith('#| export')]


def is_shown(cells, i):
    "Is the next cell that is not prose a demo or a test?"
    following = [c for c in cells[i + 1 :] if c['cell_type'] == 'code']
    return bool(following) and not ''.join(following[0]['source']).startswith('#| export')


def last_value(cell):
    "The expression that a cell ends in, or None."
    try:
        last = ast.parse(''.join(cell['source'])).body[-1:]
    except SyntaxError:  # a magic
        return None
    return last[0].value if last and isinstance(last[0], ast.Expr) else None


def is_silent(cell):
    "Does it end in an expression, or print, and hold no output? A method, a test or what draws files may return None."
    source, value = ''.join(cell['source']), last_value(cell)
    if value is None or cell['outputs'] or source.startswith('#| hide') or source.rstrip().endswith(';'):
        return False
    if not isinstance(value, ast.Call):
        return True
    return isinstance(value.func, ast.Name) and not re.fullmatch(r'test_\w+|draw_dataset|save_\w+', value.func.id)


def draws(cell):
    "Is the last expression a figure? A semicolon behind it, which hides it, does not matter."
    value = last_value(cell)
    if isinstance(value, ast.IfExp):
        value = value.body
    if isinstance(value, ast.Call) and ast.unparse(value.func) == 'display' and value.args:
        value = value.args[0]
    if isinstance(value, ast.Call):
        return re.fullmatch(
            r'plt\..+|(.+\.)?(grid|sheet|overview|Image|draw_boxes|(?!save_)\w*figure)', ast.unparse(value.func)
        )
    return value is not None and re.fullmatch(r"fig\w*(\[.+\])?", ast.unparse(value))


def holds_picture(cell):
    return any(kind.startswith('image/') for o in cell['outputs'] for kind in o.get('data', {}))


def is_noise(output):
    "Is it a progress bar or a warning?"
    return output.get('name') == 'stderr' or '%|' in ''.join(output.get('data', {}).get('text/plain', ''))


def strip(path):
    notebook = json.loads(path.read_text())
    for cell in notebook['cells']:
        if 'outputs' in cell:
            cell['outputs'] = [o for o in cell['outputs'] if not is_noise(o)]
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + '\n')


def faults_of_notebook(path):
    "Kinds of limits that a notebook exceeds."
    cells = json.loads(path.read_text())['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    plain = [c for c in code if 'parameters' not in c['metadata'].get('tags', [])]
    exports = exported(cells)
    prose = sum(cells[i - 1]['cell_type'] == 'markdown' for i in exports)
    demos = sum(is_shown(cells, i) for i in exports)
    stage = '_run_' in path.name
    checks = {
        'lines': sum(len(lines(c)) for c in plain) > 300,
        'cells': len(code) > 40,
        'cell': max(len(lines(c)) for c in plain) > 30,
        'columns': any(is_wide(l) for c in cells for l in lines(c)),
        'outputs': sum(len(json.dumps(c['outputs'])) for c in code) > 400_000,
        'prose': prose < 0.7 * len(exports),
        'demo': demos < 0.75 * len(exports),
        'picture': any(draws(c) and not holds_picture(c) for c in code),
        'noise': any(is_noise(o) for c in code for o in c['outputs']),
        'silent': not stage and any(is_silent(c) for c in code),
        'def': stage and any(re.match(r'\s*def ', l) for c in code for l in lines(c)),
        'stage cells': stage and len(code) > 12,
        'words': any(re.search(FORBIDDEN, l) for c in cells for l in lines(c)),
    }
    return {kind for kind, exceeded in checks.items() if exceeded}


def faults_of_text(path):
    "The same for a file of code or prose; the table in README is written by the report."
    text = re.sub(r'<!-- results -->.*<!-- /results -->', '', path.read_text(), flags=re.S)
    checks = {
        'columns': path.suffix in ('.py', '.md') and any(is_wide(l) for l in text.split('\n')),
        'words': path != Path(__file__).resolve() and re.search(FORBIDDEN, text),
    }
    return {kind for kind, exceeded in checks.items() if exceeded}


def files():
    "Notebooks, and all other text that a person writes."
    command = ['git', 'ls-files', '-co', '--exclude-standard', '--']
    patterns = ['*.ipynb', '*.py', '*.md', '*.yaml', '*.yml', 'Makefile', 'settings.ini']
    listed = subprocess.run(command + patterns, cwd=root, check=True, capture_output=True, text=True).stdout
    made = ('u2seg/', 'benchmarks/results/')  # exported from notebooks, written by benchmarks
    names = [n for n in sorted(listed.split('\n')) if n and not n.startswith(made)]
    return [root / n for n in names if (root / n).is_file()]


def measured():
    "File -> the limits that it exceeds."
    faults = {}
    for path in files():
        kinds = (faults_of_notebook if path.suffix == '.ipynb' else faults_of_text)(path)
        if kinds:
            faults[path.relative_to(root).as_posix()] = sorted(kinds)
    return faults


if __name__ == '__main__':
    if '--strip' in sys.argv[1:]:
        for path in files():
            if path.suffix == '.ipynb' and 'noise' in faults_of_notebook(path):
                strip(path)
    for name, kinds in measured().items():
        print(f'{name}: [{", ".join(kinds)}]')

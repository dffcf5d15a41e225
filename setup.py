"""Reads settings.ini, the one place where the package is described."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

extras = {k: shlex.split(cfg[f'{k}_requirements']) for k in ('pipeline', 'dev', 'docs')}
extras['dev'] += extras['pipeline']                             # a clone has all but what makes the site

setup(
    name=cfg['lib_name'],                    # the distribution; the package is imported as u2seg
    version=cfg['version'],
    description=cfg['description'],
    license='Apache-2.0',
    author=cfg['author'],
    keywords=cfg['keywords'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['u2seg', 'u2seg.*']),
    package_data={'u2seg': ['embedded.yaml', 'py.typed']},
    python_requires='>=' + cfg['min_python'],
    zip_safe=False,
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={'console_scripts': shlex.split(cfg['console_scripts'])})

"""Reads settings.ini, the one place where the package is described."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0', author=cfg['author'],
      url=cfg['git_url'], keywords=cfg['keywords'], long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['u2seg', 'u2seg.*']), package_data={'u2seg': ['embedded.yaml']}, python_requires='>=' + cfg['min_python'], zip_safe=False,
      install_requires=shlex.split(cfg['requirements']), extras_require={k: shlex.split(cfg[f'{k}_requirements']) for k in ('dev', 'docs')},
      entry_points={'console_scripts': shlex.split(cfg['console_scripts'])})

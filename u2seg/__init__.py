__version__ = "0.1.0"

import os as _os

if _os.environ.get('U2SEG_ARITHMETIC') == 'exact':  # a stage's kernel and the processes that it starts
    from .exact import install as _install
    _install()

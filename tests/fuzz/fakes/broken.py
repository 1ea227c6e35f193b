"""A part whose module cannot be imported by a worker."""

import sys

if 'pytest' not in sys.modules:
    raise ImportError('no module of use')

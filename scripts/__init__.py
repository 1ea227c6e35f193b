"""One script a job. Started as one, it takes Weft's packages from beside it, whatever the folder it is started in has."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# As a file, or by `python -m scripts.train`, where this runs before the name of the script is known.
started = getattr(sys.modules['__main__'], '__file__', None)
if sys.argv[:1] == ['-m'] or (started and Path(started).resolve().parent == HERE):
    sys.path.insert(0, str(HERE.parent))

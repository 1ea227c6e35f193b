"""Compiled programs kept for the next process: JAX's compilation cache, in a folder of the user that is kept whole and small.

    ~/.cache/weft/programs-MACHINE/       or below XDG_CACHE_HOME; MACHINE: a hash of the processor and what it can do
      jit_next_token-KEY-cache            what JAX writes; KEY: a hash of the program, its options and JAX' version
      jit_next_token-KEY-cache.sha256     that it was written to its end, and is as it was then

JAX writes an entry without a rename and reads it without a check: one that a full disk or a kill cut short would be in the
way for ever, one that was altered would run. So an entry without its hash, or with another, is removed before JAX looks.

`JAX_COMPILATION_CACHE_DIR` names another folder, which is left to JAX; `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
"""

import contextlib
import hashlib
import os
import platform
import re
import warnings
from pathlib import Path

import jax
import zstandard

MOST = 2**28  # bytes of all entries; the oldest go first
ENTRY, SEAL = '-cache', '.sha256'
COMPILED = (
    '/jax/core/compile/backend_compile_duration'  # JAX tells it when a program is compiled, and written if it is kept
)
_kept: list[Path] = []  # this process' folder, if there is one


def keep_programs() -> None:
    """Begins to use the cache in this process. Where no folder can be the user's own, all is compiled as without one."""
    said = jax.config.values
    if _kept or said['jax_compilation_cache_dir'] is not None or not said['jax_enable_compilation_cache']:
        return
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(folder):
            return
        tidy(folder, MOST)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return
    _kept.append(folder)
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')  # they would have no hashes
    # An entry that another process is writing, or a disk that has become full: the program is compiled and runs.
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry', UserWarning)
    jax.monitoring.register_event_duration_secs_listener(_compiled)


def keeps_programs() -> bool:
    """Whether this process has the cache in the user's folder."""
    return bool(_kept)


def cache_folder() -> Path:
    """Where this user's programs for this machine lie. Machine code runs only where the processor has what it was made for."""
    base = Path(os.environ.get('XDG_CACHE_HOME', ''))
    base = base if base.is_absolute() else Path.home() / '.cache'  # as the XDG specification has it
    return base / 'weft' / f'programs-{hashlib.sha256(_processor().encode()).hexdigest()[:12]}'


def is_private(folder: Path) -> bool:
    """Whether this user alone can have put there what lies there: it is run."""
    about = folder.stat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK)


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].split('\n')
        return '\n'.join(line for line in lines if re.match(r'(vendor_id|model|flags|CPU|Features)', line))
    return '\n'.join([platform.node(), platform.machine(), platform.processor()])


def tidy(folder: Path, most: int) -> None:
    """Removes entries that are not as they were written, and then the oldest until at most `most` bytes are left."""
    found, total = list[tuple[float, int, Path]](), 0
    for entry in folder.glob(f'*{ENTRY}'):
        with contextlib.suppress(OSError):  # another process has removed it
            content = entry.read_bytes()
            if _seal(entry).is_file() and _seal(entry).read_text() == hashlib.sha256(content).hexdigest():
                found.append((entry.stat().st_mtime, len(content), entry))
                total += len(content)
            else:
                _remove(entry)
    for _, size, entry in sorted(found):
        if total <= most:
            break
        _remove(entry)
        total -= size


def _compiled(event: str, duration_secs: float, **about: str | int) -> None:
    if event != COMPILED:
        return
    for folder in _kept:
        for entry in folder.glob(f'*{ENTRY}'):
            if not _seal(entry).exists():
                with contextlib.suppress(OSError):
                    seal(entry)


def seal(entry: Path) -> None:
    """Writes down an entry's hash; removes one that is not whole."""
    content = entry.read_bytes()
    try:
        zstandard.ZstdDecompressor().decompress(content)
    except zstandard.ZstdError:
        _remove(entry)
    else:
        _seal(entry).write_text(hashlib.sha256(content).hexdigest())


def _seal(entry: Path) -> Path:
    return entry.with_name(entry.name + SEAL)


def _remove(entry: Path) -> None:
    """The hash goes last: an entry without one is removed again."""
    entry.unlink(missing_ok=True)
    _seal(entry).unlink(missing_ok=True)

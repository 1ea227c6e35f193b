"""What a tokenizer.json's decoder makes of tokens: their bytes, and what falls off where a text begins."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from weft.data.tokenizer import SPACE
from weft.runtime.errors import UserError, shown

BYTE = re.compile('<0x([0-9A-Fa-f]{2})>')


class Decoder(NamedTuple):
    """Tokens to bytes. A text is its tokens' bytes, without what falls off at its beginning."""

    bytes_of: Callable[[str], bytes]
    first_of: Callable[[str], bytes] | None = None  # of a text's first token, where it is written otherwise
    spaces: int = 0  # at the beginning of a text that fall off


def decoder_of(said: Any, name: str) -> Decoder:
    """What the field `decoder` of the tokenizer.json `name` says. Raises UserError for kinds that are not supported."""
    decoders = [one for one in steps_of(said, 'decoders') if isinstance(one.get('type'), str)]
    kinds = [decoder['type'] for decoder in decoders]
    of = lambda kind: decoders[kinds.index(kind)]
    if 'ByteLevel' in kinds:
        table = {character: byte for byte, character in enumerate(byte_characters())}

        def from_table(token: str) -> bytes:
            return b''.join(bytes([table[one]]) if one in table else one.encode() for one in token)

        return Decoder(from_table)
    if 'WordPiece' in kinds:
        mark = str(of('WordPiece').get('prefix'))
        plain = lambda token: token.removeprefix(mark).encode() if token.startswith(mark) else f' {token}'.encode()
        return Decoder(plain, first_of=str.encode)
    if 'BPEDecoder' in kinds:
        end = str(of('BPEDecoder').get('suffix'))
        return Decoder(lambda token: (token.removesuffix(end) + ' ' if token.endswith(end) else token).encode())
    space = _space(decoders)
    if space is None:
        has = shown(', '.join(sorted(set(kinds))) or 'nothing', 100)
        raise UserError(
            f'{name}: its decoder has {has}; supported: ByteLevel, Metaspace, Replace of {SPACE} with a space, ByteFallback, '
            'WordPiece, BPEDecoder'
        )
    falls_back = 'ByteFallback' in kinds

    def spaced(token: str) -> bytes:
        byte = BYTE.fullmatch(token) if falls_back else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(space, ' ').encode()

    if 'Metaspace' in kinds and of('Metaspace').get('prepend_scheme', 'always') != 'never':
        return Decoder(spaced, first_of=lambda token: token.replace(space, '').encode())
    fused = 'Fuse' in kinds and 'Strip' in kinds[kinds.index('Fuse') :]
    strip = of('Strip') if fused else {}
    start = strip.get('start', 0) if strip.get('content') == ' ' else 0
    return Decoder(spaced, spaces=start if isinstance(start, int) else 0)


def steps_of(said: Any, *fields: str) -> Iterator[Mapping[str, Any]]:
    """The parts that one is made of, one after another, where it is a sequence of them in the first of `fields` that it has."""
    if not isinstance(said, dict):
        return
    inner = next((said[field] for field in fields if said.get(field)), None)
    if said.get('type') == 'Sequence' and isinstance(inner, list):
        for one in inner:
            yield from steps_of(one, *fields)
    else:
        yield said


def _space(decoders: Iterable[Mapping[str, Any]]) -> str | None:
    """What stands for a space in tokens."""
    for decoder in decoders:
        pattern = decoder.get('pattern')
        if decoder['type'] == 'Metaspace':
            return str(decoder.get('replacement'))
        if decoder['type'] == 'Replace' and decoder.get('content') == ' ' and isinstance(pattern, dict):
            return str(pattern.get('String') or SPACE)
    return None


def byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary (its published encoder.py)."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]

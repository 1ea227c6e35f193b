"""What text a run learns from, and how it becomes tokens."""

from dataclasses import dataclass

from weft.runtime.errors import UserError

# 256 byte pieces, <unk>, <s>, </s>, and a few to learn.
SMALLEST_VOCABULARY = 300
LARGEST_VOCABULARY = 262_144


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source` is 'stdlib' (the running Python's own standard library), or files, folders and globs of UTF-8 text.

    Text is plain text, Markdown, code, JSON Lines (`.jsonl`) or an array of objects (`.json`), each also packed by gzip, zstd,
    xz or bzip2.
    """

    source: str | tuple[str, ...] | None = 'stdlib'  # None: nothing to learn from has been named
    field: str = 'text'  # of an object in JSON: the one that holds the text
    # Whether the name of a special token in the text, such as <|endoftext|>, is that token; else it is text as any other.
    special_tokens: bool = False
    # Pieces at most of a tokenizer that is learnt, 256 byte pieces and 3 control pieces included; None: none is learnt.
    vocabulary: int | None = 4096
    # Of bytes, from half to one and a half times: whole top-level packages (stdlib) or files, where they come in such sizes,
    # else whole documents, else the end of each document.
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        if self.source is not None and (not self.source or not all(self.paths)):
            raise UserError(f"data.source={self.source!r}: must be 'stdlib' or at least one path, none of them empty")
        if not self.field:
            raise UserError("data.field='': must name the field of a JSONL object that holds the text; 'text' is usual")
        if self.vocabulary is not None and not SMALLEST_VOCABULARY <= self.vocabulary <= LARGEST_VOCABULARY:
            works = min(max(self.vocabulary, SMALLEST_VOCABULARY), LARGEST_VOCABULARY)
            rule = f'must be in [{SMALLEST_VOCABULARY}, {LARGEST_VOCABULARY}]'
            raise UserError(f'data.vocabulary={self.vocabulary}: {rule}; nearest: {works}')
        if not 0 < self.validation_share <= 0.5:
            share = 0.5 if self.validation_share > 0.5 else 0.05
            raise UserError(f'data.validation_share={self.validation_share}: must be in (0, 0.5]; try {share}')

    @property
    def paths(self) -> tuple[str, ...]:
        if self.source is None:
            raise UserError(
                "data.source is null: name what to learn from, files, folders or globs of text, or 'stdlib', as in "
                'data.source=notes/'
            )
        return (self.source,) if isinstance(self.source, str) else self.source

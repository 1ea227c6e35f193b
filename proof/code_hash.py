"""Hashes of code that change when what it does may change: not for comments, docstrings, types of functions, line breaks."""

import ast
import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path


def without_docstrings(source: str) -> ast.Module:
    """The syntax tree of Python source, each docstring (any statement that is a constant alone) replaced by None."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return tree


def without_function_types(tree: ast.Module) -> ast.Module:
    """The tree without annotations of arguments and results, which nothing reads; those of fields stay."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return tree


def code_hash(paths: Iterable[Path], more: str = '', without: Collection[Path] = ()) -> str:
    """12 hex digits of SHA-256 over the code of files and of folders (all .py below but `without`), in order, and of `more`."""
    digest = hashlib.sha256(more.encode())
    for path in paths:
        for file in sorted({*path.rglob('*.py')} - {*without}) if path.is_dir() else [path]:
            tree = without_function_types(without_docstrings(file.read_text(encoding='utf-8')))
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]

"""Modules of ours in one file, for places where `erw` is not installed."""

import ast
from importlib.util import find_spec
from pathlib import Path

HEADER = '''"""{title}

Modules of erw {version} (Apache-2.0) in one file, which needs torch and diffusers alone:
{modules}
"""
'''


def bundled(module: str, *, title: str, version: str) -> str:
    """The source of `module` behind that of every module of ours it imports, without those imports.

    Modules keep their text; their docstrings become comments, and what they import from elsewhere
    stands at the top once.
    """
    modules = _behind(module)
    names: dict[str, set[str]] = {}
    plain: set[str] = set()
    bodies = []
    for name in modules:
        source, tree = _parsed(name)
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom) and not _ours(node):
                names.setdefault(str(node.module), set()).update(map(ast.unparse, node.names))
        bodies.append(f"\n\n# -- {name} {'-' * (75 - len(name))}\n" + _body(source, tree))
    imports = [*plain, *(f"from {m} import {', '.join(sorted(n))}" for m, n in names.items())]
    head = HEADER.format(title=title, version=version, modules="\n".join(modules))
    return head + "\n" + "\n".join(sorted(imports)) + "\n" + "".join(bodies)


def _behind(module: str) -> list[str]:
    """Every module of ours that `module` stands on, then itself."""
    found: list[str] = []
    for node in _parsed(module)[1].body:
        if isinstance(node, ast.ImportFrom) and _ours(node):
            found += [name for name in _behind(str(node.module)) if name not in found]
    return [*found, module]


def _ours(node: ast.ImportFrom) -> bool:
    return str(node.module).partition(".")[0] == "erw"


def _parsed(module: str) -> tuple[str, ast.Module]:
    spec = find_spec(module)
    assert spec and spec.origin
    source = Path(spec.origin).read_text("utf-8")
    return source, ast.parse(source)


def _body(source: str, tree: ast.Module) -> str:
    """A module's text without imports, its docstring as a comment."""
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (_end(node) - node.lineno + 1)
    text = ast.get_docstring(tree, clean=False) or ""
    first = tree.body[0]
    kept = lines[_end(first) :] if text else lines
    said = "\n".join(f"# {line}".rstrip() for line in text.strip().splitlines())
    return f"{said}\n\n\n" + "\n".join(kept).strip() + "\n"


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno

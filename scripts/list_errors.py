"""Write the messages of every error into docs/troubleshooting.md: python scripts/list_errors.py

With --check nothing is written, and a page that is not as it would be is exit status 1 (make lint).

The page's text is written by hand. Below it stand lines such as

    <!-- errors: model_loaders/ cast_serve/linear.py -->
    <!-- end of errors -->

and between the two goes one line for each message that those files raise, read from their source:
what is computed at run time is `...`. A file belongs to the block that names most of its path.
tests/docs/test_troubleshooting.py wants every file that raises a message to belong to one, and the
page to be as this writes it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("cast_serve", "kernels", "model_loaders", "bench")

# Calls, beside those of classes named *Error, whose text reaches the user.
REPORTS = {
    "NoKernel",
    "WrongResult",
    "BadParameter",
    "HTTPException",
    "error",
    "fail",
    "main_error",
    "refusal",
    "refuse",
    "_fail",
    "_failure",
}
BLOCK = re.compile(
    r"(?P<begin><!-- errors: (?P<paths>[^>]*?) -->\n).*?(?P<end><!-- end of errors -->)", re.DOTALL
)
GAP = "..."


def sources() -> dict[str, str]:
    """The text of every module, by its path from the root; links are not followed."""
    files = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))
    own = (f for f in files if not any(parent.is_symlink() for parent in f.parents))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in own}


def messages(source: str) -> list[str]:
    """The messages that a module raises or reports, in its order, each once."""
    return list(dict.fromkeys(text for _, texts in reports(source) for text in texts))


def reports(source: str) -> Iterator[tuple[str, list[str]]]:
    """Every call of a module that raises or reports, as it is written, and what it can say."""
    module = ast.parse(source)
    names: dict[str, ast.AST] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            names[node.name] = node
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
    raised = {id(node.exc) for node in ast.walk(module) if isinstance(node, ast.Raise)}
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        if id(call) in raised or _reports(call):
            yield ast.unparse(call), [text for text in _texts(call, names) if _says_something(text)]


def _reports(call: ast.Call) -> bool:
    name = ast.unparse(call.func).rpartition(".")[2]
    return name.endswith("Error") or name in REPORTS


def _texts(node: ast.AST, names: dict[str, ast.AST]) -> Iterator[str]:
    """What an expression can say; nothing of what is not text.

    `names` are the functions and constants of its module.
    """
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            yield "".join(map(str, parts))
        case ast.IfExp():
            yield from _texts(node.body, names)
            yield from _texts(node.orelse, names)
        case ast.BoolOp():
            for value in node.values:
                yield from _texts(value, names)
        case ast.BinOp(op=ast.Add()):
            left = list(_texts(node.left, names)) or [GAP]
            right = list(_texts(node.right, names)) or [GAP]
            yield from (first + second for first in left for second in right)
        case ast.Name(id=name) if isinstance(names.get(name), ast.expr):
            yield from _texts(names[name], {})
        case ast.Call() if _reports(node):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield from _texts(argument, names)
        case ast.Call(func=ast.Name(id=name)) if isinstance(names.get(name), ast.FunctionDef):
            # A message, or an error, that a function of the module words.
            for returned in ast.walk(names[name]):
                if isinstance(returned, ast.Return) and returned.value is not None:
                    yield from _texts(returned.value, {})


def _says_something(text: str) -> bool:
    """More than a name, a suffix or a gap."""
    words = text.replace(GAP, " ").split()
    return sum(bool(re.search(r"[A-Za-z]{2}", word)) for word in words) > 1


def line(text: str) -> str:
    """A message as a line of the page."""
    shown = " ".join(text.split())
    shown = re.sub(r"(\.\.\.)(\s*[,;]?\s*\.\.\.)+", GAP, shown)
    quotes = "``" if "`" in shown else "`"
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"- {quotes}{pad}{shown}{pad}{quotes}"


def owner(file: str, paths: list[str]) -> str | None:
    """The longest of `paths` that is the file or a folder above it."""
    return max((path for path in paths if file.startswith(path)), key=len, default=None)


def paths_of(page: str) -> list[str]:
    """What the page's blocks name."""
    return [path for match in BLOCK.finditer(page) for path in match["paths"].split()]


def render(page: str, texts: dict[str, str]) -> str:
    """The page with every block written anew from the sources `texts`."""
    paths = paths_of(page)

    def block(match: re.Match[str]) -> str:
        mine = [file for file in texts if owner(file, paths) in match["paths"].split()]
        lines = dict.fromkeys(line(said) for file in mine for said in messages(texts[file]))
        return match["begin"] + "\n" + "\n".join([*lines, "", match["end"]])

    return BLOCK.sub(block, page)


def main() -> None:
    page = PAGE.read_text()
    current = render(page, sources())
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(current)
    elif current != page:
        sys.exit("docs/troubleshooting.md is not of this source: run python scripts/list_errors.py")


if __name__ == "__main__":
    main()

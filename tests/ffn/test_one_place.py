"""What is known of a method stands in its own file."""

from __future__ import annotations

import ast
from pathlib import Path

import sparseffn
from sparseffn.ffn import list_methods, method_class

ROOT = Path(sparseffn.__file__).parent
# The paper's rows name the paper's methods.
EXEMPT = "paper/table_rows.py"


def concrete_names() -> dict[str, str]:
    """Config and layer classes of all methods, with the file of each."""
    configs = [method_class(name) for name in list_methods()]
    classes = [*configs, *(type(config.examples()[0].build()) for config in configs)]
    return {c.__name__: c.__module__.removeprefix("sparseffn.").replace(".", "/") + ".py" for c in classes}


def asked_classes(path: Path) -> set[str]:
    """Names in the second argument of every `isinstance` and `issubclass`, and in the patterns of every `match`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            found |= {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])}
        elif isinstance(node, ast.MatchClass):
            found |= {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.cls)}
    return found


def test_no_other_file_asks_which_method_it_has() -> None:
    """A method of the class answers, with a default for methods that nobody here knows."""
    homes, strays = concrete_names(), []
    assert len(homes) == 2 * len(list_methods())
    for path in sorted(ROOT.rglob("*.py")):
        where = str(path.relative_to(ROOT))
        strays += [(where, name) for name in asked_classes(path) if homes.get(name, where) != where and where != EXEMPT]
    assert strays == []


def test_the_search_sees_what_it_looks_for(tmp_path: Path) -> None:
    """All forms of asking."""
    source = "isinstance(a, (ffn.Dense | TopK))\nissubclass(b, (PKM,))\nmatch c:\n    case Switch():\n        pass\n"
    (tmp_path / "asks.py").write_text(source)
    assert asked_classes(tmp_path / "asks.py") >= {"Dense", "TopK", "PKM", "Switch"}


def test_no_private_module_is_needed() -> None:
    """A method is written from public modules alone."""
    assert not [path.name for path in (ROOT / "ffn").glob("_*.py") if path.name != "__init__.py"]

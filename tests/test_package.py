"""Rules of the package: fast to import, layered, with all public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import iddpm_ext

PACKAGE = Path(iddpm_ext.__file__).parent

# Layers of parts, the lowest first. A part may import its own layer and lower ones.
FLOORS = [
    {"_C"},
    {"_native", "random", "files", "sizes", "text", "process_group", "scalars"},
    {"images", "data", "metrics", "ops"},
    {"diffusion"},
    {"networks"},
    {"engines"},
    {"interop"},
    {"checkpoint"},
    {"sampling"},
    {"likelihood", "evaluation", "training"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
_TYPE_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
OPTIONAL = "matplotlib tyro diffusers tensorboard datasets lmdb torch_fidelity torchvision"


def sources() -> Iterator[tuple[str, Path]]:
    """(part, file) of every module but the package's own __init__."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def type_only(tree: ast.Module) -> set[ast.AST]:
    """The nodes under ``if TYPE_CHECKING:``."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in _TYPE_ONLY
    ]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that ``path`` imports when it runs, at its top or later."""
    inside = path.is_relative_to(PACKAGE)
    package = ["iddpm_ext", *path.relative_to(PACKAGE).parent.parts] if inside else []
    tree = ast.parse(path.read_text())
    ignored = type_only(tree)
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "iddpm_ext":
                names = [alias.name for alias in node.names]
                yield from (iddpm_ext._LAZY.get(name, f"iddpm_ext.{name}") for name in names)
            else:
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names)


def edges() -> dict[str, set[str]]:
    """Part -> the other parts that it imports."""
    graph: dict[str, set[str]] = {}
    for part, path in sources():
        for name in imports(path):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if root == "iddpm_ext" and target not in ("", "__version__", part):
                graph.setdefault(part, set()).add(target)
    return graph


def test_every_part_has_a_floor():
    assert {part for part, _ in sources()} == FLOOR.keys() - {"_C"}


def test_imports_point_down_only():
    upward = [
        f"{part} imports {target}"
        for part, targets in edges().items()
        for target in targets
        if FLOOR[target] > FLOOR[part]
    ]
    assert upward == []


def test_parts_of_one_floor_do_not_import_each_other_in_a_circle():
    graph = edges()

    def reachable(part: str) -> set[str]:
        seen: set[str] = set()
        waiting = [part]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting.extend(new)
        return seen

    assert [part for part in graph if part in reachable(part)] == []


def test_no_two_files_of_interop_import_each_other():
    """Directly or through others, at their top or inside of functions."""
    graph = {
        f"iddpm_ext.interop.{path.stem}": set(imports(path))
        for part, path in sources()
        if part == "interop"
    }
    for name in graph:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting.extend(new)
        assert name not in seen, f"{name} imports itself through others"


def test_the_package_never_imports_the_programs_beside_it():
    programs = {"python", "benchmarks", "tests", "tools"}
    found = {name for _, path in sources() for name in imports(path)}
    assert not {name for name in found if name.partition(".")[0] in programs}


def test_no_test_file_imports_another():
    """What several need has a module of its own."""
    found = [
        f"{path.name} imports {name}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        for name in imports(path)
        if name.startswith("test_")
    ]
    assert found == []


def test_importing_the_package_imports_no_optional_library():
    code = (
        "import sys, iddpm_ext; "
        f"print([m for m in '{OPTIONAL}'.split() + ['torch', 'triton'] if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_using_the_api_imports_no_optional_library():
    code = (
        "import sys, iddpm_ext\n"
        "for name in ('UNet', 'Diffusion', 'sample', 'save_images', 'ops'):\n"
        "    getattr(iddpm_ext, name)\n"
        f"print([m for m in '{OPTIONAL}'.split() if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", iddpm_ext.__all__)
def test_every_public_name_resolves(name):
    try:
        assert getattr(iddpm_ext, name) is not None
    except ImportError as error:
        assert "pip install" in str(error), "only a missing extra may hide a name, and says so"


def test_the_names_for_type_checkers_are_the_lazy_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    shown = {
        alias.asname or alias.name: node.module
        for node in type_only(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    wanted = {
        name: "iddpm_ext" if module == f"iddpm_ext.{name}" else module
        for name, module in iddpm_ext._LAZY.items()
    }
    assert shown == wanted


def test_type_checkers_do_not_see_that_names_are_found_lazily():
    """It would make every name right to them; `make check` runs mypy on tests/public_names.py too."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    hidden = [
        inner
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING"
        for inner in node.body
    ]
    named = {
        node.name: node in hidden for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    assert named["__getattr__"] and not named["__dir__"]


def test_modules_are_there_as_the_documentation_names_them():
    code = (
        "import iddpm_ext as i; i.images.read_recipe, i.sampling.tune, i.data.open_data, i.metrics"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        iddpm_ext.smaple  # noqa: B018


def test_the_old_name_of_a_refusal_is_the_new_one_and_warns():
    from iddpm_ext.engines import base
    from iddpm_ext.engines.cpu import engine as cpu
    from iddpm_ext.engines.cuda import engine as cuda

    for module in (base, cpu, cuda):
        with pytest.warns(DeprecationWarning, match="NotSupported"):
            assert module.__getattr__("NotServed") is base.NotSupported  # old_names
    for module in (cpu, cuda):
        with pytest.warns(DeprecationWarning, match="why_not_supported"):
            assert module.__getattr__("why_not_served") is module.why_not_supported  # old_names
        with pytest.raises(AttributeError, match="no attribute 'why_so'"):
            module.why_so  # noqa: B018


def test_the_reference_has_every_public_name():
    shown = set((PACKAGE.parent / "docs" / "api.md").read_text().split())
    names = [name for name in iddpm_ext.__all__ if name != "__version__"]
    assert [name for name in names if f"iddpm_ext.{name}" not in shown] == []


def test_hints_name_what_an_index_has():
    """This package is not in one: an extra of it cannot be installed by name."""
    hints = [path.name for _, path in sources() if "iddpm-ext[" in path.read_text()]
    assert hints == []


def test_every_place_says_the_same_version():
    cited = (PACKAGE.parent / "CITATION.cff").read_text()
    assert f"\nversion: {iddpm_ext.__version__}\n" in cited
    models = (PACKAGE.parent / "models" / "pyproject.toml").read_text()
    assert f'\nversion = "{iddpm_ext.__version__}"\n' in models
    newest = (PACKAGE.parent / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert newest.startswith(iddpm_ext.__version__)


def test_every_place_says_the_same_of_authors_licence_and_purpose():
    """pyproject.toml is the one that is edited."""
    root = PACKAGE.parent
    project, models = ((root / name / "pyproject.toml").read_text() for name in ("", "models"))
    author = re.search(r'authors = \[\{ name = "(.*)" \}\]', project)
    about = re.search(r'^description = "(.*)"$', project, re.MULTILINE)
    assert author is not None and about is not None
    cited = (root / "CITATION.cff").read_text()
    assert f"\n  - name: {author[1]}\n" in cited and f"\nabstract: {about[1]}\n" in cited
    assert f"\nsite_description: {about[1]}\n" in (root / "mkdocs.yml").read_text()
    assert f'"{author[1]}"' in models
    assert "\nlicense: MIT\n" in cited
    assert all('\nlicense = "MIT"\n' in text for text in (project, models))


def test_a_model_that_is_not_installed_says_what_to_install(monkeypatch, tmp_path):
    from iddpm_ext.checkpoint import read

    (tmp_path / "iddpm_ext" / "weights").mkdir(parents=True)
    monkeypatch.setattr(read, "WEIGHTS", tmp_path / "iddpm_ext" / "weights")
    with pytest.raises(FileNotFoundError, match=r"iddpm-ext-models.*pip install \./models"):
        iddpm_ext.load("cifar10-small")


def test_a_build_records_the_commit_of_its_own_repository_alone(tmp_path):
    from source_state import source_state

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert source_state(tmp_path).commit == "" and source_state(tmp_path).reason
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "x")
    found = source_state(tmp_path)
    assert (found.commit, found.changed, found.reason) == (git("rev-parse", "HEAD"), False, "")
    (tmp_path / "new").write_text("not tracked")
    assert not source_state(tmp_path).changed
    (tmp_path / "file").write_text("2")
    assert source_state(tmp_path).changed
    (tmp_path / "unpacked").mkdir()
    assert source_state(tmp_path / "unpacked").commit == ""


def test_the_description_for_an_index_has_no_relative_link():
    from index_readme import index_readme

    text = "![a](x/y.png) [b](docs/c.md), [d](https://e.org/f) and [g](#h)"
    assert index_readme(text, None) == " b, [d](https://e.org/f) and [g](#h)"
    assert index_readme(text, "https://h/p/") == (
        "![a](https://h/p/x/y.png) [b](https://h/p/docs/c.md), [d](https://e.org/f) and [g](#h)"
    )
    readme = index_readme((PACKAGE.parent / "README.md").read_text(), None)
    assert re.findall(r"\]\((?!https?:|#)", readme) == []

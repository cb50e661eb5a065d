"""Who may know whom: imports go down the house, never up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedkrso_app"
OUTSIDE_IN_CORE = {"torch", "numpy"}
ROOMS = ["core", "records", "data", "training", "strategies", "federation", "runs"]  # each may import those before it
ALLOWED = {room: {"config", *ROOMS[: i + 1]} for i, room in enumerate(ROOMS)} | {"core": {"core"}, "config": set()}
DOORS = {"cli", "server_app", "client_app", "local_app"}  # may import anything; nobody below imports them


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> list[str]:
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.Module) -> list[str]:
    """The modules that it names; of ``from fedkrso_app.federation import store`` the last."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            folder = (PACKAGE.parent / module.replace(".", "/")).is_dir() and module.startswith(PACKAGE.name)
            names += [f"{module}.{alias.name}" for alias in node.names] if folder else [module]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    name = room(path)
    if name in DOORS or name == "__init__":
        return
    ours = {module.split(".")[1] for module in imported(path) if module.startswith("fedkrso_app.")}
    assert ours <= ALLOWED[name], f"{name} must not import {ours - ALLOWED[name]}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.name)
def test_core_knows_only_torch_and_numpy(path):
    import sys

    noise = {"accounting.py": {"scipy", "dp_accounting"}, "noise.py": {"cryptography"}}
    extras = {"lora.py": {"peft"}, "few_bits.py": {"bitsandbytes"}, "ring.py": {"cryptography"}} | noise
    extra = extras.get(path.name, set())
    outside = {module.split(".")[0] for module in imported(path)} - {"fedkrso_app"}
    assert outside - set(sys.stdlib_module_names) <= OUTSIDE_IN_CORE | extra


def test_a_strategy_imports_no_sibling_but_those_that_families_are_built_on():
    common = {"base", "lora", "privacy", "secure", "scalar", "factors", "label_skew", "local_head", "fedit", "fedsrd"}
    for path in (PACKAGE / "strategies").glob("*.py"):
        if path.stem == "__init__":
            continue
        siblings = {m.split(".")[2] for m in imported(path) if m.startswith("fedkrso_app.strategies.")}
        assert siblings <= common, path


def test_only_the_doors_touch_flowers_apps():
    for path in modules():
        if room(path) not in DOORS:
            assert not any(module in ("flwr.serverapp", "flwr.clientapp") for module in imported(path)), path


def test_whoever_only_leaves_waits_for_no_library_that_trains():
    """A device meets each message with a fresh process. What these two import, and what that imports, and so on."""
    reached, left, outside = set(), {PACKAGE / "client_app.py", PACKAGE / "federation" / "store.py"}, set()
    while left:
        reached.add(path := left.pop())
        body = ast.parse(path.read_text()).body
        for module in imported_by(ast.Module([node for node in body if isinstance(node, ast.Import | ast.ImportFrom)])):
            first, *rest = module.split(".")
            if first != PACKAGE.name:
                outside.add(first)
                continue
            folders = [PACKAGE.joinpath(*rest[:i]) for i in range(len(rest) + 1)]
            files = [*(folder / "__init__.py" for folder in folders), folders[-1].with_suffix(".py")]
            left |= {file for file in files if file.is_file()} - reached
    assert "numpy" in outside and not outside & {"transformers", "peft", "datasets", "scipy"}


def test_no_pickle_anywhere():
    for path in modules():
        assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(imported(path)), path
        assert "torch.load" not in path.read_text() and "allow_pickle=True" not in path.read_text()

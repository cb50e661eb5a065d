"""`make mutants`: one small change after another to a module; prints those that its tests do not notice.

It needs cosmic-ray (`pip install cosmic-ray`) and works on a copy. Not every survivor is a gap: some changes
cost time and nothing else. `python tests/mutants.py core/srd.py` tries the modules that it names.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {  # and the tests that hold its laws, none of which needs conftest.py
    "core/fixed_point.py": "test_fixed_point",
    "core/robust.py": "test_robust",
    "core/srd.py": "test_srd",
    "records/ledger.py": "test_ledger",
}
# One or two changes of an operator tell as much as all eleven.
EXCLUDED = [
    r"core/ReplaceBinaryOperator_.*_(BitOr|BitAnd|BitXor|LShift|RShift|Mod|FloorDiv|Pow)",
    r"core/ReplaceComparisonOperator_.*_(Is|IsNot)",
    r"core/ReplaceUnaryOperator_.*_(UAdd|Invert)",
]


def survivors(module: str, tree: Path) -> str:
    """cosmic-ray's report on the changes to ``module`` that no test noticed."""
    tests = f"{sys.executable} -m pytest --noconftest -n 0 -x -q -p no:cacheprovider tests/{MODULES[module]}.py"
    (tree / "mutants.toml").write_text(
        f"[cosmic-ray]\nmodule-path = 'fedkrso_app/{module}'\ntimeout = 120.0\nexcluded-modules = []\n"
        f"test-command = '{tests}'\n[cosmic-ray.distributor]\nname = 'local'\n"
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = {EXCLUDED}\n"
    )

    def call(command: str, *arguments: str) -> str:
        program = Path(sys.executable).with_name(command)
        return subprocess.run([program, *arguments], cwd=tree, check=True, capture_output=True, text=True).stdout

    call("cosmic-ray", "init", "mutants.toml", "session.sqlite", "--force")
    call("cr-filter-operators", "session.sqlite", "mutants.toml")
    call("cosmic-ray", "baseline", "mutants.toml")
    call("cosmic-ray", "exec", "mutants.toml", "session.sqlite")
    return call("cr-report", "session.sqlite", "--surviving-only", "--show-diff")


if __name__ == "__main__":
    for module in sys.argv[1:] or MODULES:
        with tempfile.TemporaryDirectory() as scratch:
            listed = subprocess.run(
                ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
            for name in filter(None, listed.split("\0")):
                copy = Path(scratch, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((ROOT / name).read_bytes())
            print(f"== {module}\n{survivors(module, Path(scratch))}", flush=True)

"""What is shipped: the package list, the wheel's contents, one copy of every class."""

import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_package_list_equals_the_folders():
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert set(CONFIG["packages"]) == {f"basinax.{name}" for name in folders}
    assert CONFIG["package-dir"] == {f"basinax.{name}": name for name in folders}
    nested = [p for f in folders for p in (ROOT / f).glob("*/*.py")]
    assert not nested, "a sub-package missing from the list vanishes from the wheel"


def test_from_the_root_the_classes_are_the_same():
    """`import optimizers` there is a second name, not a second copy."""
    code = (
        "import optimizers, basinax.optimizers as b\n"
        "assert optimizers.SpectralClipState is b.SpectralClipState\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names_are_documented():
    import basinax.landscape
    import basinax.optimizers
    import basinax.testing

    changelog = (ROOT / "CHANGELOG.md").read_text()
    for module in (basinax.optimizers, basinax.landscape, basinax.testing):
        for name in module.__all__:
            public = getattr(module, name)
            assert f"`{name}`" in changelog, f"{name} has no changelog line"
            if isinstance(public, dict):  # it has no docstring of its own
                assert f"`{name}`" in module.__doc__, name
                continue
            assert public.__doc__, name
            if not isinstance(public, type):
                assert ">>> " in public.__doc__, f"{name} has no example"


def test_wheel_holds_the_namespace_only(tmp_path):
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "tests")
    shutil.copytree(ROOT, source, ignore=skip)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", source],
        check=True,
        capture_output=True,
    )
    (wheel,) = source.glob("dist/*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"basinax"}
    for package in CONFIG["package-dir"].values():
        assert f"basinax/{package}/py.typed" in names
        for source in (ROOT / package).glob("*.py"):
            assert f"basinax/{package}/{source.name}" in names

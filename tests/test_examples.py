"""Every script in examples/ runs as a user would run it, and says what it checked."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
# A multiple of the ten seconds each takes, for machines with other things to do.
TIMEOUT = 300


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", script],
        cwd=tmp_path,
        env={"JAX_PLATFORMS": "cpu"} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    # The last line comes after the assertions.
    assert done.stdout.splitlines()[-1].startswith("Checked: "), done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_readme_lists_every_example():
    table = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) == table.count("| [`")
    for script in SCRIPTS:
        assert f"[`{script.name}`]({script.name})" in table

"""Every Python block of the README runs as it stands."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert {"tx", "curved"} & set(names)


def test_comments_in_the_example_are_true():
    import jax.numpy as jnp

    names = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert jnp.linalg.norm(names["updates"], 2) <= 2e-2
    assert names["top"].converged.all()


def test_there_is_a_way_round_the_wall():
    names = {}
    (block,) = (block for block in BLOCKS if "bezier_path" in block)
    exec(compile(block, "README.md", "exec"), names)
    straight, curved = (names["barrier"](names[n]) for n in ("straight", "curved"))
    assert curved.height < 0.2 * straight.height

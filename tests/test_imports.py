"""What is loaded when: planning, inspecting and --help must be quick and small."""

import pytest
import torch

import shardmix
from tests.support.fresh_process import python
from tests.support.models import random_model, save_model

HEAVY = ("torch", "transformers", "accelerate", "matplotlib")


def loaded_after(code):
    check = f"print([m for m in {HEAVY!r} if m in sys.modules])"
    return python(f"import sys\n{code}\n{check}").splitlines()[-1]


def test_package_loads_next_to_nothing():
    """Importing shardmix loads next to nothing."""
    code = "import shardmix\nprint('numpy' in sys.modules)"
    assert python(f"import sys\n{code}").split() == ["False"]
    assert loaded_after("import shardmix, shardmix.api, shardmix.scoring") == "[]"
    weigh = "import shardmix.scoring\nshardmix.scoring.compute_weights([1.0, 2.0], 5.0)"
    assert loaded_after(weigh) == "[]"


def test_examples_are_checked_without_torch(tmp_path):
    code = (
        "import shardmix\n"
        "try: shardmix.mix_models_with_data(['a', 'b'], 'decoder', [{'input': 'x'}])\n"
        "except shardmix.RecipeError: pass"
    )
    assert loaded_after(code) == "[]"


@pytest.mark.parametrize(
    "command",
    ["--help", "merge --help", "score --help", "plan --help", "verify --help", "inspect --help"],
)
def test_help_loads_no_torch_and_no_engine(command):
    """Help loads neither torch nor the engine."""
    run = (
        f"sys.argv = ['shardmix', *{command.split()!r}, '--help']\n"
        "from shardmix.cli.commands import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded_after(run) == "[]"


def test_command_line_loads_only_click():
    """The command line itself loads click, and nothing else."""
    names = (*HEAVY, "rich", "msgspec", "numpy", "psutil", "yaml", "huggingface_hub", "pydantic")
    names += ("logging",)
    code = f"import sys, shardmix.cli.commands\nprint([m for m in {names!r} if m in sys.modules])"
    assert python(code) == "[]\n"


def test_plan_loads_only_what_it_needs(tmp_path):
    """A plan of local safetensors folders loads none of what reads, writes or downloads weights."""
    a, b = (save_model(tmp_path / name, random_model(1)) for name in "ab")
    needless = (
        *("compute.", "execute.", "profiling.", "verification.", "scoring.", "output.staging"),
        *("sources.adapt", "sources.hub", "sources.readers", "conventions.peft"),
        *("sources.quantis", "matching.tied_copies", "formats.torch_file", "errors.logs"),
        *("formats.output_coding", "formats.coded_tensors", "formats.small_floats"),
    )
    code = (
        f"import sys, shardmix\nshardmix.plan_merge({{{str(a)!r}: 0.5, {str(b)!r}: 0.5}})\n"
        "loaded = [name.removeprefix('shardmix.') for name in sys.modules]\n"
        f"print([name for name in loaded if name.startswith({needless!r})])"
    )
    assert python(code) == "[]\n"


def test_merge_loads_no_other_command(tmp_path):
    """A merge loads nothing of other commands."""
    a, b = (save_model(tmp_path / name, random_model(1)) for name in "ab")
    names = ("verification", "output_status", "by_examples", "scorer.examples", "cli.render")
    code = (
        f"sys.argv = ['shardmix', 'merge', '{a}=0.5', '{b}=0.5', '-o', {str(tmp_path / 'o')!r}]\n"
        "from shardmix.cli.commands import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        f"print([m for m in {names!r} if 'shardmix.' + m in sys.modules])"
    )
    assert python(f"import sys\n{code}").splitlines()[-1] == "['cli.render']"


def test_commands_without_sums_load_no_torch(tmp_path):
    """Planning, inspecting, status and verifying load no torch."""
    a, b = (save_model(tmp_path / name, random_model(1)) for name in "ab")
    code = (
        f"import shardmix\nshardmix.plan_merge({{{str(a)!r}: 0.5, {str(b)!r}: 0.5}}, 'out')\n"
        f"shardmix.inspect({str(a)!r})\nshardmix.status({str(tmp_path / 'out')!r})\n"
        f"assert shardmix.verify({str(tmp_path / 'out')!r}).is_verified"
    )
    shardmix.merge({a: 0.5, b: 0.5}, tmp_path / "out")
    assert loaded_after(code) == "[]"


def test_bfloat16_merge_needs_no_torch(tmp_path):
    """A merge of bfloat16 on the CPU needs no torch if LLVM is there."""
    pytest.importorskip("llvmlite", reason="needs llvmlite")
    a, b = (save_model(tmp_path / name, random_model(1, torch.bfloat16)) for name in "ab")
    models = f"{{{str(a)!r}: 0.5, {str(b)!r}: 0.5}}"
    out, profile = str(tmp_path / "o"), str(tmp_path / "run.json")
    code = f"import shardmix\nshardmix.merge({models}, {out!r}, profile={profile!r})"
    assert loaded_after(code) == "[]"


def test_every_public_name_is_there():
    import shardmix

    for name in shardmix.__all__:
        assert getattr(shardmix, name) is not None
    assert set(shardmix.__all__) <= set(dir(shardmix))
    with pytest.raises(AttributeError):
        shardmix.no_such_name  # noqa: B018

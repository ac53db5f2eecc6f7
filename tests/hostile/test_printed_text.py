"""Names come from strangers: what is printed of them obeys no terminal, breaks no line or table."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import yaml
from click.testing import CliRunner

import shardmix
from shardmix.cli import render
from shardmix.cli.commands import app
from shardmix.errors import one_line, printable, shown
from shardmix.recipe.yaml_file import load_recipe
from shardmix.sources import hub
from shardmix.sources.resolve import resolve
from tests.support.hostile_inputs import a_model, safetensors_file

HOSTILE = "a\x1b[2J\n\r\u202e\x9b31m\x7f\u2028\U000e0041[red]|`"
ESCAPED = "a\\x1b[2J\\n\\r\\u202e\\x9b31m\\x7f\\u2028\\U000e0041[red]|`"


def obeys_nothing(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def run(*words: object) -> tuple[str, str]:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_error_is_escaped_for_programs_too():
    """An error is escaped also if a program prints it."""
    assert str(shardmix.SourceError(f"{HOSTILE}: bad")) == f"{ESCAPED}: bad"


def test_markup_is_shown_as_it_is(tmp_path):
    """What looks like markup or a picture is shown as it is."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    content = safetensors_file(json.dumps({"[bold]:smile:.weight": entry}), 4)
    stdout, _ = run("inspect", a_model(tmp_path / ":heart:", {"model.safetensors": content}))
    assert "[bold]:smile:.weight" in stdout
    assert ":heart:" in stdout


def hostile_model(folder: Path) -> Path:
    """A model that can be merged, with such names wherever a model has names."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    other = {"dtype": "I64", "shape": [1], "data_offsets": [4, 12]}
    header = json.dumps({f"{HOSTILE}.weight": entry, f"{HOSTILE}.count": other})
    config = {"architectures": [HOSTILE], "model_type": HOSTILE}
    content = safetensors_file(header, 12)
    return a_model(folder, {"model.safetensors": content, "config.json": json.dumps(config)})


def test_only_obeyed_text_is_escaped():
    """Text is escaped where a terminal would obey, and left alone elsewhere."""
    assert printable(HOSTILE) == ESCAPED
    assert printable("modèle/名前 × Σ") == "modèle/名前 × Σ"
    assert one_line(ValueError(f"x {HOSTILE}")).isprintable()
    assert shown(HOSTILE).isprintable()
    assert shown("x" * 100) == "'" + "x" * 59 + "..."


@pytest.mark.parametrize("more", [[], ["--json"], ["--all"]])
def test_inspect_shows_hostile_names_escaped(tmp_path, more):
    stdout, stderr = run("inspect", hostile_model(tmp_path / HOSTILE), *more)
    assert obeys_nothing(stdout)
    assert stderr == ""
    if more == ["--json"]:
        names = {tensor["name"] for tensor in json.loads(stdout)["tensors"]}
        assert names == {f"{HOSTILE}.weight", f"{HOSTILE}.count"}  # escaped, not changed
    else:
        assert f"{ESCAPED}.weight" in stdout


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_reports_show_hostile_names_escaped(tmp_path, command, more):
    """Plans and merges show hostile names escaped."""
    models = [hostile_model(tmp_path / f"{n}{HOSTILE}") for n in "ab"]
    content = (models[1] / "model.safetensors").read_bytes()
    (models[1] / "model.safetensors").write_bytes(content[:-8] + b"\1" * 8)  # an integer differs
    words = [f"{model}=0.5" for model in models]
    stdout, stderr = run(command, *words, "-o", tmp_path / f"out{HOSTILE}", *more)
    assert obeys_nothing(stdout)
    assert obeys_nothing(stderr)
    if command == "merge":
        assert f"warning: {ESCAPED}.count: differs in" in stderr


def test_card_of_hostile_names_stays_a_card(tmp_path):
    """A model card of hostile names is text, a table and a recipe."""
    models = [(hostile_model(tmp_path / f"{n}{HOSTILE}"), 0.5) for n in "ab"]
    shardmix.merge(models, tmp_path / f"out{HOSTILE}")
    card = (tmp_path / f"out{HOSTILE}" / "README.md").read_text()
    assert obeys_nothing(card)
    rows = [line for line in card.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == 1
    assert rows[0].count("|") == 4
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == [f"a{ESCAPED}", f"b{ESCAPED}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(body.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(recipe).sources == (f"a{ESCAPED}", f"b{ESCAPED}")


def test_servers_words_are_logged_escaped(monkeypatch, caplog):
    """What a server says is logged escaped."""

    def fail(*_, **__):
        raise OSError(f"server says: {HOSTILE}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_cached", lambda *_, **__: Path("/nowhere"))
    with caplog.at_level(logging.WARNING):
        resolve("org/name@\x1b[2J")
    assert "server says: a\\x1b[2J" in caplog.text
    assert "org/name@\\x1b[2J: the Hub cannot be asked" in caplog.text
    assert obeys_nothing(caplog.text)


def test_templates_are_copied_not_pickles(tmp_path):
    """Templates and code are copied as they are, and pickles are not touched."""
    harm = tmp_path / "harm"
    pickle = f"cos\nsystem\n(S'touch {harm}'\ntR.".encode()
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {harm}') }}}}\x1b[2J".encode()
    files = {
        "chat_template.jinja": template,
        "additional_chat_templates/rag.jinja": template,
        "modeling_x.py": f"open({str(harm)!r}, 'w')".encode(),
        "tokenizer_config.json": json.dumps({"chat_template": template.decode()}).encode(),
        "pytorch_model.bin": pickle,
        "training_args.pt": pickle,
        "model.pth": pickle,
    }
    weights = safetensors_file('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4)
    files["model.safetensors"] = weights
    models = [a_model(tmp_path / name, files) for name in "ab"]
    run("inspect", models[0])
    run("plan", *(f"{model}=0.5" for model in models))
    run("merge", *(f"{model}=0.5" for model in models), "-o", tmp_path / "out")
    for name, content in files.items():
        copied = tmp_path / "out" / name
        if name.endswith((".bin", ".pt", ".pth")):
            assert not copied.exists()
        elif name != "model.safetensors":
            assert copied.read_bytes() == content
    assert not harm.exists()


def test_hub_caches_links_are_followed(tmp_path):
    """Auxiliary files of the Hub's cache are followed."""
    repository = tmp_path / "models--org--name"
    snapshot = a_model(repository / "snapshots" / "c0ffee")
    (snapshot / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (repository / "blobs").mkdir()
    (repository / "blobs" / "0123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/0123")
    plan = shardmix.plan_merge([(snapshot, 0.5), (snapshot, 0.5)])
    assert {"tokenizer.json", "1_Pooling/config.json"} <= set(plan.auxiliary_files)


def test_linked_folder_is_a_source_as_any(tmp_path):
    """A folder that is itself a link is a source as any."""
    a_model(tmp_path / "disk" / "model")
    (tmp_path / "model").symlink_to("disk/model")
    assert shardmix.inspect(tmp_path / "model").num_tensors == 1


@dataclass(frozen=True, slots=True)
class Told:
    """A report with every kind of field."""

    name: str
    count: int
    nothing: None
    empty: tuple[str, ...]
    items: tuple[dict[str, object], ...]
    words: tuple[str, ...]
    inner: dict[str, list[int]]


def test_json_in_pieces_is_the_json(capsys):
    """Item by item it is what it would be as one text."""
    told = Told(
        "a\nb", 3, None, (), ({"x": [1, {}], "y": "\n  "}, {}), ("ä\u2028",), {"z": [], "w": [1, 2]}
    )
    render._print_json(told)
    printed = capsys.readouterr().out
    whole = msgspec.json.format(msgspec.json.encode(told), indent=2).decode()
    assert printed == whole.replace("\u2028", "\\u2028") + "\n"
    render._print_json({"error": {"kind": "x"}})
    assert capsys.readouterr().out == '{\n  "error": {\n    "kind": "x"\n  }\n}\n'

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from shardmix.cli.commands import app
from shardmix.scoring import compute_weights
from tests.support.cut_off import cut_off, large_models
from tests.support.language_models import TEXTS, save_language_model, write_examples
from tests.support.models import assert_same_bits, load_model, random_model, save_model
from tests.support.sealed import edit_provenance

REPORT_KEYS = (
    *("output", "num_tensors", "num_models", "bytes_read", "bytes_written", "seconds", "device"),
    *("strip_bytes", "workers", "projected_peak_bytes", "peak_rss_bytes", "peak_vram_bytes"),
    *("weights", "shards", "warnings"),
)


def shardmix(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "shardmix", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        **options,
    )


def refused(*words):
    """Return the exit status and the one message of a command that fails, run in this process."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    result = runner.invoke(app, [*map(str, words)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / name, random_model(seed)) for seed, name in enumerate("ab")]


def words(models, weights=(0.5, 0.5)):
    return [f"{model}={weight}" for model, weight in zip(models, weights, strict=True)]


def test_json_report_goes_with_progress(models, tmp_path):
    """A merge reports as JSON on standard output and shows progress on standard error."""
    done = shardmix("merge", *words(models), "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for key in REPORT_KEYS:
        assert key in report
    assert report["weights"] == [0.5, 0.5]
    assert {"name", "bytes"} <= set(report["shards"][0])
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]
    last = done.stderr.splitlines()[-1]
    assert "merging: 100%" in last
    assert "shards 1/1" in last
    assert "\x1b" not in done.stderr  # plain lines where there is no terminal
    assert set(load_model(tmp_path / "out")) == set(random_model(0))


def test_quiet_prints_nothing(models, tmp_path):
    done = shardmix("merge", *words(models), "-o", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_recipe_file_merges_as_its_words(models, tmp_path):
    """A recipe file merges as the same words on the command line would."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "models:\n"
        f"- {{model: {models[0]}, parameters: {{weight: 3}}}}\n"
        f"- {{model: {models[1]}, parameters: {{weight: 1}}}}\n"
        "dtype: bfloat16\n"
    )
    assert shardmix("merge", recipe, "-o", tmp_path / "a").returncode == 0
    by_words = words(models, (0.75, 0.25))
    assert shardmix("merge", *by_words, "-o", tmp_path / "b", "--dtype", "bfloat16").returncode == 0
    assert_same_bits(load_model(tmp_path / "a"), load_model(tmp_path / "b"))


def change_weight(provenance):
    provenance["recipe"]["models"][0]["parameters"]["weight"] = 0.7


def plan_of(*words):
    done = shardmix("plan", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_method_and_parameters_are_words(models, tmp_path):
    """--method, --base-model and -p say what a recipe would, also on top of one."""
    a, b = models
    report = plan_of(a, b, "--method", "slerp", "--base-model", a, "-p", "t=0.25")
    assert report["recipe"] == {
        "merge_method": "slerp",
        "models": [{"model": str(b)}],
        "base_model": str(a),
        "parameters": {"t": 0.25},
    }
    assert report["weights"] == [None, None]
    (group,) = report["parameters"]
    assert group["shared"] == {"t": 0.25}
    assert group["num_tensors"] == report["num_tensors"] - 1  # one is of integers
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(report["recipe"]))
    assert plan_of(recipe)["plan_digest"] == report["plan_digest"]
    assert plan_of(recipe, "-p", "t=0.5")["parameters"][0]["shared"] == {"t": 0.5}


def test_normalize_is_a_parameter(models):
    """--normalize is short for -p normalize=true."""
    digests = {
        plan_of(*words(models, (3, 1)), *more)["plan_digest"]
        for more in (["--normalize"], ["-p", "normalize=true"])
    }
    assert len(digests) == 1
    scaled = plan_of(f"{models[1]}=2", "--method", "task_arithmetic", "--base-model", models[0])
    assert scaled["parameters"][0]["by_model"] == [{"weight": 2.0}]


def test_plan_shows_parameters_by_tensor(models):
    """The plan lists the parameters of groups of tensors."""
    done = shardmix(
        *("plan", models[1], "--method", "slerp", "--base-model", models[0], "-p", "t=0,1")
    )
    assert "slerp" in done.stdout, done.stderr
    for flaw, finding in (("s=1", "no parameter 's'"), ("t=2", "at most 1"), ("t", "NAME=VALUE")):
        done = shardmix(
            "plan", models[1], "--method", "slerp", "--base-model", models[0], "-p", flaw
        )
        assert done.returncode == 2
        assert finding in done.stderr


@pytest.mark.parametrize("command", [["plan"], ["merge", "--dry-run"]])
def test_a_plan_writes_nothing_and_tells_all(models, tmp_path, command):
    out = tmp_path / "out"
    done = shardmix(*command, *words(models), "-o", out, "--json", "--max-memory", "2GiB")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["disk_needed_bytes"] > 0
    assert report["disk_free_bytes"] > 0
    assert report["projected_peak_bytes"] <= 2 * 2**30
    assert report["shards"][0]["bytes_read"] == report["bytes_read"]
    assert list(tmp_path.iterdir()) == []


def test_plan_for_people_names_what_matters(models):
    done = shardmix("plan", *words(models))
    assert done.returncode == 0
    for text in ("model.safetensors", "peak memory", "chunks", "disk", "read", "write"):
        assert text in done.stdout


def test_merge_keeps_what_plan_projects(models, tmp_path):
    plan = json.loads(shardmix("plan", *words(models), "--json").stdout)
    done = shardmix("merge", *words(models), "-o", tmp_path / "out", "--json", "-q")
    assert json.loads(done.stdout)["peak_rss_bytes"] <= plan["projected_peak_bytes"]


def test_inspect_shows_the_tensors(models):
    done = shardmix("inspect", models[0])
    assert done.returncode == 0
    assert "model.embed_tokens.weight" in done.stdout
    report = json.loads(shardmix("inspect", models[0], "--json").stdout)
    assert report["num_parameters"] == sum(t.numel() for t in random_model(0).values())
    assert report["tensors"][0].keys() >= {"name", "dtype", "shape"}


def test_inspect_finds_a_tied_head(reference):
    done = shardmix("inspect", reference / "decoder-bf16-tied" / "model-a", "--json")
    assert json.loads(done.stdout)["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_inspect_invents_no_head(reference):
    """An encoder has no output head, though its config says that embeddings are tied."""
    done = shardmix("inspect", reference / "encoder" / "model-a", "--json")
    assert json.loads(done.stdout)["tied"] == {}


@pytest.mark.parametrize(
    ("arguments", "status", "finding"),
    [
        (["{a}=0.5", "{b}=0.6"], 2, "weights sum to 1.1, not 1"),
        (["{a}=0.5"], 2, "a merge needs at least two"),
        (["{a}", "{b}=0.5"], 2, "no weight given"),
        (["{a}=nan", "{b}=0.5"], 2, "not a finite number"),
        (["{a}=0.5", "none/there/at=0.5"], 1, "no such file or folder"),
        (["{a}=0.5", "{b}=0.5", "--max-memory", "10MiB"], 1, "the least that works here is"),
        (["{a}=0.5", "{b}=0.5", "--max-memory", "plenty"], 2, "size 'plenty'"),
        (["{a}=0.5", "{b}=0.5", "--device", "tpu"], 2, "device 'tpu'"),
        (["{a}=0.5", "{b}=0.5", "--dtype", "int4"], 2, "dtype 'int4'"),
        (["{a}=0.5", "{b}=0.5", "--workers", "many"], 2, "--workers"),
        (["{a}=0.5", "{b}=0.5", "--frobnicate"], 2, "--frobnicate"),
        (["{a}=0.5", "{b}=0.5", "--overwrit"], 2, "Did you mean '--overwrite'?"),
        ([], 2, "Missing argument 'SOURCE=WEIGHT...'"),
        (["none.yaml"], 2, "cannot be read"),
    ],
)
def test_users_mistake_is_one_message(models, tmp_path, arguments, status, finding):
    """A user's mistake is one message and an exit status."""
    filled = [word.format(a=models[0], b=models[1]) for word in arguments]
    found, message = refused("merge", *filled, "-o", tmp_path / "out")
    assert found == status
    assert finding in message
    assert list(tmp_path.iterdir()) == []


def test_options_stand_anywhere(models, tmp_path):
    """Options may come last, first or together, and two dashes end them."""
    first, second = words(models)
    for arguments in (
        [first, "-o", tmp_path / "out", second, "--workers=1", "-q"],
        ["-qo", tmp_path / "out", "--overwrite", "--", first, second],
    ):
        done = shardmix("merge", *arguments)
        assert (done.returncode, done.stderr) == (0, "")


def test_bare_call_prints_help():
    """Without a command there is help, with every command in its order."""
    done = shardmix()
    listed = re.findall(r"^  ([a-z]+)  ", done.stderr, flags=re.MULTILINE)
    named = ["merge", "convert", "extract", "score", "plan", "verify", "status", "inspect"]
    assert listed == named
    assert shardmix("-h").stdout == shardmix("--help").stdout
    assert shardmix("--version").stdout.startswith("shardmix ")


def test_help_fits_a_terminal_of_80_columns():
    for command in ("merge", "convert", "score", "plan", "verify", "status", "inspect"):
        lines = shardmix(command, "--help").stdout.splitlines()
        assert max(map(len, lines)) <= 80
        assert f"shardmix {command} " in lines[-1]  # the example, in one line


def test_an_error_is_also_told_as_json(models, tmp_path):
    done = shardmix("merge", f"{models[0]}=1", "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["error"]["kind"] == "RecipeError"


def test_existing_output_needs_overwrite(models, tmp_path):
    """An existing output is replaced only if asked."""
    out = tmp_path / "out"
    arguments = ["merge", *words(models), "-o", out, "-q"]
    assert shardmix(*arguments).returncode == 0
    again = shardmix(*arguments)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert shardmix(*arguments, "--overwrite").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_control_characters_are_escaped(tmp_path):
    """Control characters of a stranger's file are never printed raw."""
    tensors = random_model(0)
    tensors["evil\x1b[2Jname[bold]"] = tensors.pop("lm_head.weight")
    save_model(tmp_path / "a", tensors)
    done = shardmix("inspect", tmp_path / "a")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert r"evil\x1b[2Jname[bold]" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_merge_that_resumes(tmp_path, number, status):
    """A signal stops the merge, and the same command goes on with it.

    The sources are large enough that the merge is still under way at its first progress line.
    """
    import torch

    tensors = {f"t{i}": torch.zeros(4_000_000) for i in range(20)}
    models = [save_model(tmp_path / name, tensors) for name in "ab"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shardmix", "merge", *words(models), "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "merging" in process.stderr.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    kept = tmp_path / ".out.shardmix"
    if kept.exists():
        assert f"are done and kept in {kept}: the same merge goes on from there" in errors
    else:
        assert "nothing was written" in errors
    assert not (tmp_path / "out").exists()
    done = shardmix("merge", *words(models), "-o", tmp_path / "out", "--json", "--quiet")
    assert done.returncode == 0
    assert (json.loads(done.stdout)["bytes_kept"] > 0) == ("are done and kept" in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    for seed, name in enumerate("ab"):
        save_language_model("llama", folder / name, seed=seed)
    write_examples(folder / "examples.jsonl", TEXTS)
    return folder


def test_score_reports_as_json(decoders):
    done = shardmix(
        *("score", decoders / "a", decoders / "b", "--data", decoders / "examples.jsonl"),
        *("--model-type", "decoder", "--temperature", "0.5", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weights"] == pytest.approx(compute_weights(report["losses"], 0.5))
    assert [len(row) for row in report["per_example"]] == [len(TEXTS)] * 2
    assert "scoring model 2 of 2" in done.stderr
    assert "\x1b" not in done.stderr


def in_this_process(*words):
    """Run a command where torch and transformers are loaded already."""
    return CliRunner().invoke(app, [str(word) for word in words])


def test_score_for_people_is_a_table(decoders):
    done = in_this_process(
        *("score", decoders / "a", decoders / "b", "--data", decoders / "examples.jsonl"),
        *("--model-type", "decoder"),
    )
    assert done.exit_code == 0, done.stderr
    assert "loss" in done.stdout
    assert "5 examples, temperature 5" in done.stdout


def test_examples_score_and_merge_in_one_go(decoders, tmp_path):
    done = shardmix(
        *("merge", decoders / "a", decoders / "b", "--weights-from", decoders / "examples.jsonl"),
        *("--model-type", "decoder", "--temperature", "0.5", "-o", tmp_path / "out", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weights"] == report["scores"]["weights"]
    by_hand = [f"{decoders}/{n}={w!r}" for n, w in zip("ab", report["weights"], strict=True)]
    assert shardmix("merge", *by_hand, "-o", tmp_path / "by-hand").returncode == 0
    assert_same_bits(load_model(tmp_path / "out"), load_model(tmp_path / "by-hand"))


def test_examples_may_come_through_a_pipe(decoders, tmp_path):
    done = shardmix(
        *("merge", decoders / "a", decoders / "b", "--weights-from", "/dev/stdin", "-q"),
        *("--model-type", "decoder", "-o", tmp_path / "out"),
        input="".join(json.dumps(text) + "\n" for text in TEXTS),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_dry_run_scores_no_examples(decoders, tmp_path):
    """A dry run from examples scores nothing."""
    done = shardmix(
        *("merge", decoders / "a", decoders / "b", "--weights-from", decoders / "examples.jsonl"),
        *("--model-type", "decoder", "-o", tmp_path / "out", "--json", "--dry-run"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"] == [0.5, 0.5]
    assert "scoring" not in done.stderr


def test_score_takes_a_recipe(decoders, tmp_path):
    """The models of a recipe are scored; their weights need not be there yet."""
    names = [str(decoders / name) for name in "ab"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"models": [{"model": name} for name in names]}))
    done = in_this_process(
        *("score", recipe, "--data", decoders / "examples.jsonl", "--model-type", "decoder"),
        "--json",
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["sources"] == names


@pytest.mark.parametrize(
    ("words", "status", "finding"),
    [
        (["score", "{a}", "--data", "none.json", "--model-type", "decoder"], 2, "cannot be read"),
        (["score", "{a}", "--data", "{x}", "--model-type", "llm"], 2, "model type 'llm'"),
        (["score", "{a}", "--data", "{x}", "--model-type", "encoder"], 2, "`query` is missing"),
        (["score", "{a}", "--data", "{x}"], 2, "--model-type"),
        (["score", "none/at/all", "--data", "{x}", "--model-type", "decoder"], 1, "no such file"),
        (["merge", "{a}", "{b}", "--weights-from", "{x}", "-o", "o"], 2, "needs --model-type"),
        (
            ["merge", "{a}=0.5", "{b}", "--weights-from", "{x}", "--model-type", "decoder"],
            2,
            "name only the models",
        ),
        (["merge", "{a}=0.5", "{b}=0.5", "--temperature", "1"], 2, "is for --weights-from"),
        (
            ["merge", "r.yaml", "--weights-from", "{x}", "--model-type", "decoder"],
            2,
            "r.yaml: is a recipe, which has weights",
        ),
        (
            ["merge", "{a}", "{b}", "--weights-from", "n", "--model-type", "decoder", "--dry-run"],
            2,
            "n: cannot be read",
        ),
    ],
)
def test_a_mistake_in_scoring_is_one_message(
    decoders, tmp_path, monkeypatch, words, status, finding
):
    places = {"a": decoders / "a", "b": decoders / "b", "x": decoders / "examples.jsonl"}
    filled = [word.format(**places) for word in words]
    output = ["-o", tmp_path / "out"] if words[0] == "merge" and "-o" not in words else []
    monkeypatch.chdir(tmp_path)
    found, message = refused(*filled, *output)
    assert found == status
    assert finding in " ".join(message.split())
    assert list(tmp_path.iterdir()) == []


def test_verify_exits_1_if_anything_is_wrong(models, tmp_path):
    """Verify says what is right, and exits with 1 if something is not."""
    out = tmp_path / "out"
    assert shardmix("merge", *words(models), "-o", out, "--quiet").returncode == 0
    places = [f"--source={model.name}={model}" for model in models]
    done = shardmix("verify", out, "--recompute", *places)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert "are what the sources give" in done.stdout
    assert done.stderr.count("verifying: 100%") == 1
    assert "shards 1/1" in done.stderr.splitlines()[-1]
    with (out / "config.json").open("a") as file:
        file.write(" ")
    for quiet in ([], ["--quiet"]):
        done = shardmix("verify", out, *quiet)
        assert done.returncode == 1
        assert "config.json: has" in done.stderr
    done = shardmix("verify", out, "--json", "--quiet")
    assert done.returncode == 1
    assert json.loads(done.stdout)["is_verified"] is False
    done = shardmix("verify", out, "--recompute", "--source", "nonsense")
    assert (done.returncode, "must be NAME=PATH" in done.stderr) == (2, True)


def test_status_shows_what_is_there(models, tmp_path):
    """Status shows what is there and what is not."""
    out = tmp_path / "out"
    assert "does not exist" in shardmix("status", out).stdout
    shardmix("merge", *words(models), "-o", out, "--quiet")
    done = shardmix("status", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete, a × 0.5, b × 0.5; 2 files" in done.stdout
    sha256 = hashlib.sha256((out / "shardmix.json").read_bytes()).hexdigest()
    assert sha256 in shardmix("verify", out).stdout
    edit_provenance(out, change_weight, is_sealed=False)
    done = shardmix("status", out)
    assert "complete, a × 0.7" in done.stdout
    assert "but shardmix.json is not as the merge wrote it" in done.stdout
    cut_off(large_models(tmp_path), out, overwrite=True)
    done = shardmix("status", out)
    assert "complete, a × 0.7" in done.stdout
    assert "unfinished, m0 × 0.6, m1 × 0.4; 12.6 MB of 28.0 MB, 0 of 2 files" in done.stdout
    assert "no process is at work on it" in done.stdout
    assert json.loads(shardmix("status", out, "--json").stdout)["unfinished"]["num_shards"] == 2


def test_a_merge_that_goes_on_says_so(tmp_path):
    models = large_models(tmp_path)
    cut_off(models, tmp_path / "out")
    done = shardmix(
        "merge", *words([model for model, _ in models], (0.6, 0.4)), "-o", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "went on where an earlier merge was cut off: 25.2 MB did not have to be read" in done.stdout
    )
    assert "by an earlier merge)" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--json"], ["status"], ["--help"]])
def test_unprintable_output_is_one_line(tmp_path, words):
    """Output that cannot be printed is one line of error."""
    model = save_model(tmp_path / "m", random_model(0))
    words = words if words == ["--help"] else [*words, str(model)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "shardmix", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == ("error: standard output: cannot be written (No space left on device)\n")

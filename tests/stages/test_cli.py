"""The command line: results, exit codes, JSON on stdout alone, and one clear line for whatever a user gets wrong."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mambaquant_ext
from stages.commands import in_process
from stages.hf_models import tiny_model

TEXT = (
    "The state of a Mamba block is a matrix; here it decays, and every token adds to it. ÄÖÜ ∑ 漢字\n"
    * 60
)
VOCAB = 300


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a float model, a text, and the model quantized by the command."""
    folder = tmp_path_factory.mktemp("work")
    model = tiny_model(vocab_size=VOCAB)
    model.save_pretrained(folder / "float")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "float" / "tokenizer.json"))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "latin1.txt").write_bytes("Käse".encode("latin-1") * 100)
    result = in_process(
        "quantize",
        folder / "float",
        "--calib",
        folder / "text.txt",
        "--out",
        folder / "int8",
        "--window",
        "40",
        "--samples",
        "8",
    )
    assert result == 0
    return folder


# What the commands do


def test_quantize_reports_what_it_wrote(as_json, work, tmp_path):
    values = as_json(
        "quantize",
        work / "float",
        "--calib",
        work / "text.txt",
        "--out",
        tmp_path / "out",
        "--recipe",
        "quarot",
        "--window",
        "40",
        "--samples",
        "3",
        "--batch",
        "2",
        "--seed",
        "5",
    )
    assert values["recipe"]["name"] == "quarot"
    assert values["calibration"]["samples"] == 3
    assert values["calibration"]["values"] == 120
    assert values["calibration"]["batches"] == 2
    assert values["calibration"]["seed"] == 5
    assert values["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        work / "float" / "tokenizer.json"
    ).read_bytes()


def test_quantize_is_reproducible_and_follows_its_seed(as_json, work, tmp_path):
    checksums = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        as_json(
            "quantize",
            work / "float",
            "--calib",
            work / "text.txt",
            "--out",
            tmp_path / name,
            "--recipe",
            "rtn",
            "--window",
            "40",
            "--samples",
            "2",
            "--seed",
            seed,
        )
        metadata = json.loads((tmp_path / name / "mambaquant.json").read_text())
        checksums.append((metadata["tensors_sha256"], metadata["calibration"]["sha256"]))
    assert checksums[0] == checksums[1]
    assert checksums[0][1] != checksums[2][1]


def test_eval_sets_the_quantized_model_beside_the_float_one(as_json, work):
    options = ("--text", work / "text.txt", "--window", "40", "--limit", "4")
    values = as_json("eval", work / "int8", *options, "--float", work / "float")
    assert list(values) == ["float32", "integer"]
    for row in values.values():
        assert row["predicted_tokens"] == 4 * 39
        assert row["perplexity"] > 1
    assert values["integer"]["perplexity"] == pytest.approx(
        values["float32"]["perplexity"], rel=0.05
    )
    assert values["integer"]["size_bytes"] < values["float32"]["size_bytes"]
    emulated = as_json("eval", work / "int8", *options, "--emulated")["emulated"]
    assert emulated["nll"] == pytest.approx(values["integer"]["nll"], rel=1e-3)
    alone = as_json("eval", work / "float", *options)["float32"]
    assert alone["nll"] == values["float32"]["nll"]


def test_eval_does_not_depend_on_the_batch(as_json, work):
    results = [
        as_json(
            "eval",
            work / "int8",
            "--text",
            work / "text.txt",
            "--window",
            "40",
            "--limit",
            "5",
            "--batch",
            batch,
        )["integer"]["nll"]
        for batch in (1, 4)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_greedy_generation_is_reproducible(as_json, work):
    options = ("generate", work / "int8", "--prompt", "The state", "--tokens", "12")
    first, second = as_json(*options, "--seed", "1"), as_json(*options, "--seed", "2")
    assert first["text"] == second["text"]
    assert first["prompt"] == "The state"
    assert 0 < first["tokens"] <= 12


def test_sampling_follows_its_seed(as_json, work):
    options = ("generate", work / "int8", "--prompt", "The", "--tokens", "20", "--temperature", "3")
    texts = [as_json(*options, "--top-k", "0", "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_prints_the_prompt_and_what_the_json_holds(as_json, command, work):
    options = ("generate", work / "int8", "--prompt", "A Mamba ∑", "--tokens", "12")
    values = as_json(*options)
    status, out, err = command(*options)
    assert status == 0
    assert out == values["prompt"] + values["text"] + "\n"
    assert "tok/s" in err


def test_generate_reports_how_it_ended_and_how_fast(as_json, command, work):
    options = ("generate", work / "int8", "--prompt", "The state of", "--tokens", "5")
    values = as_json(*options)
    assert values["finish_reason"] == "length"
    assert values["prompt_tokens"] > 1
    for rate in ("time_to_first_token_ms", "prompt_tokens_per_second", "tokens_per_second"):
        assert values[rate] > 0, rate
    _, _, err = command(*options)
    assert f"{values['prompt_tokens']} prompt tokens" in err
    assert "first token after" in err


@pytest.mark.parametrize("folder", ["int8", "float"])
def test_generate_takes_every_option_of_sampling(folder, as_json, work):
    options = ("generate", work / folder, "--prompt", "The", "--tokens", "8", "--temperature", "2")
    every = (*options, "--seed", "3", "--top-k", "0")
    plain = as_json(*every)
    assert as_json(*every)["text"] == plain["text"]
    greedy = as_json(*options[:-2])["text"]
    assert as_json(*every, "--top-p", "1e-9")["text"] == greedy
    assert as_json(*options, "--top-k", "1")["text"] == greedy
    assert as_json(*options[:-2], "--repetition-penalty", "1e9")["text"] != greedy


@pytest.mark.parametrize("folder", ["int8", "float"])
def test_generate_ends_before_a_stop_string(folder, as_json, work):
    options = ("generate", work / folder, "--prompt", "The", "--tokens", "12")
    text = as_json(*options)["text"]
    stop = text[2:4]
    values = as_json(*options, "--stop", "not in it", "--stop", stop)
    assert values["text"] == text[: text.index(stop)]
    assert values["finish_reason"] == "stop"
    assert values["tokens"] < 12


def test_generate_reads_its_prompt_from_a_file_or_stdin(as_json, work, tmp_path, monkeypatch):
    prompt = "A Mamba ∑\n"
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    options = ("--tokens", "4")
    expected = as_json("generate", work / "int8", "--prompt", prompt, *options)
    from_file = as_json(
        "generate", work / "int8", "--prompt-file", tmp_path / "prompt.txt", *options
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    from_stdin = as_json("generate", work / "int8", "--prompt-file", "-", *options)
    for values in (from_file, from_stdin):
        assert (values["prompt"], values["text"]) == (prompt, expected["text"])


def test_generate_runs_the_float_model_too(as_json, work):
    assert as_json("generate", work / "float", "--prompt", "The", "--tokens", "3")["tokens"] == 3


def test_inspect_of_a_float_model_shows_every_step(as_json, command, work, tmp_path):
    options = (
        "inspect",
        work / "float",
        "--calib",
        work / "text.txt",
        "--window",
        "40",
        "--samples",
        "8",
    )
    rows = as_json(*options)
    assert {row["layer"] for row in rows} == {0, 1}
    steps = {row["step"] for row in rows if row["site"] == "out"}
    assert steps == {"float", "S2", "R2"}
    assert all(row["max_over_rms"] >= 1 for row in rows)
    status, out, _ = command(*options, "--plot", tmp_path / "spread.png")
    assert status == 0
    assert "max/rms" in out
    assert (tmp_path / "spread.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_inspect_of_a_quantized_folder_shows_its_recipe(as_json, command, work):
    values = as_json("inspect", work / "int8")
    assert values["recipe"]["name"] == "w8a8"
    assert values["layers"] == 2
    assert values["calibration"]["samples"] == 8
    status, out, _ = command("inspect", work / "int8")
    assert status == 0
    assert "w8a8" in out


def test_pack_makes_an_image_that_inspect_shows_and_generate_uses(
    as_json, command, spoiled, monkeypatch
):
    folder = spoiled / "int8"
    options = ("generate", folder, "--prompt", "The state", "--tokens", "12")
    before, inspected = as_json(*options)["text"], as_json("inspect", folder)
    assert inspected["packed_images"] == {}
    isa = mambaquant_ext.current_isa()
    path = folder / f"packed-{isa}.safetensors"
    values = as_json("pack", folder)
    assert values == {"file": str(path), "isa": isa, "size_bytes": path.stat().st_size}
    status, out, _ = command("pack", folder, "--isa", "scalar")
    assert status == 0
    assert "packed-scalar.safetensors" in out
    after = as_json("inspect", folder)
    assert after["packed_images"] == {isa: "ready", "scalar": "ready"}
    assert after["size_bytes"] == inspected["size_bytes"]
    assert f"packed for {isa}" in command("inspect", folder)[1]
    monkeypatch.setattr(mambaquant_ext.ops, "pack_gemm_weight", None)
    assert as_json(*options)["text"] == before


def test_a_damaged_image_exits_with_1_and_the_remedy(command, spoiled):
    folder = spoiled / "int8"
    command("pack", folder)
    path = folder / f"packed-{mambaquant_ext.current_isa()}.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    says = [path.name, f"`mambaquant pack {folder}`"]
    fails(command, 1, "generate", folder, "--prompt", "The", says=says)
    fails(command, 1, "inspect", folder, says=says)
    assert command("pack", folder)[0] == 0
    assert command("inspect", folder)[0] == 0


def test_pack_takes_a_quantized_model_and_an_instruction_set(command, work):
    fails(command, 1, "pack", work / "float", says=["mambaquant.json", "mambaquant quantize"])
    fails(command, 2, "pack", work / "int8", "--isa", "sse", says=["--isa", "scalar", "'sse'"])


def test_info_reports_every_kernel_ok_on_every_isa(as_json, command):
    values = as_json("info")
    assert values["version"] == mambaquant_ext.__version__
    assert set(values["self_test"]) == set(mambaquant_ext.supported_isas())
    for kernels in values["self_test"].values():
        assert set(kernels.values()) == {"ok"}
    status, out, _ = command("info")
    assert status == 0
    assert "selective_scan_update" in out


def test_info_fails_where_a_kernel_is_wrong(command, monkeypatch):
    monkeypatch.setattr(mambaquant_ext.ops, "gemm", lambda a, packed, layout, n: torch.zeros(1))
    status, out, _ = command("info")
    assert status == 1
    assert "self-test failed" in out


def test_no_arguments_and_help_show_the_commands(command):
    for arguments in ((), ("--help",)):
        _, out, err = command(*arguments)
        for name in ("quantize", "pack", "eval", "generate", "inspect", "info"):
            assert name in out + err


# What a user can get wrong


def fails(command, status, *arguments, says=()):
    actual, out, err = command(*arguments)
    assert actual == status, f"exit status {actual}: {err}"
    assert out == ""
    for text in says:
        # typer wraps its messages into a box
        assert text in " ".join(err.replace("│", " ").split()), err
    if status == 1:
        assert err.splitlines()[-1].startswith("mambaquant: "), err


def test_bad_arguments_exit_with_2(command, work, tmp_path):
    quantize = ("quantize", work / "float", "--calib", work / "text.txt", "--out", tmp_path / "o")
    evaluate = ("eval", work / "int8", "--text", work / "text.txt")
    for arguments, says in (
        (("quantise",), ["quantise"]),
        (("quantize", tmp_path / "nowhere", *quantize[2:]), ["nowhere"]),
        (("quantize", work / "text.txt", *quantize[2:]), ["text.txt"]),
        ((*quantize[:3], tmp_path / "nowhere.txt", *quantize[4:]), ["nowhere.txt"]),
        (quantize[:4], ["--out"]),
        ((*quantize, "--recipe", "w1a1"), ["w8a8, rtn, smoothquant, quarot", "w1a1"]),
        ((*quantize, "--window", "1"), ["--window"]),
        ((*quantize, "--samples", "0"), ["--samples"]),
        ((*quantize, "--samples", "many"), ["--samples"]),
        ((*quantize, "--fast"), ["--fast"]),
        ((*quantize[:4], "--out", work / "float"), ["--out", "another folder"]),
        ((*evaluate, "--batch", "0"), ["--batch"]),
        ((*evaluate, "--limit", "0"), ["--limit"]),
        ((*evaluate, "--float", tmp_path / "nowhere"), ["nowhere"]),
        (("generate", work / "int8"), ["--prompt"]),
        (("generate", work / "int8", "--prompt", ""), ["at least one token"]),
        (("generate", work / "int8", "--prompt", "K\udce4se"), ["prompt", "UTF-8"]),
        (("generate", work / "int8", "--prompt", "x", "--tokens", "0"), ["--tokens"]),
        (("generate", work / "int8", "--prompt", "x", "--temperature", "-1"), ["--temperature"]),
        (("generate", work / "int8", "--prompt", "x", "--top-p", "0"), ["top_p", "above 0"]),
        (("generate", work / "int8", "--prompt", "x", "--repetition-penalty", "0"), ["above 0"]),
        (("generate", work / "int8", "--prompt", "x", "--stop", ""), ["stop", "not empty"]),
        (("generate", work / "int8", "--prompt", "x", "--seed", str(2**63)), ["seed", "64 bits"]),
        (
            ("generate", work / "int8", "--prompt", "x", "--prompt-file", work / "text.txt"),
            ["one of --prompt and --prompt-file"],
        ),
        (("generate", work / "int8", "--prompt-file", tmp_path / "nowhere"), ["nowhere"]),
        (("inspect", work / "float"), ["--calib"]),
    ):
        fails(command, 2, *arguments, says=says)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["empty.txt", "latin1.txt"])
def test_text_that_cannot_be_used_exits_with_1(name, command, work, tmp_path):
    says = [
        name,
        "UTF-8" if name == "latin1.txt" else "at least one window of 512 tokens, got 0 tokens",
    ]
    out = ("--out", tmp_path / "o")
    fails(command, 1, "quantize", work / "float", "--calib", work / name, *out, says=says)
    fails(command, 1, "eval", work / "int8", "--text", work / name, says=says)
    fails(command, 1, "inspect", work / "float", "--calib", work / name, says=says)
    assert not (tmp_path / "o").exists()


def test_a_prompt_that_is_no_text_exits_with_1(command, work, monkeypatch):
    options = ("generate", work / "int8", "--prompt-file")
    fails(command, 1, *options, work / "latin1.txt", says=["latin1.txt", "UTF-8"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"K\xe4se")))
    fails(command, 1, *options, "-", says=["stdin", "UTF-8"])
    monkeypatch.setattr("sys.stdin", None)  # as Python has it where the process has none
    fails(command, 1, *options, "-", says=["stdin", "closed"])


def test_too_little_calibration_text_exits_with_1(command, work, tmp_path):
    fails(
        command,
        1,
        "quantize",
        work / "float",
        "--calib",
        work / "text.txt",
        "--out",
        tmp_path / "o",
        "--window",
        "20",
        "--samples",
        "2",
        says=["192 calibration samples"],
    )


@pytest.fixture
def spoiled(work, tmp_path):
    """Copies of both model folders to spoil."""
    for name in ("float", "int8"):
        shutil.copytree(work / name, tmp_path / name)
    return tmp_path


def everything(command, folder, work, out, says, is_float):
    """Every command that reads a model folder refuses this one."""
    text = work / "text.txt"
    fails(command, 1, "generate", folder, "--prompt", "The", "--tokens", "2", says=says)
    fails(command, 1, "eval", folder, "--text", text, "--window", "40", "--limit", "1", says=says)
    if is_float:
        options = ("--calib", text, "--window", "40", "--samples", "8")
        fails(command, 1, "quantize", folder, *options, "--out", out, says=says)
        fails(command, 1, "inspect", folder, *options, says=says)
        assert not out.exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, ["config.json", "not found"]),
        ("config.json", b"{", ["config.json", "JSON"]),
        ("config.json", b"[]", ["config.json", "object"]),
        ("config.json", b"{}", ["config.json", "model_type"]),
        ("config.json", b'{"model_type": "llama"}', ["config.json", "'mamba'", "'llama'"]),
        (
            "config.json",
            b'{"model_type": "mamba", "hidden_size": "x"}',
            ["config.json", "hidden_size"],
        ),
        ("config.json", b'{"model_type": "mamba", "hidden_size": -4}', ["config.json"]),
        ("model.safetensors", None, ["expected model.safetensors"]),
        ("model.safetensors", b"", ["model.safetensors"]),
        ("model.safetensors", b"x" * 100, ["model.safetensors"]),
        ("tokenizer.json", None, ["tokenizer.json", "not found"]),
        ("tokenizer.json", b"{}", ["tokenizer.json"]),
        ("tokenizer.json", b"\xff", ["tokenizer.json"]),
    ],
    ids=str,
)
def test_damaged_float_folder_exits_with_1(file, content, says, command, work, spoiled):
    path = spoiled / "float" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    everything(command, spoiled / "float", work, spoiled / "o", says, is_float=True)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "mambaquant.json", "config.json", "tokenizer.json"]
)
def test_truncated_quantized_folder_exits_with_1(file, command, work, spoiled):
    path = spoiled / "int8" / file
    path.write_bytes(path.read_bytes()[:-30])
    everything(command, spoiled / "int8", work, spoiled / "o", [file], is_float=False)


def test_empty_folder_exits_with_1(command, work, tmp_path):
    (tmp_path / "empty").mkdir()
    everything(
        command, tmp_path / "empty", work, tmp_path / "o", [str(tmp_path)[:20]], is_float=True
    )


def test_quantizing_a_quantized_folder_exits_with_1(command, work, tmp_path):
    out, says = ("--out", tmp_path / "o"), ["float model", "quantized already"]
    fails(command, 1, "quantize", work / "int8", "--calib", work / "text.txt", *out, says=says)
    text = ("--text", work / "text.txt", "--window", "40")
    fails(command, 1, "eval", work / "int8", *text, "--float", work / "int8", says=says)


@pytest.mark.parametrize("name", ["float", "int8"])
def test_tokenizer_of_another_vocabulary_exits_with_1(name, command, work, spoiled):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": VOCAB + 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(spoiled / name / "tokenizer.json"))
    says = ["tokenizer.json", str(VOCAB + 7), str(VOCAB)]
    everything(command, spoiled / name, work, spoiled / "o", says, is_float=name == "float")


def test_output_that_cannot_be_written_exits_with_1(command, work, tmp_path):
    (tmp_path / "file").write_text("")
    fails(
        command,
        1,
        "quantize",
        work / "float",
        "--calib",
        work / "text.txt",
        "--window",
        "40",
        "--samples",
        "8",
        "--out",
        tmp_path / "file" / "out",
        says=["file"],
    )
    fails(
        command,
        1,
        "inspect",
        work / "float",
        "--calib",
        work / "text.txt",
        "--window",
        "40",
        "--samples",
        "8",
        "--plot",
        tmp_path / "nowhere" / "x.png",
        says=["nowhere"],
    )


def test_interrupt_exits_with_1_and_one_line(command, monkeypatch, work):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mambaquant_ext.cli.generate.load_runner", interrupt)
    status, _, err = command("generate", work / "int8", "--prompt", "The")
    assert status in (1, 130)
    assert err.count("\n") <= 2


# As a process


def process(*arguments, closed="", **environment):
    """Runs the command in a process of its own, with file descriptors such as "1" closed."""
    package = str(Path(mambaquant_ext.__file__).parents[1])
    paths = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [
            *("sh", "-c", f'exec "$@" {"".join(f"{number}>&- " for number in closed)}', "sh"),
            *(sys.executable, "-m", "mambaquant_ext", *map(str, arguments)),
        ],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_isa_of_the_environment_is_honoured():
    if "avx2" not in mambaquant_ext.supported_isas():
        pytest.skip("this processor or build lacks avx2")
    done = process("info", "--json", MAMBAQUANT_CPU_ISA="avx2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isa"] == "avx2"


@pytest.mark.parametrize("isa", ["nonsense", "AVX2 "])
def test_unknown_isa_in_the_environment_is_refused_with_one_line(isa):
    done = process("info", MAMBAQUANT_CPU_ISA=isa)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"MAMBAQUANT_CPU_ISA={isa}" in done.stderr
    assert "scalar" in done.stderr


def test_a_closed_output_is_refused_with_one_line():
    done = process("info", closed="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mambaquant: expected an open standard output\n"
    assert process("info", closed="12").returncode == 1


def test_process_writes_json_to_stdout_and_progress_to_stderr(work, tmp_path):
    done = process(
        "quantize",
        work / "float",
        "--calib",
        work / "text.txt",
        "--out",
        tmp_path / "o",
        "--window",
        "40",
        "--samples",
        "8",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "o")
    assert "calibrating" in done.stderr
    done = process("eval", tmp_path / "nowhere", "--text", work / "text.txt")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

"""`make test-gpu` as far as a machine without a GPU shows it: what it finds, refuses, installs, runs and records."""

import ast
import json
import sys
import time
from pathlib import Path

import pytest
from scripts import gpu_run, gpu_setup
from scripts.gpu_setup import GpuRunError, Outcome

ROOT = Path(__file__).parents[2]
H100 = {"torch": "2.11.0+cu130", "cuda": "13.0", "name": "NVIDIA H100", "capability": [9, 0]}


class TestWhatIsHere:
    @pytest.mark.parametrize(
        ("capability", "expected"),
        [((8, 0), "80-real"), ((8, 6), "86-real"), ((9, 0), "90a-real"), ((12, 0), "120-real")],
    )
    def test_architecture(self, capability, expected):
        assert gpu_setup.architecture_of(capability) == expected

    def test_an_old_gpu_is_refused(self):
        with pytest.raises(GpuRunError, match=r"8\.0 or later, got 7\.5"):
            gpu_setup.architecture_of((7, 5))

    def test_a_torch_that_can_run_it_passes(self):
        assert gpu_setup.check_torch(dict(H100)) == H100

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"torch": "2.9.1+cu130"}, r"expected torch 2\.10 or newer, got 2\.9\.1"),
            ({"cuda": None, "capability": None}, "built without CUDA"),
            ({"capability": None}, r"sees no GPU.*driver serves CUDA 13\.0"),
        ],
    )
    def test_a_torch_that_cannot_is_refused(self, changes, message):
        with pytest.raises(GpuRunError, match=message):
            gpu_setup.check_torch({**H100, **changes})

    def test_the_torch_of_another_python_is_asked(self):
        with pytest.raises(GpuRunError, match=r"cannot import torch in /bin/false .* PYTHON="):
            gpu_setup.probe_torch("/bin/false")

    @pytest.fixture
    def fake_finder(self, tmp_path, monkeypatch):
        def write(code):
            (tmp_path / "scripts").mkdir(exist_ok=True)
            (tmp_path / "scripts" / "cuda_toolchain.py").write_text(code)

        monkeypatch.setattr(gpu_setup, "ROOT", tmp_path)
        return write

    def test_the_toolchain_must_be_of_torchs_major_version(self, fake_finder):
        found = {"version": "13.1", "nvcc": "/usr/bin/nvcc", "cutlass": "/c"}
        fake_finder(f"print({json.dumps(found)!r})")
        assert gpu_setup.find_toolchain(sys.executable, {}, "13.0") == found
        with pytest.raises(
            GpuRunError, match=r"nvcc is of CUDA 13\.1, torch of CUDA 12\.8: set CUDA_H"
        ):
            gpu_setup.find_toolchain(sys.executable, {}, "12.8")

    def test_what_the_finder_lacks_is_passed_on(self, fake_finder):
        fake_finder("import sys; sys.exit('mambaquant_ext: found no nvcc: do this')")
        with pytest.raises(GpuRunError, match=r"^found no nvcc: do this$"):
            gpu_setup.find_toolchain(sys.executable, {}, "13.0")

    def test_a_cmake_that_knows_no_cuda_20_counts_as_missing(self, tmp_path):
        program = tmp_path / "cmake"
        for version, expected in (("3.25.1", False), ("3.28.0", True), ("4.4.4", True)):
            program.write_text(f"#!/bin/sh\necho cmake version {version}\n")
            program.chmod(0o755)
            assert gpu_setup.is_new_enough("cmake", str(tmp_path)) is expected
        assert not gpu_setup.is_new_enough("ninja", str(tmp_path))


class TestPackages:
    def test_pins_follow_their_markers(self, tmp_path):
        file = tmp_path / "pins.txt"
        file.write_text(
            '# a==0\nrich==15.0.0\nA_b.c==2 ; python_version >= "3.11"\nA_b.c==1 ; python_version < "3.11"\n'
        )
        files = [file, tmp_path / "absent.txt"]
        assert gpu_setup.pinned("3.10", files) == {"rich": "15.0.0", "a-b-c": "1"}
        assert gpu_setup.pinned("3.12", files) == {"rich": "15.0.0", "a-b-c": "2"}

    @pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
    def test_all_that_is_needed_is_pinned(self, version):
        names = [*gpu_setup.needed(version).values(), *gpu_setup.PROGRAMS, *gpu_setup.NVCC_PACKAGES]
        pins = gpu_setup.pinned(version)
        for name in names:
            assert gpu_setup.with_version(name, pins).startswith(f"{name}==")
        assert "torch" not in names

    def test_what_is_not_pinned_is_refused(self):
        with pytest.raises(GpuRunError, match="no version of nothing is pinned in requirements/"):
            gpu_setup.with_version("nothing", {})

    def test_every_import_of_what_it_runs_is_known(self):
        """Imports at the top of a file: those inside functions are of optional packages."""
        known = {*gpu_setup.MODULES, "torch", "mambaquant_ext", "bench", "scripts", "gpu", "cases"}
        known |= {"reference", "tolerances", "backends", *sys.stdlib_module_names}
        files = [*ROOT.glob("python/mambaquant_ext/**/*.py"), *ROOT.glob("bench/ops/*.py")]
        files += [
            ROOT / f"bench/{n}.py" for n in ("gpu", "gpu_machine", "gpu_timer", "run", "report")
        ]
        for folder in ("tests/ops", "tests/gpu", "tests/cases", "tests/reference"):
            files += ROOT.glob(f"{folder}/*.py")
        files += ROOT.glob("tests/*.py")
        found = set()
        for file in files:
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.split(".")[0])
        assert found - known == set()
        assert {"pytest", "typer", "rich", "safetensors"} <= found

    def test_from_a_folder_nothing_touches_the_network_and_nothing_is_resolved(self, tmp_path):
        command = gpu_setup.install_command("py", ["rich"], {"rich": "15"}, tmp_path)
        assert {"--no-deps", "--no-index"} <= set(command)
        assert command[-3:] == ["--find-links", str(tmp_path), "rich"]
        command = gpu_setup.install_command("py", ["rich"], {"rich": "15"}, None)
        assert command[-1] == "rich==15"
        assert "--no-index" not in command

    def test_missing(self):
        assert gpu_setup.missing(sys.executable, ["json", "no_such_module_x"]) == [
            "no_such_module_x"
        ]

    def test_another_python_or_torch_starts_anew(self, tmp_path):
        for torch_version, is_kept in (("2.11", False), ("2.11", True), ("2.12", False)):
            before = tmp_path / "venv" / "x"
            before.parent.mkdir(exist_ok=True)
            before.touch()
            gpu_setup.forget_another_python(tmp_path, torch_version)
            assert before.exists() is is_kept

    @pytest.mark.slow
    def test_the_venv_sees_the_packages_of_a_venv(self, tmp_path):
        python = gpu_setup.make_venv(tmp_path / "venv")
        assert gpu_setup.missing(python, ["torch", "pytest", "pip"]) == []

    def test_list_of_wheels(self, capsys):
        assert gpu_run.main(["wheels", "nowhere", "--python-version", "3.10", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "tomli==2.5.0" in lines
        assert not any(line.startswith("torch==") for line in lines)
        assert not Path("nowhere").exists()


class TestSteps:
    def test_output_is_kept(self, tmp_path):
        outcome = gpu_setup.run_step(
            "say", [sys.executable, "-c", "print('hello')"], 30, {}, tmp_path
        )
        assert (outcome.code, outcome.word) == (0, "passed")
        assert "hello" in (tmp_path / "say.log").read_text()
        outcome.check()

    def test_a_failure_shows_its_end(self, tmp_path):
        command = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
        outcome = gpu_setup.run_step("fail", command, 30, {}, tmp_path)
        with pytest.raises(
            GpuRunError, match=r"fail failed, see .*fail\.log; do that\n(.*\n)*  why"
        ):
            outcome.check("do that")

    def test_the_limit_stops_children_too(self, tmp_path):
        mark = tmp_path / "mark"
        command = ["/bin/sh", "-c", f"(sleep 2; touch {mark}) & wait"]
        start = time.monotonic()
        outcome = gpu_setup.run_step("slow", command, 0.3, {"PATH": "/usr/bin:/bin"}, tmp_path)
        assert time.monotonic() - start < 2
        assert (outcome.code, outcome.word) == (None, "timed out")
        time.sleep(2.2)
        assert not mark.exists()


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_norm" name="a[cuda]"/>
<testcase classname="tests.ops.test_norm" name="b[cuda]"><skipped/></testcase>
<testcase classname="tests.ops.test_selective_scan.TestX" name="c[cuda]"><failure>no</failure></testcase>
<testcase classname="tests.gpu.test_cuda" name="d"><error>no</error></testcase>
</testsuite></testsuites>"""


def outcome_of(tmp_path, text, code):
    log = tmp_path / "x.log"
    log.write_text(text)
    return Outcome("x", code, 1.0, log)


class TestRecord:
    def test_counts_by_group(self, tmp_path):
        (tmp_path / "t.xml").write_text(JUNIT)
        groups, failures = gpu_run.counts_of(tmp_path / "t.xml")
        assert groups == {
            "gpu": {"passed": 0, "failed": 1, "skipped": 0},
            "norm": {"passed": 1, "failed": 0, "skipped": 1},
            "selective_scan": {"passed": 0, "failed": 1, "skipped": 0},
        }
        assert failures == [
            "tests.ops.test_selective_scan.TestX::c[cuda]",
            "tests.gpu.test_cuda::d",
        ]

    @pytest.mark.parametrize(
        ("help_text", "filters"),
        [
            (
                "  --kernel-name arg  Which\n  --kernel-name-exclude arg",
                ["--kernel-name", "kns=mambaquant"],
            ),
            ("  --kernel-regex arg", ["--kernel-regex", "kns=mambaquant"]),
            ("  --kernel-name-exclude arg", []),
        ],
    )
    def test_the_sanitizer_looks_at_our_kernels_where_it_can(self, help_text, filters):
        command = gpu_run.sanitizer_command("cs", "racecheck", help_text)
        assert command[:3] == ["cs", "--tool", "racecheck"]
        assert command[5:] == filters

    def test_initcheck_looks_at_all_kernels(self):
        """Memory that torch's kernels wrote would count as unwritten."""
        assert gpu_run.sanitizer_command("cs", "initcheck", "  --kernel-name arg")[5:] == []

    @pytest.mark.parametrize(
        ("text", "code", "word", "errors"),
        [
            ("95 passed in 9s\n========= ERROR SUMMARY: 0 errors", 0, "clean", 0),
            ("95 passed\n== RACECHECK SUMMARY: 0 hazards displayed (0 errors)", 0, "clean", 0),
            ("95 passed\n========= ERROR SUMMARY: 3 errors", 99, "errors", 3),
            ("95 passed\n== RACECHECK SUMMARY: 2 hazards displayed", 0, "errors", 2),
            ("========= Error: Device not supported", 0, "failed", None),
            ("2 failed\n========= ERROR SUMMARY: 0 errors", 1, "failed", 0),
            ("5 passed", None, "timed out", None),
        ],
    )
    def test_what_the_sanitizer_said(self, text, code, word, errors, tmp_path):
        result = gpu_run.sanitizer_result(outcome_of(tmp_path, text, code))
        assert (result["outcome"], result["errors"]) == (word, errors)

    @pytest.mark.parametrize(
        ("tests", "tools", "expected"),
        [
            ("passed", ["clean", "clean"], True),
            ("passed", ["absent"], True),
            ("failed", ["clean"], False),
            ("passed", ["clean", "errors"], False),
            ("passed", ["timed out"], False),
        ],
    )
    def test_is_good(self, tests, tools, expected):
        sanitizer = {str(i): {"outcome": word} for i, word in enumerate(tools)}
        assert gpu_run.is_good({"tests": {"outcome": tests}, "sanitizer": sanitizer}) is expected

    @pytest.mark.parametrize(
        ("norm", "code", "outcome", "untested"),
        [
            ("", 0, "passed", []),
            ("<skipped/>", 0, "failed", ["norm"]),
            ("<failure/>", 1, "failed", ["norm"]),
            ("", None, "timed out", []),
        ],
    )
    def test_each_group_must_have_run(self, norm, code, outcome, untested, tmp_path, monkeypatch):
        def fake_step(name, command, limit_s, environment, out):
            junit = next(a for a in command if a.startswith("--junitxml=")).partition("=")[2]
            names = [
                "ops.test_quantize",
                "ops.test_hadamard",
                "ops.test_conv1d",
                "ops.test_conv2d",
                "ops.test_gemm",
            ]
            names += ["ops.test_selective_scan", "ops.test_registry", "gpu.test_cuda"]
            cases = "".join(f'<testcase classname="tests.{n}" name="x"/>' for n in names)
            cases += f'<testcase classname="tests.ops.test_norm" name="x">{norm}</testcase>'
            Path(junit).write_text(f"<testsuite>{cases}</testsuite>")
            return outcome_of(tmp_path, "", code)

        monkeypatch.setattr(gpu_run, "run_step", fake_step)
        build = gpu_setup.Build(sys.executable, {}, {}, "90a-real", 1.0)
        found = gpu_run.run_tests(build, 2, tmp_path)
        assert (found["outcome"], found["untested_groups"]) == (outcome, untested)

    def test_what_needs_no_gpu_is_no_pass(self):
        untested = gpu_run.untested_groups({"registry": {"passed": 15}, "norm": {"passed": 0}})
        assert {"norm", "gemm", "gpu"} <= set(untested)

    def test_an_absent_sanitizer_is_said(self, tmp_path, capsys):
        environment = {"PATH": str(tmp_path), "CUDACXX": str(tmp_path / "nvcc")}
        build = gpu_setup.Build("py", environment, {}, "90a-real", 1.0)
        assert gpu_run.run_sanitizers(build, ["memcheck"]) == {"memcheck": {"outcome": "absent"}}
        assert "absent" in capsys.readouterr().out

    def test_where_a_result_is_kept(self):
        name = gpu_run.result_name("NVIDIA H100 80GB HBM3", "test-gpu")
        assert name == "bench/results/gpu-h100-80gb-hbm3-test.json"


class TestCommandLine:
    def test_defaults(self):
        parsed = gpu_run.parse(["test"])
        assert parsed.sanitizers == ["memcheck", "racecheck", "initcheck", "synccheck"]
        assert parsed.wheels is None
        assert parsed.workers >= 1
        assert gpu_run.parse(["test", "--sanitizers", ""]).sanitizers == []

    def test_the_rest_is_for_the_bench(self):
        parsed = gpu_run.parse(["bench", "--wheels", "w", "--", "--quick", "--op", "gemm"])
        assert parsed.arguments == ["--quick", "--op", "gemm"]
        assert gpu_run.parse(["bench", "--"]).arguments == []

    @pytest.mark.parametrize("arguments", [[], ["fly"], ["wheels", "d", "--python-version", "312"]])
    def test_a_bad_command_line_is_refused(self, arguments):
        with pytest.raises(SystemExit) as error:
            gpu_run.parse(arguments)
        assert error.value.code == 2

    def test_what_is_missing_is_one_line(self, monkeypatch, capsys):
        def refuse():
            raise GpuRunError("found no GPU: buy one")

        monkeypatch.setattr(gpu_setup, "probe_torch", refuse)
        assert gpu_run.main(["test"]) == 2
        assert capsys.readouterr().err == "gpu_run: found no GPU: buy one\n"

    def test_a_folder_of_wheels_that_is_not_there(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(gpu_setup, "probe_torch", lambda: H100)
        assert gpu_run.main(["test", "--wheels", str(tmp_path / "none")]) == 2
        assert "no such folder; `make gpu-wheels" in capsys.readouterr().err
